import pytest
import timm
import torch

from tests.models.variants import tiny
from visionattn.analysis.routing import draw_routing, record_routing


def test_records_what_each_layer_routed() -> None:
    model, x = tiny("biformer", n_win=4), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    logits, routings = record_routing(model, x)
    torch.testing.assert_close(logits, model(x))
    layers = [(0, 0), (1, 0), (2, 0), (2, 1)]
    assert [r.name for r in routings] == [f"stages.{stage}.blocks.{block}.attn" for stage, block in layers]
    for routing, topk in zip(routings, (1, 4, 16, 16), strict=True):
        assert routing.grid == (4, 4)
        assert routing.index.shape == (2, 16, topk)
        assert routing.index.sort(dim=-1).values.diff(dim=-1).gt(0).all()  # no region twice
    with pytest.raises(ValueError, match="has no routing attention"):
        record_routing(timm.create_model("test_vit"), x)


def test_draws_images_predictions_and_routed_regions(tmp_path) -> None:
    model, x = tiny("biformer", n_win=4), torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = [i.permute(1, 2, 0).clamp(0, 1).numpy() for i in x]
    figure = draw_routing(model, x, images, class_names=list("abcdefg"), labels=[0, 1, 2])
    rows = [axis.get_ylabel() for axis in figure.axes[::3]]
    assert rows == ["prediction", "stage 1\ntop 1 of 16", "stage 2\ntop 4 of 16"]  # stage 3 routes everywhere
    predicted = model(x).argmax(-1)
    assert [a.get_title()[0] for a in figure.axes[:3]] == ["abcdefg"[i] for i in predicted]
    figure.savefig(tmp_path / "routing.png")
    assert (tmp_path / "routing.png").stat().st_size > 10_000
