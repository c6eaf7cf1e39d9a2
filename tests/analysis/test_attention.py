"""The weights that are recovered from an operator are those that it used."""

import copy
from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

import visionattn
from tests.models.test_fuse import SMALL, small
from tests.models.variants import TINY, tiny
from visionattn.analysis import AttentionLayer, NoAttentionError, record_attention
from visionattn.ops import get_impl

SOFTMAXES = (
    "agent_attention",
    "gated_positional_attention",
    "neighborhood_attention",
    "routed_attention",
    "scaled_dot_product_attention",
    "window_attention",
)


def image(H: int = 64, W: int = 64) -> Tensor:
    return torch.randn(1, 3, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def family(name: str) -> tuple[nn.Module, Tensor]:
    """A small model in float64 whose weights are not near zero, and an image for it."""
    torch.manual_seed(0)
    if name in SMALL:
        model, x = small(name)
        return visionattn.fuse(model).double(), x[:1].double()
    model = timm.create_model("test_vit").eval() if name == "timm" else tiny(name)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model.double(), image(160, 160) if name == "timm" else image()


@cache
def recorded(name: str) -> list[AttentionLayer]:
    return record_attention(*family(name)).layers


def others(layer: AttentionLayer) -> AttentionLayer:
    """The same queries and keys with new values, more of them than the layer's own."""
    gen = torch.Generator().manual_seed(1)
    args = list(layer.args)
    for i in (2, 4) if layer.operator == "aggregated_attention" else (2,):
        args[i] = torch.randn(*args[i].shape[:-1], 40, generator=gen, dtype=torch.float64)
    return replace(layer, args=tuple(args))


@pytest.mark.parametrize("name", [*TINY, *SMALL, "timm"])
def test_rows_are_what_the_operator_does_to_any_values(name: str) -> None:
    layers = recorded(name)
    assert layers
    for layer in layers:
        if layer.operator == "channel_attention":
            q, k, v = layer.args[:3]
            weights = layer.channel_map()
            torch.testing.assert_close(weights, (q[0].mT @ k[0] * layer.args[3]).softmax(-1))
            torch.testing.assert_close((weights @ v[0].mT).mT, layer.output())
            continue
        tokens = layer.args[0].shape[2:-1].numel()
        asked = sorted({0, 1, tokens // 3, tokens // 2 + 1, tokens - 1})
        rows = layer.rows(asked)
        for known in (layer, others(layer)):
            out = known.output()[:, [0] * len(asked) if layer.same_for_all else asked]
            torch.testing.assert_close(rows @ known.values(), out, rtol=1e-9, atol=1e-12)
        if layer.operator in SOFTMAXES:
            assert rows.min() >= 0
            torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))
        if layer.grid is not None:
            maps = layer.maps(asked)
            torch.testing.assert_close(maps.weights.sum((-1, -2)) + maps.prefix + maps.padding, rows.sum(-1))


def test_every_operator_is_seen_once_a_call() -> None:
    seen = {layer.operator for name in [*TINY, *SMALL] for layer in recorded(name)}
    assert seen == {*visionattn.ops.OPERATORS, "scaled_dot_product_attention"} - {"sigmoid_gate"}
    assert [(x.name, x.kind) for x in recorded("litv2")][:2] == [
        ("stages.2.blocks.0.attn", "softmax on 2 x 2 pooled keys"),
        ("stages.2.blocks.0.attn/2", "window 2 x 2"),
    ]
    assert [x.kind for x in recorded("transnext")] == [
        *["window 3 x 3 and 2 x 2 pooled keys"] * 2, *["window 3 x 3 and 2 x 2 pooled keys"] * 2, "softmax",
    ]  # fmt: skip
    assert [x.kind for x in recorded("dinat")] == [
        "neighbourhood 3 x 3",
        "neighbourhood 3 x 3, dilation 2",
        "neighbourhood 3 x 3, dilation 3",
    ]
    assert [x.kind for x in recorded("agent_swin")][1:] == ["window 4 x 4", "window 4 x 4, shifted by 2"]
    assert [x.kind for x in recorded("infvit_linear")] == ["infinite, linear: centrality"] * 3


def reach(layer: AttentionLayer, row: int, column: int) -> set[tuple[int, int]]:
    """Places that a place sees, in any head."""
    assert layer.grid is not None
    weights = layer.maps([layer.grid.token(row, column)]).weights.sum(0)[0]
    return {(int(r), int(c)) for r, c in weights.abs().gt(1e-12).nonzero()}


def block(rows: range, columns: range) -> set[tuple[int, int]]:
    return {(r, c) for r in rows for c in columns}


def test_maps_lie_where_the_family_looks() -> None:
    near, spread = recorded("dinat")[:2]
    assert reach(near, 5, 9) == block(range(4, 7), range(8, 11))
    assert reach(near, 0, 15) == block(range(3), range(13, 16))  # shifted inwards at the border
    assert reach(spread, 5, 9) == block(range(3, 8, 2), range(7, 12, 2))
    windows = record_attention(*family("agent_swin")).layers
    assert reach(windows[1], 5, 2) == block(range(4, 8), range(4))
    assert reach(windows[2], 5, 5) == block(range(2, 6), range(2, 6))  # shifted by two
    low, high = recorded("litv2")[:2]
    assert reach(high, 1, 2) == block(range(2), range(2, 4))
    assert low.pooled == (2, 2)
    spread_out = low.maps([3]).weights
    assert torch.equal(spread_out[..., 0, 0], spread_out[..., 1, 1])  # one pooled key, spread over its window
    routed = recorded("biformer")[1]
    assert routed.regions is not None
    index, grid = routed.regions
    assert (index.shape, grid) == ((49, 4), (7, 7))


def test_routed_weights_fill_the_routed_regions() -> None:
    torch.manual_seed(0)
    layer = record_attention(tiny("biformer", n_win=4).double(), image()).layers[1]  # 8 x 8 tokens, 4 x 4 regions
    assert layer.regions is not None
    own = (5 // 2) * 4 + 2 // 2
    expected = set()
    for region in layer.regions[0][own].tolist():
        r, c = divmod(region, 4)
        expected |= block(range(2 * r, 2 * r + 2), range(2 * c, 2 * c + 2))
    assert reach(layer, 5, 2) == expected


def test_maxvit_looks_in_a_block_and_over_a_grid() -> None:
    layers = [x for x in recorded("maxvit") if x.map_size == (10, 10)]
    assert [x.kind for x in layers[:2]] == ["window 5 x 5", "grid 5 x 5"]
    assert reach(layers[0], 6, 1) == block(range(5, 10), range(5))
    assert reach(layers[1], 6, 1) == block(range(0, 10, 2), range(1, 10, 2))


@pytest.mark.parametrize(
    ("name", "size"), [("litv2", (70, 90)), ("agent_cswin", (76, 52)), ("agent_swin", (70, 90)), ("nat_iso", (20, 72))]
)
def test_padding_is_no_part_of_a_map(name: str, size: tuple[int, int]) -> None:
    model, _ = family(name)
    for layer in record_attention(model, image(*size)).layers:
        assert layer.grid is not None
        stride = max(size) / max(layer.map_size)
        assert all(abs(n / stride - m) < 1 for n, m in zip(size, layer.map_size, strict=True)), layer
        maps = layer.maps(layer.grid.numbers()[:3])
        if layer.grid.size == layer.grid.valid and layer.pooled is None:
            assert maps.padding.abs().max() < 1e-12
        elif layer.pooled is None:
            assert maps.padding.min() > -1e-12


def test_stripes_are_padded_on_both_sides() -> None:
    model, _ = family("agent_cswin")
    down = record_attention(model, image(64, 80)).layers[1]  # stripes of 3 columns on 8 x 10 tokens
    assert down.grid is not None
    assert (down.grid.size, down.grid.valid, down.grid.offset) == ((8, 12), (8, 10), (0, 1))
    assert reach(down, 4, 0) == block(range(8), range(2))
    assert down.maps([down.grid.token(4, 0)]).padding.min() > 0.01


def test_class_tokens_come_before_the_map() -> None:
    layer = recorded("gated_vit")[0]
    assert layer.grid is not None
    assert (layer.grid.prefix, layer.grid.size, layer.grid.tokens) == (1, (4, 4), 17)
    maps = layer.maps([0])
    torch.testing.assert_close(maps.prefix, layer.rows([0])[..., 0])
    assert maps.weights.shape == (2, 1, 4, 4)


def test_centrality_is_one_row_for_all() -> None:
    layer = recorded("infvit_linear")[0]
    q, k = layer.args[0][0], layer.args[1][0]  # (h, N, d)
    norms = q.norm(dim=-1, keepdim=True)
    mean = (norms / norms.sum(1, keepdim=True) * q).sum(1, keepdim=True)
    scores = (mean @ k.mT).relu()
    expected = layer.args[3] * scores / scores.sum(-1, keepdim=True)
    rows = layer.rows(range(layer.args[0].shape[2]))
    assert layer.same_for_all
    torch.testing.assert_close(rows, expected.expand_as(rows), rtol=1e-3, atol=1e-6)  # but for eps


def test_gates_are_told_by_head() -> None:
    model, x = family("convit")
    layers = record_attention(model, x).layers
    for i in range(2):
        torch.testing.assert_close(layers[i].gates, model.blocks[i].attn.gating_param.sigmoid().float().detach())
    assert layers[2].gates is None
    gated, x = family("gated_vit")
    logits: list[Tensor] = []
    gated.stages[1].attn.gate.register_forward_hook(lambda m, i, out: logits.append(out))
    gates = record_attention(gated, x).layers[1].gates
    torch.testing.assert_close(gates, logits[0].sigmoid().mean((0, 1, 3)).float().detach())


def test_recording_leaves_the_model_as_it_was() -> None:
    model, x = family("timm")
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    recording = record_attention(model, x)
    torch.testing.assert_close(recording.output, expected)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert all(m.fused_attn is False for m in model.modules() if hasattr(m, "fused_attn"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert get_impl() == "auto"
    assert all(type(m).__name__ == "module" for m in visionattn.ops.window_attention.__globals__["IMPLS"].values())


def test_works_where_gradients_are_switched_off() -> None:
    model, x = family("infvit_pure")
    with torch.inference_mode():
        layer = record_attention(model, x).layers[0]
        rows = layer.rows([3])
    torch.testing.assert_close(rows @ layer.values(), layer.output()[:, [3]])


def test_errors_say_what_is_wrong() -> None:
    model, x = family("gated_vit")
    with pytest.raises(ValueError, match=r"one image \(1, C, H, W\) expected, got \(2, 3, 64, 64\)"):
        record_attention(model, x.expand(2, -1, -1, -1))
    recording = record_attention(model, x)
    with pytest.raises(ValueError, match=r"no attention layer is named 'x'; there are stages.0.attn, stages.1.attn"):
        recording.layer("x")
    with pytest.raises(ValueError, match=r"queries must be in \[0, 17\), got 17 to 17"):
        recording.layers[0].rows([17])
    with pytest.raises(ValueError, match="attends among tokens"):
        recording.layers[0].channel_map()
    with pytest.raises(ValueError, match="attends among channels"):
        next(x for x in recorded("davit") if x.operator == "channel_attention").rows([0])
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        record_attention(model.train(), x)
    with pytest.raises(NoAttentionError, match=r"ConVit: call visionattn.fuse\(model\) first"):
        record_attention(small("convit")[0], image().float())
    with pytest.raises(NoAttentionError, match="no attention found in ResNet"):
        record_attention(timm.create_model("test_resnet").eval(), image().float())
    arch = {"embed_dim": 8, "num_heads": (1, 1), "img_size": 56}
    recording = record_attention(
        timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), **arch).eval(), image(56, 56).float()
    )
    assert [x.name for x in recording.layers] == ["layers.1.blocks.0.attn"]  # a map of one window
    assert recording.unseen == ["layers.0.blocks.0.attn"]
    arch["num_heads"] = (1,)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1,), **arch)
    with pytest.raises(NoAttentionError, match="cuts its maps into windows before it attends"):
        record_attention(swin.eval(), image(56, 56).float())
