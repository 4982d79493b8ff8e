"""Chromium, and pages of it that notice everything that goes wrong in them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import Served, puppet, until

__all__ = ["Served", "puppet"]

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
# Without these a browser looks for its maker's hosts at every start.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
FIGURES = Path(__file__).parents[2] / "docs" / "figures"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser, started once a module."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        if os.environ.get("CI"):
            pytest.fail(f"there is no {CHROMIUM}: make setup installs it")
        pytest.skip(f"there is no {CHROMIUM} (Debian's package chromium; or set CHROMIUM)")
    api.expect.set_options(timeout=20_000)  # two cores may have much else to do
    # For one module only: while it lasts this thread has a running event loop, and other tests bring their own.
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium: Any) -> Iterator[Callable[..., Any]]:
    """`browse(url, allowed=(…), **context)`: a page in a window of its own, opened and ready.

    At the test's end nothing may have failed in it, nothing may have been asked of another host, and its console must be
    empty but for lines that hold one of the `allowed` words.
    """
    opened: list[tuple[Any, str, tuple[str, ...], list[str]]] = []

    def open_page(url: str, *, allowed: tuple[str, ...] = (), **context: Any) -> Any:
        from playwright.sync_api import expect

        given = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", **context}
        window = chromium.new_context(**given)
        window.set_default_timeout(20_000)
        page = window.new_page()
        said: list[str] = []
        page.on(
            "console",
            lambda message: said.append(f"{message.type}: {message.text} {message.location['url']}"),
        )
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((url, "blob:")) else said.append(f"asked {request.url}")
            ),
        )
        opened.append((window, url, allowed, said))
        page.goto(url + "/")
        if not allowed:
            expect(page.locator("#model")).not_to_be_empty()
        return page

    yield open_page
    for window, url, allowed, said in opened:
        window.close()
        fine = (*allowed, url + "/inside")  # which a server may refuse
        wrong = [line for line in said if not any(word in line for word in fine)]
        assert not wrong, wrong


def hold(server: Served, after: int) -> Callable[[], None]:
    """Let the puppet write so many tokens from now on and wait then. What is returned lets it go on, once it waits."""
    engine, left = server.engine, [after]
    step = engine.step

    def counted() -> bool:
        left[0] -= 1
        if left[0] == 0:
            engine.gate.clear()
        return bool(step())

    def release() -> None:
        until(lambda: left[0] <= 0)
        engine.gate.set()

    engine.step = counted
    return release


def say(page: Any, text: str, *, wait: bool = True) -> None:
    """Send a message; wait for the end of its answer."""
    page.fill("#ask", text)
    page.press("#ask", "Enter")
    if wait:
        done(page)


def done(page: Any) -> None:
    """Nothing is under way any more."""
    from playwright.sync_api import expect

    expect(page.locator("#send")).to_be_visible(timeout=15_000)
    expect(page.locator(".turn.live")).to_have_count(0)


def tidy(page: Any) -> None:
    """Times that are the same every time, so that the pictures are."""
    from playwright.sync_api import expect

    expect(page.locator(".katex").first).to_be_visible()
    expect(page.locator(".hljs-keyword").first).to_be_visible()
    page.evaluate(
        "() => document.querySelectorAll('.figures-line, .reasoning summary')"
        ".forEach((e) => { e.textContent = e.textContent.replace(/[\\d.]+ s\\b/g, '0.4 s').replace(/[\\d.]+ a second/, '38.2 a second') })"
    )
    page.evaluate("() => document.fonts.ready")


def picture(page: Any, name: str) -> None:
    """A picture of the page; kept in docs/figures if the environment says FIGURES=1, so that a plain run changes nothing."""
    path = FIGURES / f"page-{name}.png"
    taken = page.screenshot()
    assert 10_000 < len(taken) < 200_000
    if os.environ.get("FIGURES") or not path.exists():
        path.write_bytes(taken)
