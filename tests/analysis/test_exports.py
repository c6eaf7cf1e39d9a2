import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from visionattn.analysis import bench, exports
from visionattn.analysis.exports import survey

TOOLS = Path(__file__).parents[2] / "tools"


def fake(tmp_path: Path, body: str) -> Path:
    """A stand-in for tools/export.py: its arguments are in `args`, the place of its report in `report`."""
    tool = tmp_path / "tool.py"
    tool.write_text(
        "import json, sys, time\nargs = sys.argv[1:]\nreport = open(args[args.index('--report') + 1], 'w')\n" + body
    )
    return tool


@pytest.mark.slow
def test_every_format_of_a_model_is_tried(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "exports.json"
    command = ["check_exports.py", "infvit_4l_linear", "--out", str(out), "--format", "torchscript", "safetensors"]
    monkeypatch.setattr(sys, "argv", command)
    for _ in range(2):  # the second time there is nothing left to do
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOLS / "check_exports.py"), run_name="__main__")
        assert end.value.code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(r["model"], r["format"], r["stopped"]) for r in rows] == [
        ("infvit_4l_linear", "torchscript", ""), ("infvit_4l_linear", "safetensors", ""),
    ]  # fmt: skip
    assert all(r["largest_error"] <= 1e-4 and r["megabytes"] > 1 for r in rows)
    assert capsys.readouterr().out.count("1 of 2") == 1


def test_what_does_not_export_says_why_and_the_rest_goes_on(tmp_path) -> None:
    tool = fake(tmp_path, """
if args[0] == "bad":
    sys.exit(print("a warning\\nerror: no such operator", file=sys.stderr) or 1)
if args[0] == "dead":
    sys.exit(3)
json.dump({"megabytes": 1.5, "largest_error": 1e-6, "smallest": None, "path": "model"}, report)
""")  # fmt: skip
    told: list[str] = []
    rows = {r.model: r for r in survey(tool, ["bad", "good", "dead"], [("onnx", "batch")], log=told.append)}
    assert rows["bad"].stopped == "no such operator"
    assert rows["dead"].stopped == "exit status 3"
    assert (rows["good"].megabytes, rows["good"].stopped) == (1.5, "")
    assert len(told) == 3


def test_an_export_that_does_not_end_is_stopped(tmp_path) -> None:
    tool = fake(tmp_path, "time.sleep(600)")
    (row,) = survey(tool, ["slow"], [("pt2", "batch,size")], limit_s=1, log=lambda _: None)
    assert row.stopped == "not finished in 1 s"


def test_a_survey_goes_on_elsewhere_by_the_same_versions_alone(tmp_path) -> None:
    here = bench.machine("cpu")
    there = {**here, "device": "another", "date": "2000-01-01"}
    rows = [exports.ExportRow("a", "onnx", "batch"), exports.ExportRow("b", "onnx", "batch")]
    out = tmp_path / "exports.json"
    for where, row in zip((there, here), rows, strict=True):
        bench.write(out, where, [row], append=True, keys=exports.KEYS, same=exports.SAME)
    held = bench.read(out, there, same=exports.SAME)
    assert (held["machine"], [r["model"] for r in held["rows"]]) == (here, ["a", "b"])
    for name in exports.SAME:
        with pytest.raises(ValueError, match=re.escape(f"'{name}': '{here[name]}'")):
            bench.read(out, {**here, name: "0.0"}, same=exports.SAME)


def test_rows_that_are_known_are_not_made_again(tmp_path) -> None:
    known = [{"model": "a", "format": f, "dynamic": d} for f, d in exports.KINDS]
    assert list(survey(tmp_path / "nowhere.py", ["a"], known=known)) == []
