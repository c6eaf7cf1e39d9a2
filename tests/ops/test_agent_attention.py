import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.layers.attention.agent import AgentAttention, pool_to_grid
from visionattn.ops import AgentBias, UnsupportedError, agent_attention
from visionattn.testing import assert_within_budget, check_operator, randn

# batch, heads, map, prefix tokens, agents, head width: real stages, odd maps, one token, one head,
# more agents than tokens
SHAPES = [
    (2, 2, (14, 14), 1, 49, 64),
    (1, 3, (28, 28), 0, 16, 32),
    (2, 1, (5, 9), 0, 9, 8),
    (1, 2, (1, 1), 0, 4, 16),
    (3, 5, (2, 3), 2, 49, 4),
]


def tables(heads: int, agents: int, size: tuple[int, int], prefix: int, seed: int) -> list[Tensor]:
    shapes = [(7, 7), (size[0],), (size[1],), (prefix,)]
    return [randn(heads, agents, *s, seed=seed + i) for i, s in enumerate(shapes)]


def inputs(B: int, h: int, size: tuple[int, int], prefix: int, a: int, d: int) -> list[Tensor]:
    N = prefix + size[0] * size[1]
    tokens = [randn(B, h, n, d, seed=i) for i, n in enumerate((N, N, N, a))]
    return [*tokens, *tables(h, a, size, prefix, 4), *tables(h, a, size, prefix, 8)]


def run(impl: str, size: tuple[int, int]):
    def call(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *bias: Tensor) -> Tensor:
        grids = {"key_bias": AgentBias(*bias[:4]), "query_bias": AgentBias(*bias[4:])} if bias else {}
        return agent_attention(q, k, v, agents, size=size, **grids, impl=impl)

    return call


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_is_within_budget(shape) -> None:
    size = shape[2]
    assert_within_budget(run("eager", size), run("reference", size), inputs(*shape))
    assert_within_budget(run("eager", size), run("reference", size), inputs(*shape)[:4])


def test_eager_passes_what_every_implementation_must() -> None:
    shape = (3, 2, (6, 5), 1, 4, 8)
    tensors = inputs(*shape)
    fixed = tensors[4:]

    def with_bias(impl: str):
        return lambda q, k, v, agents: run(impl, shape[2])(q, k, v, agents, *(x.to(q.dtype) for x in fixed))

    check_operator(with_bias("eager"), with_bias("reference"), tensors[:4])


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradients(impl: str) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(2, 2, (2, 3), 1, 3, 4)]
    assert torch.autograd.gradcheck(run(impl, (2, 3)), tensors, fast_mode=True)


def test_bias_equals_the_resized_sum_of_its_tables() -> None:
    h, a, d = 2, 4, 8
    size, other = (6, 4), (9, 7)
    q, k, v, agents, *bias = inputs(1, h, other, 0, a, d)
    grid, rows, cols = bias[0], randn(h, a, size[0]), randn(h, a, size[1], seed=1)
    full = F.interpolate(grid, size=other, mode="bilinear") + F.interpolate(
        rows[..., None] + cols[..., None, :], size=other, mode="bilinear"
    )
    logits = d**-0.5 * agents @ k.transpose(-2, -1) + full.flatten(2)
    expected = (d**-0.5 * q @ agents.transpose(-2, -1)).softmax(-1) @ (logits.softmax(-1) @ v)
    actual = agent_attention(q, k, v, agents, size=other, key_bias=AgentBias(grid, rows, cols))
    torch.testing.assert_close(actual, expected)


@given(n=st.integers(1, 40), a=st.integers(1, 12), power=st.integers(-3, 3))
@settings(max_examples=15, deadline=None)
def test_weights_sum_to_one(n: int, a: int, power: int) -> None:
    q, k = randn(1, 2, n, 4) * 2.0**power, randn(1, 2, n, 4, seed=1)
    agents = randn(1, 2, a, 4, seed=2)
    y = agent_attention(q, k, torch.full((1, 2, n, 3), 1.5), agents)
    torch.testing.assert_close(y, torch.full_like(y, 1.5))


@given(n=st.integers(1, 20), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_order_of_tokens_and_of_agents_is_free_without_bias(n: int, seed: int) -> None:
    q, k, v, agents = (randn(2, 1, m, 4, seed=i) for i, m in enumerate((n, n, n, 5)))
    gen = torch.Generator().manual_seed(seed)
    tokens, other = torch.randperm(n, generator=gen), torch.randperm(5, generator=gen)
    y = agent_attention(q, k, v, agents)
    moved = agent_attention(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], agents[:, :, other])
    torch.testing.assert_close(moved, y[:, :, tokens], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(agent_attention(q[:1], k[:1], v[:1], agents[:1]), y[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "grid"), [((56, 56), (3, 3)), ((14, 9), (4, 7)), ((1, 2), (7, 7)), ((7, 7), (7, 7))])
def test_pooling_is_adaptive_average_pooling(size, grid) -> None:
    x = randn(2, *size, 5)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).permute(0, 2, 3, 1)
    torch.testing.assert_close(pool_to_grid(x, grid), expected)


def test_layer_with_more_agents_than_its_tables_resizes_them() -> None:
    layer = AgentAttention(16, num_heads=2, agents=(2, 2), size=(8, 8))
    finer = AgentAttention(16, num_heads=2, agents=(2, 2), size=(8, 8), pool=(3, 5))
    finer.load_state_dict(layer.state_dict())
    x = randn(1, 8, 8, 16)
    assert finer(x).shape == x.shape
    assert not torch.allclose(finer(x), layer(x))
    bias = finer.key_bias(finer.pool)
    grid = layer.key_bias.rows.detach().unflatten(1, (2, 2)).permute(0, 3, 1, 2)  # (h, 8, 2, 2)
    expected = F.interpolate(grid, size=(3, 5), mode="bilinear").permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(bias.rows, expected)


def test_wrong_arguments_are_explained() -> None:
    q, k, v, agents, *bias = inputs(1, 2, (2, 3), 0, 4, 8)
    with pytest.raises(ValueError, match="key_bias needs size"):
        agent_attention(q, k, v, agents, key_bias=AgentBias(*bias[:3]))
    with pytest.raises(ValueError, match="are 2 more than the map's 2 x 2"):
        agent_attention(q, k, v, agents, size=(2, 2), key_bias=AgentBias(*bias[:3]))
    with pytest.raises(ValueError, match=r"query_bias\.rows must have 3 axes"):
        agent_attention(q, k, v, agents, size=(2, 3), query_bias=AgentBias(bias[0], bias[1][:1], bias[2]))
    with pytest.raises(ValueError, match="agents must be"):
        agent_attention(q, k, v, agents[..., :4])
    with pytest.raises(ValueError, match="as many keys as queries"):
        agent_attention(q, k[:, :, :2], v[:, :, :2], agents)
    with pytest.raises(UnsupportedError, match="natten"):
        agent_attention(q, k, v, agents, impl="natten")
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads"):
        AgentAttention(10, num_heads=4, agents=(2, 2), size=(4, 4))
    with pytest.raises(ValueError, match="at least one a side"):
        AgentAttention(8, num_heads=4, agents=(0, 2), size=(4, 4))
