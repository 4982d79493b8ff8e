"""Talking on the page, as a person would: against the real application, with a model that writes what the test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.page.conftest import Served, done, hold, say
from tests.serve.conftest import until
from tests.serve.puppet import dsml

sync_api = pytest.importorskip("playwright.sync_api")
expect = getattr(sync_api, "expect", None)
Start, Browse = Callable[..., Served], Callable[..., Any]

CALL = dsml(("weather", {"city": "true>São Paulo"}))


def bodies(page: Any) -> list[dict[str, Any]]:
    """The bodies of the requests for answers from now on."""
    found: list[dict[str, Any]] = []
    page.on(
        "request", lambda request: found.append(request.post_data_json) if "/chat/" in request.url else None
    )
    return found


def answers(page: Any) -> list[str]:
    return [text.strip() for text in page.locator(".answer > .prose").all_inner_texts()]


def test_an_answer_comes_as_it_is_written(puppet: Start, browse: Browse) -> None:
    server = puppet("I think.</think>" + "Hello **world** " * 60)
    page = browse(server.url)
    release = hold(server, 6)
    say(page, "Hi\nthere", wait=False)
    expect(page.locator(".reasoning summary")).to_contain_text("Thinking…")
    until(lambda: not server.engine.gate.is_set())
    page.wait_for_timeout(350)
    release()
    release = hold(server, 200)
    expect(page.locator(".answer.live strong").nth(5)).to_be_visible()
    part = answers(page)[0]
    assert 0 < len(part) < 60 * 12 and page.locator("#announcer").inner_text() == ""
    expect(page.locator("#stop")).to_be_visible()
    release()
    done(page)
    assert answers(page) == [("Hello world " * 60).strip()]
    expect(page.locator(".bubble")).to_have_text("Hi\nthere")
    expect(page.locator(".figures-line")).to_contain_text("prompt tokens from the cache")
    expect(page.locator(".figures-line")).to_contain_text("a second · first after")
    expect(page.locator("#announcer")).to_contain_text("The answer is there, 120 words")
    reasoning = page.locator(".reasoning")
    expect(reasoning.locator("summary")).to_contain_text("Thought for")
    assert float(reasoning.locator("summary").inner_text().split()[-2]) >= 0.3
    expect(reasoning.locator(".thoughts")).to_be_hidden()
    reasoning.locator("summary").click()
    expect(reasoning.locator(".thoughts")).to_have_text("I think.")


def test_stopping_cancels_and_keeps_what_is_there(puppet: Start, browse: Browse) -> None:
    server = puppet("x</think>" + "word " * 3000, "x</think>Again.")
    page = browse(server.url)
    release = hold(server, 100)
    say(page, "Go on", wait=False)
    expect(page.locator(".answer > .prose")).to_contain_text("word word")
    until(lambda: not server.engine.gate.is_set())
    page.keyboard.press("Escape")
    done(page)
    release()
    until(lambda: server.engine.cancelled == 1)
    expect(page.locator(".note")).to_have_text("Stopped.")
    assert answers(page)[0].startswith("word word")
    say(page, "And now?")
    assert answers(page)[1] == "Again."


def test_answers_and_messages_have_versions(puppet: Start, browse: Browse) -> None:
    server = puppet(*(f"x</think>Answer {n}." for n in range(1, 6)))
    page = browse(server.url)
    sent = bodies(page)
    say(page, "One")
    page.get_by_role("button", name="Answer again").click()
    expect(page.locator(".answer > .prose")).to_have_text("Answer 2.")
    expect(page.locator(".answer .branches")).to_have_text("Version 2/2")
    expect(page.locator("#ask")).to_be_focused()
    page.get_by_role("button", name="Earlier version").click()
    assert answers(page) == ["Answer 1."]
    expect(page.get_by_role("button", name="Later version")).to_be_focused()  # there is none before it
    say(page, "Two")
    assert answers(page) == ["Answer 1.", "Answer 3."]
    assert [m["content"] for m in sent[-1]["messages"]] == ["One", "Answer 1.", "Two"]
    page.get_by_role("button", name="Edit message").first.click()
    page.get_by_label("Edit the message").fill("Other")
    page.get_by_label("Edit the message").press("Enter")
    expect(page.locator(".answer > .prose")).to_have_text("Answer 4.")
    assert [m["content"] for m in sent[-1]["messages"]] == ["Other"]
    page.locator(".user").get_by_role("button", name="Earlier version").click()
    assert answers(page) == ["Answer 1.", "Answer 3."]
    page.reload()
    expect(page.locator(".answer > .prose").nth(1)).to_have_text("Answer 3.")
    expect(page.locator(".user .branches")).to_contain_text("1/2")


def test_conversations_stay(puppet: Start, browse: Browse, tmp_path: Path) -> None:
    server = puppet(*(f"Hm.</think>Number {n}" for n in range(1, 9)))
    page = browse(server.url)
    say(page, "The first")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".welcome")).to_be_visible()
    say(page, "The second")
    page.reload()
    names = page.locator(".talk")
    expect(names).to_have_text(["The second", "The first"])
    assert answers(page) == ["Number 2"]
    names.nth(1).click()
    assert answers(page) == ["Number 1"]
    page.get_by_role("button", name="Rename The first").click()
    page.get_by_label("Name of the conversation").fill("Whales")
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_text("Whales")
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Export all").click()
    saved = tmp_path / "all.json"
    waiting.value.save_as(saved)
    assert len(json.loads(saved.read_text())["conversations"]) == 2
    page.get_by_role("button", name="Delete Whales").click()
    page.get_by_role("button", name="Cancel").click()
    expect(names).to_have_count(2)
    page.get_by_role("button", name="Delete Whales").click()
    page.locator("#sure-yes").click()
    expect(names).to_have_text(["The second"])
    page.set_input_files("#import-file", saved)
    expect(names).to_have_count(3)
    names.get_by_text("Whales").click()
    assert answers(page) == ["Number 1"] and page.locator(".reasoning").count() == 1
    say(page, "And on")
    assert answers(page)[1] == "Number 3"
    for text in (
        "{",
        '{"nodes": {}, "children": ["a"]}',
        '{"nodes": {"a": {"role": "user", "children": ["a"]}}, "children": ["a"]}',
        "[]",
        "7",
    ):
        page.set_input_files(
            "#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": text.encode()}
        )
        expect(page.locator("#notice")).to_contain_text("can't be imported")
        page.evaluate("() => { document.querySelector('#notice').textContent = '' }")
    expect(names).to_have_count(3)


def test_settings_go_into_the_request(puppet: Start, browse: Browse) -> None:
    server = puppet("y")
    page = browse(server.url)
    sent = bodies(page)
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Thinking").select_option("off")
    for name, value in (
        ("Temperature", "0.5"),
        ("Top p", "0.9"),
        ("Top k", "40"),
        ("Min p", "0.05"),
        ("Most tokens", "33"),
        ("Seed", "7"),
    ):
        page.get_by_label(name, exact=True).fill(value)
    say(page, "Hi")
    body = sent[-1]
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed", "thinking")} == {
        "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 33, "seed": 7, "thinking": {"type": "disabled"},
    }  # fmt: skip
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert server.engine.seen[-1].sampling.top_k == 40
    page.get_by_label("Temperature").fill("3")
    say(page, "Hi", wait=False)
    expect(page.locator("#notice")).to_contain_text("can't be sent")
    expect(page.get_by_label("Temperature")).to_be_focused()
    assert len(sent) == 1 and page.input_value("#ask") == "Hi"
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Thinking").select_option("on")
    page.get_by_label("Effort").select_option("max")
    say(page, "Hi")
    assert (
        "temperature" not in sent[-1]
        and sent[-1]["reasoning_effort"] == "max"
        and sent[-1]["thinking"]["type"] == "enabled"
    )
    page.reload()
    expect(page.locator("#system")).to_have_value("Be brief.")


def test_a_schema_holds_the_answer(puppet: Start, browse: Browse) -> None:
    server = puppet('x</think>{"name": "Balaenoptera"}')
    page = browse(server.url)
    sent = bodies(page)
    page.keyboard.press("Alt+KeyS")
    page.get_by_label("Hold the answer to a schema").check()
    area = page.get_by_label("JSON schema")
    good = area.input_value()
    area.fill('{"type": ')
    expect(page.locator("#schema-note")).to_contain_text("Not JSON yet")
    say(page, "Name one", wait=False)
    expect(page.locator("#notice")).to_contain_text("The JSON schema is not JSON")
    assert not sent
    area.fill(good)
    expect(page.locator("#schema-note")).to_have_text("Valid JSON.")
    say(page, "Name one")
    assert sent[-1]["response_format"]["json_schema"]["schema"] == json.loads(good)
    assert answers(page) == ['{"name": "Balaenoptera"}']
    assert server.engine.seen[-1].sampling.grammar is not None


def test_a_call_is_answered_by_the_user(puppet: Start, browse: Browse) -> None:
    server = puppet("Look.</think>I ask." + CALL, "x</think>It rains.", "x</think>Still.")
    page = browse(server.url)
    sent = bodies(page)
    page.keyboard.press("Alt+KeyS")
    page.get_by_label("Offer functions to call").check()
    page.get_by_label("Tools", exact=True).fill('[{"name": "weather", "parameters": {"type": "object"}}]')
    say(page, "Weather?")
    assert sent[-1]["tools"][0]["function"]["name"] == "weather"
    card = page.get_by_role("group", name="Call of weather")
    expect(card).to_contain_text("São Paulo")
    expect(page.locator("#announcer")).to_contain_text("The model calls weather")
    say(page, "Hello?", wait=False)
    expect(page.locator("#notice")).to_contain_text("waits for the result")
    expect(page.get_by_label("Result of weather")).to_be_focused()
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Send result").click()
    expect(page.locator(".answer > .prose").nth(1)).to_have_text("It rains.")
    told = sent[-1]["messages"]
    assert [m["role"] for m in told] == ["user", "assistant", "tool"]
    assert told[2]["content"] == "rain" and told[2]["tool_call_id"] == told[1]["tool_calls"][0]["id"]
    assert told[1]["reasoning_content"] == "Look."
    expect(card).to_contain_text("rain")
    say(page, page.input_value("#ask"))
    assert answers(page) == ["I ask.", "It rains.", "Still."]


def test_a_key_is_asked_for(puppet: Start, browse: Browse) -> None:
    server = puppet("x</think>Open.", keys=("right",))
    page = browse(server.url, allowed=("401",))
    dialog = page.get_by_role("dialog", name="This server wants an API key")
    dialog.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    say(page, "Hi", wait=False)
    expect(dialog).to_contain_text("did not accept")
    dialog.get_by_label("API key").fill("right")
    page.keyboard.press("Enter")
    expect(page.locator(".answer > .prose")).to_have_text("Open.")
    expect(page.locator("#model")).to_have_text("rorqual")
    page.reload()
    expect(page.locator("#model")).to_have_text("rorqual")
    assert page.evaluate(
        "() => [sessionStorage.getItem('api-key'), JSON.stringify(localStorage).includes('right')]"
    ) == ["right", False]


def test_errors_are_told_and_can_be_tried_again(puppet: Start, browse: Browse) -> None:
    server = puppet("x</think>All is well.")
    page = browse(server.url, allowed=("503", "500", "429", "400", "ERR_"))
    server.service.draining = True
    say(page, "Hi")
    alert = page.locator(".error")
    expect(alert).to_contain_text("The server isn't taking requests")
    expect(alert).to_contain_text("It asks to wait 1 s.")
    server.service.draining = False
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer > .prose")).to_have_text("All is well.")
    expect(page.locator(".answer .branches")).to_have_count(0)  # the failed one had nothing in it
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Gone?")
    expect(alert).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/chat/completions")
    broken = 'data: {"choices":[{"index":0,"delta":{"content":"Half"}}]}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=broken, content_type="text/event-stream")
    )
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("broke before the answer was whole")
    assert answers(page)[1] == "Half"
    page.unroute("**/v1/chat/completions")
    failed = broken + 'data: {"error":{"message":"the engine broke","type":"server_error"}}\n\n'
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=failed, content_type="text/event-stream")
    )
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The engine broke.")
    page.unroute("**/v1/chat/completions")
    server.engine.fail = RuntimeError("a step that fails")
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("The server")
    page.reload()
    expect(alert).to_be_visible()


def test_an_answer_cut_off_by_a_reload(puppet: Start, browse: Browse) -> None:
    server = puppet("x</think>" + "word " * 3000, "x</think>Whole.")
    page = browse(server.url)
    release = hold(server, 100)
    say(page, "Go", wait=False)
    expect(page.locator(".answer > .prose")).to_contain_text("word")
    until(lambda: not server.engine.gate.is_set())
    page.reload()
    expect(page.locator(".error")).to_contain_text("Interrupted.")
    release()
    until(lambda: server.engine.cancelled == 1)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer > .prose")).to_have_text("Whole.")


def test_other_conversations_go_on_meanwhile(puppet: Start, browse: Browse) -> None:
    server = puppet("x</think>" + "one " * 500, "x</think>Two.")
    page = browse(server.url)
    release = hold(server, 100)
    say(page, "First", wait=False)
    expect(page.locator(".answer > .prose")).to_contain_text("one one")
    until(lambda: not server.engine.gate.is_set())
    page.keyboard.press("Alt+KeyN")
    release()
    say(page, "Second")
    assert answers(page) == ["Two."]
    page.locator(".talk").nth(1).click()
    done(page)
    assert answers(page) == [("one " * 500).strip()]
