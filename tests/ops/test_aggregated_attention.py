import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionattn.ops import _tiles, aggregated_attention
from visionattn.ops.aggregated_attention import _chunked, eager
from visionattn.testing import assert_within_budget, check_operator, randn

NAMES = ("q", "k", "v", "k_pool", "v_pool", "bias_local", "bias_pool", "extra")
# batch, heads, H, W, d, dv, P, window
SHAPES = [
    (2, 3, 7, 5, 8, 8, 4, 3),
    (3, 4, 1, 1, 4, 4, 1, 3),
    (1, 2, 1, 6, 8, 4, 2, 3),
    (2, 1, 9, 2, 5, 7, 3, 5),
    (1, 2, 14, 14, 24, 24, 49, 3),
    (2, 8, 3, 4, 8, 8, 6, 1),
    (1, 1, 3, 2, 8, 8, 2, 7),  # a window larger than the map
]


@pytest.fixture(scope="module", params=[0, math.inf], ids=["chunked", "whole"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Many pooled tokens and few are computed in two ways; every test sees both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "KEPT", request.param)
        yield


def inputs(B: int, h: int, H: int, W: int, d: int, dv: int, P: int, window: int, seed: int = 0) -> list[Tensor]:
    cells = window**2
    shapes = [
        (B, h, H, W, d),
        (B, h, H, W, d),
        (B, h, H, W, dv),
        (B, h, P, d),
        (B, h, P, dv),
        (h, cells),
        (h, H * W, P),
        (B, h, H, W, cells),
    ]
    return [randn(*s, seed=seed + i) for i, s in enumerate(shapes)]


def run(*tensors: Tensor) -> Tensor:
    return aggregated_attention(*tensors, impl="eager")


def reference(*tensors: Tensor) -> Tensor:
    return aggregated_attention(*tensors, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensors = inputs(*shape)
    assert_within_budget(run, reference, tensors, dtype=dtype, names=NAMES)
    assert_within_budget(run, reference, tensors[:-1], dtype=dtype, names=NAMES[:-1])


def test_parity_where_heads_lie_inside_tokens() -> None:
    tensors = inputs(2, 3, 7, 5, 8, 8, 4, 3)

    def permuted(call):
        def inner(*tensors: Tensor) -> Tensor:
            tensors = [x.movedim(1, -2).contiguous().movedim(-2, 1) if x.ndim > 3 else x for x in tensors]
            tensors[6] = tensors[6].transpose(1, 2).contiguous().transpose(1, 2)
            return call(*tensors)

        return inner

    assert_within_budget(permuted(run), permuted(reference), tensors, names=NAMES)


@pytest.mark.parametrize("budget", [1, 300, 2_000, 20_000, 200_000])
def test_parity_however_the_work_is_cut(monkeypatch, budget: int) -> None:
    monkeypatch.setitem(_chunked.CHUNK_BYTES, "cpu", budget)
    monkeypatch.setattr(_tiles, "TILE_BYTES", budget)
    for B, window in ((5, 3), (1, 3), (1, 5)):
        assert_within_budget(run, reference, inputs(B, 4, 9, 6, 8, 6, 5, window), names=NAMES)


def test_what_every_implementation_must_pass() -> None:
    q, k, v, k_pool, v_pool, bias_local, bias_pool, extra = inputs(3, 2, 5, 6, 8, 8, 4, 3)

    def of_maps(impl: str):
        def call(q: Tensor, k: Tensor, v: Tensor, bias_local: Tensor, bias_pool: Tensor) -> Tensor:
            pools = (x[:, :, ::3, ::3].flatten(2, 3) for x in (k, v))
            return aggregated_attention(
                q, k, v, *pools, bias_local, bias_pool, q[..., :1] * k[..., :1].expand(*k.shape[:-1], 9), impl=impl
            )

        return call

    batched = (True, True, True, False, False)
    check_operator(of_maps("eager"), of_maps("reference"), (q, k, v, bias_local, bias_pool), batched=batched)
    tensors = [x.requires_grad_() for x in (q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)]
    ops, args = torch.ops.visionattn, [x.detach() for x in tensors]
    for name in ("aggregated_attention_chunked", "aggregated_attention_whole"):
        forward, backward = getattr(ops, name), getattr(ops, f"{name}_backward")
        for some_args in (args, [*args[:-1], None]):
            torch.library.opcheck(forward, some_args)
            _, *saved = forward(*some_args)
            torch.library.opcheck(backward, [randn(*v.shape), *some_args, *saved])


def test_an_empty_batch_gives_biases_no_gradient() -> None:
    tensors = [x.requires_grad_() for x in inputs(0, 2, 4, 5, 8, 8, 4, 3)]
    out = run(*tensors)
    assert out.shape == (0, 2, 4, 5, 8)
    out.sum().backward()
    assert not any(x.grad.any() for x in tensors)


@pytest.mark.parametrize("impl", ["reference", "eager"])
def test_gradcheck(impl: str) -> None:
    tensors = [x.double().requires_grad_() for x in inputs(2, 2, 3, 2, 3, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *t: aggregated_attention(*t, impl=impl), tensors)


def test_a_second_backward_pass_is_as_the_first() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 2, 4, 4, 8, 8, 4, 3)]
    loss = run(*tensors).square().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, tensors)))


