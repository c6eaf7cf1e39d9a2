import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.operators.routed_attention import gather_formulation
from visionattn.ops import _crossovers, routed_attention, topk_regions
from visionattn.ops.routed_attention import eager
from visionattn.testing import assert_within_budget, check_operator, poisoned, randn

# heads, map, grid, topk, channels: masked, chunked, one token a region, everything routed, odd and non-square
SHAPES = [
    (2, (14, 14), (7, 7), 16, 8),
    (3, (12, 20), (4, 4), 2, 8),
    (1, (5, 3), (5, 3), 4, 4),
    (2, (6, 4), (2, 1), 2, 8),
    (2, (9, 15), (3, 5), 1, 5),
]
every_shape = pytest.mark.parametrize(("heads", "size", "grid", "topk", "dim"), SHAPES, ids=str)


def data(heads: int, size: tuple[int, int], grid: tuple[int, int], topk: int, dim: int, batch: int = 2) -> list[Tensor]:
    q, k, v = (randn(batch, heads, *size, dim, seed=i) for i in range(3))
    return [q, k, v, topk_regions(q, k, grid=grid, topk=topk)]


@every_shape
def test_eager_is_right(heads, size, grid, topk, dim) -> None:
    check_operator(
        lambda *x: routed_attention(*x, grid=grid, impl="eager"),
        lambda *x: routed_attention(*x, grid=grid, impl="reference"),
        data(heads, size, grid, topk, dim),
    )


def mask_wins_up_to(cover: float, monkeypatch) -> None:
    monkeypatch.setitem(_crossovers.CROSSOVERS, (eager.MASK_WINS, "cpu", None), _crossovers.Crossover(cover, "test"))


@every_shape
def test_chunks_of_any_size_agree(heads, size, grid, topk, dim, monkeypatch) -> None:
    tensors = data(heads, size, grid, topk, dim)
    reference = lambda *x: routed_attention(*x, grid=grid, impl="reference")  # noqa: E731
    mask_wins_up_to(0, monkeypatch)
    for limit in (1, 3000, 2**30):
        monkeypatch.setattr(eager, "CHUNK_BYTES", limit)
        assert_within_budget(lambda *x: routed_attention(*x, grid=grid, impl="eager"), reference, tensors)


@pytest.mark.parametrize("impl", ["reference", "eager"])
@pytest.mark.parametrize("cover", [0, 100])
def test_gradcheck(impl: str, cover: int, monkeypatch) -> None:
    mask_wins_up_to(cover, monkeypatch)
    q, k, v, index = data(2, (4, 6), (2, 3), 2, 3, batch=1)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(lambda *x: routed_attention(*x, index, grid=(2, 3), impl=impl), (q, k, v))


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_routing_everywhere_is_global_attention(impl: str) -> None:
    q, k, v, index = data(2, (6, 6), (3, 3), 9, 8)
    y = routed_attention(q, k, v, index, grid=(3, 3), impl=impl)
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
    torch.testing.assert_close(y.flatten(2, 3), expected)


@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    region=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    data=st.data(),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(grid, region, heads, dim, data) -> None:
    size = (grid[0] * region[0], grid[1] * region[1])
    topk = data.draw(st.integers(1, grid[0] * grid[1]))
    q, k = randn(2, heads, *size, dim), randn(2, heads, *size, dim, seed=1)
    v = randn(2, heads, *size, dim + 1, seed=2)
    index = topk_regions(q, k, grid=grid, topk=topk)
    with poisoned():
        y = routed_attention(q, k, v, index, grid=grid)
    torch.testing.assert_close(y, routed_attention(q, k, v, index, grid=grid, impl="reference"), rtol=1e-4, atol=1e-5)
    # rows of the softmax sum to one, the order of the routed regions does not matter, nor what else is in the batch
    ones = routed_attention(q, k, torch.ones_like(v), index, grid=grid)
    torch.testing.assert_close(ones, torch.ones_like(ones))
    torch.testing.assert_close(routed_attention(q, k, v, index.flip(-1), grid=grid), y, rtol=1e-4, atol=1e-5)
    alone = routed_attention(q[:1], k[:1], v[:1], index[:1], grid=grid)
    torch.testing.assert_close(alone, y[:1], rtol=1e-4, atol=1e-5)


