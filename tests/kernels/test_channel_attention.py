from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.checks import check_budget, check_kernel, check_transforms, copies, far_apart
from tests.ops.test_channel_attention import data
from visionattn.ops import channel_attention
from visionattn.testing import randn


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is compiled ahead of time (`tests.kernels.aot`): groups of 32 channels, as DaViT's, and the widest."""
    from visionattn.kernels import channel_attention as kernels

    for d in (32, 64):
        x = torch.empty(2, 3, 3136, d, dtype=dtype, device="meta")
        weights = x.new_empty(2, 3, d, d, dtype=torch.float32)
        yield f"d={d}", lambda x=x, d=d: kernels.forward(x, x, x, d**-0.5)
        yield f"d={d}", lambda x=x, d=d, weights=weights: kernels.backward(x, x, x, x, d**-0.5, weights)


def attend(impl: str, scale: float | None = None) -> Callable[..., Tensor]:
    return lambda *x: channel_attention(*x, scale=scale, impl=impl)


def test_is_right() -> None:
    check_kernel(attend("triton"), attend("reference"), data(2, 1, 300, 12))  # three splits


@given(tokens=st.integers(1, 300), groups=st.integers(1, 3), d=st.integers(1, 40))
@settings(max_examples=5, deadline=None)
def test_any_shape(tokens: int, groups: int, d: int) -> None:
    scale = tokens**-0.5  # keeps the softmax soft, whose gradients are else differences of nearly equal numbers
    groups = max(groups, copies(d))
    check_budget(attend("triton", scale), attend("reference", scale), data(1, groups, tokens, d))


def test_more_splits_than_are_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from visionattn.kernels import channel_attention as kernels

    monkeypatch.setattr(kernels, "LEAST", 64)
    (small,) = kernels.SMALL
    tokens = 64 * (small.blocks["SPLITS"] + 1)
    scale = tokens**-0.5
    check_budget(attend("triton", scale), attend("reference", scale), data(1, 1, tokens, 4))


def test_one_channel_is_copied() -> None:
    q, k, v = data(1, 2, 5, 1)
    assert torch.equal(attend("triton")(q, k, v), v)


def test_transforms() -> None:
    check_transforms(attend("triton"), data(2, 2, 9, 5))


def test_opcheck() -> None:
    q, k, v = data(2, 2, 9, 5)
    torch.library.opcheck(torch.ops.visionattn.channel_attention_triton.default, (q, k, v, 0.5))
    args = (randn(2, 2, 9, 5), q, k, v, 0.5, torch.zeros(2, 2, 5, 5))
    torch.library.opcheck(torch.ops.visionattn.channel_attention_triton_backward.default, args)


def test_offsets_exceed_32_bits() -> None:
    q, k, v = (x.bfloat16() for x in data(1, 3, 3, 16))
    far = attend("triton")(*(far_apart(x, dim=2) for x in (q, k, v)))
    assert torch.equal(far, attend("triton")(q, k, v))
