from collections.abc import Callable, Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import DEVICE, check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_gated_positional_attention import data
from visionattn.ops import gated_positional_attention
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): ConViT's heads of 48 channels, larger maps, wide heads."""
    from visionattn.kernels import gated_positional_attention as kernels

    wide = ((128, 14, 14),) if dtype == torch.float32 else ()
    for d, H, W in ((48, 14, 14), (48, 40, 70), *wide):
        x = torch.empty(2, 6, H, W, d, dtype=dtype, device="meta")
        position, gate = (torch.empty(6, *n, device="meta") for n in ((3,), ()))
        stats, axes = (torch.empty(shape, device="meta") for shape in ((2, 6, H * W, 2), (4, 6, H + W)))
        args, saved, name = (x, x, x, position, gate, 0.1), (stats, axes), f"d={d}, {H} x {W}"
        yield name, lambda args=args: kernels.forward(*args)
        yield name, lambda args=args, saved=saved: kernels.backward(args[0], *args, args[0], *saved)


def attend(impl: str) -> Callable[..., Tensor]:
    return lambda *x: gated_positional_attention(*x[:5], bias=x[5] if len(x) > 5 else None, scale=0.4, impl=impl)


def test_is_right() -> None:
    tensors = [*data(1, 2, 3, 17, 12), randn(2, seed=5)]
    check_kernel(attend("triton"), attend("reference"), tensors, batched=[True] * 3 + [False] * 3)


@given(H=st.integers(1, 20), W=st.integers(1, 2), turned=st.booleans(), d=st.integers(1, 40), dv=st.integers(1, 40))
@settings(max_examples=4, deadline=None)
def test_any_shape(H: int, W: int, turned: bool, d: int, dv: int) -> None:
    H, W = (W, H) if turned else (H, W)
    heads = copies(1)  # each has one gate
    q, k, _, position, gate = data(1, heads, H, W, d)
    check_budget(attend("triton"), attend("reference"), [q, k, randn(1, heads, H, W, dv, seed=2), position, gate])


def test_wide_heads_are_multiplied_in_parts() -> None:
    q, k, _, position, gate = data(1, 2, 3, 17, 72)
    tensors = [q, k, randn(1, 2, 3, 17, 128, seed=2), position, gate]
    check_budget(attend("triton"), attend("reference"), tensors)


def test_gates_of_zero_and_one() -> None:
    q, k, v, position, _ = data(1, 2, 2, 3, 4)
    gate = torch.tensor([0.0, 1.0])
    check_budget(attend("triton"), attend("reference"), [q, k, v, position, gate])


def test_steep_positions_do_not_overflow() -> None:
    q, k, v, _, _ = (x.to(DEVICE) for x in data(1, 1, 2, 20, 4))
    steep = torch.tensor([[0.0, 0.0, -1e4]], device=DEVICE)
    torch.testing.assert_close(attend("triton")(q, k, v, steep, torch.ones(1, device=DEVICE)), v)


def test_transforms() -> None:
    check_transforms(attend("triton"), data(1, 1, 2, 3, 4))


def test_opcheck() -> None:
    q, k, v, position, gate = data(1, 2, 2, 3, 4)
    args = (q, k, v, position, gate, None, 0.5)
    torch.library.opcheck(torch.ops.visionattn.gated_positional_attention_triton.default, args)
    content, stats, axes = torch.ops.visionattn.gated_positional_attention_triton(*args)[1:]
    args = (torch.ones_like(v), q, k, v, position, gate, randn(2), 0.5, content, stats, axes)
    torch.library.opcheck(torch.ops.visionattn.gated_positional_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    q, k, v, position, gate = (x.bfloat16() for x in data(1, 1, 1, 3, 16))
    far = attend("triton")(*(far_apart(x, dim=3) for x in (q, k, v)), position, gate)
    assert torch.equal(far, attend("triton")(q, k, v, position, gate))