@torch.no_grad()
def test_autocast_leaves_the_arithmetic_alone() -> None:
    tensors = inputs(2, 2, 4, 5, 8, 8, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(*tensors)
    assert torch.equal(y, run(*tensors))


def test_inputs_without_a_gradient_do_not_stop_the_others() -> None:
    tensors = inputs(1, 2, 4, 4, 8, 8, 4, 3)
    tensors[2].requires_grad_()
    run(*tensors).sum().backward()
    (expected,) = torch.autograd.grad(reference(*tensors).sum(), tensors[2])
    torch.testing.assert_close(tensors[2].grad, expected)


def test_inputs_that_lie_as_planes_are_not_written_to() -> None:
    tensors = [x.movedim(-1, 2).contiguous().movedim(2, -1) for x in inputs(2, 2, 4, 5, 8, 8, 4, 3)[:3]]
    rest = inputs(2, 2, 4, 5, 8, 8, 4, 3)[3:]
    extra = rest[-1].movedim(-1, 2).contiguous().movedim(2, -1)
    tensors = [x.requires_grad_() for x in (*tensors, *rest[:-1], extra)]
    before = [x.detach().clone() for x in tensors]
    run(*tensors).square().sum().backward()
    assert all(x.equal(y) for x, y in zip(tensors, before, strict=True))


maps = st.tuples(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.just(4),
    st.just(4),
    st.integers(1, 9),
)
either = pytest.mark.parametrize("impl", ["reference", "eager"])
some = settings(max_examples=15, deadline=None)


@either
@given(shape=maps, window=st.sampled_from([1, 3, 5]))
@some
def test_weights_sum_to_one_and_outside_cells_have_none(impl: str, shape: tuple[int, ...], window: int) -> None:
    q, k, v, k_pool, v_pool, bias_local, bias_pool, _ = inputs(*shape, window)
    out = aggregated_attention(
        q, k, torch.ones_like(v), k_pool, torch.ones_like(v_pool), bias_local, bias_pool, impl=impl
    )
    torch.testing.assert_close(out, torch.ones_like(out))


@either
@given(shape=maps)
@some
def test_extra_weights_add_what_they_weigh(impl: str, shape: tuple[int, ...]) -> None:
    q, k, v, k_pool, v_pool, bias_local, bias_pool, extra = inputs(*shape, 3)
    H, W = shape[2:4]
    args = (q, k, torch.ones_like(v), k_pool, torch.ones_like(v_pool), bias_local, bias_pool)
    y, x = torch.arange(H)[:, None, None], torch.arange(W)[None, :, None]
    dy, dx = torch.arange(9) // 3 - 1, torch.arange(9) % 3 - 1
    inside = (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)  # (H, W, 9)
    expected = 1 + (extra * inside).sum(dim=-1, keepdim=True).expand_as(v)
    torch.testing.assert_close(aggregated_attention(*args, extra, impl=impl), expected)


@either
@given(H=st.integers(1, 4), W=st.integers(1, 4), P=st.integers(1, 5))
@some
def test_a_window_as_large_as_the_map_is_full_attention(impl: str, H: int, W: int, P: int) -> None:
    q, k, v, k_pool, v_pool, _, bias_pool, _ = inputs(2, 2, H, W, 8, 8, P, 7)
    out = aggregated_attention(q, k, v, k_pool, v_pool, torch.zeros(2, 49), bias_pool, impl=impl)
    keys, values = torch.cat([k.flatten(2, 3), k_pool], dim=2), torch.cat([v.flatten(2, 3), v_pool], dim=2)
    bias = torch.cat([torch.zeros(2, H * W, H * W), bias_pool], dim=2)
    expected = ((q.flatten(2, 3) @ keys.transpose(2, 3) + bias).softmax(dim=-1) @ values).view_as(v)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@either
@given(shape=maps, seed=st.integers(0, 99))
@some
def test_the_order_of_pooled_tokens_does_not_matter(impl: str, shape: tuple[int, ...], seed: int) -> None:
    q, k, v, k_pool, v_pool, bias_local, bias_pool, extra = inputs(*shape, 3)
    order = torch.randperm(shape[-1], generator=torch.Generator().manual_seed(seed))
    out = aggregated_attention(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra, impl=impl)
    shuffled = (k_pool[:, :, order], v_pool[:, :, order], bias_local, bias_pool[..., order])
    torch.testing.assert_close(aggregated_attention(q, k, v, *shuffled, extra, impl=impl), out, rtol=1e-4, atol=1e-5)


@either
@given(shape=maps)
@some
def test_the_items_of_a_batch_do_not_mix(impl: str, shape: tuple[int, ...]) -> None:
    *rest, bias_local, bias_pool, extra = inputs(*shape, 3)
    whole = aggregated_attention(*rest, bias_local, bias_pool, extra, impl=impl)
    one = [x[-1:] for x in rest]
    torch.testing.assert_close(
        aggregated_attention(*one, bias_local, bias_pool, extra[-1:], impl=impl), whole[-1:], rtol=1e-4, atol=1e-5
    )


@either
def test_mirrored_maps_give_mirrored_output(impl: str) -> None:
    q, k, v, k_pool, v_pool, bias_local, bias_pool, extra = inputs(1, 2, 5, 6, 8, 8, 4, 3)
    out = aggregated_attention(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra, impl=impl)
    maps = (x.flip(2, 3) for x in (q, k, v))
    mirrored = aggregated_attention(
        *maps, k_pool, v_pool, bias_local.flip(1), bias_pool.flip(1), extra.flip(2, 3, 4), impl=impl
    )
    torch.testing.assert_close(mirrored.flip(2, 3), out)


@either
def test_only_the_window_and_pooled_tokens_are_seen(impl: str) -> None:
    tensors = inputs(1, 1, 6, 6, 4, 4, 2, 3)
    tensors[1].requires_grad_()
    tensors[2].requires_grad_()
    out = aggregated_attention(*tensors, impl=impl)
    for grad in torch.autograd.grad(out[0, 0, 2, 0].sum(), (tensors[1], tensors[2])):
        seen = grad[0, 0].abs().sum(dim=-1) > 0
        assert seen.nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (0, 1)]


