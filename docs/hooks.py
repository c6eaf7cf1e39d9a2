"""What MkDocs does besides: pages and pictures that live elsewhere in the repository, links to files, formulas."""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages and pictures outside docs/, by their place in the repository.
ELSEWHERE = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ELSEWHERE |= {f"model_cards/{path.name}": f"models/{path.name}" for path in sorted((ROOT / "model_cards").glob("*.md"))}
ELSEWHERE |= {
    str(path.relative_to(ROOT)): f"plots/{path.name}"
    for folder, kind in (("benchmarks/plots", "*.svg"), ("benchmarks", "*.png"))
    for path in (ROOT / folder).glob(kind)
}
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the folders of the navigation; let ```math fences become MathML, which browsers draw by themselves."""
    config.nav = [_folder(entry) for entry in config.nav or []]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": _math}
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what lives elsewhere."""
    for place, uri in ELSEWHERE.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links, which are right in the repository, to pages; those to other files of the repository become text."""
    uri = page.file.src_uri
    place = next((place for place, other in ELSEWHERE.items() if other == uri), f"docs/{uri}")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), target))
        page_uri = ELSEWHERE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if page_uri is not None:
            return f"[{text}]({posixpath.relpath(page_uri, posixpath.dirname(uri) or '.')}{anchor})"
        return text if (ROOT / path).exists() else match[0]

    return LINK.sub(link, markdown)


def _folder(entry: Any) -> Any:
    """``{title: "folder/"}`` with the folder's pages, its index first."""
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if not (isinstance(value, str) and value.endswith("/")):
        return entry
    pages = {f"{value}{path.name}" for path in (ROOT / "docs" / value).glob("*.md")}
    pages |= {uri for uri in ELSEWHERE.values() if uri.startswith(value)}
    return {title: sorted(pages, key=lambda uri: (not uri.endswith("index.md"), uri))}


def _math(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    return f'<div class="{css_class}">{convert(source, display="block")}</div>'
