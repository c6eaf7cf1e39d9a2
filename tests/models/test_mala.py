import pytest
import timm
import torch
from torch import Tensor, nn

from tests.golden import GRAD_TOLERANCE, TOLERANCE, assert_golden, golden, golden_input, golden_model, relative_error
from visionattn.layers.attention.linear import MagnitudeAwareAttention
from visionattn.models._checkpoint import rename
from visionattn.models.mala import MALA, MALABlock


def test_computes_what_the_authors_code_computes(tmp_path) -> None:
    case = golden("mala/mala_t")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


def attention(kind: str, dim: int, num_heads: int) -> nn.Module:
    return MagnitudeAwareAttention(dim, num_heads=num_heads, kind=kind)


def block(kind: str, dim: int, num_heads: int) -> nn.Module:
    return MALABlock(dim, num_heads=num_heads, kind=kind, mlp_ratio=3.5, layer_scale=1.0, drop_path=0.0, impl="auto")


@pytest.mark.parametrize(
    ("variant", "make", "kind", "dim", "num_heads"),
    [
        *(
            (f"mala_{kind}_d{dim}_h{heads}", attention, kind, dim, heads)
            for kind in ("linear", "softmax")
            for dim, heads in ((64, 1), (96, 1), (128, 2))
        ),
        ("mala_block_linear_d128_h2", block, "linear", 128, 2),
        ("mala_block_softmax_d128_h2", block, "softmax", 128, 2),
    ],
)
def test_modules_compute_what_the_authors_modules_compute(variant, make, kind, dim, num_heads) -> None:
    case = golden(f"mala_op/{variant}")
    module = make(kind, dim, num_heads)
    prefix = "block." if make is block else "attn."
    keys = {
        k: next(iter(rename({k: v}, MALA.official_rules)), "").removeprefix(prefix) for k, v in case.state_dict.items()
    }
    own = module.state_dict()
    module.load_state_dict({n: case.state_dict[k].reshape(own[n].shape) for k, n in keys.items() if n})
    for i, recording in enumerate(case.manifest["cases"]):
        x = golden_input(tuple(recording["input_shape"]), recording["seed"])
        y = module(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert relative_error(y, case.recorded(f"case{i}.logits")) <= TOLERANCE
        if "grad_norms" not in recording:
            continue
        y.square().mean().backward()
        grads = {n: p.grad.norm().item() for n, p in module.named_parameters()}
        recorded = {keys[k]: norm for k, norm in recording["grad_norms"].items()}
        assert grads == pytest.approx(recorded, rel=GRAD_TOLERANCE, abs=1e-6 * max(recorded.values()))


@pytest.mark.parametrize(
    ("name", "params"), [("mala_t", 16_449_128), ("mala_s", 27_142_568), ("mala_b", 49_792_648), ("mala_l", 97_766_088)]
)
def test_published_parameter_counts(name: str, params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


def small(**kwargs: object) -> nn.Module:
    arch = {"dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2), "kinds": ("linear", "linear")}
    return timm.create_model(
        "mala_t", layer_scale=(1.0, 1.0), projection=32, num_classes=5, **{**arch, **kwargs}
    ).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_finite_and_close_at_1024_pixels(dtype: torch.dtype) -> None:
    model = small()
    x = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.forward_features(x)
        with torch.autocast("cpu", dtype):
            y = model.forward_features(x)
    assert y.isfinite().all()
    assert (y - exact).abs().mean() <= 16 * torch.finfo(dtype).eps * exact.abs().mean()


def test_linear_attention_knows_positions_and_does_not_mix_the_batch() -> None:
    module = MagnitudeAwareAttention(16, num_heads=2).eval()
    x = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(0))
    y: Tensor = module(x)
    torch.testing.assert_close(module(x.flip(0)), y.flip(0))
    assert not torch.allclose(module(x.flip(1)), y.flip(1), atol=1e-4)  # positions rotate queries and keys


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"must be a multiple of 4 \* num_heads"):
        small(num_heads=(3, 2))
    with pytest.raises(ValueError, match="kind must be 'linear' or 'softmax'"):
        small(kinds=("linear", "window"))
    with pytest.raises(ValueError, match="must be as long"):
        small(depths=(1, 1, 1))