def test_exports_through_the_reference() -> None:
    tensors = inputs(2, 2, 4, 5, 8, 8, 4, 3)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return aggregated_attention(*tensors)

    program = torch.export.export(Module(), tuple(tensors))
    assert not any("visionattn" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(*tensors), run(*tensors), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow() -> None:
    tensors = inputs(1, 2, 5, 5, 8, 8, 4, 3)
    out = run(tensors[0] * 1e4, *tensors[1:])
    assert out.isfinite().all()
    assert math.isfinite(out.sum())


def test_wrong_inputs_are_explained() -> None:
    good = dict(zip(NAMES, inputs(2, 2, 4, 4, 8, 8, 4, 3), strict=True))

    def call(**changed: Tensor) -> Tensor:
        return aggregated_attention(**{**good, **changed})

    with pytest.raises(ValueError, match="k_pool and v_pool must be"):
        call(k_pool=randn(2, 2, 4, 7))
    with pytest.raises(ValueError, match="k_pool and v_pool must be"):
        call(k_pool=randn(2, 2, 0, 8), v_pool=randn(2, 2, 0, 8), bias_pool=randn(2, 16, 0))
    with pytest.raises(ValueError, match="odd window"):
        call(bias_local=randn(2, 4))
    with pytest.raises(ValueError, match="odd window"):
        call(bias_local=randn(3, 9))
    with pytest.raises(ValueError, match="bias_pool must be"):
        call(bias_pool=randn(2, 4, 16))
    with pytest.raises(ValueError, match="extra must be"):
        call(extra=randn(2, 2, 4, 4, 4))
    with pytest.raises(ValueError, match="must agree"):
        call(bias_pool=good["bias_pool"].double())
