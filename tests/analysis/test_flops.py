"""Counts: of operators by hand, of models against what the papers publish."""

import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn import macs, ops, use_impl
from visionattn.analysis import cards, flops
from visionattn.ops import OPERATORS

ROOT = Path(__file__).parents[2]
VARIANTS = {
    f"{v['model']}{v.get('kwargs', '')}@{v.get('size', 'native')}": (card, v)
    for card in cards.read(ROOT)
    for v in card.variants
}
TABLES = cards.Tables(ROOT)
FIRST = {next(name for name, (c, _) in VARIANTS.items() if c is card) for card, _ in VARIANTS.values()}


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def tokens(n: int, d: int = 8) -> Tensor:
    return empty(2, 3, n, d)


def maps(h: int, w: int, d: int = 8) -> Tensor:
    return empty(2, 3, h, w, d)


INDEX = torch.zeros(2, 4, 3, dtype=torch.int64, device="meta")
CALLS = {  # the call, and its multiply-adds by hand; head dims are 8 for keys and 5 for values where they may differ
    "agent_attention": (
        lambda: ops.agent_attention(tokens(12), tokens(12), tokens(12, 5), tokens(4)),
        6 * 2 * 12 * 4 * (8 + 5),
    ),
    "aggregated_attention": (
        lambda: ops.aggregated_attention(
            maps(4, 6), maps(4, 6), maps(4, 6, 5), tokens(7), tokens(7, 5), empty(3, 9), empty(3, 24, 7)
        ),
        6 * 24 * (9 + 7) * (8 + 5),
    ),
    "channel_attention": (lambda: ops.channel_attention(tokens(12), tokens(12), tokens(12)), 6 * 12 * 8 * 8 * 2),
    "clipped_softmax_attention": (
        lambda: ops.clipped_softmax_attention(tokens(12), tokens(9), tokens(9, 5), gamma=-0.1),
        6 * 12 * 9 * (8 + 5),
    ),
    "gated_positional_attention": (
        lambda: ops.gated_positional_attention(maps(4, 6), maps(4, 6), maps(4, 6, 5), empty(3, 3), empty(3)),
        6 * 24 * 24 * (8 + 5) + 24 * 24 * 3 * 3,
    ),
    "infinite_attention": (
        lambda: ops.infinite_attention(
            tokens(12), tokens(9), tokens(9, 5), torch.empty((), device="meta"), form="pure"
        ),
        6 * 12 * 9 * (8 + 5),
    ),
    "linear_attention": (
        lambda: ops.linear_attention(tokens(12), tokens(9), tokens(9, 5)),
        6 * (9 * 8 * 5 + 12 * 8 * 5 + 12 * 8),
    ),
    "neighborhood_attention": (
        lambda: ops.neighborhood_attention(maps(7, 9), maps(7, 9), maps(7, 9, 5), kernel_size=(3, 5)),
        6 * 63 * 15 * (8 + 5),
    ),
    "routed_attention": (
        lambda: ops.routed_attention(maps(4, 6), maps(4, 6), maps(4, 6, 5), INDEX, grid=(2, 2)),
        6 * 24 * 3 * 6 * (8 + 5),
    ),
    "sigmoid_gate": (lambda: ops.sigmoid_gate(tokens(12), empty(2, 3, 12, 1)), 0),
    "window_attention": (
        lambda: ops.window_attention(maps(4, 6), maps(4, 6), maps(4, 6, 5), window=(2, 3), shift=1),
        6 * 24 * 6 * (8 + 5),
    ),
}
BY_PRODUCTS = sorted(
    set(OPERATORS) - {"aggregated_attention", "linear_attention"}
)  # references of matrix products alone


def test_every_operator_has_a_formula() -> None:
    assert set(macs.MACS) == set(OPERATORS) == set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_formula_is_the_count_by_hand(op: str) -> None:
    call, expected = CALLS[op]
    counted = macs.cost(nn.Identity(), call)
    assert counted.by_kind == ({op: expected} if expected else {})
    assert counted.macs == expected


