import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.ops import UnsupportedError, sigmoid_gate
from visionattn.testing import check_operator, randn

# Shapes of y and of the logits: a gate a head; a head and image; a token and head; a channel; a token.
SHAPES = [
    ((2, 9, 3, 8), (1, 1, 3, 1)),
    ((2, 9, 3, 8), (2, 1, 3, 1)),
    ((2, 9, 3, 8), (2, 9, 3, 1)),
    ((2, 9, 3, 8), (2, 9, 3, 8)),
    ((2, 5, 2, 6), (1, 5, 1, 6)),
    ((2, 1, 1, 1), (1, 1, 1, 1)),
]
every_shape = pytest.mark.parametrize(("shape", "gates"), SHAPES, ids=str)
every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])


def data(shape: tuple[int, ...], gates: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, dtype=dtype), 2 * randn(*gates, seed=1, dtype=dtype)]


def gate(impl: str, scale: float = 1.0):
    return lambda *x: sigmoid_gate(*x, scale=scale, impl=impl)


@every_shape
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_eager_is_right(shape, gates, scale: float) -> None:
    tensors, batched = data(shape, gates), [True, gates[0] > 1]
    check_operator(gate("eager", scale), gate("reference", scale), tensors, batched=batched)
    y, logits = tensors
    assert torch.equal(gate("eager", scale)(y, logits), y * (logits.sigmoid() * scale))


@every_shape
@every_impl
def test_gradcheck(shape, gates, impl: str) -> None:
    tensors = [x.requires_grad_() for x in data(shape, gates, torch.float64)]
    assert torch.autograd.gradcheck(gate(impl, 1.5), tensors)


@every_impl
def test_open_gates_change_nothing_and_shut_ones_stop_all(impl: str) -> None:
    y, logits = data((2, 9, 3, 8), (2, 9, 3, 1))
    torch.testing.assert_close(gate(impl, 3.0)(y, torch.full_like(logits, 40)), 3 * y)
    assert not gate(impl, 3.0)(y, torch.full_like(logits, -200)).any()


@given(axes=st.lists(st.booleans(), min_size=4, max_size=4), scale=st.floats(0.5, 10))
@settings(max_examples=16, deadline=None)
def test_one_logit_for_many_is_many_alike(axes: list[bool], scale: float) -> None:
    shape = (2, 5, 3, 4)
    y, logits = data(shape, tuple(n if whole else 1 for n, whole in zip(shape, axes, strict=True)))
    torch.testing.assert_close(gate("auto", scale)(y, logits), gate("auto", scale)(y, logits.expand(shape)))


@every_impl
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)], ids=str)
def test_runs_under_vmap(impl: str, dims: tuple[int | None, int | None]) -> None:
    y, logits = (
        x if dim is None else torch.stack([x, 2 * x, -x]) for x, dim in zip(data(*SHAPES[3]), dims, strict=True)
    )
    expected = [
        gate(impl, 3.0)(*(x if dim is None else x[i] for x, dim in zip((y, logits), dims, strict=True)))
        for i in range(3)
    ]
    torch.testing.assert_close(torch.vmap(gate(impl, 3.0), dims)(y, logits), torch.stack(expected))


@every_impl
def test_result_has_the_dtype_of_what_is_gated(impl: str) -> None:
    y, logits = data((2, 9, 3, 8), (1, 1, 3, 1))
    exact = gate(impl)(y.bfloat16().float(), logits)
    assert torch.equal(gate(impl)(y.bfloat16(), logits.expand(2, 9, 3, 8)), exact.bfloat16())


def test_wrong_arguments_are_explained() -> None:
    y, logits = data((2, 9, 3, 8), (2, 9, 3, 1))
    with pytest.raises(ValueError, match=r"each as long as that of y or 1; got \(2, 9, 3, 8\) and \(2, 9, 2, 1\)"):
        sigmoid_gate(y, logits[:, :, :2])
    with pytest.raises(ValueError, match="four axes"):
        sigmoid_gate(y, logits[0])
    with pytest.raises(ValueError, match="must be floating point"):
        sigmoid_gate(y, logits.int())
    with pytest.raises(UnsupportedError, match="no impl='flex'"):
        sigmoid_gate(y, logits, impl="flex")
