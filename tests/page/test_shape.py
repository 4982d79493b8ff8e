"""For everyone: axe's rules, the keyboard alone, a phone, both colours, and pictures of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.page import fake
from tests.page.conftest import Served, done, picture, say, tidy
from tests.serve.conftest import serving
from tests.serve.puppet import dsml

sync_api = pytest.importorskip("playwright.sync_api")
expect = getattr(sync_api, "expect", None)
Start, Browse = Callable[..., Served], Callable[..., Any]
CALL = dsml(("weather", {"city": "true>São Paulo"}))


@pytest.fixture(scope="module")
def made_up() -> Any:
    with serving(fake.create()) as server:
        yield server


def problems(page: Any, rule: str = "") -> list[str]:
    """What axe finds, by all of its rules or one."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.evaluate(axe.axe_script)
    told = page.evaluate(
        "(only) => axe.run({ resultTypes: ['violations'], ...only })", {"runOnly": [rule]} if rule else {}
    )
    return [
        f"{v['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for v in told["violations"]
        for node in v["nodes"]
    ]


@pytest.mark.parametrize("scheme, rule", [("light", ""), ("dark", "color-contrast")])
def test_accessible(made_up: Any, browse: Browse, scheme: str, rule: str) -> None:
    page = browse(made_up.url, color_scheme=scheme)
    assert problems(page, rule) == []
    page.keyboard.press("Alt+KeyI")
    say(page, "How do whales sing?")
    page.locator(".reasoning summary").click()
    page.locator("#tokens").focus()
    page.keyboard.press("ArrowRight")
    page.get_by_text("The prompt's tokens").click()
    page.get_by_text("Layer by layer").click()
    expect(page.locator(".hljs-keyword").first).to_be_visible()
    assert problems(page, rule) == []
    page.get_by_label("Coloured").select_option("drafts")
    page.get_by_role("button", name="Answer again").click()
    done(page)
    page.keyboard.press("Alt+KeyS")
    page.get_by_label("Hold the answer to a schema").check()
    page.get_by_label("Offer functions to call").check()
    page.get_by_label("Temperature").fill("9")
    page.get_by_role("button", name="Edit message").click()
    assert problems(page, rule) == []
    page.locator("#title").click()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    assert problems(page, rule) == []


def test_accessible_calls_and_errors(puppet: Start, browse: Browse) -> None:
    server = puppet("Look.</think>I ask." + CALL)
    page = browse(server.url, allowed=("503",), viewport={"width": 390, "height": 844}, color_scheme="dark")
    say(page, "Weather?")
    page.keyboard.press("Alt+KeyS")
    page.get_by_label("Offer functions to call").check()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".card")).to_be_visible()
    server.service.draining = True
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Send result").click()
    expect(page.locator(".error")).to_be_visible()
    assert problems(page) == []


def test_by_keyboard_alone(puppet: Start, browse: Browse) -> None:
    server = puppet(*(f"x</think>Answer {n}." for n in range(1, 9)))
    page = browse(server.url)
    keys, focus = page.keyboard, "() => document.activeElement.id || document.activeElement.textContent"
    assert page.evaluate(focus) == "ask"
    keys.type("One")
    keys.press("Shift+Enter")
    keys.type("more")
    keys.press("Enter")
    done(page)
    expect(page.locator(".bubble")).to_have_text("One\nmore")
    keys.press("Alt+KeyR")
    expect(page.locator(".answer > .prose")).to_have_text("Answer 2.")
    keys.press("Alt+ArrowUp")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    keys.press("Escape")
    expect(page.locator(".bubble")).to_be_visible()
    expect(page.get_by_role("button", name="Edit message")).to_be_focused()
    keys.press("Enter")
    keys.type("!")
    keys.press("Enter")
    expect(page.locator(".answer > .prose")).to_have_text("Answer 3.")
    done(page)
    keys.press("/")
    expect(page.locator("#ask")).to_be_focused()
    keys.press("Alt+KeyS")
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate("() => document.querySelector('#settings').contains(document.activeElement)")
    keys.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#show-settings")).to_be_focused()
    keys.press("?")
    help_ = page.get_by_role("dialog", name="Keyboard shortcuts")
    expect(help_).to_contain_text("answer again")
    page.get_by_label("Shortcuts are on").focus()
    keys.press("Space")
    keys.press("Escape")
    keys.press("?")
    expect(help_).to_be_hidden()
    keys.press("Alt+KeyN")
    expect(page.locator(".bubble")).to_be_visible()  # they are off now
    page.locator("#help").focus()
    keys.press("Enter")
    page.get_by_label("Shortcuts are on").focus()
    keys.press("Space")
    keys.press("Escape")
    keys.press("Alt+KeyN")
    expect(page.locator(".welcome")).to_be_visible()
    # The first stop of the page leads to the message box.
    page.locator("a").first.focus()
    keys.press("Enter")
    expect(page.locator("#ask")).to_be_focused()
    # All can be reached, and each shows where it is.
    seen = set()
    for _ in range(30):
        keys.press("Tab")
        name, line = page.evaluate(
            "() => { const e = document.activeElement, s = getComputedStyle(e.id === 'ask' ? e.parentElement : e);"
            " return [e.tagName === 'BODY' ? '' : e.id || e.className, s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0] }"
        )
        assert line or name == "", name
        seen.add(name)
    assert {
        "new-talk",
        "show-list",
        "show-inside",
        "show-settings",
        "theme",
        "help",
        "thread",
        "ask",
        "send",
        "talk",
        "export",
    } <= seen