@pytest.mark.parametrize("op", BY_PRODUCTS)
def test_formula_is_what_the_reference_multiplies(op: str) -> None:
    call, expected = CALLS[op]
    with FlopCounterMode(display=False) as counter, use_impl("reference"):
        call()
    assert counter.get_total_flops() == 2 * expected


def test_linear_form_pools_once() -> None:
    def run() -> Tensor:
        rho = torch.empty((), device="meta")
        return ops.infinite_attention(tokens(12), tokens(9), tokens(9, 5), rho, form="linear")

    assert macs.cost(nn.Identity(), run).macs == 6 * (12 * 8 + 9 * 8 + 9 * 5)
    shapes = []
    macs.cost(nn.Identity(), lambda: shapes.append(run().shape))
    assert shapes == [run().shape]


def test_counts_do_not_depend_on_the_implementation() -> None:
    expected = flops.count("biformer_t", (64, 96))
    with use_impl("eager"):
        assert flops.count("biformer_t", (64, 96)) == expected
        assert flops.count("biformer_t", (64, 96), impl="eager") == flops.Row(
            **{**vars(expected), "kwargs": {"impl": "eager"}}
        )


def test_operators_compute_again_after_a_count_that_failed() -> None:
    known = {op: importlib.import_module(f"visionattn.ops.{op}").IMPLS for op in OPERATORS}
    before = {op: dict(impls) for op, impls in known.items()}

    def fail() -> None:
        raise RuntimeError("no such size")

    with pytest.raises(RuntimeError, match="no such size"):
        macs.cost(nn.Identity(), fail)
    assert known == before


def test_counts_scale_with_the_image() -> None:
    small, large = flops.count("shvit_s1", (64, 64)), flops.count("shvit_s1", (64, 128))
    assert small.params == large.params
    assert small.by_kind["convolution"] < large.by_kind["convolution"]


def test_convolutions_and_linear_layers_by_hand() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Flatten(2), nn.Linear(20, 7))
    counted = macs.cost(model, lambda: model(empty(1, 4, 4, 5)))
    assert counted.by_kind == {"convolution": 20 * 6 * 2 * 9, "matrix product": 6 * 20 * 7}
    assert counted.params == 6 * 2 * 9 + 6 + 20 * 7 + 7


def test_bad_input_is_one_clear_error() -> None:
    with pytest.raises(ValueError, match="no model is named 'biformer_x'"):
        flops.count("biformer_x")
    with pytest.raises(ValueError, match="counted on the meta device: weight is elsewhere"):
        macs.cost(nn.Linear(2, 2), lambda: None)


@pytest.mark.parametrize("name", VARIANTS)
def test_published_figures(name: str) -> None:
    """Within 2 %, or the same when rounded as published, or the card says why not."""
    card, variant = VARIANTS[name]
    row = TABLES.size(variant)
    for what, unit in (("params", 1e6), ("macs", 1e9)):
        published = variant.get(what)
        if published is not None and not cards.agrees(row[what] / unit, published):
            assert variant.get(f"why_{what}", card.front.get(f"why_{what}")), f"{what}: {row[what]}, {published}"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FIRST else [pytest.mark.slow]) for n in VARIANTS])
def test_committed_counts(name: str) -> None:
    variant = VARIANTS[name][1]
    assert json.loads(json.dumps(vars(cards.count(variant)))) == TABLES.size(variant)


def test_command_line_counts_and_writes(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "rows.json"

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["flops.py", *arguments])
        runpy.run_path(str(ROOT / "tools/flops.py"), run_name="__main__")

    run("shvit_s1", "--size", "64", "96", "--json", str(out))
    (row,) = json.loads(out.read_text())
    assert (row["model"], row["size"], row["params"]) == ("shvit_s1", [64, 96], 6_330_808)
    assert f"{row['macs'] / 1e9:.3f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("shvit_s9")
    assert "no model is named 'shvit_s9'" in capsys.readouterr().err
