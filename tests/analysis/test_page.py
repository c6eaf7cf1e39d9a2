"""The page in a real browser: a click on a patch says what it attends to, and the numbers are the model's."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.analysis.test_attention import family
from tests.analysis.test_methods import Net
from visionattn.analysis import AttentionLayer, look, receptive_fields, render_page
from visionattn.analysis.page import BUDGET, _plan, busiest, logarithmic

CLASSES = [f"</script><b>{c}" for c in "abcdefg"]  # text, whatever it looks like
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed (make browser)")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as p:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox root
        # Containers have little of the memory that processes share.
        chromium = p.chromium.launch(executable_path=executable, args=[*sandbox, "--disable-dev-shm-usage"])
        yield chromium
        chromium.close()


def picture(height: int = 128, width: int = 128) -> Any:
    gen = torch.Generator().manual_seed(0)
    small = torch.randint(256, (3, 4, 4), generator=gen).float()[None]
    pixels = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")[0]
    return Image.fromarray(pixels.byte().permute(1, 2, 0).contiguous().numpy())


class Opened:
    """A page in the browser, and what it said on its console."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.said: list[str] = []
        self.page = browser.new_page(viewport={"width": 1200, "height": 950}, **context)
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.said.append(request.url) if self.foreign(request.url) else None)
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("body[data-ready]")

    @staticmethod
    def foreign(url: str) -> bool:
        return not url.startswith(("file:", "data:", "blob:"))

    def click(self, row: int, column: int, rows: int, columns: int) -> None:
        """Click the middle of a cell of the view."""
        box = self.page.locator("#view").bounding_box()
        x, y = (column + 0.5) / columns * box["width"], (row + 0.5) / rows * box["height"]
        self.page.locator("#view").click(position={"x": x, "y": y})

    def layer(self, name: str) -> None:
        self.page.locator(f'#layers button[title^="{name}:"]').click()

    def head(self, number: int) -> None:
        self.page.locator(f'#heads button[title^="head {number}"]').click()

    @property
    def text(self) -> str:
        return self.page.inner_text("#say")

    def shares(self) -> dict[tuple[int, int], float]:
        """Places that the page says are attended to, counted from 0, and how much."""
        found = re.findall(r"row (\d+), column (\d+) \((-?[\d.e-]+)(\s%)?\)", self.text)
        return {(int(r) - 1, int(c) - 1): float(v) / (100 if p else 1) for r, c, v, p in found}


def agrees(shares: dict[tuple[int, int], float], weights: Tensor) -> None:
    """What the page names are the largest of ``weights (H, W)``, within the 8 bits of a weight and the digits shown."""
    assert shares
    step = float(weights.max() - weights.min().clamp(max=0)) / 510
    largest = weights.abs().flatten().topk(len(shares)).values
    for (place, share), most in zip(shares.items(), largest, strict=True):
        digit = 0.005 if abs(share) >= 0.0995 else 0.0005 if abs(share) >= 0.00995 else 0.00005
        assert abs(share - float(weights[place])) <= step + digit, (place, share)
        assert abs(share - float(most)) <= 2 * step + digit  # there are no larger ones


