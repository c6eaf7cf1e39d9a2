import pytest
import timm
import torch
from torch.nn import functional as F

from tests.golden import assert_golden, golden, golden_model
from visionattn.layers.attention import inline
from visionattn.testing import randn

PARAMS = {
    "inline_deit_t": 6_477_736,
    "inline_deit_s": 16_734_760,
    "inline_deit_b": 23_797_096,
    "inline_pvt_t": 12_032_232,
    "inline_pvt_s": 21_556_136,
    "inline_pvt_m": 37_618_856,
    "inline_pvt_l": 51_154_280,
    "inline_swin_t": 29_223_544,
    "inline_swin_s": 49_793_296,
    "inline_swin_b": 88_350_120,
    "inline_swin_b_384": 88_465_320,
    "inline_cswin_t": 20_604_520,
    "inline_cswin_s": 33_032_872,
    "inline_cswin_b": 73_413_640,
    "inline_cswin_b_384": 73_413_640,
}


@pytest.mark.parametrize("variant", ["inline_deit_t", "inline_pvt_t", "inline_swin_t", "inline_cswin_t"])
def test_computes_what_the_authors_code_computes(variant: str, tmp_path) -> None:
    case = golden(f"inline/{variant}")
    model = golden_model(case, tmp_path)
    assert sum(p.numel() for p in model.parameters()) == case.manifest["params"]
    for i, recording in enumerate(case.manifest["cases"]):
        assert_golden(case, model, i, grads="grad_norms" in recording)


@pytest.mark.parametrize(("name", "params"), PARAMS.items())
def test_parameter_counts(name: str, params: int) -> None:
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == params


@pytest.mark.parametrize("batch", [1, 3])
def test_both_ways_to_convolve_by_kernels_of_the_input_agree(batch: int) -> None:
    x, kernels = randn(batch, 5, 4, 6), randn(batch, 6, 3, 3, seed=1)
    expected = torch.stack(
        [F.conv2d(a.permute(2, 0, 1), k[:, None], padding=1, groups=6) for a, k in zip(x, kernels, strict=True)]
    )
    for way in (inline._grouped, inline._shifted):
        torch.testing.assert_close(way(x, kernels), expected.permute(0, 2, 3, 1))


def test_grouped_linear_is_a_block_diagonal_matrix() -> None:
    layer = inline.GroupedLinear(6, 12, groups=3)
    x = randn(4, 6)
    torch.testing.assert_close(layer(x), x @ torch.block_diag(*layer.weight).T + layer.bias)


def test_wrong_arguments_are_explained() -> None:
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        timm.create_model("inline_deit_t", num_heads=5)
    with pytest.raises(ValueError, match="must have an entry a stage"):
        timm.create_model("inline_swin_t", inline_depths=(2,))
