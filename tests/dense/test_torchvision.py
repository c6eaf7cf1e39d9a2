"""torchvision's detectors around the library's backbones."""

import pytest
import torch
from torch import Tensor

from tests.dense.families import FAMILIES
from visionattn import extras
from visionattn.dense import BackboneError, torchvision_detector

pytestmark = pytest.mark.dense


def detector(family: str, kind: str):
    name, arch = FAMILIES[family]
    return torchvision_detector(
        name,
        num_classes=4,
        kind=kind,
        backbone={"pyramid_channels": 16, **arch},
        fpn_channels=64,
        min_size=96,
        max_size=160,
    )


def targets(masks: bool) -> list[dict[str, Tensor]]:
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([3])}
    if masks:
        target["masks"] = torch.zeros(1, 96, 131, dtype=torch.uint8)
        target["masks"][:, 8:70, 8:60] = 1
    return [target]


@pytest.mark.parametrize("kind", ["mask_rcnn", "retinanet", "fcos"])
@pytest.mark.parametrize("family", ["biformer", "gated_vit", "shvit", "transnext"])
def test_losses_gradients_and_predictions(family: str, kind: str) -> None:
    torch.manual_seed(0)
    model = detector(family, kind).train()
    image = torch.rand(3, 96, 131)
    losses = model([image], targets(kind == "mask_rcnn"))
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert [k for k, p in model.backbone.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        (found,) = model.eval()([image])
    assert found["boxes"].shape == (len(found["scores"]), 4)
    assert ("masks" in found) == (kind == "mask_rcnn")


def test_anchors_follow_the_strides() -> None:
    assert detector("biformer", "mask_rcnn").rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert detector("shvit", "mask_rcnn").rpn.anchor_generator.sizes == ((128,), (256,), (512,), (1024,))
    retina = detector("biformer", "retinanet")
    assert retina.backbone.strides == [8, 16, 32, 64, 128]
    assert retina.anchor_generator.sizes[0] == (32, 40, 50)


def test_bad_arguments_get_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackboneError, match="kind must be one of mask_rcnn, retinanet, fcos, got 'yolo'"):
        torchvision_detector("biformer_t", num_classes=2, kind="yolo")  # type: ignore[arg-type]
    with pytest.raises(BackboneError, match="counts the background"):
        torchvision_detector("biformer_t", num_classes=1)
    with pytest.raises(
        extras.MissingExtraError, match=r"needs the package 'no_such_package': pip install 'visionattn\[dense\]'"
    ):
        extras.require("no_such_package.sub", "tools/train_dense.py", "visionattn[dense]")