def test_regions_not_routed_to_do_not_matter() -> None:
    q, k, v, _ = data(2, (8, 8), (2, 2), 1, 4)
    index = torch.zeros(2, 4, 1, dtype=torch.int64)
    y = routed_attention(q, k, v, index, grid=(2, 2))
    for x in (k, v):
        x[:, :, 4:] = 1e4
    torch.testing.assert_close(routed_attention(q, k, v, index, grid=(2, 2)), y)


def test_routes_to_the_most_similar_regions() -> None:
    q = torch.zeros(1, 1, 4, 4, 2)
    k = torch.zeros(1, 1, 4, 4, 2)
    q[..., 0] = 1.0
    for number, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        k[0, 0, row : row + 2, column : column + 2, 0] = [0.0, 3.0, 1.0, 2.0][number]
    assert topk_regions(q, k, grid=(2, 2), topk=4)[0].tolist() == [[1, 3, 2, 0]] * 4
    assert topk_regions(q, k, grid=(2, 2), topk=9).shape == (1, 4, 4)


def test_padding_can_be_left_out_of_the_routing() -> None:
    q, k = randn(1, 2, 5, 7, 4), randn(1, 2, 5, 7, 4, seed=1)
    padded = [F.pad(x, (0, 0, 0, 1, 0, 1)) for x in (q, k)]
    index = topk_regions(*padded, grid=(2, 2), topk=4, valid=(5, 7))
    means = [
        torch.stack([x[0, :, r : r + 3, c : c + 4].flatten(1, 2).mean(1).flatten() for r in (0, 3) for c in (0, 4)])
        for x in (q, k)
    ]
    assert torch.equal(index[0], (means[0] @ means[1].T).argsort(dim=-1, descending=True))


@pytest.mark.parametrize("name", ["routed_attention_chunked", "routed_attention_chunked_backward"])
def test_opcheck(name: str) -> None:
    q, k, v, index = (x.contiguous() for x in data(2, (4, 4), (2, 2), 2, 4))
    q, k, v = (x.view(2, 2, 4, 4, 4) for x in (q, k, v))
    args = (*((torch.ones_like(v),) if name.endswith("backward") else ()), q, k, v, index, 0.5)
    tests = ("test_schema", "test_faketensor")
    assert torch.library.opcheck(getattr(torch.ops.visionattn, name).default, args, test_utils=tests)


def test_func_grad_and_checkpoint() -> None:
    q, k, v, index = data(2, (12, 20), (4, 4), 2, 8)

    def loss(q: Tensor) -> Tensor:
        return routed_attention(q, k, v, index, grid=(4, 4), impl="eager").square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    again = torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, leaf)[0], expected)


def test_published_formulation_of_the_benchmark_agrees() -> None:
    q, k, v, index = data(4, (14, 14), (7, 7), 5, 32)
    expected = routed_attention(q, k, v, index, grid=(7, 7), scale=0.1, impl="reference")
    torch.testing.assert_close(gather_formulation(q, k, v, index, 7, 0.1), expected)


def test_gathered_copy_is_bounded_whatever_topk() -> None:
    from visionattn.analysis.bench import peak_bytes

    held = []
    for topk in (2, 8):
        q, k, v, index = data(4, (64, 64), (8, 8), topk, 32, batch=1)
        held.append(peak_bytes(lambda x=(q, k, v, index): routed_attention(*x, grid=(8, 8)), "cpu"))
    maps = 6 * q.numel() * 4  # inputs in region order, the output in both orders, and a little
    assert max(held) <= maps + 2 * eager.CHUNK_BYTES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (3, 2)}, r"grid \(3, 2\) must divide the map's 8 x 8 tokens"),
        ({"index": torch.zeros(2, 3, 1, dtype=torch.int64)}, r"index must be \(B=2, P=4, topk <= P\)"),
        ({"index": torch.zeros(2, 4, 1)}, "index must be int64"),
        ({"q": torch.zeros(2, 8, 8, 4)}, r"q must be \(B, heads, H, W, head_dim\)"),
        ({"k": torch.zeros(2, 2, 8, 8, 5)}, r"k \(2, 2, 8, 8, 5\) does not fit q \(2, 2, 8, 8, 4\)"),
        ({"v": torch.zeros(2, 2, 8, 8, 4).half()}, "they must agree"),
    ],
)
def test_wrong_arguments_are_explained(change, message: str) -> None:
    q, k, v, index = data(2, (8, 8), (2, 2), 2, 4)
    args = {"q": q, "k": k, "v": v, "index": index, "grid": (2, 2), **change}
    with pytest.raises(ValueError, match=message):
        routed_attention(**args)
