import pytest
import timm
import torch

from tests.golden import assert_golden, golden, golden_model
from visionattn import CheckpointError, load_checkpoint

CASES = [
    "infvit_example_s6_linear",
    "infvit_example_s6_pure",
    pytest.param("infvit_4l_linear_rep1024", marks=pytest.mark.slow),
    pytest.param("infvit_4l_pure", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("variant", CASES)
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"infvit/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@pytest.mark.parametrize(
    ("size", "kwargs", "params"),
    [
        ("s6", {"num_classes": 100}, 11_057_386),
        ("b16", {}, 86_567_668),
        ("4l", {}, 52_402_156),
        ("4l", {"representation_size": 1024}, 53_451_756),
        ("4l", {"img_size": 512}, 53_250_028),
        ("24l", {}, 304_326_656),
    ],
)
@pytest.mark.parametrize("form", ["linear", "pure"])
def test_parameter_counts(size: str, kwargs: dict[str, int], params: int, form: str) -> None:
    model = timm.create_model(f"infvit_{size}_{form}", device="meta", **kwargs)
    assert sum(p.numel() for p in model.parameters()) == params


@pytest.mark.parametrize("form", ["linear", "pure"])
def test_rho_starts_where_asked_and_learns(form: str) -> None:
    model = timm.create_model(f"infvit_s6_{form}", dim=32, num_heads=2, depth=2, rho_init=0.7, num_classes=3)
    assert all(block.attn.rho_logit.sigmoid().item() == pytest.approx(0.7) for block in model.stages)
    model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert all(block.attn.rho_logit.grad.abs() > 0 for block in model.stages)


def test_position_embedding_follows_the_image_size(tmp_path) -> None:
    arch = {"dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3}
    model = timm.create_model("infvit_s6_pure", img_size=64, **arch).eval()
    x = torch.randn(1, 3, 96, 80, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "64.pth")
    model.set_input_size((96, 80))
    assert model.pos_embed.shape == (1, 1 + 6 * 5, 32)
    torch.testing.assert_close(model(x), expected)
    other = timm.create_model("infvit_s6_pure", img_size=(96, 80), **arch).eval()
    torch.testing.assert_close(load_checkpoint(other, tmp_path / "64.pth")(x), expected)


def test_wrong_arguments_are_explained(tmp_path) -> None:
    with pytest.raises(ValueError, match="rho_init must be between 0 and 1"):
        timm.create_model("infvit_s6_pure", rho_init=1.5)
    with pytest.raises(ValueError, match="form must be 'pure' or 'linear'"):
        timm.create_model("infvit_s6_pure", form="neumann")
    with pytest.raises(ValueError, match="multiple of num_heads"):
        timm.create_model("infvit_s6_pure", num_heads=7)
    arch = {"dim": 32, "num_heads": 2, "depth": 1}
    torch.save(timm.create_model("infvit_s6_pure", representation_size=16, **arch).state_dict(), tmp_path / "rep.pth")
    with pytest.raises(CheckpointError, match=r"pre_logits\.weight"):
        load_checkpoint(timm.create_model("infvit_s6_pure", **arch), tmp_path / "rep.pth")
