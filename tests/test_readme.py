"""The README's Python runs, and its numbers are those that were measured."""

import re
from pathlib import Path

import pytest
import timm
import torch

import visionattn  # noqa: F401 - registers the models
from visionattn.analysis import performance

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": timm.create_model("biformer_s").state_dict()}, "biformer_small_best.pth")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "biformer_stl_nchw" in printed
    assert "fused 12 modules, left 0" in printed
    assert "replaced 11 attention modules" in printed


def test_tables_are_up_to_date() -> None:
    text = README.read_text()
    assert performance.render(README.parent, text) == text, "run: python tools/make_tables.py"
    stale = text.replace("`agent_attention` | 7 |", "`agent_attention` | 8 |")
    assert stale != text
    assert performance.render(README.parent, stale) == text
