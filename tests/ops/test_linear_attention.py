import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops import UnsupportedError, linear_attention
from visionattn.testing import check_operator, randn

SHAPES = [(2, 1, 2, 4), (2, 2, 7, 6), (1, 3, 65, 32), (2, 1, 196, 64)]  # few tokens, odd sizes, real heads
NORMALIZATIONS = ["sum", "magnitude_aware", "injective"]
IMPLS = ["eager", "reference"]


def inputs(*shape: int, normalization: str = "injective", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v = (randn(*shape, seed=i, dtype=dtype) for i in range(3))
    if normalization != "injective":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    return [q, k, v]


def rotation(tokens: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angle = randn(tokens, dim // 2, seed=9, dtype=dtype)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rope"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_eager_is_within_budget(normalization: str, rotated: bool, shape: tuple[int, ...]) -> None:
    if rotated and normalization == "injective":
        normalization = "magnitude_aware"
    tensors = inputs(*shape, normalization=normalization)
    rope = rotation(shape[2], shape[3]) if rotated else None
    scale = 0.7 * shape[3] ** -0.5

    def run(impl: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, normalization=normalization, rope=rope, scale=scale, impl=impl)

    check_operator(
        lambda *t: run("eager", *t),
        lambda *t: run("reference", *t),
        tensors,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        compile_backend="aot_eager" if shape == SHAPES[1] else None,
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_gradcheck(normalization: str, impl: str) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 2, 5, 4, normalization=normalization, dtype=torch.float64)]
    rope = None if normalization == "injective" else rotation(5, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *t: linear_attention(*t, normalization=normalization, rope=rope, impl=impl), tensors
    )


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_one_token_attends_to_itself(normalization: str) -> None:
    q, k, v = inputs(2, 2, 1, 4, normalization=normalization)
    torch.testing.assert_close(linear_attention(q, k, v, normalization=normalization, eps=0.0), v)


def weights(q: Tensor, k: Tensor, normalization: str, **kwargs: object) -> Tensor:
    """The implied N x M matrix: what the operator does to one-hot values."""
    v = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    return linear_attention(q, k, v, normalization=normalization, **kwargs)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_are_those_of_the_papers(impl: str) -> None:
    q, k, _ = inputs(2, 2, 6, 4, normalization="sum", dtype=torch.float64)
    n, scale = 6, 0.3
    dots = q @ k.transpose(-2, -1)
    total = dots.sum(-1, keepdim=True)
    expected = {
        "sum": dots / (total + 1e-6),
        # beta phi(q).phi(k) - gamma with beta = 1 + 1 / total and gamma = total / n, the scale in the features
        "magnitude_aware": (1 + 1 / (scale / n * total + 1e-6)) * scale / n * dots - scale / n * total / n,
        "injective": scale / n * dots - scale / n * dots.mean(-1, keepdim=True) + 1 / n,
    }
    for normalization, w in expected.items():
        actual = weights(q, k, normalization, scale=scale, impl=impl)
        torch.testing.assert_close(actual, w, rtol=1e-10, atol=1e-12)


@given(n=st.integers(1, 40), m=st.integers(1, 40), normalization=st.sampled_from(NORMALIZATIONS))
@settings(max_examples=20, deadline=None)
def test_weights_of_a_query_sum_to_one(n: int, m: int, normalization: str) -> None:
    q, k = (F.elu(randn(1, 2, count, 8, seed=count, dtype=torch.float64)) + 1 for count in (n, m))
    out = linear_attention(q, k, torch.ones(1, 2, m, 3, dtype=torch.float64), normalization=normalization, eps=0.0)
    torch.testing.assert_close(out, torch.ones_like(out))


@given(normalization=st.sampled_from(NORMALIZATIONS), seed=st.integers(0, 100))
@settings(max_examples=15, deadline=None)
def test_order_of_keys_does_not_matter_and_queries_are_independent(normalization: str, seed: int) -> None:
    q, k, v = inputs(2, 2, 9, 4, normalization=normalization, dtype=torch.float64)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    out = linear_attention(q, k, v, normalization=normalization)
    torch.testing.assert_close(linear_attention(q, k[:, :, order], v[:, :, order], normalization=normalization), out)
    torch.testing.assert_close(linear_attention(q[:, :, order], k, v, normalization=normalization), out[:, :, order])
    torch.testing.assert_close(linear_attention(q[:1], k[:1], v[:1], normalization=normalization), out[:1])


@pytest.mark.parametrize("normalization", ["sum", "magnitude_aware"])
def test_rotation_is_relative(normalization: str) -> None:
    q, k, v = inputs(1, 1, 8, 6, normalization=normalization, dtype=torch.float64)
    angle = randn(8, 3, seed=4, dtype=torch.float64)
    first, second = (
        linear_attention(q, k, v, normalization=normalization, rope=((angle + by).cos(), (angle + by).sin()))
        for by in (0.0, 1.7)
    )
    torch.testing.assert_close(first, second)
    unturned = (torch.ones(8, 3, dtype=torch.float64), torch.zeros(8, 3, dtype=torch.float64))
    plain = linear_attention(q, k, v, normalization=normalization)
    torch.testing.assert_close(linear_attention(q, k, v, normalization=normalization, rope=unturned), plain)
    assert not torch.allclose(first, plain)


def test_a_larger_query_makes_magnitude_aware_attention_sharper() -> None:
    q, k, _ = inputs(1, 1, 6, 8, normalization="magnitude_aware", dtype=torch.float64)
    small, large = (weights(q * c, k, "magnitude_aware") for c in (1.0, 4.0))
    assert (large.amax(-1) > small.amax(-1)).all()
    same = [weights(q * c, k, "sum") for c in (1.0, 4.0)]
    torch.testing.assert_close(*same, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_half_precision_holds_at_1024_pixels(normalization: str, impl: str, dtype: torch.dtype) -> None:
    q, k, v = (3 * x for x in inputs(1, 1, 256 * 256, 16))  # the first stage's map, with large activations
    if normalization != "injective":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    tensors = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    rope = None if normalization == "injective" else rotation(256 * 256, 16)
    out = linear_attention(*tensors, normalization=normalization, rope=rope, impl=impl)
    exact = linear_attention(*(x.double() for x in tensors), normalization=normalization, rope=rope, impl=impl)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    grads = torch.autograd.grad(out.sum(), tensors)
    assert all(g.isfinite().all() for g in grads)


def test_autocast_does_not_lower_the_precision_of_sums() -> None:
    q, k, v = inputs(1, 2, 64, 16, normalization="sum")
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_attention(q, k, v)
    torch.testing.assert_close(y, linear_attention(q, k, v), rtol=0, atol=0)


def test_wrong_arguments_are_explained() -> None:
    q, k, v = inputs(1, 2, 6, 4)
    with pytest.raises(ValueError, match="normalization must be one of sum, magnitude_aware, injective"):
        linear_attention(q, k, v, normalization="softmax")
    with pytest.raises(ValueError, match="takes no rope"):
        linear_attention(q, k, v, normalization="injective", rope=rotation(6, 4))
    with pytest.raises(ValueError, match=r"rope must be two tensors \(N, d / 2\)"):
        linear_attention(q, k, v, rope=rotation(5, 4))
    with pytest.raises(ValueError, match="as many keys as queries"):
        linear_attention(q, k[:, :, :5], v[:, :, :5], rope=rotation(6, 4))
    with pytest.raises(ValueError, match=r"must be \(B, heads, tokens, head_dim\)"):
        linear_attention(q[0], k[0], v[0])
    with pytest.raises(UnsupportedError, match="there is no impl='flex'"):
        linear_attention(q, k, v, impl="flex")
