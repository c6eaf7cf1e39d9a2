from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import DEVICE, check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_infinite_attention import RHO, attend, data
from visionattn.ops import infinite_attention
from visionattn.testing import randn, value_and_grads

FORMS = ["pure", "linear"]
every_form = pytest.mark.parametrize("form", FORMS)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): InfViT's heads."""
    from visionattn.kernels import infinite_attention as kernels

    x = torch.empty(2, 6, 1025, 64, dtype=dtype, device="meta")
    few = x.new_empty(2, 6, 1, 64)
    norm, query, total, sums = (x.new_empty(2, 6, *size, dtype=torch.float32) for size in ((), (64,), (1,), (65,)))
    options = (1 / 64, 1e-6)
    yield "pure", lambda: kernels.forward(x, x, x, *options)
    yield "pure", lambda: kernels.backward(x, x, x, x, *options, x, norm)
    yield "linear", lambda: kernels.forward_linear(x, x, x, *options)
    yield "linear", lambda: kernels.backward_linear(few, x, x, x, *options, query, total, sums)


@every_form
def test_is_right(form: str) -> None:
    check_kernel(attend("triton", form), attend("reference", form), data(2, 67, 35, 16, 24)[:3])


@every_form
@given(
    N=st.integers(1, 150), S=st.integers(1, 150), heads=st.integers(1, 2), d=st.integers(1, 40), dv=st.integers(1, 40)
)
@settings(max_examples=8, deadline=None)
def test_any_shape(form: str, N: int, S: int, heads: int, d: int, dv: int) -> None:
    # An eps that matters: gradients of a lone positive score, or of single channels, are as small as eps is beside the
    # normaliser, what cancels in them is not.
    eps = 0.1 * (S if form == "linear" else (N * S) ** 0.5)

    def run(impl: str):
        return lambda *x: infinite_attention(*x, RHO.to(x[0]), form=form, eps=eps, impl=impl)

    heads = max(heads, copies(2 * min(N, S, dv)))
    check_budget(run("triton"), run("reference"), data(heads, N, S, d, dv)[:3])


@every_form
@pytest.mark.parametrize("keys", [1, 2])
def test_one_query_and_few_keys(form: str, keys: int) -> None:
    """Most of the gradients of one or two scores cancels, so they are held to what cancels, which is about one."""
    q, k, v = (randn(2, 1, n, 3, seed=i).abs().to(DEVICE) for i, n in enumerate((1, keys, keys)))
    actual, exact = (
        value_and_grads(lambda *x: attend(impl, form)(*x), (q, k, v), dtype)  # noqa: B023 - called at once
        for impl, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-6)


@every_form
def test_heads_have_their_own_rho(form: str) -> None:
    q, k, v, _ = data(2, 9, 7, 5, 4)
    rho = torch.tensor([0.9, 0.4])
    check_budget(
        lambda *x: infinite_attention(*x, form=form, impl="triton"),
        lambda *x: infinite_attention(*x, form=form, impl="reference"),
        [q, k, v, rho],
    )


@every_form
def test_scores_that_are_all_negative_give_zero_and_finite_gradients(form: str) -> None:
    q, k = torch.ones(1, 1, 4, 2, device=DEVICE), -torch.ones(1, 1, 4, 2, device=DEVICE)
    tensors = [q.requires_grad_(), k.requires_grad_(), torch.ones_like(q).requires_grad_()]
    y = attend("triton", form)(*tensors)
    assert not y.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))


@every_form
def test_queries_that_are_zero_give_zero_and_finite_gradients(form: str) -> None:
    tensors = [torch.zeros(1, 1, 4, 2, device=DEVICE).requires_grad_() for _ in range(3)]
    y = attend("triton", form)(*tensors)
    assert not y.any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), tensors))


def test_scores_beyond_fp16_are_no_trouble_to_it() -> None:
    q, k, v, _ = (x.to(DEVICE, torch.float16) for x in data(1, 40, 40, 16, 16, batch=1))
    q, k = 500 * q, 500 * k  # scores of a million
    exact, y = (attend("triton", "pure")(*(x.to(dtype) for x in (q, k, v))) for dtype in (torch.float32, torch.float16))
    assert (y - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps * exact.abs().max()


@every_form
def test_transforms(form: str) -> None:
    check_transforms(attend("triton", form), data(2, 9, 5, 4, 3, batch=1)[:3])


@every_form
def test_opcheck(form: str) -> None:
    name = "infinite_attention_triton" if form == "pure" else "infinite_attention_linear_triton"
    args = (*data(2, 9, 5, 4, 3, batch=1)[:3], 0.25, 1e-6)
    op, backward = (getattr(torch.ops.visionattn, n).default for n in (name, f"{name}_backward"))
    torch.library.opcheck(op, args)
    out, *saved = op(*args)
    kept = [out, *saved] if form == "pure" else saved
    torch.library.opcheck(backward, (randn(*out.shape), *args, *kept))


@every_form
def test_offsets_exceed_32_bits(form: str) -> None:
    tensors = [x.bfloat16() for x in data(1, 3, 3, 16, 16, batch=1)[:3]]
    run = attend("triton", form)
    assert torch.equal(run(*(far_apart(x, dim=2) for x in tensors)), run(*tensors))


@every_form
def test_autocast_changes_nothing(form: str) -> None:
    tensors = [x.to(DEVICE) for x in data(2, 9, 7, 5, 4)[:3]]
    run = attend("triton", form)
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(*tensors)
    assert torch.equal(y, run(*tensors))
