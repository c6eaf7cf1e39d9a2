from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_aggregated_attention import inputs, reference
from visionattn.ops import UnsupportedError, aggregated_attention
from visionattn.testing import randn

BATCHED = (True, True, True, True, True, False, False, True)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): TransNeXt's heads of 24 channels, and wide ones."""
    from visionattn.kernels import aggregated_attention as kernels

    for d in (24, 128) if dtype == torch.float32 else (24,):
        tensors = [x.to("meta", dtype) for x in inputs(2, 3, 28, 29, d, d, 49, 3)]
        tops = tensors[0].new_empty(2, 3, 28 * 29, dtype=torch.float32)
        yield f"d={d}", lambda tensors=tensors: kernels.forward(*tensors)
        yield f"d={d}", lambda tensors=tensors, tops=tops: kernels.backward(tensors[0], *tensors, tops)


def run(*tensors: Tensor) -> Tensor:
    return aggregated_attention(*tensors, impl="triton")


def test_is_right() -> None:
    check_kernel(run, reference, inputs(2, 1, 5, 8, 8, 8, 18, 3), batched=BATCHED)  # two blocks of each kind


def test_is_right_without_added_weights() -> None:
    check_budget(run, reference, inputs(1, 2, 3, 4, 6, 5, 3, 3)[:-1])


@pytest.mark.parametrize(("d", "dv"), [(128, 72), (20, 100)], ids=str)
def test_wide_heads_are_multiplied_in_parts(d: int, dv: int) -> None:
    check_budget(run, reference, inputs(2, 1, 3, 6, d, dv, 18, 3))


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    P=st.integers(1, 20),
    window=st.sampled_from([1, 3, 5]),
    d=st.integers(1, 20),
    dv=st.integers(1, 20),
)
@settings(max_examples=6, deadline=None)
def test_any_shape(size: tuple[int, int], P: int, window: int, d: int, dv: int) -> None:
    heads = copies(min(window**2, P, size[0] * size[1]))
    check_budget(run, reference, inputs(1, heads, *size, d, dv, P, window))


def test_sums_are_cut_in_any_way(monkeypatch) -> None:
    from visionattn.kernels import aggregated_attention as kernels

    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    check_budget(run, reference, inputs(3, 1, 5, 8, 4, 4, 3, 3))  # tokens: two parts of one block; images: 2 and 1


def test_without_a_batch_gradients_of_biases_are_zero() -> None:
    *rest, bias_local, bias_pool, extra = inputs(0, 2, 3, 4, 4, 4, 2, 3)
    biases = (bias_local.requires_grad_(), bias_pool.requires_grad_())
    for grad, bias in zip(torch.autograd.grad(run(*rest, *biases, extra).sum(), biases), biases, strict=True):
        assert torch.equal(grad, torch.zeros_like(bias))


def test_transforms() -> None:
    check_transforms(run, inputs(1, 1, 2, 3, 4, 3, 2, 3))


@pytest.mark.parametrize("added", [True, False])
def test_opcheck(added: bool) -> None:
    *rest, extra = inputs(2, 1, 2, 3, 4, 4, 2, 3)
    args = (*rest, extra if added else None)
    torch.library.opcheck(torch.ops.visionattn.aggregated_attention_triton.default, args)
    args = (randn(*rest[2].shape), *args, torch.zeros(2, 1, 6))
    torch.library.opcheck(torch.ops.visionattn.aggregated_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    tensors = [x.bfloat16() for x in inputs(1, 1, 3, 1, 16, 16, 3, 3)]
    far = [far_apart(x, dim=2) if x.ndim == 5 else x for x in tensors]
    assert torch.equal(run(*far), run(*tensors))


def test_large_windows_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="up to 49 cells, got 81"):
        run(*inputs(1, 1, 3, 3, 4, 4, 2, 9))
