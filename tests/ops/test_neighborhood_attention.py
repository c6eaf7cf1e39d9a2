import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.bench import peak_bytes
from visionattn.analysis.operators.neighborhood_attention import gather_formulation
from visionattn.ops import UnsupportedError, _dispatch, neighborhood_attention
from visionattn.ops.neighborhood_attention import eager, natten
from visionattn.testing import assert_within_budget, check_operator, poisoned, randn

# heads, map, kernel, dilation, channels: one tile, several, classes of unequal size, even and unequal kernels, one key
SHAPES = [
    (2, (7, 7), 7, 1, 8),
    (3, (9, 21), 7, 1, 8),
    (2, (15, 19), 7, 2, 5),
    (1, (10, 11), 3, 3, 4),
    (2, (13, 9), (3, 4), (2, 1), 8),
    (2, (5, 4), 1, 2, 3),
]
every_shape = pytest.mark.parametrize(("heads", "size", "kernel", "dilation", "dim"), SHAPES, ids=str)
both = pytest.mark.parametrize("impl", ["reference", "eager"])


def data(heads: int, size: tuple[int, int], kernel: int | tuple[int, int], dim: int, batch: int = 2) -> list[Tensor]:
    rows, cols = (kernel, kernel) if isinstance(kernel, int) else kernel
    q, k, v = (randn(batch, heads, *size, dim, seed=i) for i in range(3))
    return [q, k, v, randn(heads, 2 * rows - 1, 2 * cols - 1, seed=3)]


