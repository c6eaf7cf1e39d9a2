from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_clipped_softmax_attention import attend, data
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): heads of 32 to 128 channels."""
    from visionattn.kernels import clipped_softmax_attention as kernels

    for d in (32, 64, 128):
        x = torch.empty(2, 6, 197, d, dtype=dtype, device="meta")
        options = (-0.01, 1.0, d**-0.5)
        stats = x.new_empty(2, 6, 197, 2, dtype=torch.float32)
        yield f"d={d}", lambda x=x, options=options: kernels.forward(x, x, x, *options)
        yield f"d={d}", lambda x=x, options=options, stats=stats: kernels.backward(x, x, x, x, *options, stats)


@pytest.mark.parametrize("clip", [(-0.01, 1.2), (0.0, 1.0)], ids=str)
def test_is_right(clip: tuple[float, float]) -> None:
    check_kernel(attend("triton", clip), attend("reference", clip), data(2, 67, 35, 16, 24))


@given(
    N=st.integers(1, 70),
    S=st.integers(1, 70),
    heads=st.integers(1, 3),
    d=st.integers(1, 40),
    dv=st.integers(1, 40),
    gamma=st.floats(-0.1, 0),
    zeta=st.floats(1, 1.5),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(N: int, S: int, heads: int, d: int, dv: int, gamma: float, zeta: float) -> None:
    clip, heads = (gamma, zeta), max(heads, copies(2 * min(N, S)))
    check_budget(attend("triton", clip), attend("reference", clip), data(heads, N, S, d, dv))


def test_transforms() -> None:
    check_transforms(attend("triton", (-0.01, 1.1)), data(2, 9, 5, 4, 3))


def test_opcheck() -> None:
    q, k, v = data(2, 9, 5, 4, 3)
    args = (q, k, v, -0.01, 1.1, 0.5)
    torch.library.opcheck(torch.ops.visionattn.clipped_softmax_attention_triton.default, args)
    args = (randn(2, 2, 9, 3), *args, torch.zeros(2, 2, 9, 2))
    torch.library.opcheck(torch.ops.visionattn.clipped_softmax_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    q, k, v = (x.bfloat16() for x in data(1, 3, 3, 16, 16, batch=1))
    run = attend("triton", (-0.01, 1.0))
    far = run(*(far_apart(x, dim=2) for x in (q, k, v)))
    assert torch.equal(far, run(q, k, v))
