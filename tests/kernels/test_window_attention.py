from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_window_attention import inputs
from visionattn.ops import window_attention
from visionattn.testing import randn

# The map's shape, the window, options; several windows a block, one, and several blocks a window.
CASES = [
    ((2, 2, 4, 10, 8), (2, 2), {}),
    ((1, 2, 14, 14, 16), (7, 7), {"shift": (3, 2)}),
    ((2, 1, 8, 6, 4), (4, 3), {"grid": True, "scale": 0.3}),
    ((1, 1, 10, 18, 4), (10, 9), {"shift": (4, 0)}),
]


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): Swin's, HiLo's, and larger windows; wide heads in fp32."""
    from visionattn.kernels import window_attention as kernels

    wide = ((128, 7, True), (128, 2, False)) if dtype == torch.float32 else ()
    for d, window, biased in ((32, 7, True), (64, 2, False), (32, 12, True), *wide):
        x = torch.empty(2, 3, 84, 84, d, dtype=dtype, device="meta")
        bias = x.new_empty(3, window**2, window**2) if biased else None
        options = (bias, (window, window), (0, 0), False, d**-0.5)
        stats = x.new_empty(2, 3, 84 * 84, 2, dtype=torch.float32)
        case = f"d={d}, n={window**2}"
        yield case, lambda x=x, options=options: kernels.forward(x, x, x, *options)
        yield case, lambda x=x, options=options, stats=stats: kernels.backward(x, x, x, x, *options, x, stats)


def attend(impl: str, window: tuple[int, int], **options: object) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, window=window, bias=bias, impl=impl, **options)

    return run


@pytest.mark.parametrize(("shape", "window", "options"), CASES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_is_right(shape: tuple[int, ...], window: tuple[int, int], options: dict, biased: bool) -> None:
    tensors = inputs(shape, window)[: 4 if biased else 3]
    run, reference = (attend(impl, window, **options) for impl in ("triton", "reference"))
    if biased:
        check_kernel(run, reference, tensors, batched=[True, True, True, False])
    else:
        check_budget(run, reference, tensors)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], tuple[int, int], dict]:
    # Windows of 49 tokens take several blocks; three a side are a middle and both borders.
    window = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    counts = draw(st.sampled_from([(1, 1), (1, 3), (3, 1), (2, 2)]))
    heads, d, dv = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    options: dict = {"grid": draw(st.booleans())}
    if not options["grid"]:
        options["shift"] = tuple(draw(st.integers(0, side - 1)) for side in window)
    size, n = (window[0] * counts[0], window[1] * counts[1]), window[0] * window[1]
    heads = max(heads, copies(min(n**2, size[0] * size[1])) if n > 1 else 1)
    q, k, _, bias = inputs((1, heads, *size, d), window)
    tensors = [q, k, randn(1, heads, *size, dv, seed=2), bias]
    return tensors[: 4 if n > 1 else 3], window, options  # the bias of a single key has no effect


@given(problem=problems())
@settings(max_examples=12, deadline=None)
def test_any_shape(problem: tuple[list[Tensor], tuple[int, int], dict]) -> None:
    tensors, window, options = problem
    check_budget(attend("triton", window, **options), attend("reference", window, **options), tensors)


@pytest.mark.parametrize(("d", "window"), [(72, (2, 2)), (128, (4, 5))], ids=str)
def test_wide_heads_take_passes_over_queries_and_keys(d: int, window: tuple[int, int]) -> None:
    tensors = inputs((1, 1, 4, 10, d), window)
    check_budget(attend("triton", window, shift=(1, 1)), attend("reference", window, shift=(1, 1)), tensors)


def test_an_empty_batch_gives_the_bias_no_gradient() -> None:
    for window in ((2, 2), (10, 9)):
        q, k, v, bias = inputs((0, 2, *window, 4), window)
        bias.requires_grad_()
        attend("triton", window)(q, k, v, bias).sum().backward()
        assert bias.grad is not None
        assert not bias.grad.any()


def test_transforms() -> None:
    check_transforms(attend("triton", (2, 2), shift=(1, 0)), inputs((2, 2, 4, 4, 5), (2, 2)))


def test_opcheck() -> None:
    x, _, _, bias = inputs((2, 2, 4, 4, 5), (2, 2))
    for some in (bias, None):
        args = (x, x, x, some, [2, 2], [1, 0], False, 0.5)
        torch.library.opcheck(torch.ops.visionattn.window_attention_triton.default, args)
        args = (x, *args, x, torch.zeros(2, 2, 16, 2))
        torch.library.opcheck(torch.ops.visionattn.window_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    q, k, v, bias = (x.bfloat16() for x in inputs((1, 1, 3, 2, 16), (3, 2)))
    run = attend("triton", (3, 2))
    assert torch.equal(run(*(far_apart(x, dim=2) for x in (q, k, v)), bias), run(q, k, v, bias))
