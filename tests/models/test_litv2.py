import re

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.golden import GRAD_TOLERANCE, TOLERANCE, assert_golden, golden, golden_input, golden_model, relative_error
from visionattn.layers import deformable
from visionattn.layers.attention.hilo import HiLoAttention
from visionattn.layers.deformable import DeformablePatchMerging


def tokens_layout(module: DeformablePatchMerging, x: Tensor) -> Tensor:
    """`DeformablePatchMerging.forward` with the authors' memory layout, tokens behind a contiguous NCHW map.

    PyTorch's batch norm on the CPU misreads the gradient of such tokens in eval mode at batch size 1, and the recorded
    gradient norms hold what it then returns.
    """
    x = x.permute(0, 3, 1, 2).contiguous()
    y = deformable.deform_conv2d(x, module.offset(x), module.conv.weight, module.conv.bias, stride=2)
    y = module.act(module.norm(y))
    return y.flatten(2).transpose(1, 2).contiguous().view(y.shape[0], *y.shape[2:], y.shape[1])


@pytest.mark.parametrize("variant", ["litv2_s", "litv2_s_alpha05", "litv2_s_alpha10", "litv2_s_ws4"])
def test_computes_what_the_authors_code_computes(variant: str, tmp_path, monkeypatch) -> None:
    case = golden(f"litv2/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i)
        if "grad_norms" in recording:
            monkeypatch.setattr(DeformablePatchMerging, "forward", tokens_layout)
            assert_golden(case, model, i, grads=True)
            monkeypatch.undo()


@pytest.mark.parametrize(
    "variant",
    [
        "hilo_d384_h12_ws2_a05_nobias",
        "hilo_d384_h12_ws2_a09_bias",
        "hilo_d384_h12_ws4_a09_bias",
        "hilo_d768_h12_ws2_a09_bias",
        "hilo_d768_h24_ws1_a09_bias",
        "hilo_det_pad_d384_h12_ws2_a09_bias",
        "hilo_det_pad_d384_h12_ws4_a09_bias",
    ],
)
def test_hilo_computes_what_the_authors_module_computes(variant: str) -> None:
    case = golden(f"litv2_op/{variant}")
    dim, heads, window, alpha = map(int, re.findall(r"_d(\d+)_h(\d+)_ws(\d)_a0(\d)", variant)[0])
    bias = not variant.endswith("nobias")
    module = HiLoAttention(dim, num_heads=heads, window=window, alpha=alpha / 10, qkv_bias=bias)
    module.load_state_dict(case.state_dict)
    for i, recording in enumerate(case.manifest["cases"]):
        shape = tuple(recording["input_shape"])
        size = SIZES[shape[1]]
        y = module(golden_input(shape, recording["seed"]).unflatten(1, size)).flatten(1, 2)
        assert relative_error(y, case.recorded(f"case{i}.logits")) <= TOLERANCE
        if "grad_norms" in recording:
            assert_grads(module, y, recording["grad_norms"])


SIZES = {196: (14, 14), 221: (13, 17), 63: (7, 9), 96: (8, 12), 256: (16, 16)}  # of the maps, by their tokens


def assert_grads(module: nn.Module, y: Tensor, recorded: dict[str, float]) -> None:
    module.zero_grad()
    y.square().mean().backward()
    grads = {n: p.grad.norm().item() for n, p in module.named_parameters()}
    assert grads == pytest.approx(recorded, rel=GRAD_TOLERANCE, abs=1e-6 * max(recorded.values()))


def merging(**kwargs: int) -> tuple[DeformablePatchMerging, Tensor]:
    """A small module with offsets of a token or so, and a map."""
    torch.manual_seed(0)
    module = DeformablePatchMerging(4, 6).double().eval()
    nn.init.normal_(module.offset.weight, std=0.5)
    nn.init.normal_(module.offset.bias)
    return module, torch.randn(kwargs.get("batch", 2), 6, 7, 4, dtype=torch.float64)


def test_deformable_merging_computes_what_the_authors_module_computes() -> None:
    case = golden("litv2_op/dtm_d96_28")
    names = {"dconv.conv_offset": "offset", "dconv": "conv", "norm_layer": "norm"}

    def own(key: str) -> str:
        prefix, leaf = key.rsplit(".", 1)
        return f"{names[prefix]}.{leaf}"

    module = DeformablePatchMerging(96, 192).eval()
    module.load_state_dict({own(k): v for k, v in case.state_dict.items()})
    (recording,) = case.manifest["cases"]
    x = golden_input(tuple(recording["input_shape"]), recording["seed"]).unflatten(1, (28, 28))
    recorded = case.recorded("case0.logits")
    assert relative_error(module(x).flatten(1, 2), recorded) <= TOLERANCE
    y = tokens_layout(module, x)
    assert relative_error(y.flatten(1, 2), recorded) <= TOLERANCE
    assert_grads(module, y, {own(k): norm for k, norm in recording["grad_norms"].items()})


@pytest.mark.parametrize("batch", [1, 2])
def test_deformable_merging_has_the_gradient_of_what_it_computes(batch: int) -> None:
    module, x = merging(batch=batch)
    assert torch.autograd.gradcheck(module, (x.requires_grad_(),))


def test_exportable_sampling_equals_deformable_convolution(monkeypatch) -> None:
    module, x = merging()
    expected = module(x)
    monkeypatch.setattr(deformable, "exporting", lambda: True)
    torch.testing.assert_close(module(x), expected)


def test_deformable_merging_starts_as_a_convolution_and_drops_the_odd_row() -> None:
    module, x = DeformablePatchMerging(4, 6).eval(), torch.randn(2, 7, 5, 4)
    plain = module.act(module.norm(module.conv(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), plain)
    assert module(x).shape == (2, 3, 2, 6)


def test_hilo_with_windows_of_one_token_or_all_heads_low_is_plain_attention() -> None:
    x = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    one = HiLoAttention(8, num_heads=2, window=1, alpha=0.0)
    q = one.l_q(x).view(2, 24, 2, 4).transpose(1, 2)
    k, v = one.l_kv(x).view(2, 24, 2, 2, 4).permute(2, 0, 3, 1, 4)
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 4, 6, 8)
    torch.testing.assert_close(one(x), one.l_proj(y))


def test_high_frequencies_stay_inside_their_window() -> None:
    module = HiLoAttention(8, num_heads=2, window=2, alpha=0.0)
    x = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    changed = x.clone()
    changed[:, 2:, 4:] += 1
    same = (module(changed) == module(x)).all(-1)[0]
    expected = torch.ones(4, 6, dtype=torch.bool)
    expected[2:, 4:] = False
    assert torch.equal(same, expected)


@pytest.mark.parametrize(
    ("name", "kwargs", "params"),
    [
        ("litv2_s", {}, 27_844_000),
        ("litv2_m", {}, 48_830_368),
        ("litv2_b", {}, 86_520_704),
        ("litv2_b_384", {}, 86_520_704),
        ("litv2_s", {"alpha": 0.0}, 28_089_760),
        ("litv2_s", {"alpha": 0.4}, 27_696_544),
        ("litv2_s", {"alpha": 0.5}, 27_647_392),
    ],
)
def test_published_parameter_counts(name: str, kwargs: dict[str, float], params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta", **kwargs).parameters()) == params


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match=r"alpha in \[0, 1\]"):
        timm.create_model("litv2_s", alpha=1.5)
    with pytest.raises(ValueError, match="must be as long"):
        timm.create_model("litv2_s", local_ws=(0, 0, 2))
    with pytest.raises(ValueError, match="must be a multiple of num_heads"):
        timm.create_model("litv2_s", num_heads=(3, 6, 11, 24))
