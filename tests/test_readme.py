"""The README's Python runs."""

import re
from pathlib import Path

import pytest
import timm
import torch

import visionattn  # noqa: F401 - registers the models

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
