"""The page over a real engine and a small random model: nothing made up between the draw of a token and its colour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.page.conftest import say
from tests.serve.conftest import serving
from tests.serve.test_real import speaking

sync_api = pytest.importorskip("playwright.sync_api")
expect = getattr(sync_api, "expect", None)
httpx = pytest.importorskip("httpx2")
Browse = Callable[..., Any]


@pytest.mark.parametrize("kind", ["v3", "v4"])
def test_a_real_model_inside_and_out(browse: Browse, kind: str) -> None:
    from rorqual.serve import create_app

    model = speaking(kind, "v31" if kind == "v3" else kind)
    app = create_app(model, memory=40_000_000, max_requests=4, page_size=64, speculate=True)
    with serving(app) as server:
        page = browse(server.url)
        told = httpx.get(server.url + "/inside")
        page.keyboard.press("Alt+KeyS")
        page.get_by_label("Thinking").select_option("off")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Most tokens").fill("24")
        page.keyboard.press("Alt+KeyI")
        say(page, "What? " * 20)
        expect(page.locator(".figures-line")).to_contain_text("tokens")
        first = page.locator(".answer > .prose").inner_text()
        page.get_by_role("button", name="Answer again").click()
        expect(page.locator(".answer .branches")).to_contain_text("2/2")
        expect(page.locator("#send")).to_be_visible()
        assert page.locator(".answer > .prose").inner_text() == first  # temperature 0
        expect(page.locator(".figures-line")).not_to_contain_text(" 0 of ")  # the prompt was in the cache
        count = int(page.locator(".figures-line").inner_text().split(" ")[0])
        expect(page.locator("#tokens .token")).to_have_count(count)
        shape = told.json()["model"]
        layers, experts = len(shape["expert_layers"]), shape["experts"]
        expect(page.locator("canvas.heat")).to_be_visible()
        label = page.locator("canvas.heat").get_attribute("aria-label")
        assert label.startswith(f"Heat map of {layers} layers by {experts} experts over {count - 1} tokens")
        expect(page.locator(".cache")).to_contain_text("tokens")
        page.locator("#tokens").focus()
        page.keyboard.press("Home")
        expect(page.locator(".guesses li")).to_have_count(5)
        expect(page.locator(".guesses .own")).to_have_count(1)
        if page.locator(".seen").count():
            page.get_by_text("The prompt's tokens").click()
            expect(page.locator(".looked-at").first).to_be_attached()
