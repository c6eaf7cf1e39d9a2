import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops import UnsupportedError, _crossovers, _tiles, clipped_softmax_attention
from visionattn.ops.clipped_softmax_attention.eager import KEPT_WINS, WHOLE_WINS
from visionattn.testing import assert_within_budget, check_operator, poisoned, randn

# heads, queries, keys, channels, channels of values: many tiles, one query, odd sizes, more queries than keys
SHAPES = [(2, 50, 50, 16, 16), (3, 1, 6, 4, 4), (1, 17, 33, 5, 7), (2, 129, 64, 8, 8)]
CLIPS = [(-0.01, 1.0), (-0.01, 1.2), (0.0, 1.003), (0.0, 1.0), (-0.2, 1.0)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_clip = pytest.mark.parametrize("clip", CLIPS, ids=str)
every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])


@pytest.fixture(params=[0, math.inf], ids=["tiles", "whole"])
def scoring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in the way of large maps, and in that of small ones."""
    for name in (WHOLE_WINS, KEPT_WINS):
        monkeypatch.setitem(_crossovers.CROSSOVERS, (name, "cpu", None), _crossovers.Crossover(request.param, "test"))


def data(heads: int, N: int, S: int, d: int, dv: int, batch: int = 2) -> list[Tensor]:
    q, k = 2 * randn(batch, heads, N, d), randn(batch, heads, S, d, seed=1)
    return [q, k, randn(batch, heads, S, dv, seed=2)]


def attend(impl: str, clip: tuple[float, float]):
    return lambda *x: clipped_softmax_attention(*x, gamma=clip[0], zeta=clip[1], impl=impl)


@every_clip
@every_impl
@every_shape
@pytest.mark.usefixtures("scoring")
def test_is_the_published_formula(shape, impl: str, clip) -> None:
    q, k, v = (x.double() for x in data(*shape))
    attn = (q @ k.mT / shape[3] ** 0.5).softmax(-1)
    expected = torch.clip((clip[1] - clip[0]) * attn + clip[0], 0, 1) @ v
    torch.testing.assert_close(attend(impl, clip)(q, k, v), expected)


@every_clip
@every_shape
@pytest.mark.usefixtures("scoring")
def test_eager_is_right(shape, clip) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    check_operator(attend("eager", clip), attend("reference", clip), data(*shape), dtypes=dtypes)


@every_shape
def test_tiles_of_any_size_agree(shape, monkeypatch) -> None:
    for name in (WHOLE_WINS, KEPT_WINS):
        monkeypatch.setitem(_crossovers.CROSSOVERS, (name, "cpu", None), _crossovers.Crossover(0, "test"))
    for size in (1, 3000, 2**30):
        monkeypatch.setattr(_tiles, "TILE_BYTES", size)
        assert_within_budget(attend("eager", (-0.01, 1.1)), attend("reference", (-0.01, 1.1)), data(*shape))


@every_clip
@every_impl
@pytest.mark.usefixtures("scoring")
def test_gradcheck(impl: str, clip, monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_BYTES", 100)
    tensors = [x.double().requires_grad_() for x in data(2, 4, 5, 3, 2, batch=1)]
    assert torch.autograd.gradcheck(attend(impl, clip), tensors)


def test_opcheck() -> None:
    q, k, v = data(2, 9, 5, 4, 3)
    args = (q, k, v, -0.01, 1.1, 0.5)
    torch.library.opcheck(torch.ops.visionattn.clipped_softmax_attention_tiled.default, args)
    args = (torch.ones(2, 2, 9, 3), *args)
    torch.library.opcheck(torch.ops.visionattn.clipped_softmax_attention_tiled_backward.default, args)


@given(
    N=st.integers(1, 40),
    S=st.integers(1, 40),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    gamma=st.floats(-0.1, 0),
    zeta=st.floats(1, 1.5),
    tile=st.integers(1, 5000),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_and_nothing_left_unwritten(N, S, heads, dim, gamma, zeta, tile) -> None:
    tensors = data(heads, N, S, dim, dim + 1)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(_tiles, "TILE_BYTES", tile)
        patch.setitem(_crossovers.CROSSOVERS, (WHOLE_WINS, "cpu", None), _crossovers.Crossover(0, "test"))
        y = attend("eager", (gamma, zeta))(*tensors)
    torch.testing.assert_close(y, attend("reference", (gamma, zeta))(*tensors), rtol=1e-4, atol=1e-5)


@every_impl
def test_no_clipping_is_plain_attention(impl: str) -> None:
    q, k, v = data(2, 30, 20, 8, 8)
    torch.testing.assert_close(attend(impl, (0.0, 1.0))(q, k, v), F.scaled_dot_product_attention(q, k, v))


@every_impl
@pytest.mark.usefixtures("scoring")
def test_probabilities_are_in_range_and_zero_where_small(impl: str) -> None:
    q, k, _ = data(2, 30, 20, 8, 8)
    attn = attend(impl, (-0.1, 1.1))(q, k, torch.eye(20).expand(2, 2, 20, 20))
    plain = (q @ k.mT / 8**0.5).softmax(-1)
    assert attn.min() == 0
    assert attn.max() <= 1 + 1e-6
    low, high = 0.1 / 1.2, 1.1 / 1.2
    assert not attn[plain < low - 1e-6].any()
    torch.testing.assert_close(attn[plain > high + 1e-6], torch.ones_like(attn[plain > high + 1e-6]))
    assert (attn.sum(-1) - 1).abs().max() > 0.1


@every_impl
@pytest.mark.usefixtures("scoring")
def test_a_head_can_attend_to_nothing(impl: str) -> None:
    _, k, v = data(2, 30, 20, 8, 8)
    y = attend(impl, (-2 / 20, 1.0))(torch.zeros(2, 2, 30, 8), k, v)
    assert not y.any()


@every_impl
def test_order_of_keys_does_not_matter(impl: str) -> None:
    q, k, v = data(2, 30, 20, 8, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    run = attend(impl, (-0.03, 1.0))
    torch.testing.assert_close(run(q, k[:, :, order], v[:, :, order]), run(q, k, v))


@every_impl
def test_queries_and_items_do_not_mix(impl: str) -> None:
    q, k, v = data(2, 30, 20, 8, 8, batch=3)
    run = attend(impl, (-0.03, 1.0))
    torch.testing.assert_close(run(q[1:2, :, 5:9], k[1:2], v[1:2]), run(q, k, v)[1:2, :, 5:9])


def test_wrong_arguments_are_explained() -> None:
    q, k, v = data(2, 9, 9, 4, 4)
    with pytest.raises(ValueError, match=r"gamma must be at most 0 and zeta at least 1, got 0.1 and 1"):
        clipped_softmax_attention(q, k, v, gamma=0.1)
    with pytest.raises(ValueError, match="zeta at least 1"):
        clipped_softmax_attention(q, k, v, gamma=-0.1, zeta=0.9)
    with pytest.raises(ValueError, match=r"k .* does not fit q"):
        clipped_softmax_attention(q, k[:, :1], v[:, :1], gamma=-0.1)
    with pytest.raises(UnsupportedError, match="no impl='flex'"):
        clipped_softmax_attention(q, k, v, gamma=-0.1, impl="flex")
