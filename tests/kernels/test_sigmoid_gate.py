from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.checks import DEVICE, check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_sigmoid_gate import SHAPES, data, gate
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): ViT-S/16's heads, a gate each or one a channel."""
    from visionattn.kernels import sigmoid_gate as kernels

    y = torch.empty(2, 197, 6, 64, dtype=dtype, device="meta")
    for width in (1, 64):
        logits = y[..., :width]
        yield f"logits={width}", lambda logits=logits: kernels.forward(y, logits, 4.0)
        yield f"logits={width}", lambda logits=logits: kernels.backward(y, y, logits, 4.0)


@pytest.mark.parametrize(("shape", "gates"), SHAPES, ids=str)
def test_is_right(shape, gates) -> None:
    check_kernel(gate("triton", 4.0), gate("reference", 4.0), data(shape, gates), batched=[True, gates[0] > 1])


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 90), st.integers(1, 3), st.integers(1, 80)),
    per_channel=st.booleans(),
    scale=st.floats(0.5, 10),
)
@settings(max_examples=15, deadline=None)
def test_any_shape(shape: tuple[int, ...], per_channel: bool, scale: float) -> None:
    B, N, heads, d = shape
    shape = (B, N, max(heads, copies(B * N)), d)
    gates = shape if per_channel else (*shape[:3], 1)
    check_budget(gate("triton", scale), gate("reference", scale), data(shape, gates))


@given(axes=st.lists(st.booleans(), min_size=4, max_size=4))
@settings(max_examples=8, deadline=None)
def test_a_logit_for_many_gets_the_sum_of_their_gradients(axes: list[bool]) -> None:
    shape = (2, 9, 3, 8)
    y, logits = data(shape, tuple(n if whole else 1 for n, whole in zip(shape, axes, strict=True)))
    leaves = [logits.to(DEVICE).requires_grad_(), logits.to(DEVICE).expand(shape).contiguous().requires_grad_()]
    shared, own = (torch.autograd.grad(gate("triton")(y.to(DEVICE), x).sum(), x)[0] for x in leaves)
    torch.testing.assert_close(shared, own.sum_to_size(logits.shape))


def test_an_empty_batch_gives_shared_logits_no_gradient() -> None:
    y, logits = (x.requires_grad_() for x in data((0, 9, 3, 8), (1, 1, 3, 1)))
    gate("triton")(y, logits).sum().backward()
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("gates", [(1, 1, 3, 1), (2, 9, 3, 8)], ids=str)
def test_transforms(gates) -> None:
    check_transforms(gate("triton", 1.5), data((2, 9, 3, 8), gates))


def test_opcheck() -> None:
    y, logits = data((2, 9, 3, 8), (2, 1, 3, 1))
    torch.library.opcheck(torch.ops.visionattn.sigmoid_gate_triton.default, (y, logits, 1.5))
    args = (randn(2, 9, 3, 8), y, logits, 1.5)
    torch.library.opcheck(torch.ops.visionattn.sigmoid_gate_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    y, logits = (x.bfloat16() for x in data((1, 3, 2, 16), (1, 3, 2, 16)))
    far = gate("triton")(far_apart(y, dim=1), far_apart(logits, dim=1))
    assert torch.equal(far, gate("triton")(y, logits))
