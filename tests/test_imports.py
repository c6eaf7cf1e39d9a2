"""Rules of who may import what that the import linter cannot say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "visionattn").rglob("*.py"))


def test_timms_private_modules_stay_behind_the_backbone() -> None:
    users = [p.name for p in SOURCES if re.search(r"(?:from|import) timm\.\w+\._", p.read_text())]
    assert users == ["_backbone.py"]


def test_implementations_of_an_operator_never_import_each_other() -> None:
    names = "reference|eager|triton|natten|flex"
    for path in SOURCES:
        if path.parent.parent.name == "ops" and path.stem in names.split("|"):
            others = re.findall(rf"^from visionattn\.ops\.\w+(?:\.| import )({names})\b", path.read_text(), re.M)
            assert others == [], path


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_documents_name_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    paths = re.findall(r"\b(?:tools|configs|tests|visionattn)/[\w/.-]+\.(?:py|yaml)", text)
    assert paths
    assert [p for p in paths if not (ROOT / p).exists()] == []
