"""What the documents say is so: Python runs, commands parse, paths and names exist, numbers are those measured."""

import argparse
import importlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import timm
import torch

import visionattn
from visionattn.analysis import cards, documents, performance
from visionattn.ops import OPERATORS

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING, FAMILY = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/adding-a-family.md"
PAGES = [README, *documents.pages(ROOT)]

FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
PATH = re.compile(r"(?:benchmarks|configs|docs|model_cards|tests|tools|visionattn)/[^\s,;:)]*")
WRITES = {"--out", "--json", "--output", "--work-dir", "--results", "--results-file"}  # what follows need not exist
LAUNCHERS = {"python", "accelerate", "torchrun"}


def place(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Untitled blocks: a title names the file that a block stands for."""
    return [code for found, title, code in FENCE.findall(page.read_text()) if found == language and not title]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in bash blocks."""
    for code in blocks(page, "bash"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


def mentioned(page: Path) -> Iterator[list[str]]:
    """The words of each command in the text, where `a|b` is either, and the rest of a command may be left out."""
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
        if code.startswith(("python tools/", "python -m ")):
            for words in itertools.product(*(word.split("|") for word in shlex.split(code))):
                yield list(words)


every_page = pytest.mark.parametrize(
    "page", [*PAGES, CONTRIBUTING, *(card.path for card in cards.read(ROOT))], ids=place
)


# Python


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "biformer_small_best.pth"
    torch.save({"model": timm.create_model("biformer_s").state_dict()}, path)
    return path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python") and page != FAMILY], ids=place)
def test_python_blocks_run_in_order(page: Path, tmp_path, monkeypatch, capsys, request) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(page, "python")
    if any("biformer_small_best.pth" in block for block in code):
        (tmp_path / "biformer_small_best.pth").symlink_to(request.getfixturevalue("weights"))
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, place(page), "exec"), names)
    if page == README:
        printed = capsys.readouterr().out
        assert "biformer_stl_nchw" in printed
        assert "fused 12 modules, left 0" in printed
        assert "replaced 11 attention modules" in printed


