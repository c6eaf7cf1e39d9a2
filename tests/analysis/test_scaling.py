"""Speed and memory against resolution, training steps, and the plots made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from visionattn.analysis import bench, cards, performance, plots, scaling

ROOT = Path(__file__).parents[2]
SMALL = {"SHViT": "shvit_s1"}


def row(size: int, seconds: float = 1.0, mb: float = 1.0, **more: Any) -> dict[str, Any]:
    point = scaling.Point(
        "SHViT", "shvit_s1", size, 1, "forward", "fp32", "cpu", 1 / seconds, seconds * 1e3, 1.0, 2.0, 3, mb
    )
    return {**vars(point), **more}


def test_every_family_has_a_small_model() -> None:
    found = {v["model"] for card in cards.read(ROOT) for v in card.variants}
    assert set(scaling.FAMILIES.values()) <= found
    assert len(scaling.FAMILIES) == len(cards.read(ROOT))


def test_rows_are_measured_once(tmp_path) -> None:
    log: list[str] = []
    first = list(scaling.resolution(SMALL, [32], log=log.append))
    assert [(p.model, p.size, p.direction, p.stopped) for p in first] == [("shvit_s1", 32, "forward", "")]
    assert first[0].ms_low <= first[0].ms <= first[0].ms_high
    assert first[0].images_per_s == pytest.approx(1e3 / first[0].ms, rel=0.01)
    assert first[0].peak_mb > 0
    assert log == ["1 of 1: shvit_s1 at 32, 0 of 60 s used"]
    path, where = tmp_path / "rows.json", {"device": "this"}
    bench.write(path, where, first, append=True, keys=scaling.KEYS)
    known = bench.read(path, where)["rows"]
    second = list(scaling.resolution(SMALL, [32, 64], known=known, log=log.append))
    assert [p.size for p in second] == [64]
    bench.write(path, where, second, append=True, keys=scaling.KEYS)
    known = bench.read(path, where)["rows"]
    assert [r["size"] for r in known] == [32, 64]
    assert list(scaling.resolution(SMALL, [32, 64], known=known)) == []


@pytest.mark.parametrize(
    ("known", "why"),
    [
        ([row(100), row(200, seconds=4)], "time: about 16 s a call were expected"),
        ([row(100, mb=2048), row(200, mb=8192)], "memory: about 32 GB were expected"),
        ([row(100, mb=512), row(200, mb=8192)], "memory: about 128 GB were expected"),
    ],
)
def test_a_model_is_stopped_before_it_overruns_a_budget(known: list[dict[str, Any]], why: str) -> None:
    points = list(scaling.resolution(SMALL, [100, 200, 400, 800], known=known, budget_s=20, memory_gb=16))
    assert [(p.size, p.stopped, p.ms) for p in points] == [(400, why, None)]
    known = [*known, vars(points[0])]
    assert list(scaling.resolution(SMALL, [100, 200, 400, 800], known=known)) == []


def test_a_training_step_holds_gradients_and_state() -> None:
    (point,) = scaling.train(SMALL, size=32, batch=2, log=lambda _: None)
    weights_mb = 6.3e6 * 4 / 2**20
    assert point.peak_mb > 3 * weights_mb  # gradients and AdamW's two moments
    assert (point.direction, point.batch) == ("training step", 2)
    assert list(scaling.train(SMALL, size=32, batch=2, known=[vars(point)])) == []


def test_cards_are_measured_at_their_own_size(monkeypatch) -> None:
    asked: list[tuple[dict[str, str], tuple[int, ...]]] = []
    monkeypatch.setattr(scaling, "resolution", lambda models, sizes: asked.append((models, tuple(sizes))) or [])
    assert list(scaling.accurate(ROOT, 9)) == []
    assert ({"BiFormer": "biformer_t"}, (224,)) in asked
    assert ({"Agent Attention": "agent_pvt_m_256"}, (256,)) not in asked  # above nine
    names = [name for models, _ in asked for name in models.values()]
    assert len(names) == len(set(names))
    assert "dinat_l" not in names  # pretrained on more data


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    """A repository with a few rows of measurements."""
    (tmp_path / "benchmarks").mkdir()
    for name in ("flops", "flops_dense", "parity", "models_cpu"):
        (tmp_path / f"benchmarks/{name}.json").write_text((ROOT / f"benchmarks/{name}.json").read_text())
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    end = row(896, images_per_s=None, ms=None, peak_mb=None, stopped="time: about 99 s a call were expected")
    data = {
        "machine": {"device": "a CPU", "threads": 2, "torch": "2", "date": "2026-01-02"},
        "rows": [row(224, 0.05, 9.0), row(448, 0.25, 2048.0), end],
    }
    (tmp_path / plots.RESOLUTION).write_text(json.dumps(data))
    (tmp_path / plots.TRAINING).write_text(json.dumps({**data, "rows": data["rows"][:1]}))
    return tmp_path


def test_tables_say_what_was_measured(measured: Path) -> None:
    table = list(performance.resolution(measured))
    assert table[:3] == [
        "| model | 224 | 448 | 896 |",
        "|---|---|---|---|",
        "| `shvit_s1` | 20/s, 9 MB | 4.00/s, 2.0 GB | out of time |",
    ]
    assert any("a CPU, 2 threads, torch 2, 2026-01-02" in line for line in table)
    assert "| `shvit_s1` | 224x224, batch 1 | 20.00 | 0.05 (0.00 to 0.00) | 9 |" in list(performance.train(measured))
    for name in ("resolution", "train"):
        (measured / f"benchmarks/{name}_cpu.json").unlink()
    assert "Not measured yet" in next(performance.resolution(measured))
    assert "Not measured yet" in next(performance.train(measured))


def test_plots_tell_whether_they_are_stale(measured: Path) -> None:
    found = plots.plots(measured)
    assert [path.name for path in found] == ["throughput.svg", "memory.svg", "accuracy.svg"]
    path, plot = next(iter(found.items()))
    assert not plots.fresh(path, plot)
    path.parent.mkdir()
    path.write_text(plots.draw(plot))
    assert path.read_text() == plots.draw(plot)
    assert plots.fresh(path, plot)
    for text in ("SHViT: shvit_s1", ">20<", ">4<", "then out of time", "images a second"):
        assert text in path.read_text()
    data = json.loads((measured / plots.RESOLUTION).read_text())
    data["rows"][1]["images_per_s"] = 4.5
    (measured / plots.RESOLUTION).write_text(json.dumps(data))
    assert not plots.fresh(path, plots.plots(measured)[path])


def test_committed_plots_are_fresh() -> None:
    for path, plot in plots.plots(ROOT).items():
        assert plots.fresh(path, plot), f"{path.name} is out of date; run: python tools/make_tables.py"
