import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from visionattn.analysis import bench, compare, performance
from visionattn.ops import OPERATORS

ROOT = Path(__file__).parents[2]


def test_every_operator_has_cases() -> None:
    cases = bench.operator_cases()
    assert {c.operator for c in cases} == set(OPERATORS)
    with pytest.raises(ValueError, match="no operator named wrong; there are: "):
        bench.operator_cases(["wrong"])


def test_peak_memory_is_what_was_held_at_once() -> None:
    def call() -> None:
        x = torch.empty(2**20)  # 4 MiB
        x = x + 1  # 8 MiB at once
        del x
        torch.empty(2**18)

    assert 8 * 2**20 <= bench.peak_bytes(call, "cpu") < 9 * 2**20


def test_contestants_that_differ_are_not_timed() -> None:
    case = bench.Case("square", "small", lambda: [torch.ones(4)], lambda x: x**2 + 0.01, lambda x: x**2)
    with pytest.raises(AssertionError, match=r"square, small: visionattn is off by 1.0e-02"):
        bench.measure(case)


def test_race_has_a_row_for_each_contestant_and_direction() -> None:
    case = bench.Case("square", "small", lambda: [torch.ones(4)], lambda x: x**2, lambda x: x * x)
    rows = bench.measure(case, rounds=3)
    assert [(r.contestant, r.direction) for r in rows] == [
        ("published", "forward"),
        ("visionattn", "forward"),
        ("published", "forward+backward"),
        ("visionattn", "forward+backward"),
    ]
    for row in rows:
        assert row.ms > 0
        assert row.speedup_low <= row.speedup <= row.speedup_high
    assert rows[0].speedup == 1.0


def test_a_race_lasts_as_long_as_asked() -> None:
    case = bench.Case("square", "small", lambda: [torch.ones(4)], lambda x: x**2, lambda x: x * x)
    begun = time.perf_counter()
    bench.measure(case, rounds=1, at_least=0.3)
    assert time.perf_counter() - begun > 0.6  # forward, and with backward


def test_gradients_are_dense() -> None:
    seen = []

    def run(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda grad: seen.append(grad))
        return y

    bench.measure(bench.Case("double", "small", lambda: [torch.ones(8)], run, run), rounds=1)
    assert seen
    assert all(grad.stride() == (1,) and grad.unique().numel() > 1 for grad in seen)


def test_rows_are_appended_to_those_of_the_same_machine_and_day(tmp_path) -> None:
    case = bench.Case("square", "small", lambda: [torch.ones(4)], lambda x: x**2, lambda x: x * x)
    rows, where, path = bench.measure(case, rounds=1), {"device": "this"}, tmp_path / "rows.json"
    bench.write(path, where, rows[:2], append=True)
    bench.write(path, where, rows[1:], append=True, note="two runs")
    data = json.loads(path.read_text())
    assert data == {"machine": where, "note": "two runs", "rows": bench.as_dicts(rows)}
    with pytest.raises(ValueError, match="another machine, versions or day"):
        bench.write(path, {"device": "that"}, rows, append=True)
    bench.write(path, {"device": "that"}, rows[:1])
    assert len(json.loads(path.read_text())["rows"]) == 1


def test_comparisons_race_every_rival() -> None:
    rows = list(compare.hilo([4], rounds=1))
    rivals = ("spatial reduction by 2", "windows of 7", "softmax")
    assert [r.contestant for r in rows] == [name for rival in rivals for name in (rival, "HiLo")]
    rows = list(compare.agent([2, 3], rounds=1))
    assert [(r.contestant, r.shape) for r in rows[1::2]] == [("agent", "4 tokens"), ("agent", "9 tokens")]


def test_infvit_is_compared_with_softmax_fused_and_not() -> None:
    rows = list(compare.infvit([32], rounds=1, dim=32, depth=1, num_heads=2))
    assert [r.contestant for r in rows] == ["softmax, unfused", "softmax, fused", "InfViT, linear", "InfViT, pure"]
    assert rows[0].shape == "32x32, batch 1"


def test_compiled_models_are_raced_against_each_other(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "_compiled", copy.deepcopy)
    rows = bench.measure_model("shvit_s1", size=64, batch=1, rounds=1, compiled=True)
    assert [r.contestant for r in rows] == ["timm", "visionattn", "timm, compiled", "visionattn, compiled"]
    assert rows[0].speedup == rows[2].speedup == 1.0
    bench.write(tmp_path / performance.MODELS, bench.machine("cpu"), rows)
    head, _, *table = performance.models(tmp_path)
    assert head == "| model against timm | | 64x64, batch 1 |"
    assert [line.split(" | ")[:2] for line in table[:2]] == [
        ["| `shvit_s1`", "forward"], ["| `shvit_s1`", "forward, compiled"],
    ]  # fmt: skip


@pytest.mark.slow
def test_models_are_compared_eager_and_exported() -> None:
    rows = list(compare.shvit("shvit_s1", "test_efficientnet", size=64, batches=[1], rounds=1))
    assert [r.contestant for r in rows] == ["test_efficientnet", "shvit_s1"] * 2
    assert [r.shape.rpartition(", ")[2] for r in rows[::2]] == ["eager", "ONNX Runtime"]


def test_the_crossover_is_where_agent_stays_ahead() -> None:
    rows = list(compare.agent([2], rounds=1))[1:] * 4
    rows = [
        replace(r, shape=f"{i} tokens", speedup=s) for i, (r, s) in enumerate(zip(rows, (1, 0.9, 1, 2), strict=True))
    ]
    assert compare.crossover(rows) == 2
    assert compare.crossover(rows[:2]) is None


@pytest.mark.slow
def test_command_line_writes_rows_and_the_machine(tmp_path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, ROOT / "tools/benchmark.py"]
    ops = [*command, "ops", "routed_attention", "--shape", "stage 4 at 224", "--rounds", "1", "--out", out]
    done = subprocess.run(ops, capture_output=True, text=True, check=True)
    data = json.loads(out.read_text())
    assert data["machine"]["torch"] == torch.__version__
    assert [r["contestant"] for r in data["rows"]] == ["published", "visionattn"] * 2
    assert "speed-up" in done.stdout
    wrong = subprocess.run([*command, "ops", "wrong"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "no operator named wrong" in wrong.stderr
    models = [*command, "models", "convit_tiny", "--size", "64", "--rounds", "1"]
    done = subprocess.run(models, capture_output=True, text=True, check=True)
    assert "convit_tiny, 64x64, batch 1" in done.stdout
    agent = [*command, "compare", "agent", "--size", "2", "40", "--rounds", "1", "--out", out]
    done = subprocess.run(agent, capture_output=True, text=True, check=True)
    assert "never slower from" in done.stdout or "no crossover" in done.stdout
    assert "agent_crossover_tokens" in json.loads(out.read_text())
    wrong = subprocess.run([*agent, "--dtype", "bf16"], capture_output=True, text=True, check=False)
    assert "only infvit is measured on a GPU or in half precision" in wrong.stderr
