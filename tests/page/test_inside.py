"""The look inside: what the page shows of what the server tells."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.page import fake
from tests.page.conftest import done, picture, say, tidy
from tests.serve.conftest import serving, until

sync_api = pytest.importorskip("playwright.sync_api")
expect = getattr(sync_api, "expect", None)
Browse = Callable[..., Any]

PIXELS = """() => {
  const canvas = document.querySelector('canvas.heat');
  const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  const seen = new Set();
  for (let at = 0; at < data.length; at += 4) seen.add(`${data[at]},${data[at + 1]},${data[at + 2]}`);
  return [canvas.width, canvas.height, seen.size];
}"""


@pytest.fixture
def server() -> Iterator[Any]:
    with serving(fake.create()) as running:
        yield running


def told() -> list[dict[str, Any]]:
    """What the server tells of each token."""
    import random

    draw = random.Random(1)
    words = [("reasoning", w) for w in fake.pieces(fake.THOUGHT)] + [
        ("content", w) for w in fake.pieces(fake.ANSWER)
    ]
    return [fake.inside_of(at, text, part, draw) for at, (part, text) in enumerate(words)]


def test_nothing_is_asked_for_while_it_is_closed(server: Any, browse: Browse) -> None:
    page = browse(server.url)
    say(page, "Hi")
    assert "inside" not in server.app.state.asked[0]
    page.keyboard.press("Alt+KeyI")
    expect(page.locator("#inside")).to_contain_text("Nothing to show yet")
    page.get_by_role("button", name="Answer again").click()
    done(page)
    assert server.app.state.asked[1]["inside"] == {
        "alternatives": 5,
        "experts": True,
        "drafts": True,
        "seen": True,
    }


def test_the_map_fills_while_the_answer_streams(server: Any, browse: Browse) -> None:
    page = browse(server.url, allowed=("willReadFrequently",))  # which this test does, not the page
    expect(page.locator("#model")).to_have_text("tiny-v3")
    page.get_by_role("button", name="Look inside").click()
    server.app.state.gate.clear()
    say(page, "Hi", wait=False)
    expect(page.locator("#tokens .token")).to_have_count(41)
    expect(page.locator("canvas.heat")).to_have_accessible_name(
        re.compile("13 layers by 48 experts over 41 tokens;")
    )
    width, height, colours = page.evaluate(PIXELS)
    assert width > 200 and height >= 13 * 3 and colours > 5
    early = page.locator(".figures dd").first.inner_text()
    server.app.state.gate.set()
    done(page)
    tokens = told()
    expect(page.locator("#tokens .token")).to_have_count(len(tokens))
    assert page.evaluate(PIXELS)[2] > colours or page.locator(".figures dd").first.inner_text() != early
    # The same figures from the same choices, counted here.
    peaks, spreads, unused = [], [], []
    for layer in range(13):
        counts = [0] * 48
        for token in tokens:
            for expert in token["experts"][layer]:
                counts[expert] += 1
        mean = sum(counts) / 48
        peaks.append(max(counts) / mean)
        spreads.append((sum((n - mean) ** 2 for n in counts) / 48) ** 0.5 / mean)
        unused.append(counts.count(0))
    figures = [text.split("\n")[0] for text in page.locator(".figures dd").all_inner_texts()]
    assert figures == [f"{sum(peaks) / 13:.2f}", f"{sum(spreads) / 13:.2f}", f"{sum(unused) / 13:.1f}"]
    page.get_by_text("Layer by layer").click()
    cells = page.locator(".figures + details tbody tr").nth(4).locator("th, td")
    expect(cells).to_have_text(["7", f"{peaks[4]:.2f}", f"{spreads[4]:.2f}", str(unused[4])])
    expect(page.locator(".cache")).to_contain_text(f"{12 + len(tokens)} tokens · 56.9 times smaller")


def test_tokens_by_keyboard_and_pointer(server: Any, browse: Browse) -> None:
    page = browse(server.url)
    page.keyboard.press("Alt+KeyI")
    say(page, "Hi whales")
    tokens = told()
    strip = page.get_by_role("listbox", name="Tokens of the answer")
    assert "".join(t["text"] for t in tokens).replace("\n", "↵\n") == strip.evaluate(
        "(e) => [...e.querySelectorAll('.token')].map((t) => t.textContent).join('')"
    )
    strip.focus()
    page.keyboard.press("Home")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(strip).to_have_attribute("aria-activedescendant", "token-3")
    chosen, guesses = page.locator(".chosen"), page.locator(".guesses li")
    import math

    def percent(logprob: float) -> str:
        p = 100 * math.exp(logprob)
        return "100 %" if p >= 99.95 else f"{p:.1f} %" if p >= 0.1 else "< 0.1 %"

    expect(chosen).to_contain_text(percent(tokens[3]["logprob"]))
    expect(guesses).to_have_count(5)
    assert [row.split()[-2] for row in guesses.all_inner_texts()] == [
        percent(t["logprob"]).split()[0] for t in tokens[3]["top"]
    ]
    expect(strip.locator('[aria-selected="true"]')).to_have_accessible_name(
        f"␣{tokens[3]['text'].strip()}, {percent(tokens[3]['logprob'])}"
        + ("" if tokens[3]["draft"] == "none" else ", drafted and accepted")
        + (", instead of the draft ␣song" if tokens[3]["refused"] else "")
    )
    # What it looked at: marked in the answer and in the prompt, for all layers or one.
    page.get_by_text("The prompt's tokens").click()
    places = {p for one in tokens[3]["seen"] for p in one["positions"]}
    expect(page.locator(".seen")).to_contain_text(f"Looked at {len(places)} earlier tokens")
    expect(page.locator(".prompt-tokens .looked-at")).to_have_count(sum(p < 12 for p in places))
    expect(strip.locator(".looked-at")).to_have_count(sum(p >= 12 for p in places))
    page.locator(".seen select").select_option("9")
    expect(page.locator(".looked-at")).to_have_count(5)
    # The pointer shows another for as long as it is there.
    far = next(n for n, t in enumerate(tokens) if t["refused"] and n < 12)
    strip.locator(f"#token-{far}").hover()
    expect(chosen).to_contain_text(percent(tokens[far]["logprob"]))
    expect(page.locator("#token-detail")).to_contain_text("Refused before it:")
    page.locator("#ask").hover()
    expect(chosen).to_contain_text(percent(tokens[3]["logprob"]))
    # Drafts
    page.get_by_label("Coloured").select_option("drafts")
    good = sum(t["draft"] == "accepted" for t in tokens)
    bad = sum(len(t["refused"]) for t in tokens)
    expect(page.locator(".legend")).to_contain_text(f"{good} of {good + bad} drafts accepted")
    assert strip.locator("del.refused").count() == bad and strip.locator("del.refused").first.is_visible()
    # The map by keyboard
    page.locator("canvas.heat").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):
        page.keyboard.press(key)
    count = sum(1 in t["experts"][1] for t in tokens)
    expect(page.locator(".heat-reading")).to_have_text(
        f"Layer 4, expert 1: chosen for {count} of {len(tokens)} tokens"
    )


def test_each_answer_keeps_its_own(server: Any, browse: Browse) -> None:
    page = browse(server.url)
    page.keyboard.press("Alt+KeyI")
    say(page, "One")
    say(page, "Two")
    expect(page.get_by_role("button", name="Look inside this answer")).to_have_count(2)
    page.get_by_role("button", name="Look inside this answer").first.click()
    expect(page.locator("#tokens .token")).to_have_count(len(told()))
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("#inside")).to_contain_text("Nothing to show yet")


def test_blocks_windows_and_gaps(server: Any, browse: Browse) -> None:
    """A compressed cache's places stand for several tokens; the last token has no experts; a model may have none."""
    page = browse(server.url)
    model = {**fake.MODEL, "expert_layers": [], "experts": 0, "window": 8}
    page.route("**/inside", lambda route: route.fulfill(json={"enabled": True, "model": model}))
    page.reload()
    page.keyboard.press("Alt+KeyI")
    seen = [{"layer": 2, "positions": [0, 8], "weights": None, "every": 4}]
    tokens = [
        {"index": 0, "id": 1, "text": "a", "logprob": -0.1, "top": [], "part": "content", "experts": None, "draft": "none", "refused": [], "seen": seen},
        {"index": 1, "id": 2, "text": "", "logprob": None, "top": [], "part": "markup", "experts": None, "draft": "none", "refused": [], "seen": None},
    ]  # fmt: skip
    lines = [
        {"choices": [{"index": 0, "delta": {"content": "a"}}], "inside": {"tokens": tokens}},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    ]
    body = "".join(f"data: {json.dumps(line)}\n\n" for line in lines) + "data: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream")
    )
    say(page, "Hi whales")
    page.locator("#tokens").focus()
    page.get_by_text("The prompt's tokens").click()
    expect(page.locator(".seen")).to_contain_text("Looked at 8 earlier tokens")
    expect(page.locator(".seen")).to_contain_text("the 8 before it")
    expect(page.locator(".prompt-tokens .looked-at")).to_have_count(8)
    expect(page.locator("canvas.heat")).to_be_hidden()
    page.locator("#tokens").press("ArrowRight")
    expect(page.locator(".chosen")).to_contain_text("? · token 2 · markup")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(server: Any, browse: Browse, scheme: str) -> None:
    page = browse(server.url, color_scheme=scheme, viewport={"width": 1280, "height": 980})
    page.keyboard.press("Alt+KeyI")
    say(page, "How do whales sing so low?")
    page.locator("#tokens").focus()
    page.keyboard.press("Home")
    for _ in range(11):
        page.keyboard.press("ArrowRight")
    until(lambda: page.locator(".guesses li").count() == 5)
    tidy(page)
    picture(page, f"inside-{scheme}")
