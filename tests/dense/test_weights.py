"""Weight files in backbones: the authors' for ImageNet and dense ones, our own, and those that do not fit."""

import argparse

import pytest
import torch

from tests.dense.families import FAMILIES, backbone
from tests.golden import golden, golden_input, relative_error, sample
from visionattn import CheckpointError
from visionattn.dense import Backbone

pytestmark = pytest.mark.dense

DENSE = {
    "agent/agent_pvt_t_dense": ("agent_pvt_t", {}),
    "agent/agent_swin_t_dense": ("agent_swin_t", {}),
    "transnext/transnext_micro_dense_interp": ("transnext_micro", {"img_size": 256, "bias_mode": "interpolate"}),
}


@pytest.mark.parametrize("case", DENSE)
def test_authors_dense_backbones_compute_what_was_recorded(case: str, tmp_path) -> None:
    recorded = golden(case)
    name, kwargs = DENSE[case]
    # As a detector's file: neck and heads stay behind.
    state = {f"backbone.{k}": v for k, v in recorded.state_dict.items()} | {"neck.weight": torch.ones(3)}
    torch.save({"state_dict": state, "meta": {"epoch": 12}}, tmp_path / "detector.pth")
    model = Backbone(name, pretrained=tmp_path / "detector.pth", **kwargs).eval()
    model.init_weights()
    recording = recorded.manifest["cases"][1]
    x = golden_input(tuple(recording["input_shape"]), recording["seed"])
    with torch.no_grad():
        maps, last = model.model.forward_intermediates(x, intermediates_only=True), model(x)[-1]
    for i, y in enumerate(maps):  # before the norms of outputs
        assert relative_error(sample(y), recorded.recorded(f"case1.feature{i}")) < 1e-4, i
    # The recorded "logits" are the mean of the last map that the authors' backbone returns, normed where it norms.
    assert relative_error(last.mean(dim=(2, 3)), recorded.recorded("case1.logits")) < 1e-4


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("biformer/biformer_tiny", "biformer_t"),
        ("shvit/shvit_s1", "shvit_s1"),
        ("davit/DaViT_tiny", "davit_tiny"),
        ("convit/convit_tiny", "convit_tiny"),
        ("infvit/infvit_example_s6_linear", "infvit_s6_linear"),
        ("gated/gated_vit_s16_vanilla", "gated_vit_s16"),
    ],
)
def test_authors_imagenet_files_fill_the_model(case: str, name: str, tmp_path) -> None:
    recorded = golden(case)
    torch.save({"model": recorded.state_dict, "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    model = Backbone(name, init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "official.pth")})
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    same = [k for k, v in model.state_dict().items() if torch.equal(v, fresh[k])]
    assert [k for k in same if k.startswith("model.") and not k.endswith("num_batches_tracked")] == []
    assert len([k for k in same if not k.startswith("model.")]) == len([k for k in fresh if not k.startswith("model.")])
    recording = recorded.manifest["cases"][0]
    with torch.no_grad():
        y = model.eval().model.forward_intermediates(
            golden_input(tuple(recording["input_shape"]), recording["seed"]), intermediates_only=True
        )[-1]
    assert list(y.shape) == recording["features"][-1]["shape"]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_own_backbones_load_whole(family: str, tmp_path) -> None:
    torch.manual_seed(0)
    source = backbone(family)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "own.pth")
    torch.manual_seed(1)
    target = backbone(family, pretrained=tmp_path / "own.pth")
    target.init_weights()
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_levels_left_out_of_a_file_and_of_the_model(tmp_path) -> None:
    source = backbone("biformer")
    torch.save(source.state_dict(), tmp_path / "whole.pth")
    part = backbone("biformer", out_indices=[0, 1], pretrained=tmp_path / "whole.pth")
    part.init_weights()  # norms and stages behind level 1 are not wanted
    assert torch.equal(part.norms["1"].weight, source.norms["1"].weight)
    torch.save(part.state_dict(), tmp_path / "part.pth")
    whole = backbone("biformer", pretrained=tmp_path / "part.pth")
    with pytest.raises(CheckpointError, match="missing from the file"):
        whole.init_weights()


def test_norms_that_the_model_lacks_are_told(tmp_path) -> None:
    torch.save(backbone("litv2", norm_outputs=True).state_dict(), tmp_path / "segmenter.pth")
    model = backbone("litv2", pretrained=tmp_path / "segmenter.pth")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"norms\.0\.weight.*Give the backbone the name, norm_outputs"):
        model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_channels_of_the_image(tmp_path) -> None:
    source = backbone("biformer")
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    model = backbone("biformer", in_chans=1, pretrained=tmp_path / "rgb.pth")
    model.init_weights()
    rgb, grey = (m.model.stem[0].weight for m in (source, model))
    torch.testing.assert_close(grey, rgb.sum(dim=1, keepdim=True))


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_code_in_a_file_is_not_run(tmp_path) -> None:
    torch.save({"state_dict": backbone("nat").state_dict(), "meta": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="could run code"):
        backbone("nat", pretrained=tmp_path / "evil.pth").init_weights()


def test_another_models_file_and_no_file(tmp_path) -> None:
    torch.save(backbone("nat").state_dict(), tmp_path / "nat.pth")
    with pytest.raises(CheckpointError, match="does not fit biformer_t; nothing was loaded"):
        backbone("biformer", pretrained=tmp_path / "nat.pth").init_weights()
    with pytest.raises(FileNotFoundError, match="no weight file"):
        backbone("biformer", pretrained=tmp_path / "none.pth").init_weights()
