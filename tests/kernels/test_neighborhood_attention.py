from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_neighborhood_attention import data, run
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): NAT's and DiNAT's heads of 32 channels, and wide ones."""
    from visionattn.kernels import neighborhood_attention as kernels

    for d in (32, 128) if dtype == torch.float32 else (32,):
        x = torch.empty(2, 6, 28, 29, d, dtype=dtype, device="meta")
        table = x.new_empty(6, 13, 13, dtype=torch.float32)
        stats = x.new_empty(2, 6, 28 * 29, 2, dtype=torch.float32)
        for name, bias in (("bias", table), ("no bias", None)):
            args = (x, x, x, bias, (7, 7), (1, 4), d**-0.5)
            yield f"d={d}, {name}", lambda args=args: kernels.forward(*args)
            yield f"d={d}, {name}", lambda x=x, args=args, stats=stats: kernels.backward(x, *args, x, stats)


def test_is_right() -> None:
    tensors = data(1, (5, 9), (3, 4), 8)  # several tiles along both axes
    batched = (True, True, True, False)
    check_kernel(run("triton", (3, 4)), run("reference", (3, 4)), tensors, batched=batched)


def test_wide_heads_are_multiplied_in_parts() -> None:
    check_budget(run("triton", (3, 4)), run("reference", (3, 4)), data(1, (5, 9), (3, 4), 72))


@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.sampled_from([(1, 1), (2, 1), (1, 3)]),
    extra=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    d=st.integers(1, 20),
    dv=st.integers(1, 20),
    biased=st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(kernel, dilation, extra, d, dv, biased) -> None:
    size = tuple(K * step + more for K, step, more in zip(kernel, dilation, extra, strict=True))
    biased = biased and kernel != (1, 1)  # the bias of a single key has no effect
    numbers = (2 * kernel[0] - 1) * (2 * kernel[1] - 1) if biased else size[0] * size[1]
    q, k, _, bias = data(copies(numbers), size, kernel, d, batch=1)
    tensors = [q, k, randn(*q.shape[:4], dv, seed=4), bias][: 4 if biased else 3]
    check_budget(run("triton", kernel, dilation), run("reference", kernel, dilation), tensors)


def test_tiles_share_the_work_on_the_bias_in_any_way(monkeypatch) -> None:
    from visionattn.kernels import neighborhood_attention as kernels

    # windows of the middle tile touch no border; five splits, the last of them without a tile
    tensors = data(1, (11, 9), (2, 1), 4)
    monkeypatch.setattr(kernels, "PROGRAMS", 13)
    check_budget(run("triton", (2, 1)), run("reference", (2, 1)), tensors)


def test_bias_keeps_its_own_precision() -> None:
    q, k, v, bias = data(2, (5, 6), 3, 4)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    y = run("triton", 3)(q, k, v, bias.requires_grad_())
    (grad,) = torch.autograd.grad(y.float().sum(), bias)
    assert (y.dtype, grad.dtype) == (torch.bfloat16, torch.float32)
    exact = run("reference", 3)(*(x.double() for x in (q, k, v, bias)))
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.01)


def test_without_a_batch_the_gradient_of_the_bias_is_zero() -> None:
    q, k, v, bias = data(2, (5, 6), 3, 4, batch=0)
    (grad,) = torch.autograd.grad(run("triton", 3)(q, k, v, bias.requires_grad_()).sum(), bias)
    assert torch.equal(grad, torch.zeros_like(bias))


def test_transforms() -> None:
    check_transforms(run("triton", 3, (1, 2)), data(1, (3, 6), 3, 4, batch=1))


@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(biased: bool) -> None:
    q, k, v, bias = data(1, (3, 5), 3, 4)
    args = (q, k, v, bias if biased else None, (3, 3), (1, 1), 0.5)
    torch.library.opcheck(torch.ops.visionattn.neighborhood_attention_triton.default, args)
    args = (randn(*v.shape), *args, randn(*v.shape), torch.zeros(2, 1, 15, 2))
    torch.library.opcheck(torch.ops.visionattn.neighborhood_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    q, k, v, bias = (x.bfloat16() for x in data(1, (3, 1), (3, 1), 16, batch=1))
    attend = run("triton", (3, 1))
    far = attend(*(far_apart(x, dim=2) for x in (q, k, v)), bias)
    assert torch.equal(far, attend(q, k, v, bias))
