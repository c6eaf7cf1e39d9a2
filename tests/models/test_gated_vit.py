import logging

import pytest
import timm
import torch

from tests.golden import NAMES, assert_golden, golden, golden_model
from visionattn import CheckpointError, load_checkpoint
from visionattn.models.gated_vit import gated_vit_s16

CASES = sorted(name.removeprefix("gated/") for name in NAMES if name.startswith("gated/"))
TINY = {"dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3, "img_size": 32}


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"gated/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@pytest.mark.parametrize(
    ("gate", "extra"),
    [
        ("none", 0),
        ("unconditional", 6),
        ("linear", 390),
        ("per_head", 390),
        ("mlp", 6342),
        ("per_head_mlp", 6342),
        ("mlp2", 25350),
        ("all_linear", 2310),
        ("headwise", 2310),
        ("elementwise", 384 * 385),
    ],
)
def test_parameter_counts(gate: str, extra: int) -> None:
    for name in ("gated_vit_s16", "clipped_vit_s16"):
        model = timm.create_model(name, device="meta", gate=gate)
        assert sum(p.numel() for p in model.parameters()) == 22_050_664 + 12 * extra


def test_no_gate_by_every_route(tmp_path, caplog) -> None:
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = gated_vit_s16(gate=None, **TINY).eval()
    assert all(block.attn.gate is None for block in plain.stages)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    pretrained = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "plain.pth")}}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model("gated_vit_s16", gate=None, **pretrained, **TINY).eval()
    assert "loses its own" in caplog.text
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    caplog.clear()
    model = timm.create_model("gated_vit_s16", gate="none", **pretrained, **TINY).eval()
    assert caplog.text == ""
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"missing from the file: stages\.0\.attn\.gate"):
        timm.create_model("gated_vit_s16", gate="linear", **pretrained, **TINY)


def test_weights_that_do_not_fit_leave_the_gates(tmp_path) -> None:
    state = gated_vit_s16(gate=None, **TINY).state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "part.pth")
    model = timm.create_model("gated_vit_s16", **TINY)
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_checkpoint(model, tmp_path / "part.pth")
    assert all(block.attn.gate is not None for block in model.stages)


def test_alpha_is_a_gamma_of_the_constructed_length() -> None:
    assert timm.create_model("clipped_vit_s16", device="meta").stages[0].attn.clip == (-2 / 197, 1.0)
    model = timm.create_model("clipped_vit_s16", device="meta", img_size=384, alpha=4.0)
    assert model.stages[0].attn.clip == (-4 / 577, 1.0)
    model = timm.create_model("gated_vit_s16", device="meta", alpha=3.0, max_seq_length=100)
    assert model.stages[0].attn.clip == (-0.03, 1.0)
    assert model.stages[0].attn.gate is not None


def test_fine_tuning_starts_near_the_model_without_gates() -> None:
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gated = timm.create_model("gated_vit_s16", gate="linear", fine_tuning=True, **TINY).eval()
    plain = timm.create_model("gated_vit_s16", gate="none", **TINY).eval()
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if ".gate." not in k})
    torch.testing.assert_close(gated(x), plain(x), rtol=0.02, atol=1e-3)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="gate must be None or one of unconditional, linear"):
        timm.create_model("gated_vit_s16", gate="mlp3")
    with pytest.raises(ValueError, match="clip or alpha, not both"):
        timm.create_model("clipped_vit_s16", clip=(-0.1, 1.0), alpha=2.0)
    with pytest.raises(ValueError, match="gamma <= 0 and zeta >= 1"):
        timm.create_model("clipped_vit_s16", clip=(0.1, 1.0))
    with pytest.raises(ValueError, match="gate_init must be between 0 and 1"):
        timm.create_model("gated_vit_s16", gate_init=0.0)


def test_training_starts_only_below_an_alpha_of_one() -> None:
    def reached(alpha: float) -> bool:
        torch.manual_seed(0)
        model = timm.create_model("clipped_vit_s16", alpha=alpha, dim=32, num_heads=2, depth=2, num_classes=7)
        model(torch.randn(2, 3, 224, 224)).square().sum().backward()
        return bool(model.stages[0].attn.qkv.weight.grad.any()) and bool(model.stem.proj.weight.grad.any())

    assert reached(0.6)
    assert not reached(2.0)