def weights(layer: AttentionLayer, row: int, column: int) -> Tensor:
    assert layer.grid is not None
    return layer.maps([layer.grid.token(row, column)]).weights[:, 0]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A page of a gated ViT with everything on it, and what it shows."""
    torch.manual_seed(0)
    model, x = family("gated_vit")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    found = look(model, x, fields=receptive_fields(model, [x]))
    path = tmp_path_factory.mktemp("page") / "a <b> & 'c'.html"
    text = render_page(found, picture(), title="a <b>", model="gated_vit", class_names=CLASSES)
    path.write_text(text)
    return path, (model, x, found)


def test_a_click_says_what_a_patch_attends_to(browser: Any, vit: tuple[Path, Any]) -> None:
    path, (_, _, found) = vit
    opened = Opened(browser, path)
    layer = found.attention[1]
    opened.layer(layer.name)
    opened.click(2, 1, 4, 4)
    assert opened.text.startswith("Row 3, column 2 of 4 x 4 attends to ")
    agrees(opened.shares(), weights(layer, 2, 1).mean(0))
    opened.head(2)
    agrees(opened.shares(), weights(layer, 2, 1)[1])
    on_token = float(re.findall(r"class token \(([\d.]+)\s%\)", opened.text)[0]) / 100
    assert on_token == pytest.approx(float(layer.rows([layer.grid.token(2, 1)])[1, 0, 0]), abs=0.006)
    gate = opened.page.get_attribute('#heads button[title^="head 2"]', "title")
    assert gate == f"head 2: output gate {100 * float(layer.gates[1]):.0f}\u00a0%"
    assert "Pinned" in opened.text
    opened.page.hover("#view", position={"x": 5, "y": 5})
    assert opened.text.startswith("Row 3, column 2 ")  # pinned: the pointer does not move it
    opened.page.click("#token")
    assert opened.text.startswith("The class token of 4 x 4 attends to ")
    agrees(opened.shares(), layer.maps([0]).weights[1, 0])
    assert opened.said == []


def test_pointer_and_keys_move_the_patch(browser: Any, vit: tuple[Path, Any]) -> None:
    path, (_, _, found) = vit
    opened = Opened(browser, path)
    box = opened.page.locator("#view").bounding_box()
    opened.page.hover("#view", position={"x": 0.9 * box["width"], "y": 0.1 * box["height"]})
    assert opened.text.startswith("Row 1, column 4 ")
    opened.page.focus("#view")
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "ArrowUp"):
        opened.page.keyboard.press(key)
    assert opened.text.startswith("Row 2, column 3 ")
    name = opened.page.inner_text("#layer-name")
    opened.page.keyboard.press("[")
    assert opened.page.inner_text("#layer-name") != name
    agrees(opened.shares(), weights(found.attention[1], 1, 2).mean(0))
    opened.page.keyboard.press("Escape")
    assert "Pinned" not in opened.text
    opened.page.focus("#tab-attention")
    opened.page.keyboard.press("ArrowRight")
    assert opened.page.get_attribute("#tab-rollout", "aria-selected") == "true"
    assert opened.said == []


def test_every_method_has_a_tab(browser: Any, vit: tuple[Path, Any]) -> None:
    path, (_, _, found) = vit
    opened = Opened(browser, path)
    assert opened.page.title() == "a <b> · gated_vit"
    names = opened.page.locator("#prediction span:first-child").all_inner_texts()
    assert names == [CLASSES[i] for i in found.logits.topk(3).indices]
    opened.page.click("#tab-rollout")
    assert opened.text.startswith("The class token of 4 x 4 comes from ")
    agrees(opened.shares(), found.rollout.map())
    opened.click(3, 0, 4, 4)
    agrees(opened.shares(), found.rollout.matrix[found.rollout.grid.token(3, 0), 1:].view(4, 4))
    opened.page.click("#tab-gradcam")
    assert f"What speaks for it in {found.cams[0].layer}" in opened.text
    opened.page.click("#tab-field")
    assert "99 % in" in opened.text
    opened.page.click("#tab-features")
    assert "32 channels on 4 x 4 places" in opened.text
    assert opened.page.locator("#heads button").count() == 24
    opened.page.locator("#heads button").nth(3).click()
    assert opened.page.locator("#heads button").nth(3).get_attribute("aria-pressed") == "true"
    assert opened.said == []


@pytest.mark.parametrize("name", ["biformer", "transnext", "davit", "infvit_linear", "inline_swin", "litv2"])
def test_every_kind_of_map_opens(browser: Any, name: str, tmp_path: Path) -> None:
    model, x = family(name)
    found = look(model, x, methods=["attention", "rollout"])
    (tmp_path / "page.html").write_text(render_page(found, picture(), title=name, model=name))
    opened = Opened(browser, tmp_path / "page.html", color_scheme="dark")
    for layer in found.attention:
        opened.page.locator(f'#layers button[title="{layer.name}: {layer.kind}"]').click()
        if layer.operator == "channel_attention":
            assert re.match(r"Channel \d+ of a group \(mean of groups\) takes from channel ", opened.text)
            number = int(re.findall(r"^Channel (\d+)", opened.text)[0]) - 1
            best = int(re.findall(r"takes from channel (\d+)", opened.text)[0]) - 1
            row = layer.channel_map().mean(0)[number]
            assert row[best] >= row.max() - (row.max() - row.min()) / 255
            continue
        H, W = layer.map_size
        opened.click(H // 2, W // 2, H, W)
        if layer.same_for_all:
            assert opened.text.startswith("Every token")
            agrees(opened.shares(), layer.maps([0]).weights[:, 0].mean(0))
            continue
        r, c = (int(n) - 1 for n in re.findall(r"^Row (\d+), column (\d+)", opened.text)[0])
        assert abs(r - H // 2) <= 1  # where a layer is subsampled, the nearest patch that can be asked
        shares, known = opened.shares(), weights(layer, r, c).mean(0)
        if known.min() >= -1e-3 * known.abs().max():
            agrees(shares, known)
        else:
            assert all(
                abs(known[k] - v) <= float(known.max() - known.min()) / 255 + abs(v) * 0.06 for k, v in shares.items()
            )
    opened.page.click("#tab-rollout")
    if "rollout" in found.reasons:
        assert opened.page.inner_text("#reason") == found.reasons["rollout"]
    assert opened.said == []


def test_a_page_of_nothing_says_why(browser: Any, tmp_path: Path) -> None:
    found = look(Net().eval(), torch.ones(1, 1, 8, 8))
    (tmp_path / "page.html").write_text(render_page(found, picture(), title="", model="Net"))
    opened = Opened(browser, tmp_path / "page.html")
    for tab, reason in {
        "attention": "no attention found in Net",
        "rollout": "no attention found in Net",
        "gradcam": "Net does not say where its stages end",
        "field": "No receptive fields were derived",
        "features": "Net does not say where its stages end",
    }.items():
        opened.page.click(f"#tab-{tab}")
        assert reason in opened.page.inner_text("#reason")
    assert opened.said == []


def test_pages_stay_within_their_budget() -> None:
    model, x = family("nat")
    layers = look(model, x, methods=["attention"]).attention
    full = sum(plan.bytes for plan in _plan(layers, BUDGET))
    plans = _plan(layers, full // 4)
    assert sum(plan.bytes for plan in plans) <= full // 4
    found = look(model, x, methods=["attention"])
    whole, small = (render_page(found, picture(), title="", model="", budget=b) for b in (BUDGET, full // 4))
    assert len(small) < len(whole)
    assert "Subsampled for the page" in small
    assert "Subsampled for the page" not in whole  # 16 x 16 patches and fewer
    assert not re.search(r"(?:src|href)=.?(?!data:)\w+:", whole)


def test_small_helpers() -> None:
    image = Image.new("RGB", (140, 140), "white")
    image.paste(picture(10, 10), (50, 30))
    assert busiest(image, (14, 14)) == (3, 5)
    torch.testing.assert_close(logarithmic(torch.tensor([0, 1e-5, 1e-2, 1.0])), torch.tensor([0, 0, 0.5, 1.0]))
