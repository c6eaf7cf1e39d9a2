"""Made-up measurements, of which the tests say what must be chosen, and the committed ones."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from visionattn.analysis import performance, ranks
from visionattn.ops import _crossovers, _dispatch, _ranks
from visionattn.ops._ranks import Rank

ROOT = Path(__file__).parents[2]
NAT, GATE = "neighborhood_attention", "sigmoid_gate"


def races(
    operator: str, elements: int, *, dtype: str = "bf16", shape: str = "", rivals: float = 9.0, **ms: float
) -> list[dict[str, Any]]:
    """Rows of one case, whose backward pass takes as long as its forward pass."""
    times = {"published": 9.0, "FlexAttention": rivals, "visionattn": min(ms.values()), **ms}
    return [
        {"subject": operator, "shape": shape or f"{elements}", "contestant": name, "direction": direction}
        | {"dtype": dtype, "ms": t * factor, "elements": elements}
        for direction, factor in (("forward", 1), ("forward+backward", 2))
        for name, t in times.items()
    ]


def measured(*rows: list[dict[str, Any]], kind: str = "sm_90") -> dict[str, Any]:
    machine = {"device": f"A made-up {kind}", "kind": kind, "torch": "9.9", "date": "2099-01-01"}
    return {"machine": machine, "rows": [row for race in rows for row in race]}


def test_the_fastest_is_first_by_size() -> None:
    data = measured(
        races(GATE, 900, triton=3.0, eager=1.0),
        races(GATE, 1000, triton=1.0, eager=1.1),  # one pool with the last: up to 1024
        races(GATE, 2000, triton=2.0, eager=1.0),
        races(GATE, 2**20, triton=1.0, eager=2.0),
    )
    assert ranks.ranks([data]) == {
        (GATE, "sm_90", "bf16"): (Rank(2048, ("eager", "triton")), Rank(None, ("triton", "eager")))
    }


def test_what_the_order_of_impls_says_needs_no_row() -> None:
    close = races(GATE, 100, triton=1.04, eager=1.0)  # within the margin
    alone = races(GATE, 100, dtype="fp32", eager=1.0)
    assert ranks.ranks([measured(close, alone)]) == {}
    assert ranks.ranks([measured(races(GATE, 100, triton=1.06, eager=1.0))])


def test_devices_and_dtypes_are_apart_and_files_of_one_kind_together() -> None:
    slow = races(GATE, 100, triton=2.0, eager=1.0)
    assert set(ranks.ranks([measured(slow), measured(slow, kind="sm_80")])) == {
        (GATE, "sm_90", "bf16"),
        (GATE, "sm_80", "bf16"),
    }
    fast = measured(races(GATE, 100, triton=1.0, eager=4.0))
    assert ranks.ranks([measured(slow), fast]) == {}


def test_an_implementation_that_takes_some_cases_is_ranked_by_its_ratios() -> None:
    biased = races(NAT, 100, shape="biased", triton=2.0, eager=8.0)
    plain = races(NAT, 100, shape="unbiased", natten=1.0, triton=1.0, eager=8.0)
    assert ranks.ranks([measured(biased, plain)]) == {}  # natten, eight times faster than eager, stays first
    plain = races(NAT, 100, shape="unbiased", natten=7.0, triton=1.0, eager=8.0)
    (rows,) = ranks.ranks([measured(biased, plain)]).values()
    assert rows == (Rank(None, ("triton", "natten", "eager")),)


class Takes:
    """An implementation of an operator."""

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal

    def why_not(self, *args: object) -> str | None:
        return self.refusal


def test_auto_follows_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a file of measurements to the choice, with the sizes, dtypes and devices that it names."""
    data = measured(
        races(GATE, 1000, triton=2.0, eager=1.0),
        races(GATE, 10000, triton=1.0, eager=2.0),
        races(NAT, 1000, triton=2.0, eager=1.0),
    )
    file, module = tmp_path / "h100.json", tmp_path / "_ranks.py"
    file.write_text(json.dumps(data))
    module.write_text(Path(_ranks.__file__).read_text())
    ranks.write([file], module)
    spec = importlib.util.spec_from_file_location("written", module)
    assert spec is not None
    assert spec.loader is not None
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    assert written.SOURCES == {"sm_90": ("A made-up sm_90, torch 9.9, 2099-01-01: h100.json",)}
    assert ranks.ranks([data]) == written.RANKS
    assert len(written.RANKS) == 2

    monkeypatch.setattr(_crossovers, "RANKS", written.RANKS)
    monkeypatch.setattr(_crossovers, "kind", lambda device: "sm_90")
    monkeypatch.setattr(_dispatch, "INTERPRET", False)
    monkeypatch.setattr(_dispatch, "missing", lambda impl: None)
    known: Any = {"natten": Takes("no bias"), "triton": Takes(), "eager": Takes(), "reference": Takes()}

    def chosen(op: str, elements: int, dtype: torch.dtype = torch.bfloat16) -> str:
        found = _dispatch.choose(op, "auto", known, torch.empty(elements, dtype=dtype, device="meta"))
        return next(name for name, module in known.items() if module is found)

    assert chosen(GATE, 1024) == "eager"
    assert chosen(GATE, 1025) == "triton"
    assert chosen(GATE, 1024, torch.float32) == "triton"  # not measured
    with monkeypatch.context() as autocast:
        autocast.setattr(_crossovers, "autocast_dtype", lambda x: torch.bfloat16)
        assert chosen(GATE, 1024, torch.float32) == "eager"
    assert chosen(NAT, 2**20) == "eager"
    known["eager"].refusal = "too wide"
    assert chosen(NAT, 2**20) == "triton"
    known["eager"].refusal, known["natten"].refusal = None, None
    assert chosen(NAT, 2**20) == "natten"  # was not measured: keeps its place
    monkeypatch.setattr(_crossovers, "kind", lambda device: "sm_80")
    assert chosen(NAT, 2**20) == "natten"
    assert chosen("sigmoid_gate", 1) == "natten"


def test_what_wins_from_every_implementation_is_told() -> None:
    data = measured(races(GATE, 100, triton=2.0, eager=3.0, rivals=1.0), races(GATE, 200, triton=1.0, eager=1.0))
    assert list(ranks.beaten(data)) == [
        f"{GATE}, 100, {direction}, bf16: FlexAttention by 2.00" for direction in ("forward", "forward+backward")
    ]


def test_the_library_follows_the_committed_measurements() -> None:
    files = {name: json.loads((ROOT / name).read_text()) for name in performance.GPUS if (ROOT / name).exists()}
    assert ranks.ranks(files.values()) == _ranks.RANKS
    assert set(_ranks.SOURCES) == {device for _, device, _ in _ranks.RANKS}
    tail = ranks.render(_ranks.SOURCES, _ranks.RANKS)
    assert Path(_ranks.__file__).read_text().endswith(tail)
    # On the CPU there is one implementation besides the definition, and nothing to rank.
    cpu = ROOT / performance.OPERATORS
    assert ranks.ranks([json.loads(cpu.read_text())]) == {}
    with pytest.raises(ValueError, match=r"ops_cpu\.json was not measured on a GPU"):
        ranks.write([cpu])
