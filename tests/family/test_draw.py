"""The picture: well-formed, within its frame, described for readers who don't see it, and to scale."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest

from rorqual.family import Card, config, models
from rorqual.family.account import layer_parameters
from rorqual.family.draw import ATTENTION, HEIGHT, IDLE, ROUTED, TOWER_WIDTH, WIDTH, draw
from rorqual.family.parts import GQA, Layer, MoE, Rope, Router, SwiGLU

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("card", models(), ids=lambda card: card.name)
def test_well_formed_and_inside_its_frame(card: Card) -> None:
    root = ET.fromstring(draw(card.config, card.name))
    assert root.tag == f"{SVG}svg"
    assert root.attrib["role"] == "img"
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert title is not None and title.text == card.name
    assert description is not None and description.text and str(len(card.config.layers)) in description.text
    for rect in root.iter(f"{SVG}rect"):
        x, y, width, height = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert width > 0 and height > 0
        assert x >= 0 and y >= 0 and x + width <= WIDTH and y + height <= HEIGHT
    for text in root.iter(f"{SVG}text"):
        size, x = float(text.attrib["font-size"]), float(text.attrib["x"])
        bold = text.attrib.get("font-weight", "400") >= "600"
        wide = (0.62 if bold else 0.53) * size * len(text.text or "")
        left = {"start": x, "middle": x - wide / 2, "end": x - wide}[text.attrib.get("text-anchor", "start")]
        assert left >= 0 and left + wide <= WIDTH, text.text


def test_titles_are_escaped() -> None:
    root = ET.fromstring(draw(config("deepseek-v3"), "<b>&\"'"))
    title = root.find(f"{SVG}title")
    assert title is not None and title.text == "<b>&\"'"
    assert draw(config("deepseek-v3")) == draw(config("deepseek-v3"), "deepseek-v3")


def test_the_active_experts_are_lit() -> None:
    for name, routed, active in (
        ("deepseek-v3", 256, 8),
        ("deepseek-v4-pro", 384, 6),
        ("deepseek-v2", 160, 6),
    ):
        squares = [
            rect
            for rect in ET.fromstring(draw(config(name))).iter(f"{SVG}rect")
            if rect.attrib["width"] == rect.attrib["height"] and rect.attrib.get("rx") == "2"
        ]
        squares = [rect for rect in squares if float(rect.attrib["y"]) < 700]  # not the legend
        assert sum(rect.attrib["fill"] == ROUTED for rect in squares) == active
        assert sum(rect.attrib["fill"] in (ROUTED, IDLE) for rect in squares) == routed


def test_the_tower_is_to_scale() -> None:
    model = config("deepseek-v3")
    counts = layer_parameters(model, model.layers[-1])
    bars = [r for r in ET.fromstring(draw(model)).iter(f"{SVG}rect") if r.attrib["fill"] == ATTENTION["MLA"]]
    stripes = [float(r.attrib["width"]) for r in bars if r.attrib["x"] == "210"]
    assert len(stripes) == 62  # 61 layers and MTP
    longest = counts.total - counts.rest
    assert max(stripes) == pytest.approx(TOWER_WIDTH * counts.attention / longest, abs=0.02)


def test_odd_models_can_be_drawn() -> None:
    rope = Rope(dim=2)
    tiny = config("deepseek-llm-7b").replace(layers=(Layer(GQA(1, 1, 2, rope), SwiGLU(1)),), tied=True)
    huge = Layer(GQA(10**9, 10**9, 2, rope), MoE(10**9, 5, 8, 10**6, Router(groups=10**3, keep=7)))
    for model in (tiny, tiny.replace(layers=(huge,)), tiny.replace(layers=(tiny.layers[0],) * 5000)):
        ET.fromstring(draw(model, "odd"))
