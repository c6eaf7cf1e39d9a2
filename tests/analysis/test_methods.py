"""Rollout, Grad-CAM, receptive fields and feature maps against computations by hand."""

import pytest
import timm
import torch
from torch import Tensor, nn

import visionattn
from tests.analysis.test_attention import family, image
from tests.models.variants import tiny
from visionattn.analysis import (
    NoEvidenceError,
    UndefinedError,
    feature_maps,
    grad_cam,
    look,
    principal_colours,
    receptive_fields,
    record_attention,
    rollout,
)
from visionattn.analysis._stages import UnknownLayerError, stage_names


def test_rollout_is_the_product_of_the_layers_matrices() -> None:
    model, x = family("gated_vit")
    inputs: list[Tensor] = []
    for block in model.stages:
        block.attn.qkv.register_forward_hook(lambda m, i, out: inputs.append(out))
    recording = record_attention(model, x)
    total = torch.eye(17, dtype=torch.float64)
    for qkv in inputs:
        q, k, _ = qkv.view(17, 3, 2, 16).permute(1, 2, 0, 3)
        attn = (q @ k.mT / 4).softmax(-1).mean(0)
        total = (0.5 * attn + 0.5 * torch.eye(17, dtype=torch.float64)) @ total
    rolled = rollout(model, recording)
    torch.testing.assert_close(rolled.matrix, total)
    torch.testing.assert_close(rolled.map(), total[0, 1:].view(4, 4))
    model.global_pool = "avg"
    torch.testing.assert_close(rollout(model, recording).map(), total[1:, 1:].mean(0).view(4, 4))


def test_rollout_lets_a_late_class_token_join() -> None:
    model, x = family("convit")
    recording = record_attention(model, x)
    first, second, third = (layer.rows(range(layer.grid.tokens)).mean(0) for layer in recording.layers)  # type: ignore[union-attr]
    eye = torch.eye(17, dtype=torch.float64)
    total = eye.clone()
    total[1:, 1:] = (second + eye[1:, 1:]) / 2 @ (first + eye[1:, 1:]) / 2
    rolled = rollout(model, recording)
    torch.testing.assert_close(rolled.matrix, (third + eye) / 2 @ total)
    torch.testing.assert_close(rolled.matrix.sum(-1), torch.ones(17, dtype=torch.float64))


@pytest.mark.parametrize("name", ["clipped_vit", "infvit_pure", "infvit_linear", "agent_deit", "nat_iso", "timm"])
def test_rollout_is_defined_for_isotropic_models(name: str) -> None:
    model, x = family(name)
    rolled = rollout(model, record_attention(model, x))
    assert rolled.matrix.min() >= 0
    torch.testing.assert_close(rolled.matrix.sum(-1), torch.ones(rolled.grid.tokens, dtype=torch.float64))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("biformer", "same tokens in all layers; here maps have 16 x 16"),
        ("transnext", "stages.0.blocks.0.attn has pooled ones"),
        ("davit", "stages.0.blocks.0.1.attn attends among channels"),
        ("inline_deit", r"stages.0.attn \(linear, injective\) has negative ones"),
    ],
)
def test_rollout_is_refused_with_the_reason(name: str, reason: str) -> None:
    model, x = family(name)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # linear attention far from a uniform one
    with pytest.raises(UndefinedError, match=reason):
        rollout(model, record_attention(model, x))


