import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops import gated_positional_attention
from visionattn.testing import check_operator, randn


def data(batch: int, heads: int, H: int, W: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    maps = [randn(batch, heads, H, W, dim, seed=i, dtype=dtype) for i in range(3)]
    return [*maps, randn(heads, 3, seed=3, dtype=dtype), randn(heads, seed=4, dtype=dtype).sigmoid()]


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 8), (2, 1, 1, 1, 4), (1, 2, 14, 14, 16), (1, 2, 1, 9, 4)], ids=str)
def test_eager_is_right(shape) -> None:
    check_operator(
        lambda *x: gated_positional_attention(*x, impl="eager"),
        lambda *x: gated_positional_attention(*x, impl="reference"),
        data(*shape),
        batched=(True, True, True, False, False),
    )


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl: str) -> None:
    tensors = [x.requires_grad_() for x in [*data(1, 2, 2, 3, 2, torch.float64), randn(2, dtype=torch.float64)]]
    assert torch.autograd.gradcheck(
        lambda *x: gated_positional_attention(*x[:5], bias=x[5], impl=impl), tensors, atol=1e-6
    )


@given(H=st.integers(1, 8), W=st.integers(1, 8), heads=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_promises(H: int, W: int, heads: int) -> None:
    q, k, v, position, gate = data(2, heads, H, W, 4)
    ones = gated_positional_attention(q, k, torch.ones_like(v), position, gate)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    content = gated_positional_attention(q, k, v, position, torch.zeros(heads))
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
    torch.testing.assert_close(content.flatten(2, 3), expected, rtol=1e-4, atol=1e-5)
    # steep negative squares look at the query itself alone
    steep = torch.tensor([[0.0, 0.0, -1e4]]).expand(heads, 3)
    torch.testing.assert_close(gated_positional_attention(q, k, v, steep, torch.ones(heads)), v)


def test_direction_is_from_the_query_to_the_key() -> None:
    v = torch.arange(4.0).view(1, 1, 1, 4, 1)
    right = torch.tensor([[50.0, 0.0, 0.0]])
    assert gated_positional_attention(v, v, v, right, torch.ones(1)).flatten().tolist() == [3.0, 3.0, 3.0, 3.0]


def test_wrong_arguments_are_explained() -> None:
    q, k, v, position, gate = data(1, 2, 3, 3, 4)
    with pytest.raises(ValueError, match=r"position must be \(2, 3\) for 2 heads, got \(2, 2\)"):
        gated_positional_attention(q, k, v, position[:, :2], gate)
    with pytest.raises(ValueError, match=r"gate must be \(2,\) for 2 heads"):
        gated_positional_attention(q, k, v, position, gate[:1])