@pytest.mark.parametrize("width", [360, 390])
def test_on_a_phone(made_up: Any, browse: Browse, width: int) -> None:
    page = browse(made_up.url, viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True)
    fits = "() => [document.documentElement.scrollWidth, document.body.scrollWidth, document.querySelector('#thread').scrollWidth].every((w) => w <= innerWidth)"
    assert page.evaluate(fits)
    page.locator("#ask").fill("How do whales sing so low?" + "so" * 80 * (width == 360))
    page.locator("#send").tap()
    done(page)
    assert page.evaluate(fits)
    expect(page.locator(".katex").first).to_be_visible()
    assert page.locator("#thread").evaluate("(e) => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    for name in ("Look inside", "Settings", "Conversations"):
        page.get_by_role("button", name=name, exact=True).tap()
        drawer = page.locator(
            {"Look inside": "#inside", "Settings": "#settings", "Conversations": "#list"}[name]
        )
        expect(drawer).to_be_in_viewport()
        assert page.evaluate(fits)
        box = drawer.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        assert drawer.evaluate("(e) => e.scrollWidth <= e.clientWidth")
        assert page.evaluate("() => document.querySelector('#middle').inert")
        drawer.get_by_role("button", name="Close").first.tap()
        assert not page.evaluate("() => document.querySelector('#middle').inert")
    for button in page.locator("header button:visible, #send, .actions button:visible").all():
        box = button.bounding_box()
        assert box["width"] >= 24 and box["height"] >= 24
    if width == 390:
        tidy(page)
        picture(page, "phone")
        # The panel covers the conversation here: once opened, it goes on watching while it is closed.
        page.get_by_role("button", name="Answer again").tap()
        done(page)
        page.get_by_role("button", name="Look inside", exact=True).tap()
        expect(page.locator("canvas.heat")).to_be_visible()
        page.get_by_label("Watch the answers").uncheck()
        page.locator("#inside").get_by_role("button", name="Close").tap()
        page.get_by_role("button", name="Answer again").tap()
        done(page)
        assert [bool(body.get("inside")) for body in made_up.app.state.asked[-3:]] == [False, True, False]


def test_light_and_dark(made_up: Any, browse: Browse) -> None:
    page = browse(made_up.url, color_scheme="light")
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert light == "rgb(255, 255, 255)" and dark == "rgb(21, 24, 27)"
    switch = page.locator("#theme")
    expect(switch).to_have_accessible_name("Colours: as the system")
    switch.click()
    expect(switch).to_have_accessible_name("Colours: light")
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light
    page.locator("#theme").click()
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == dark


def test_motion_can_be_without(made_up: Any, browse: Browse) -> None:
    page = browse(made_up.url)
    made_up.app.state.gate.clear()
    try:
        moving = "() => document.getAnimations().length"
        say(page, "Hi", wait=False)
        assert page.evaluate(moving) == 0
    finally:
        made_up.app.state.gate.set()
    done(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(made_up: Any, browse: Browse, scheme: str) -> None:
    page = browse(made_up.url, color_scheme=scheme, viewport={"width": 1120, "height": 900})
    say(page, "How do whales sing so low?")
    tidy(page)
    picture(page, scheme)