def run(impl: str, kernel: int | tuple[int, int], dilation: int | tuple[int, int] = 1):
    return lambda *x: neighborhood_attention(*x, kernel_size=kernel, dilation=dilation, impl=impl)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, dilation: int) -> Tensor:
    """The definition read token by token: an N x N matrix of bias, -inf outside of the neighbourhood."""
    H, W = q.shape[2:4]

    def window(i: int, length: int) -> dict[int, int]:  # key to where the bias is read
        same = range(i % dilation, length, dilation)
        me = same.index(i)
        first = min(max(me - kernel // 2, 0), len(same) - kernel)
        return {same[j]: j - me + kernel - 1 for j in range(first, first + kernel)}

    mask = torch.full((bias.shape[0], H * W, H * W), -torch.inf)
    for y in range(H):
        for x in range(W):
            for r, dr in window(y, H).items():
                for c, dc in window(x, W).items():
                    mask[:, y * W + x, r * W + c] = bias[:, dr, dc]
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(2, (H, W))


@both
@pytest.mark.parametrize(
    ("size", "kernel", "dilation"), [((8, 6), 5, 1), ((7, 10), 3, 2), ((9, 9), 4, 2), ((11, 12), 3, 3)], ids=str
)
def test_is_the_definition(impl: str, size, kernel, dilation) -> None:
    tensors = data(2, size, kernel, 4)
    torch.testing.assert_close(run(impl, kernel, dilation)(*tensors), dense(*tensors, kernel, dilation))


@every_shape
@pytest.mark.parametrize("biased", [True, False])
def test_eager_is_right(heads, size, kernel, dilation, dim, biased) -> None:
    tensors = data(heads, size, kernel, dim)[: 4 if biased else 3]
    check_operator(
        run("eager", kernel, dilation),
        run("reference", kernel, dilation),
        tensors,
        batched=[True, True, True, False][: len(tensors)],
    )


@every_shape
def test_chunks_of_any_size_agree(heads, size, kernel, dilation, dim, monkeypatch) -> None:
    tensors = data(heads, size, kernel, dim)
    for limit in (1, 20_000, 2**30):
        monkeypatch.setitem(eager.CHUNK_BYTES, "cpu", limit)
        assert_within_budget(run("eager", kernel, dilation), run("reference", kernel, dilation), tensors)


@both
@pytest.mark.parametrize("biased", [True, False])
def test_gradcheck(impl: str, biased: bool) -> None:
    tensors = [x.double().requires_grad_() for x in data(2, (5, 7), 2, 2, batch=1)[: 4 if biased else 3]]
    assert torch.autograd.gradcheck(run(impl, 2, (1, 2)), tensors)


@given(
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    extra=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(kernel, dilation, extra, heads, dim) -> None:
    size = tuple(K * d + more for K, d, more in zip(kernel, dilation, extra, strict=True))
    q, k, v, bias = data(heads, size, kernel, dim)
    v = randn(2, heads, *size, dim + 1, seed=4)
    attend = run("eager", kernel, dilation)
    with poisoned():
        y = attend(q, k, v, bias)
    torch.testing.assert_close(y, run("reference", kernel, dilation)(q, k, v, bias), rtol=1e-4, atol=1e-5)
    # rows of the softmax sum to one, items and heads do not mix, a constant on the bias cancels
    torch.testing.assert_close(attend(q, k, torch.ones_like(v), bias), torch.ones_like(v))
    torch.testing.assert_close(attend(q[:1], k[:1], v[:1], bias), y[:1], rtol=1e-4, atol=1e-5)
    flipped = attend(*(x.flip(1) for x in (q, k, v)), bias.flip(0))
    torch.testing.assert_close(flipped.flip(1), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attend(q, k, v, bias + 3.0), y, rtol=1e-4, atol=1e-5)


@both
def test_kernel_as_large_as_the_map_is_global_attention(impl: str) -> None:
    q, k, v, bias = data(2, (4, 6), (4, 6), 8)
    y = run(impl, (4, 6))(q, k, v)
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)))
    torch.testing.assert_close(y.flatten(2, 3), expected)
    row, col = (torch.arange(n)[None] - torch.arange(n)[:, None] + n - 1 for n in (4, 6))  # key minus query
    mask = bias[:, row[:, None, :, None], col[None, :, None, :]].reshape(2, 24, 24)
    expected = F.scaled_dot_product_attention(*(x.flatten(2, 3) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(run(impl, (4, 6))(q, k, v, bias).flatten(2, 3), expected)


@both
def test_dilation_is_attention_in_each_class_of_tokens(impl: str) -> None:
    tensors = data(2, (11, 13), 3, 4)
    q, k, v, bias = tensors
    y = run(impl, 3, (2, 3))(*tensors)
    for r in range(2):
        for c in range(3):
            part = run(impl, 3)(*(x[:, :, r::2, c::3] for x in (q, k, v)), bias)
            torch.testing.assert_close(y[:, :, r::2, c::3], part)
    plain = neighborhood_attention(*tensors, kernel_size=3, impl=impl)
    assert torch.equal(run(impl, 3, 1)(*tensors), plain)


@both
def test_mirrored_and_transposed_maps(impl: str) -> None:
    q, k, v, bias = tensors = data(2, (9, 14), 5, 4)
    y = run(impl, 5)(*tensors)
    mirrored = run(impl, 5)(*(x.flip(3) for x in (q, k, v)), bias.flip(2))
    torch.testing.assert_close(mirrored.flip(3), y)
    transposed = run(impl, 5)(*(x.transpose(2, 3) for x in (q, k, v)), bias.transpose(1, 2))
    torch.testing.assert_close(transposed.transpose(2, 3), y)


@both
def test_moves_with_the_map_away_from_its_ends(impl: str) -> None:
    q, k, v, bias = tensors = data(2, (16, 16), 5, 4)
    y = run(impl, 5)(*tensors)
    moved = run(impl, 5)(*(x.roll((3, -2), dims=(2, 3)) for x in (q, k, v)), bias)
    torch.testing.assert_close(moved.roll((-3, 2), dims=(2, 3))[:, :, 5:11, 5:11], y[:, :, 5:11, 5:11])


@both
def test_tokens_outside_of_the_window_do_not_matter(impl: str) -> None:
    q, k, v, bias = tensors = data(2, (12, 12), 3, 4)
    y = run(impl, 3, 2)(*tensors)[:, :, 4, 6]
    window = torch.zeros(12, 12, 1, dtype=torch.bool)
    window[2:7:2, 4:9:2] = True
    k, v = (torch.where(window, x, torch.full_like(x, 1e4)) for x in (k, v))
    torch.testing.assert_close(run(impl, 3, 2)(q, k, v, bias)[:, :, 4, 6], y)


@pytest.mark.parametrize("name", ["neighborhood_attention_tiled", "neighborhood_attention_tiled_backward"])
@pytest.mark.parametrize("biased", [True, False])
def test_opcheck(name: str, biased: bool) -> None:
    q, k, v, bias = data(2, (6, 7), 3, 4)
    args = (q, k, v, bias if biased else None, (3, 3), (2, 1), 0.5)
    args = (torch.ones_like(v), *args) if name.endswith("backward") else args
    tests = ("test_schema", "test_faketensor")
    assert torch.library.opcheck(getattr(torch.ops.visionattn, name).default, args, test_utils=tests)


def test_func_grad_and_checkpoint() -> None:
    q, k, v, bias = data(2, (9, 10), 3, 4)

    def loss(q: Tensor) -> Tensor:
        return run("eager", 3)(q, k, v, bias).square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(q), expected)
    again = torch.utils.checkpoint.checkpoint(loss, leaf, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, leaf)[0], expected)


