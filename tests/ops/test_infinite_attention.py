import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.analysis.bench import peak_bytes
from visionattn.ops import UnsupportedError, _crossovers, _tiles, infinite_attention, use_impl
from visionattn.ops.infinite_attention.eager import WHOLE_WINS
from visionattn.testing import assert_within_budget, check_operator, poisoned, randn

# heads, queries, keys, channels, channels of values: many tiles, one query, odd sizes, more queries than keys
SHAPES = [(2, 50, 50, 16, 16), (3, 1, 6, 4, 4), (1, 17, 33, 5, 7), (2, 129, 64, 8, 8)]
RHO = torch.tensor(0.9)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
every_form = pytest.mark.parametrize("form", ["pure", "linear"])
every_impl = pytest.mark.parametrize("impl", ["reference", "eager"])


@pytest.fixture(params=[0, math.inf], ids=["tiles", "whole"])
def scoring(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores in the way of large maps, and in that of small ones."""
    way = _crossovers.Crossover(request.param, "test")
    monkeypatch.setitem(_crossovers.CROSSOVERS, (WHOLE_WINS, "cpu", None), way)


def data(heads: int, N: int, S: int, d: int, dv: int, batch: int = 2) -> list[Tensor]:
    q, k = randn(batch, heads, N, d), randn(batch, heads, S, d, seed=1)
    return [q, k, randn(batch, heads, S, dv, seed=2), RHO]


def attend(impl: str, form: str):
    """The operator of q, k and v; the gradient of rho is one sum of a product, for `test_gradcheck` to check."""
    return lambda q, k, v: infinite_attention(q, k, v, RHO.to(q.dtype), form=form, impl=impl)


def authors(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str) -> Tensor:
    """The formulas of the paper's code, one operation a line."""
    q, k = q / q.shape[-1] ** 0.5, k / q.shape[-1] ** 0.5
    if form == "pure":
        attn = torch.relu(q @ k.mT)
        attn = attn / (attn.flatten(2).norm(dim=-1)[..., None, None] + 1e-6)
        return (rho * attn) @ v
    weights = q.norm(dim=-1) / (q.norm(dim=-1).sum(-1, keepdim=True) + 1e-6)
    mean = (weights[..., None] * q).sum(2, keepdim=True)
    attn = torch.relu((mean * k).sum(-1))
    attn = attn / (attn.sum(-1, keepdim=True) + 1e-6)
    return (rho * attn[..., None] * v).sum(2, keepdim=True)


@every_form
@every_impl
@every_shape
@pytest.mark.usefixtures("scoring")
def test_is_the_published_formula(shape, impl: str, form: str) -> None:
    tensors = [x.double() for x in data(*shape)]
    actual = infinite_attention(*tensors, form=form, impl=impl)
    torch.testing.assert_close(actual, authors(*tensors, form))


@every_form
@every_shape
@pytest.mark.usefixtures("scoring")
def test_eager_is_right(shape, form: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    check_operator(attend("eager", form), attend("reference", form), data(*shape)[:3], dtypes=dtypes)


@every_shape
def test_tiles_of_any_size_agree(shape, monkeypatch) -> None:
    monkeypatch.setitem(_crossovers.CROSSOVERS, (WHOLE_WINS, "cpu", None), _crossovers.Crossover(0, "test"))
    for size in (1, 3000, 2**30):
        monkeypatch.setattr(_tiles, "TILE_BYTES", size)
        assert_within_budget(attend("eager", "pure"), attend("reference", "pure"), data(*shape)[:3])


@every_form
@every_impl
@pytest.mark.usefixtures("scoring")
def test_gradcheck(impl: str, form: str, monkeypatch) -> None:
    monkeypatch.setattr(_tiles, "TILE_BYTES", 100)
    q, k, v, _ = (x.double().requires_grad_() for x in data(2, 4, 5, 3, 2, batch=1))
    rho = torch.tensor([0.9, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: infinite_attention(*x, form=form, impl=impl), (q, k, v, rho))


def test_opcheck() -> None:
    tensors = data(2, 9, 5, 4, 3)[:3]
    torch.library.opcheck(torch.ops.visionattn.infinite_attention_tiled.default, (*tensors, 0.25, 1e-6))
    out, norm = torch.ops.visionattn.infinite_attention_tiled(*tensors, 0.25, 1e-6)
    args = (torch.ones_like(out), *tensors, 0.25, 1e-6, out, norm)
    torch.library.opcheck(torch.ops.visionattn.infinite_attention_tiled_backward.default, args)
    torch.library.opcheck(torch.ops.visionattn.infinite_attention_pooled.default, (*tensors, 0.25, 1e-6))
    out, *saved = torch.ops.visionattn.infinite_attention_pooled(*tensors, 0.25, 1e-6)
    args = (torch.ones_like(out), *tensors, 0.25, 1e-6, *saved)
    torch.library.opcheck(torch.ops.visionattn.infinite_attention_pooled_backward.default, args)


@given(
    N=st.integers(1, 40),
    S=st.integers(1, 40),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    tile=st.integers(1, 5000),
)
@settings(max_examples=25, deadline=None)
def test_any_shape_and_nothing_left_unwritten(N, S, heads, dim, tile) -> None:
    tensors = data(heads, N, S, dim, dim + 1)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(_tiles, "TILE_BYTES", tile)
        patch.setitem(_crossovers.CROSSOVERS, (WHOLE_WINS, "cpu", None), _crossovers.Crossover(0, "test"))
        y = infinite_attention(*tensors, impl="eager")
    torch.testing.assert_close(y, infinite_attention(*tensors, impl="reference"), rtol=1e-4, atol=1e-6)


@every_impl
def test_norm_of_the_pure_attention_matrix_is_rho(impl: str) -> None:
    q, k, _, rho = data(2, 30, 20, 8, 8)
    eye = torch.eye(20).expand(2, 2, 20, 20)
    attn = infinite_attention(q, k, eye, rho, impl=impl)
    torch.testing.assert_close(attn.norm(dim=(2, 3)), rho.expand(2, 2), rtol=1e-4, atol=0)
    assert attn.min() >= 0


@every_impl
def test_linear_weights_sum_to_rho(impl: str) -> None:
    q, k, _, rho = data(2, 30, 20, 8, 8)
    y = infinite_attention(q, k, torch.ones(2, 2, 20, 1), rho, form="linear", impl=impl)
    torch.testing.assert_close(y, rho.expand(2, 2, 1, 1), rtol=1e-4, atol=0)


@every_form
@every_impl
def test_order_of_keys_does_not_matter(impl: str, form: str) -> None:
    q, k, v, rho = data(2, 30, 20, 8, 8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    y = infinite_attention(q, k, v, rho, form=form, impl=impl)
    torch.testing.assert_close(infinite_attention(q, k[:, :, order], v[:, :, order], rho, form=form, impl=impl), y)


@every_form
@every_impl
def test_items_and_heads_do_not_mix(impl: str, form: str) -> None:
    q, k, v, _ = data(2, 30, 20, 8, 8, batch=3)
    rho = torch.tensor([0.9, 0.5])
    y = infinite_attention(q, k, v, rho, form=form, impl=impl)
    one = infinite_attention(*(x[1:2, 1:] for x in (q, k, v)), rho[1:], form=form, impl=impl)
    torch.testing.assert_close(one, y[1:2, 1:])


@every_form
@every_impl
@pytest.mark.usefixtures("scoring")
def test_scores_that_are_all_negative_give_zero_and_finite_gradients(impl: str, form: str) -> None:
    q, k = torch.ones(1, 1, 4, 2, requires_grad=True), -torch.ones(1, 1, 4, 2)
    y = infinite_attention(q, k.requires_grad_(), torch.ones(1, 1, 4, 2), torch.tensor(0.9), form=form, impl=impl)
    assert not y.any()
    grads = torch.autograd.grad(y.sum(), (q, k))
    assert all(g.isfinite().all() for g in grads)


@every_form
@every_impl
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("scoring")
def test_norm_of_many_tokens_survives_half_precision(dtype: torch.dtype, impl: str, form: str) -> None:
    tensors = [10 * x for x in data(1, 1024, 1024, 16, 16, batch=1)[:3]]  # the squared norm is over fp16's range
    rho = torch.tensor(0.9)
    exact = infinite_attention(*(x.to(dtype).double() for x in tensors), rho.double(), form=form, impl=impl)
    y = infinite_attention(*(x.to(dtype) for x in tensors), rho, form=form, impl=impl)
    assert y.dtype == dtype
    assert (y.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("backward", [False, True])
def test_pure_form_needs_a_tenth_of_the_memory(backward: bool) -> None:
    tensors = [x.requires_grad_(backward) for x in data(1, 4096, 4096, 32, 32, batch=1)]

    def peak(impl: str) -> int:
        def call() -> None:
            y = infinite_attention(*tensors, impl=impl)
            if backward:
                torch.autograd.grad(y.sum(), tensors)

        return peak_bytes(call, "cpu")

    assert 0 < 10 * peak("eager") <= peak("reference")


def test_exporting_is_left_to_the_reference() -> None:
    class Attend(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            return infinite_attention(*x)

    class Eager(torch.nn.Module):
        def forward(self, *x: Tensor) -> Tensor:
            with use_impl("eager"):
                return infinite_attention(*x)

    tensors = tuple(data(2, 9, 9, 4, 4))
    torch.testing.assert_close(torch.export.export(Attend(), tensors).module()(*tensors), Attend()(*tensors))
    with pytest.raises(Exception, match="opaque to exporters"):
        torch.export.export(Eager(), tensors)


def test_wrong_arguments_are_explained() -> None:
    q, k, v, rho = data(2, 9, 9, 4, 4)
    with pytest.raises(ValueError, match="form must be 'pure' or 'linear', got 'neumann'"):
        infinite_attention(q, k, v, rho, form="neumann")
    with pytest.raises(ValueError, match=r"rho must be a scalar or \(2,\)"):
        infinite_attention(q, k, v, torch.ones(3))
    with pytest.raises(ValueError, match="scale must be positive"):
        infinite_attention(q, k, v, rho, scale=0.0)
    with pytest.raises(ValueError, match="same tokens"):
        infinite_attention(q, k, v[:, :, 1:], rho)
    with pytest.raises(UnsupportedError, match="no impl='natten'"):
        infinite_attention(q, k, v, rho, impl="natten")