class Net(nn.Module):
    """A convolution, a ReLU, a mean, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 3, 2, stride=2), nn.Linear(3, 2)
        self.dead = nn.Conv2d(1, 3, 1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=gen)

    def forward(self, x: Tensor) -> Tensor:
        self.dead(x)
        return self.fc(self.conv(x).relu().mean((2, 3)))


def test_grad_cam_by_hand() -> None:
    net, x = Net().eval(), torch.randn(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
    features = net.conv(x)[0].detach()  # (3, 4, 3)
    for target in (0, 1):
        alive = (features > 0).float()
        alpha = net.fc.weight[target].detach() * alive.mean((1, 2)) / 12  # mean over 12 places of w / 12 where alive
        expected = (alpha[:, None, None] * features).sum(0).relu()
        cam = grad_cam(net, x, layer="conv", target=target)
        torch.testing.assert_close(cam.map, expected)
        assert cam.target == target
    assert grad_cam(net, x, layer="conv").target == int(net(x).argmax())
    with pytest.raises(UnknownLayerError, match="Net has no layer 'con'; it has conv, fc, dead"):
        grad_cam(net, x, layer="con")
    with pytest.raises(UnknownLayerError, match="does not say where its stages end"):
        grad_cam(net, x)
    with pytest.raises(UnknownLayerError, match=r"output of layer 'fc' is no map of the image: \(1, 2\)"):
        grad_cam(net, x, layer="fc")
    with pytest.raises(NoEvidenceError, match="does not depend on the map of layer 'dead'"):
        grad_cam(net, x, layer="dead")
    with pytest.raises(ValueError, match="class 2 does not exist; the model has 2"):
        grad_cam(net, x, layer="conv", target=2)


@pytest.mark.parametrize("name", ["biformer", "agent_pvt", "mala", "maxvit", "davit", "shvit", "convit", "timm"])
def test_grad_cam_finds_the_last_map_of_every_layout(name: str) -> None:
    model, x = family(name)
    cam = grad_cam(model, x)
    reduction = model.feature_info[-1]["reduction"]
    assert cam.map.shape == (-(-x.shape[2] // reduction), -(-x.shape[3] // reduction))
    assert cam.map.min() >= 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_derivatives_are_taken_where_they_are_switched_off(switch) -> None:
    net = Net().eval()
    with switch():
        x = torch.randn(1, 1, 8, 6, generator=torch.Generator().manual_seed(1))
        assert grad_cam(net, x, layer="conv").map.shape == (4, 3)


def test_receptive_field_of_convolutions() -> None:
    conv = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.Conv2d(1, 1, 5, stride=2, padding=2, bias=False))
    for p in conv.parameters():
        p.data.fill_(1.0)
    images = [torch.rand(1, 2, 16, 20, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    first, second = receptive_fields(conv, images, layers=["0", "1"])
    box = torch.zeros(16, 20)
    box[7:10, 9:12] = 2  # of two channels
    assert torch.equal(first.map, box)
    ones, wide = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 5, 5)
    kernel = nn.functional.conv2d(nn.functional.pad(ones, (4,) * 4), wide)[0, 0]  # (7, 7), around row 8, column 10
    expected = torch.zeros(16, 20)
    expected[5:12, 7:14] = 2 * kernel
    torch.testing.assert_close(second.map, expected)
    assert (second.images, first.centre) == (2, (8.5, 10.5))
    assert first.area_ratio(1.0) == 9 / 320
    assert first.area_ratio(1 / 9) == 1 / 320
    assert first.area_ratio(0.2) == 9 / 320
    with pytest.raises(ValueError, match="at least one image"):
        receptive_fields(conv, [], layers=["0"])
    with pytest.raises(ValueError, match=r"one size expected, got \(16, 20\) and \(8, 8\)"):
        receptive_fields(conv, [images[0], torch.rand(1, 2, 8, 8)], layers=["0"])
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 0"):
        first.area_ratio(0)


def test_receptive_fields_of_a_model_grow() -> None:
    model = tiny("nat").double()
    fields = receptive_fields(model, [image(128, 128)])
    assert [f.layer for f in fields] == [f"stages.{i}" for i in range(4)]
    areas = [f.area_ratio(0.9) for f in fields]
    assert areas == sorted(areas)
    assert areas[3] > 4 * areas[0]


def test_feature_maps_are_those_of_the_model() -> None:
    for name in ("biformer", "agent_deit", "convit"):
        model, x = family(name)
        maps = feature_maps(model, x)
        assert list(maps) == stage_names(model)
        expected = model.forward_intermediates(x, intermediates_only=True)
        for got, want in zip(maps.values(), expected, strict=True):
            torch.testing.assert_close(got, want[0])
    assert stage_names(timm.create_model("nat_iso_s", dim=32)) == [f"stages.{i}" for i in (2, 5, 8, 11)]


def test_principal_colours_separate_what_differs() -> None:
    features = torch.zeros(5, 4, 6)
    features[:, :, 3:] = torch.tensor([0.0, 3, 0, 1, 0])[:, None, None]
    colours = principal_colours(features)
    assert colours.shape == (4, 6, 3)
    assert torch.equal(colours[:, :3, 0], torch.zeros(4, 3))  # the larger channel counts as positive
    assert torch.equal(colours[:, 3:, 0], torch.ones(4, 3))
    assert torch.equal(colours[..., 1:], torch.full((4, 6, 2), 0.5))  # nothing else varies


def test_look_notes_what_a_model_has_no_answer_to() -> None:
    found = look(timm.create_model("test_resnet").eval(), image().float(), methods=["attention", "gradcam", "features"])
    assert "no attention found in ResNet" in found.reasons["attention"]
    assert found.reasons["rollout"] == found.reasons["erf"] == "Not asked for."
    assert [cam.target for cam in found.cams] == found.logits.topk(2).indices.tolist()
    assert len(found.features) == 5
    model, x = family("biformer")
    found = look(model, x, methods=["rollout", "attention"], layers=["stages.1.blocks.0.attn"])
    assert found.reasons["rollout"].startswith("Not defined here: rollout needs the same tokens")
    assert [layer.name for layer in found.attention] == ["stages.1.blocks.0.attn"]
    with pytest.raises(ValueError, match="unknown method gradcamm; there are attention, rollout, gradcam"):
        look(model, x, methods=["gradcamm"])


def test_public_names_exist() -> None:
    assert all(hasattr(visionattn.analysis, name) for name in visionattn.analysis.__all__)
