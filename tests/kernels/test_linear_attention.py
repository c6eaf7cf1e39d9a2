from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import DEVICE, check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_linear_attention import NORMALIZATIONS, inputs, rotation
from visionattn.ops import UnsupportedError, linear_attention
from visionattn.testing import randn

Rope = tuple[Tensor, Tensor] | None
KINDS = [("sum", False), ("sum", True), ("magnitude_aware", False), ("magnitude_aware", True), ("injective", False)]
every_kind = pytest.mark.parametrize(("normalization", "turned"), KINDS, ids=str)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): MALA's and InLine's heads, and wider ones."""
    from visionattn.kernels import linear_attention as kernels

    mala, inline = ("magnitude_aware", True), ("injective", False)
    for (kind, turned), d in ((mala, 64), (inline, 32), (mala, 32), (mala, 128)):
        x = torch.empty(2, 6, 3136, d, dtype=dtype, device="meta")
        table = x.new_empty(3136, d // 2, dtype=torch.float32) if turned else None
        options = (kind, table, table, d**-0.5, 1e-6)
        sums = x.new_empty(2, 6, d * d + 2 * d, dtype=torch.float32)
        yield f"{kind}, d={d}", lambda x=x, options=options: kernels.forward(x, x, x, *options)
        yield f"{kind}, d={d}", lambda x=x, options=options, sums=sums: kernels.backward(x, x, x, x, *options, sums)


def attend(impl: str, normalization: str, rope: Rope = None, **options: float) -> Callable[..., Tensor]:
    tables = None if rope is None else tuple(x.to(DEVICE) for x in rope)
    return lambda q, k, v: linear_attention(q, k, v, normalization=normalization, rope=tables, impl=impl, **options)


def data(N: int, M: int, d: int, dv: int, normalization: str, batch: int = 2, heads: int = 1) -> list[Tensor]:
    q, _, _ = inputs(batch, heads, N, d, normalization=normalization)
    _, k, _ = inputs(batch, heads, M, d, normalization=normalization)
    return [q, k, randn(batch, heads, M, dv, seed=2)]


@every_kind
def test_is_right(normalization: str, turned: bool) -> None:
    N, M = (37, 37) if turned else (37, 19)
    rope = rotation(N, 16) if turned else None
    tensors = data(N, M, 16, 20, normalization)
    check_kernel(attend("triton", normalization, rope), attend("reference", normalization, rope), tensors)


@given(
    N=st.integers(1, 140),
    M=st.integers(1, 140),
    heads=st.integers(1, 2),
    d=st.integers(1, 20),
    dv=st.integers(1, 40),
    kind=st.sampled_from(KINDS),
    scale=st.floats(0.1, 2),
)
@settings(max_examples=8, deadline=None)
def test_any_shape(N: int, M: int, heads: int, d: int, dv: int, kind: tuple[str, bool], scale: float) -> None:
    normalization, turned = kind
    if turned:
        M, d = N, 2 * d
    rope = rotation(N, d) if turned else None
    heads = max(heads, copies(2 * min(N, M)))
    # An eps that matters: gradients of a single key, or of single channels, are as small as eps is beside the
    # normaliser, what cancels in them is not.
    eps = 0.1 * (M if normalization == "sum" else 1)
    runs = (attend(impl, normalization, rope, scale=scale, eps=eps) for impl in ("triton", "reference"))
    check_budget(*runs, data(N, M, d, dv, normalization, heads=heads))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_wide_heads_are_taken_in_slices(normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from visionattn.kernels import linear_attention as kernels

    monkeypatch.setattr(kernels, "STATE", 16 * 16)  # slices of 16, 16 and 5 channels
    check_budget(attend("triton", normalization), attend("reference", normalization), data(5, 7, 9, 37, normalization))


@pytest.mark.parametrize(("normalization", "turned"), [("magnitude_aware", True), ("injective", False)], ids=str)
def test_wide_heads_are_passed_over_twice(normalization: str, turned: bool) -> None:
    rope = rotation(19, 100) if turned else None
    tensors = data(19, 19, 100, 20, normalization, batch=1)
    check_budget(attend("triton", normalization, rope), attend("reference", normalization, rope), tensors)


@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_distant_means_cost_no_digits(offset: float) -> None:
    q, k, v = data(9, 40, 8, 8, "injective")
    check_budget(attend("triton", "injective"), attend("reference", "injective"), [q, k + offset, v + offset])


def test_transforms() -> None:
    check_transforms(attend("triton", "magnitude_aware", rotation(9, 4)), data(9, 9, 4, 3, "magnitude_aware", batch=1))


def test_opcheck() -> None:
    q, k, v = data(9, 9, 4, 3, "sum", batch=1)
    args = (q, k, v, "sum", *rotation(9, 4), 0.5, 1e-6)
    torch.library.opcheck(torch.ops.visionattn.linear_attention_triton.default, args)
    out, sums = torch.ops.visionattn.linear_attention_triton(*args)
    args = (torch.ones_like(out), *args, sums)
    torch.library.opcheck(torch.ops.visionattn.linear_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    tensors = [x.bfloat16() for x in data(3, 3, 16, 16, "injective", batch=1)]
    run = attend("triton", "injective")
    assert torch.equal(run(*(far_apart(x, dim=2) for x in tensors)), run(*tensors))


def test_autocast_changes_nothing() -> None:
    tensors = [x.to(DEVICE) for x in data(9, 9, 8, 8, "sum", batch=1)]
    run = attend("triton", "sum")
    with torch.autocast(DEVICE, torch.bfloat16):
        y = run(*tensors)
    assert torch.equal(y, run(*tensors))


def test_tables_with_gradients_are_refused() -> None:
    cos, sin = rotation(9, 4)
    tensors = [x.to(DEVICE) for x in data(9, 9, 4, 3, "sum")]
    with pytest.raises(UnsupportedError, match="no gradients of rope's tables"):
        attend("triton", "sum", (cos.requires_grad_(), sin))(*tensors)
    with torch.no_grad():
        attend("triton", "sum", (cos, sin))(*tensors)
