import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops import UnsupportedError, _crossovers, window_attention
from visionattn.ops.window_attention import eager
from visionattn.testing import check_operator, randn

# The map's shape, the window, options.
CASES = [
    ((2, 2, 4, 6, 8), (2, 3), {}),
    ((2, 1, 1, 1, 4), (1, 1), {}),
    ((1, 2, 14, 14, 16), (7, 7), {"shift": (3, 3)}),
    ((2, 2, 8, 8, 4), (4, 4), {"shift": (2, 0)}),
    ((1, 2, 6, 6, 4), (6, 3), {"shift": (1, 2)}),  # one window along H: the shift cuts it in two
    ((2, 2, 8, 12, 4), (4, 4), {"grid": True}),
    ((1, 2, 20, 10, 4), (10, 10), {"scale": 0.3}),  # windows large enough for SDPA
    ((2, 2, 6, 10, 4), (2, 10), {}),  # stripes
]


@pytest.fixture(params=[0, math.inf], ids=["zones", "masked"])
def shifting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shifted windows in the way of large maps, and in that of small ones."""
    way = _crossovers.Crossover(request.param, "test")
    monkeypatch.setitem(_crossovers.CROSSOVERS, (eager.MASK_WINS, "cpu", None), way)


def inputs(shape: tuple[int, ...], window: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    n = window[0] * window[1]
    return [*(randn(*shape, seed=i, dtype=dtype) for i in range(3)), randn(shape[1], n, n, seed=3, dtype=dtype)]


@pytest.mark.parametrize(("shape", "window", "options"), CASES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
@pytest.mark.usefixtures("shifting")
def test_eager_is_within_budget(shape: tuple[int, ...], window: tuple[int, int], options: dict, biased: bool) -> None:
    tensors = inputs(shape, window)[: 4 if biased else 3]

    def run(impl: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, window=window, bias=bias, impl=impl, **options)

    check_operator(
        lambda *t: run("eager", *t),
        lambda *t: run("reference", *t),
        tensors,
        dtypes=(torch.float32, torch.bfloat16),
        batched=[x.ndim == 5 for x in tensors],
        compile_backend="aot_eager" if biased and options else None,
    )


@pytest.mark.parametrize("options", [{}, {"shift": 1}, {"grid": True}], ids=str)
@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.usefixtures("shifting")
def test_gradcheck(impl: str, options: dict) -> None:
    tensors = [x.requires_grad_() for x in inputs((1, 2, 4, 4, 2), (2, 2), torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, b: window_attention(q, k, v, window=2, bias=b, impl=impl, **options), tensors
    )


@pytest.mark.parametrize("options", [{}, {"shift": 1}], ids=str)
@pytest.mark.parametrize("of", ["maps", "bias"])
@pytest.mark.usefixtures("shifting")
def test_runs_under_vmap(of: str, options: dict) -> None:
    *maps, bias = inputs((1, 2, 4, 4, 2), (2, 2))
    dims = (0, 0, 0, None) if of == "maps" else (None, None, None, 0)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return window_attention(q, k, v, window=2, bias=bias, impl="eager", **options)

    tensors = [x if dim is None else torch.stack([x, 2 * x]) for x, dim in zip([*maps, bias], dims, strict=True)]
    expected = [run(*(x if dim is None else x[i] for x, dim in zip(tensors, dims, strict=True))) for i in range(2)]
    torch.testing.assert_close(torch.vmap(run, dims)(*tensors), torch.stack(expected))


def weights(q: Tensor, k: Tensor, **options: object) -> Tensor:
    """The implied N x N matrix of the whole map, ``(B, h, N, N)``: what the operator does to one-hot values."""
    B, h, H, W, _ = q.shape
    v = torch.eye(H * W, dtype=q.dtype).view(1, 1, H, W, H * W).expand(B, h, -1, -1, -1)
    return window_attention(q, k, v, **options).flatten(2, 3)


@pytest.mark.parametrize("impl", ["eager", "reference"])
@pytest.mark.usefixtures("shifting")
def test_shifted_windows_hold_neighbours_alone(impl: str) -> None:
    q, k = (randn(1, 1, 8, 12, 4, seed=i) for i in range(2))
    w = weights(q, k, window=4, shift=(2, 1), impl=impl)[0, 0]
    row, col = (torch.arange(8) - 2).div(4, rounding_mode="floor"), (torch.arange(12) - 1).div(4, rounding_mode="floor")
    number = (row[:, None] * 100 + col[None]).flatten()
    assert torch.equal(w > 0, number[:, None] == number[None])


@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_grid_windows_hold_tokens_at_equal_strides(impl: str) -> None:
    q, k = (randn(1, 1, 8, 12, 4, seed=i) for i in range(2))
    w = weights(q, k, window=4, grid=True, impl=impl)[0, 0]
    number = ((torch.arange(8) % 2)[:, None] * 100 + (torch.arange(12) % 3)[None]).flatten()
    assert torch.equal(w > 0, number[:, None] == number[None])


@given(
    window=st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 8)]),
    shifted=st.booleans(),
    grid=st.booleans(),
    impl=st.sampled_from(["eager", "reference"]),
)
@settings(max_examples=25, deadline=None)
def test_rows_of_the_softmax_sum_to_one(window: tuple[int, int], shifted: bool, grid: bool, impl: str) -> None:
    q, k, _, bias = inputs((2, 2, 4, 8, 4), window)
    shift = (window[0] // 2, window[1] // 2) if shifted and not grid else 0
    v = torch.full((2, 2, 4, 8, 3), 2.5)
    out = window_attention(q, k, v, window=window, bias=bias, shift=shift, grid=grid, impl=impl)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("impl", ["eager", "reference"])
def test_window_as_large_as_the_map_is_global_attention(impl: str, grid: bool) -> None:
    q, k, v, bias = inputs((2, 3, 5, 7, 8), (5, 7))
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)), attn_mask=bias)
    out = window_attention(q, k, v, window=(5, 7), bias=bias, grid=grid, impl=impl)
    torch.testing.assert_close(out.flatten(2, 3), expected)


def test_grid_is_windows_of_a_regrouped_map() -> None:
    q, k, v, bias = inputs((1, 2, 6, 6, 4), (3, 3))
    order = torch.tensor([0, 2, 4, 1, 3, 5])  # tokens at stride two become neighbours
    regrouped = [x[:, :, order][:, :, :, order] for x in (q, k, v)]
    expected = window_attention(q, k, v, window=3, bias=bias, grid=True)[:, :, order][:, :, :, order]
    torch.testing.assert_close(window_attention(*regrouped, window=3, bias=bias), expected)


def test_windows_and_batch_items_do_not_mix() -> None:
    q, k, v, bias = inputs((2, 2, 8, 8, 4), (4, 4))
    out = window_attention(q, k, v, window=4, bias=bias)
    torch.testing.assert_close(window_attention(q[:1], k[:1], v[:1], window=4, bias=bias), out[:1])
    corner = [x[:, :, :4, 4:] for x in (q, k, v)]
    torch.testing.assert_close(window_attention(*corner, window=4, bias=bias), out[:, :, :4, 4:])


def test_moving_the_map_by_a_window_moves_the_result() -> None:
    q, k, v, bias = inputs((1, 2, 8, 8, 4), (4, 4))
    moved = [x.roll((4, 4), dims=(2, 3)) for x in (q, k, v)]
    expected = window_attention(q, k, v, window=4, bias=bias).roll((4, 4), dims=(2, 3))
    torch.testing.assert_close(window_attention(*moved, window=4, bias=bias), expected)


def test_wrong_arguments_are_explained() -> None:
    q, k, v, bias = inputs((1, 2, 4, 4, 4), (2, 2))
    with pytest.raises(ValueError, match="must divide the map's 4 x 4 tokens"):
        window_attention(q, k, v, window=3)
    with pytest.raises(ValueError, match=r"shift \(2, 2\) must be in \[0, window\)"):
        window_attention(q, k, v, window=2, shift=2)
    with pytest.raises(ValueError, match="grid windows cannot be shifted"):
        window_attention(q, k, v, window=2, shift=1, grid=True)
    with pytest.raises(ValueError, match=r"bias must be floating \(heads=2, n=4, n=4\)"):
        window_attention(q, k, v, window=2, bias=bias[:1])
    with pytest.raises(ValueError, match="must be"):
        window_attention(q[0], k[0], v[0], window=2)
    with pytest.raises(UnsupportedError, match="there is no impl='natten'"):
        window_attention(q, k, v, window=2, impl="natten")


def test_shifted_windows_export_with_an_open_batch() -> None:
    class Shifted(torch.nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return window_attention(q, q, q, window=4, shift=2)

    axes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Shifted(), (randn(2, 2, 8, 8, 4),), dynamic_shapes=axes).module()
    assert sum(node.target is torch.ops.aten.softmax.int for node in program.graph.nodes) == 1  # not one a zone
    x = randn(5, 2, 8, 8, 4)
    torch.testing.assert_close(program(x), Shifted()(x))
