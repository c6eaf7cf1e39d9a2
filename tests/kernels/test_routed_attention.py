from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import DEVICE, check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_routed_attention import data
from visionattn.ops import routed_attention
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): regions of many tokens and of 2 x 2; heads of 32 and 64."""
    from visionattn.kernels import routed_attention as kernels

    for d, side in ((32, 56), (64, 56), (32, 14)):
        x = torch.empty(2, 6, side, side, d, dtype=dtype, device="meta")
        index = torch.empty(2, 49, 4, dtype=torch.int64, device="meta")
        stats = x.new_empty(2, 6, 49, (side // 7) ** 2, 2, dtype=torch.float32)
        options = (index, (7, 7), d**-0.5)
        yield f"d={d}, side={side}", lambda x=x, options=options: kernels.forward(x, x, x, *options)
        yield f"d={d}, side={side}", lambda x=x, o=options, stats=stats: kernels.backward(x, x, x, x, *o, x, stats)


def attend(impl: str, grid: tuple[int, int]) -> Callable[..., Tensor]:
    return lambda q, k, v, index: routed_attention(q, k, v, index, grid=grid, scale=0.3, impl=impl)


@pytest.mark.parametrize(
    ("heads", "size", "grid", "topk", "dim"),
    [(1, (4, 6), (2, 3), 5, 8), (1, (5, 14), (1, 2), 1, 24)],
    ids=["small regions", "large regions"],
)
def test_is_right(heads: int, size: tuple[int, int], grid: tuple[int, int], topk: int, dim: int) -> None:
    check_kernel(attend("triton", grid), attend("reference", grid), data(heads, size, grid, topk, dim))


@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    region=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    heads=st.integers(1, 2),
    d=st.integers(1, 40),
    dv=st.integers(1, 40),
    draw=st.data(),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(grid, region, heads: int, d: int, dv: int, draw) -> None:
    size = (grid[0] * region[0], grid[1] * region[1])
    P = grid[0] * grid[1]
    heads = max(heads, copies(size[0] * size[1]))
    topk = draw.draw(st.integers(1, P))
    q, k, v = (randn(1, heads, *size, c, seed=i) for i, c in enumerate((d, d, dv)))
    index = randn(1, P, P, seed=3).topk(topk).indices
    check_budget(attend("triton", grid), attend("reference", grid), [q, k, v, index])


def test_regions_that_nobody_routes_to_have_no_gradient() -> None:
    q, k, v, _ = (x.to(DEVICE) for x in data(1, (4, 4), (2, 2), 1, 4))
    k.requires_grad_()
    index = torch.full((2, 4, 1), 3, device=DEVICE)
    (dk,) = torch.autograd.grad(attend("triton", (2, 2))(q, k, v, index).square().sum(), k)
    assert dk[:, :, 2:, 2:].abs().min() > 0
    dk[:, :, 2:, 2:] = 0
    assert torch.equal(dk, torch.zeros_like(dk))


def test_transforms() -> None:
    check_transforms(attend("triton", (1, 2)), data(1, (2, 6), (1, 2), 1, 4))


def test_opcheck() -> None:
    q, k, v, index = data(1, (2, 6), (1, 2), 1, 4)
    v = randn(2, 1, 2, 6, 3)
    args = (q, k, v, index, 1, 2, 0.5)
    torch.library.opcheck(torch.ops.visionattn.routed_attention_triton.default, args)
    args = (torch.ones_like(v), *args, v, torch.zeros(2, 1, 2, 6, 2))
    torch.library.opcheck(torch.ops.visionattn.routed_attention_triton_backward.default, args)


@pytest.mark.parametrize("axis", [2, 3], ids=["rows", "columns"])
def test_offsets_exceed_32_bits(axis: int) -> None:
    size = (3, 2) if axis == 2 else (2, 3)
    q, k, v, index = (x.bfloat16() if x.is_floating_point() else x for x in data(1, size, size, 5, 16, batch=1))
    run = attend("triton", size)
    far = run(*(far_apart(x, dim=axis) for x in (q, k, v)), index)
    assert torch.equal(far, run(q, k, v, index))
