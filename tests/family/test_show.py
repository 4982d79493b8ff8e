"""The tables fit their width, say the exact numbers, and the plain data is JSON."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from rorqual.family import Card, ConfigError, card, config, models
from rorqual.family.show import as_dict, models_as_dict, show_inspect, show_models


def console(width: int) -> Console:
    return Console(width=width, file=io.StringIO(), force_terminal=False)


def text(page: Console) -> str:
    assert isinstance(page.file, io.StringIO)
    return page.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_family_fits(width: int) -> None:
    page = console(width)
    show_models(page)
    shown = text(page)
    assert max(map(len, shown.splitlines())) <= width
    assert "\u2026" not in shown  # nothing cut off
    for c in models():
        assert c.name in shown
    for exact in ("671,026,419,200", "37,552,297,472", "1,572,997,201,763", "(u)", "70,272", "1M"):
        assert exact in shown


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize(
    "name", ["deepseek-v3", "deepseek-v4-flash", "deepseek-llm-67b", "deepseek-v3.2", "r1-distill-qwen-1.5b"]
)
def test_inspect_fits(name: str, width: int) -> None:
    page = console(width)
    show_inspect(card(name), page, context=4096, batch=3)
    shown = text(page)
    assert max(map(len, shown.splitlines())) <= width
    assert "\u2026" not in shown
    for words in (
        "Layers",
        "Parameters",
        "Cache, 3 x 4,096 tokens",
        "FLOPs a token",
        "To serve",
        "H100 80 GB",
    ):
        assert words in shown


def test_inspect_says_what_was_recalled() -> None:
    page = console(100)
    show_inspect(card("deepseek-llm-7b"), page)
    assert "recalled" in text(page) and "rope_theta" in text(page)


def test_inspect_of_a_bare_config() -> None:
    page = console(80)
    show_inspect(config("deepseek-v2-lite").replace(name=""), page, context=1)
    assert "15,706,484,224" in text(page)
    with pytest.raises(ConfigError):
        show_inspect(config("deepseek-v2-lite"), page, context=0)
    with pytest.raises(ConfigError):
        as_dict(config("deepseek-v2-lite"), context=9, batch=0)


@pytest.mark.parametrize("c", models(), ids=lambda c: c.name)
def test_plain_data(c: Card) -> None:
    data = as_dict(c, context=1000)
    assert json.loads(json.dumps(data)) == data
    assert sum(part["total"] for part in data["parameters"]["parts"].values()) == data["parameters"]["total"]
    assert sum(run["count"] * len(run["period"]) for run in data["runs"]) == len(c.config.layers)
    assert data["cache"][0]["bytes"] > 0


def test_the_family_as_plain_data() -> None:
    data = models_as_dict()
    assert json.loads(json.dumps(data)) == data
    assert {record["name"] for record in data} == {c.name for c in models()}
    v3 = next(record for record in data if record["name"] == "deepseek-v3")
    assert (v3["parameters"], v3["cache_bytes_per_token"], v3["encoding"]) == (
        671_026_419_200,
        70_272,
        "roles",
    )
