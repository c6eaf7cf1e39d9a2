"""Recipes side by side: equal terms, runs that are not repeated, what the table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from visionattn.train import CompareConfig, ConfigError, DataError, compare
from visionattn.train.cli import read_yaml
from visionattn.train.compare import _recipes, summarise, to_markdown

CIFAR = Path(__file__).parents[2] / "configs" / "cifar10"


@pytest.fixture
def recipes(tmp_path: Path, images: Path) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    base = {"img_size": 32, "batch_size": 4, "epochs": 2, "warmup_epochs": 0, "lr": 1e-3, "workers": 0}
    base |= {"progress": "false", "data_dir": str(images)}
    (folder / "_base.yaml").write_text("".join(f"{key}: {value}\n" for key, value in base.items()))
    for name in ("test_resnet", "test_convnext"):
        (folder / f"{name}.yaml").write_text(f"extends: _base.yaml\nmodel: {name}\n")
    return folder


def test_the_recipes_of_this_repository_are_on_equal_terms() -> None:
    """One for every family, which differ in the model alone; sizes follow what is asked for."""
    found = _recipes(CompareConfig(configs=str(CIFAR)), {"img_size": 32, "epochs": 2, "warmup_epochs": 0})
    families = {"agent", "biformer", "dinat", "gated", "infvit", "inline", "litv2", "mala", "nat", "transnext"}
    families |= {"convit", "davit", "maxvit", "shvit"}
    assert {name.partition("_")[0] for name, _ in found} == families
    for _, recipe in found:
        assert (recipe.img_size, recipe.epochs) == (32, 2)
        assert recipe.model_kwargs.get("img_size", 32) == 32
    assert read_yaml(CIFAR / "agent_pvt_t.yaml")["model_kwargs"]["img_size"] == 64


@pytest.mark.slow
def test_a_comparison_runs_once(recipes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "small.json"
    common: dict[str, Any] = {"configs": str(recipes), "output": str(tmp_path / "runs"), "results": str(results)}
    cfg = CompareConfig(**common, seeds=(3, 4), only=("test_resnet",), per_class=(8, 2), label="a test")
    rows = compare(cfg, {"smoothing": 0.0})
    assert [row.name for row in rows] == ["test_resnet"]
    (row,) = rows
    assert row.seeds == 2
    assert row.spread is not None
    assert 0.36 < row.parameters_m < 0.38
    record = json.loads(results.read_text())
    assert record["label"] == "a test"
    assert record["recipe"]["smoothing"] == 0.0
    assert record["images_of_a_class"] == [8, 2]
    assert [found["seed"] for found in record["rows"]] == [3, 4]
    assert all(found["epochs"] == 2 and found["peak_memory_mb"] > 100 for found in record["rows"])
    assert results.with_suffix(".png").stat().st_size > 5000
    assert results.with_suffix(".md").read_text() == to_markdown(rows)
    shown = capfd.readouterr().out
    assert "16 training images" in shown  # eight of each of two classes
    before = results.read_bytes()
    assert compare(cfg, {"smoothing": 0.0}) == rows
    assert capfd.readouterr().out.count("done before") == 2
    assert results.read_bytes() == before
    fewer = CompareConfig(**common, seeds=(3,), only=("test_resnet",), per_class=(6, 2))
    assert len(compare(fewer, {"smoothing": 0.0})) == 1  # other data, so another run
    assert "done before" not in capfd.readouterr().out


def test_unequal_terms_and_wrong_names(recipes: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"configs": str(recipes), "output": str(tmp_path / "runs")}
    with pytest.raises(ConfigError, match=r"--only names test_vit; .* has test_convnext, test_resnet"):
        compare(CompareConfig(**common, only=("test_vit",)), {})
    with pytest.raises(DataError, match="has 12 images, --per-class asks for 99"):
        compare(CompareConfig(**common, per_class=(99, 2)), {})
    with (recipes / "test_resnet.yaml").open("a") as file:
        file.write("lr: 2e-3\n")
    with pytest.raises(ConfigError, match="not on equal terms: test_resnet and test_convnext differ in lr"):
        compare(CompareConfig(**common), {})
    with pytest.raises(ConfigError, match="no recipes"):
        compare(CompareConfig(configs=str(tmp_path)), {})
    for values, message in (
        ({"seeds": ()}, "at least one seed"),
        ({"per_class": (3,)}, "two numbers"),
        ({"results": "a.csv"}, "must end in .json"),
    ):
        with pytest.raises(ConfigError, match=message):
            CompareConfig(**values)


def test_the_table() -> None:
    def run(name: str, seed: int, top1: float) -> dict[str, Any]:
        return {
            "name": name, "model": name, "seed": seed, "top1": top1, "parameters": 1_500_000, "macs": 2e9,
            "images_per_second": 100.0 + seed, "peak_memory_mb": 10.0 * (1 + seed), "seconds": 60.0,
        }  # fmt: skip

    runs = [run("a", 0, 80.0), run("b", 0, 90.0), run("a", 1, 82.0), run("b", 1, 90.0), run("c", 0, 99.0)]
    rows = summarise(runs, [0, 1])
    assert [row.name for row in rows] == ["b", "a"]  # c lacks a seed
    assert (rows[1].top1, rows[1].spread) == (81.0, pytest.approx(2**0.5))
    assert (rows[1].images_per_second, rows[1].peak_memory_mb, rows[1].minutes) == (100.5, 20.0, 1.0)
    assert "| a | 81.00 ± 1.41 | 1.50 | 2.000 |" in to_markdown(rows)
