import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.ops import channel_attention
from visionattn.testing import check_operator, randn


def data(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype) for i in range(3)]


@pytest.mark.parametrize("shape", [(2, 3, 49, 8), (2, 1, 1, 4), (1, 2, 200, 32)], ids=str)
def test_eager_is_right(shape) -> None:
    check_operator(
        lambda *x: channel_attention(*x, impl="eager"), lambda *x: channel_attention(*x, impl="reference"), data(*shape)
    )


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl: str) -> None:
    tensors = [x.requires_grad_() for x in data(1, 2, 5, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: channel_attention(*x, impl=impl), tensors)


@given(tokens=st.integers(1, 40), groups=st.integers(1, 4), dim=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_promises(tokens: int, groups: int, dim: int) -> None:
    q, k, v = data(2, groups, tokens, dim)
    y = channel_attention(q, k, v)
    # a token's output does not depend on where it stands
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    moved = channel_attention(q[:, :, order], k[:, :, order], v[:, :, order])
    torch.testing.assert_close(moved, y[:, :, order], rtol=1e-4, atol=1e-5)
    # weights sum to one: channels that are all alike stay as they are
    same = v[..., :1].expand_as(v)
    torch.testing.assert_close(channel_attention(q, k, same), same)
    torch.testing.assert_close(channel_attention(q[:1], k[:1], v[:1]), y[:1], rtol=1e-4, atol=1e-5)


def test_wrong_arguments_are_explained() -> None:
    q, k, v = data(1, 2, 5, 3)
    with pytest.raises(ValueError, match="must have one shape"):
        channel_attention(q[:, :, :4], k, v)