@pytest.mark.slow
def test_the_family_that_a_page_adds_fulfils_the_contract(tmp_path) -> None:
    text = FAMILY.read_text()
    for folder in ("visionattn", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("goldens", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    files = {title: code for language, title, code in FENCE.findall(text) if title}
    variants = tmp_path / "tests/models/variants.py"
    entry = files.pop("tests/models/variants.py").strip()
    _replace(variants, "TINY: dict[str, tuple[str, dict[str, Any]]] = {", lambda line: f"{line}\n    {entry},")
    models = tmp_path / "visionattn/models/__init__.py"
    _replace(models, "FAMILIES = (", lambda line: f"from visionattn.models import linear_pvt\n{line}linear_pvt, ")
    for name, code in files.items():
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(code)
    (block,) = blocks(FAMILY, "python")
    (tmp_path / "tests/test_page.py").write_text(f"def test_page_linear_pvt():\n    exec({block!r}, {{}})\n")
    (command,) = (words for words in commands(FAMILY) if words[2] == "pytest")
    run = subprocess.run(
        [sys.executable, *command[1:], "tests/test_page.py", "-m", "not slow", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 15, run.stdout[-3000:]


def _replace(path: Path, line: str, change: Callable[[str], str]) -> None:
    text = path.read_text()
    assert text.count(line) == 1, (path, line)
    path.write_text(text.replace(line, change(line)))


# Commands


class Parsed(Exception):
    """A tool has read its command line, and would begin to work."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments


class Refused(Exception):
    """A tool does not take a command line; the message says why."""


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a tool read its arguments, and return them instead of working."""
    parse_args = argparse.ArgumentParser.parse_args

    def read(parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        raise Parsed(parse_args(parser, *args))

    def work(arguments: Any, *_: Any) -> NoReturn:
        raise Parsed(arguments)

    def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise Refused(f"{shlex.join(words)}: {message}")

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        patch.setattr(sys, "argv", words)
        spec = importlib.util.spec_from_file_location("tool", ROOT / words[0])
        assert spec is not None
        assert spec.loader is not None
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        for name in ("train", "dry_run", "validate", "validate_table", "compare"):
            if hasattr(tool, name) and "parse_config" in vars(tool):
                patch.setattr(tool, name, work)
        try:
            status = tool.main()
        except Parsed as done:
            return done.arguments
        except SystemExit as stopped:
            status = stopped.code
        if status != 0:
            raise Refused(f"{shlex.join(words)}: exit status {status}")
        return argparse.Namespace()  # --help


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch, whole: bool = True) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
        for word in words:
            for extra in re.findall(r"^\.\[([\w,]+)\]$", word):
                assert set(extra.split(",")) <= set(extras), words
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None, words
    else:
        assert words[0] in LAUNCHERS, f"what does {words[0]} do? {words}"
        tool = next((i for i, word in enumerate(words) if word.startswith("tools/")), None)
        if tool is not None:
            try:
                arguments = parsed(words[tool:], monkeypatch)
            except Refused as refused:
                if whole or "arguments are required" not in str(refused):
                    raise
                return
            given = [name for key in ("models", "names") for name in _listed(arguments, key)]
            assert all(timm.is_model(name) for name in given if name not in ("all", "cards", "configs")), given
            assert set(_listed(arguments, "operators")) <= set(OPERATORS)


def _listed(arguments: Any, key: str) -> Sequence[str]:
    value = getattr(arguments, key, ())
    return value if isinstance(value, list | tuple) else ()


@every_page
def test_commands_are_those_of_the_tools(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for words in commands(page):
        check_command(words, monkeypatch)
    for words in mentioned(page):
        check_command(words, monkeypatch, whole=False)


@pytest.mark.parametrize(
    "line",
    [
        "python tools/train.py configs/digits/biformer_t.yaml --epoch 3",
        "python tools/train.py configs/digits/biformer_x.yaml",
        "python tools/flops.py biformer_x",
        "python tools/flops.py biformer_t --width 3",
        "python tools/benchmark.py ops routed_attn",
        "python tools/no_such_tool.py",
        "python -m visionattn.no_such_module",
        "make coffee",
        "pip install '.[coffee]'",
        "coffee",
    ],
)
def test_a_wrong_command_is_seen(line: str, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, OSError, ModuleNotFoundError, Refused)):
        check_command(shlex.split(line), monkeypatch)


# Paths and names


def missing_paths(text: str) -> list[str]:
    """Paths of the repository in code, inline or in bash blocks, that do not exist."""
    code = [block for language, _, block in FENCE.findall(text) if language == "bash"]
    code += INLINE.findall(FENCE.sub("", text))
    missing = []
    for words in (line.split() for block in code for line in block.splitlines()):
        for before, word in itertools.pairwise(["", *words]):
            match = PATH.match(word)
            if match is None or before in WRITES or set(match[0]) & set("<{"):
                continue
            name = match[0].rstrip(".")
            if not (any(ROOT.glob(name)) if "*" in name else (ROOT / name).exists()):
                missing.append(name)
    return missing


@every_page
def test_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text()) == []


def test_a_missing_path_is_seen() -> None:
    text = (
        "`tools/train.py`, `tools/no.py`\n```bash\npython tools/flops.py --out benchmarks/new.json configs/no.py\n```\n"
    )
    assert missing_paths(text) == ["configs/no.py", "tools/no.py"]


@every_page
def test_names_of_the_library_exist(page: Path) -> None:
    for code in INLINE.findall(FENCE.sub("", page.read_text())):
        for name in re.findall(r"(?<![\w/])visionattn(?:\.\w+)+", code):
            resolve(name)


def resolve(name: str) -> object:
    """Return what a dotted name names: modules as far as there are any, then attributes."""
    parts = name.split(".")
    found: object = visionattn
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(found, part):
            importlib.import_module(".".join(parts[:i]))
        found = getattr(found, part)
    return found


def test_every_operator_has_a_page() -> None:
    pages = {page.stem for page in documents.pages(ROOT) if page.parent.name == "operators"}
    assert pages == {*OPERATORS, "index"}


# Tables


@pytest.mark.parametrize("page", documents.pages(ROOT), ids=place)
def test_tables_of_the_docs_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert documents.render(ROOT, page, text) == text, "run: python tools/make_tables.py"


def test_tables_of_the_readme_are_up_to_date() -> None:
    text = README.read_text()
    assert performance.render(ROOT, text) == text, "run: python tools/make_tables.py"
    stale = text.replace("`agent_attention` | 7 |", "`agent_attention` | 8 |")
    assert stale != text
    assert performance.render(ROOT, stale) == text


def test_of_one_kind_and_image_a_dearer_segmenter_is_listed_only_if_it_is_better() -> None:
    rows = [line.split(" | ") for line in documents.segmentation(ROOT, README) if line.startswith("| upernet | 160k")]
    for cheap, dear in itertools.pairwise(rows):
        if cheap[-1] == dear[-1]:
            assert float(cheap[4]) < float(dear[4])
            assert float(cheap[6]) <= float(dear[6])


def test_the_device_advice_is_what_was_measured() -> None:
    """docs/choosing.md calls SHViT the quickest."""
    first = next(line for line in documents.latency(ROOT, README) if line.startswith("| `"))
    assert first.startswith("| `shvit_")