@both
def test_bias_keeps_its_own_precision(impl: str) -> None:
    q, k, v, bias = data(2, (9, 10), 3, 4)
    q, k, v, bias = (*(x.bfloat16().requires_grad_() for x in (q, k, v)), bias.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        y = run(impl, 3)(q, k, v, bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert [x.grad.dtype for x in (q, bias)] == [torch.bfloat16, torch.float32]
    exact = run(impl, 3)(q.double(), k.double(), v.double(), bias.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dilation", [1, 8])
def test_published_formulation_of_the_benchmark_agrees(dilation: int) -> None:
    tensors = data(2, (56, 57), 7, 8, batch=1)
    expected = run("reference", 7, dilation)(*tensors)
    torch.testing.assert_close(gather_formulation(*tensors, 7, dilation), expected)


def test_memory_is_a_small_part_of_the_gathered_keys_and_values() -> None:
    tensors = [x.requires_grad_() for x in data(2, (56, 56), 7, 32, batch=1)]
    gathered = 2 * 49 * tensors[0].numel() * 4

    def train() -> None:
        run("eager", 7)(*tensors).sum().backward()

    train()
    with torch.no_grad():
        assert peak_bytes(lambda: run("eager", 7)(*tensors), "cpu") < gathered / 5
    assert peak_bytes(train, "cpu") < gathered / 3


def fake_natten(monkeypatch, built: bool = True) -> list[dict]:
    """Put a natten with CUDA kernels in place, whose na2d is the reference; return what it is called with."""
    calls = []

    def na2d(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        calls.append({"layout": q.shape, **options})
        assert all(x.is_contiguous() for x in (q, k, v))
        maps = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
        return neighborhood_attention(*maps, **options, impl="reference").permute(0, 2, 3, 1, 4)

    module = ModuleType("natten")
    module.na2d, module.HAS_LIBNATTEN = na2d, built
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    return calls


def test_natten_is_called_in_its_own_layout(monkeypatch) -> None:
    calls = fake_natten(monkeypatch)
    q, k, v, _ = data(2, (9, 10), 3, 8)
    y = natten.forward(q, k, v, None, (3, 3), (2, 3), 0.3)
    assert calls == [{"layout": (2, 9, 10, 2, 8), "kernel_size": (3, 3), "dilation": (2, 3), "scale": 0.3}]
    expected = neighborhood_attention(q, k, v, kernel_size=3, dilation=(2, 3), scale=0.3, impl="eager")
    torch.testing.assert_close(y, expected)


def test_natten_says_why_it_refuses(monkeypatch) -> None:
    q, k, v, bias = (x.to("meta") for x in data(2, (9, 10), 3, 8))
    monkeypatch.setitem(_dispatch._HAS, "natten", False)
    with pytest.raises(UnsupportedError, match="impl='natten' refuses: natten is not installed"):
        neighborhood_attention(q, k, v, kernel_size=3, impl="natten")
    fake_natten(monkeypatch)
    with pytest.raises(UnsupportedError, match="no relative position bias"):
        neighborhood_attention(q, k, v, bias, kernel_size=3, impl="natten")
    with pytest.raises(UnsupportedError, match="need CUDA tensors, these are on meta"):
        neighborhood_attention(q, k, v, kernel_size=3, impl="natten")


@pytest.mark.gpu
@pytest.mark.skipif(_dispatch.missing("natten") is not None, reason=str(_dispatch.missing("natten")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kernel", "dilation"), [(7, 1), (7, 3), ((3, 5), (2, 1))], ids=str)
def test_natten_is_right(kernel, dilation, dtype) -> None:
    tensors = [x.cuda() for x in data(2, (24, 31), kernel, 32)[:3]]
    assert_within_budget(run("natten", kernel, dilation), run("reference", kernel, dilation), tensors, dtype=dtype)
    assert torch.equal(run("auto", kernel, dilation)(*tensors), run("natten", kernel, dilation)(*tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 9}, r"a map of \(8, 8\) is smaller than kernel_size \(9, 9\) x dilation \(1, 1\)"),
        ({"dilation": (1, 3)}, r"smaller than kernel_size \(3, 3\) x dilation \(1, 3\)"),
        ({"dilation": 0}, "must be at least 1, got 3 and 0"),
        ({"bias": torch.zeros(2, 5, 7)}, r"bias must be \(heads, 2 Kh - 1, 2 Kw - 1\) = \(2, 5, 5\)"),
        ({"bias": torch.zeros(2, 5, 5, dtype=torch.int64)}, "bias must be floating point"),
        ({"q": torch.zeros(2, 8, 8, 4)}, r"q must be \(B, heads, H, W, head_dim\)"),
        ({"k": torch.zeros(2, 2, 8, 8, 5)}, r"k \(2, 2, 8, 8, 5\) does not fit q \(2, 2, 8, 8, 4\)"),
    ],
)
def test_wrong_arguments_are_explained(change, message: str) -> None:
    q, k, v, bias = data(2, (8, 8), 3, 4)
    args = {"q": q, "k": k, "v": v, "bias": bias, "kernel_size": 3, **change}
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**args)
