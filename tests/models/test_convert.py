import copy

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import visionattn
from visionattn.convert import MIXERS, Converted, convert, convert_report
from visionattn.testing import randn


def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, embed_dim=32, num_heads=2, num_classes=5)


def deit() -> nn.Module:  # two tokens before the map
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
    return timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, **small)


def swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, depths=(2, 1), embed_dim=16, num_heads=(2, 2), num_classes=5
    )


def pvt() -> nn.Module:
    dims, heads = (16, 16, 32, 32), (1, 1, 2, 2)
    return timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=dims, num_heads=heads, num_classes=5)


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5)


def host() -> nn.Module:
    return timm.create_model("agent_deit_b", dim=32, depth=2, num_heads=2, agent_layers=0, img_size=64, num_classes=5)


MODELS = {
    "vit": (vit, 64, 2),
    "deit": (deit, 64, 1),
    "host": (host, 64, 2),
    "swin": (swin, 56, 2),
    "pvt": (pvt, 64, 4),
    "torchvision": (torchvision_vit, 64, 2),
}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_mixer_runs_trains_and_round_trips(kind: str, mixer: str, tmp_path) -> None:
    make, side, count = MODELS[kind]
    x = randn(2, 3, side, side)
    model = convert(make(), mixer).eval()
    assert len(convert_report(model).replaced) == count
    y = model(x)
    assert y.shape == (2, 5)
    y.square().sum().backward()
    converted = [m for m in model.modules() if isinstance(m, Converted)]
    assert len(converted) == count
    for module in converted:
        for name, p in module.named_parameters():
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
    torch.save(model.state_dict(), tmp_path / "model.pth")
    again = visionattn.load_checkpoint(convert(make(), mixer), tmp_path / "model.pth").eval()
    torch.testing.assert_close(again(x), y)


@pytest.mark.parametrize("kind", MODELS)
def test_weights_are_kept(kind: str) -> None:
    """A gate that is open, on softmax attention: what the model computed before, but for Swin's bias."""
    make, side, _ = MODELS[kind]
    x, model = randn(2, 3, side, side), make().eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            p.add_(randn(*p.shape, seed=i), alpha=0.02)  # torchvision's classifier starts at zero
            if "relative_position_bias" in name:
                p.zero_()
    # only PVT's last stage does not reduce keys and values
    exclude = ("stages.0.*", "stages.1.*", "stages.2.*") if kind == "pvt" else ()
    opened = convert(copy.deepcopy(model), "gated", gate="unconditional", exclude=exclude).eval()
    with torch.no_grad():
        for module in opened.modules():
            if isinstance(module, Converted):
                module.mixer.gate.logit.fill_(100.0)
    torch.testing.assert_close(opened(x), model(x), rtol=1e-4, atol=1e-5)
    fresh = convert(copy.deepcopy(model), "gated", gate="unconditional", exclude=exclude, copy_weights=False)
    assert not torch.allclose(fresh.eval()(x), model(x), atol=1e-3)


def test_include_and_exclude_choose_by_name() -> None:
    model = convert(vit(), "linear_infsa", include=["blocks.*"], exclude=["blocks.0.*"], rho_init=0.8)
    assert list(convert_report(model).replaced) == ["blocks.1.attn"]
    assert "Attention -> linear_infsa, weights kept" in convert_report(model).replaced["blocks.1.attn"]
    torch.testing.assert_close(model.blocks[1].attn.mixer.rho_logit.sigmoid(), torch.tensor(0.8))


def test_what_cannot_be_replaced_is_refused_with_a_reason() -> None:
    model = swin()
    convert(model, "injective")
    assert convert_report(model).refused == {"layers.0.blocks.1.attn": "its windows are shifted and need a mask"}
    with pytest.raises(ValueError, match="unknown mixer 'softmax'; there are: pure_infsa"):
        convert(vit(), "softmax")
    with pytest.raises(ValueError, match=r"no attention of ResNet could be replaced \(none is known here or matches\)"):
        convert(timm.create_model("resnet10t"), "agent")
    normed = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2, qk_norm=True)
    with pytest.raises(ValueError, match="it has a norm of queries and keys, which the mixers do not"):
        convert(normed, "agent")


def test_a_mask_is_an_error() -> None:
    model = convert(vit(), "linear_infsa")
    x: Tensor = randn(1, 17, 32)
    with pytest.raises(ValueError, match="takes no mask"):
        model.blocks[0].attn(x, attn_mask=torch.ones(17, 17))
