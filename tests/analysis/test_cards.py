"""Model cards are complete, true to what is registered, and their tables up to date."""

import re
from pathlib import Path

import pytest
import timm

from visionattn import list_models
from visionattn.analysis import cards, flops

ROOT = Path(__file__).parents[2]
CARDS = {card.path.stem: card for card in cards.read(ROOT)}
every_card = pytest.mark.parametrize("name", CARDS)


def test_every_model_is_on_a_card() -> None:
    listed = {v["model"] for card in CARDS.values() for v in card.variants}
    assert set(flops.model_names()) <= listed
    assert all(timm.is_model(name) for name in listed)
    assert len(CARDS) == 13  # NAT and DiNAT share one


@every_card
def test_front_matter_is_complete(name: str) -> None:
    front = CARDS[name].front
    assert set(front) >= {"family", "paper", "code", "weights", "reported", "variants", "parity"}
    assert all(re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper) for paper in front["paper"])
    assert set(front["code"]) == {"url", "commit", "licence"}
    assert set(front["weights"]) == {"licence", "where"}
    assert front["reported"]["kind"] == "reported"
    known = {"model", "size", "kwargs", "params", "macs", "top1", "weights", "why_params", "why_macs"}
    for variant in front["variants"]:
        assert set(variant) <= known


@every_card
def test_says_what_for_and_what_not(name: str) -> None:
    text = CARDS[name].text
    for heading in ("**For**", "**Not for**", "**Departures", "**Limits.**"):
        assert heading in re.sub(r"\s+", " ", text), heading
    own = ["quantization"] if name == "gated_vit" else []
    assert [m[1] for m in cards.TABLE.findall(text)] == ["variants", "parity", "speed", "dense", *own]


@every_card
def test_tables_are_up_to_date(name: str) -> None:
    assert cards.Tables(ROOT).render(CARDS[name]) == CARDS[name].text, "run: python tools/make_tables.py"


def test_a_stale_number_is_seen() -> None:
    card = CARDS["biformer"]
    stale = cards.Card(card.path, card.front, card.text.replace("| 13.14 |", "| 13.41 |"))
    assert stale.text != card.text
    assert cards.Tables(ROOT).render(stale) == card.text


def test_a_difference_without_a_reason_is_refused() -> None:
    card = CARDS["biformer"]
    front = {**card.front, "variants": [{"model": "biformer_t", "params": 14.1}]}
    with pytest.raises(
        ValueError, match="biformer_t: counted and published params differ, and the card has no why_params"
    ):
        cards.Tables(ROOT).render(cards.Card(card.path, front, card.text))


def test_agreement_is_two_percent_or_the_published_digits() -> None:
    assert cards.agrees(1.173, 1.2)  # 2.2 % off, but 1.2 when rounded
    assert cards.agrees(20.3, 20.0)
    assert not cards.agrees(1.14, 1.2)
    assert cards.agrees(7.4, 7)
    assert not cards.agrees(7.6, 7)


@every_card
def test_parity_is_measured_and_within_the_tests_bound(name: str) -> None:
    front = CARDS[name].front
    rows = [r for r in cards.Tables(ROOT).parity["rows"] if r["case"].split("/")[0] in front["parity"]]
    assert rows
    assert all(r["outputs"] <= 1e-4 and (r["grads"] is None or r["grads"] <= 1e-3) for r in rows)
    assert {r["model"] for r in rows} <= {v["model"] for v in front["variants"]} | set(list_models())
