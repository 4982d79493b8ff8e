"""The server over a real engine and small random models: the same answers whatever way they take."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rorqual import Engine, Sampling
from rorqual.model import Model
from rorqual.text import get_encoding
from rorqual.text.registry import ENCODINGS
from tests.engine.conftest import build
from tests.serve.conftest import Served, serving, until
from tests.serve.puppet import TOKENIZER

httpx = pytest.importorskip("httpx2")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yz"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    "tools": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
}


def speaking(kind: str, encoding: str) -> Model:
    """A random model with a vocabulary and a chat format, and room for a conversation."""
    model = build(kind, vocab=TOKENIZER.vocab_size)
    model.tokenizer, model.encoding = TOKENIZER, get_encoding(encoding)
    model.config = model.config.replace(eos=TOKENIZER.eos, max_positions=4000)
    return model


NEWER = ("v31", "v32", "v4")
"""Generations whose models have MTP and whose formats have both reasoning and calls."""


@pytest.fixture(scope="module", params=NEWER)
def servers(request: pytest.FixtureRequest) -> Iterator[tuple[Served, Served]]:
    """Two servers of one model: without and with speculation."""
    with two_of(request.param) as both:
        yield both


@contextmanager
def two_of(encoding: str) -> Iterator[tuple[Served, Served]]:
    from rorqual.serve import create_app

    model = speaking("v4" if encoding == "v4" else "v3", encoding)
    plain, drafting = (
        create_app(model, memory=40_000_000, max_requests=4, page_size=64, speculate=speculate)
        for speculate in (False, True)
    )
    with serving(plain) as one, serving(drafting) as other:
        yield one, other


def ask(server: Served, stream: bool, **body: Any) -> tuple[Any, ...]:
    """What an answer comes to: reasoning, content, calls without their ids, finish reason, tokens; and its cache
    hits apart."""
    given = {"messages": [{"role": "user", "content": "What?"}], "temperature": 0, "max_tokens": 16, **body}
    if not stream:
        done = httpx.post(server.url + "/v1/chat/completions", json=given, timeout=60).json()
        choice, usage = done["choices"][0], done["usage"]
        message = choice["message"]
        calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls") or ()]
        texts = message.get("reasoning_content") or "", message["content"] or ""
        return (
            *texts,
            calls,
            choice["finish_reason"],
            usage["completion_tokens"],
            usage["prompt_cache_hit_tokens"],
        )
    more = given | {"stream": True, "stream_options": {"include_usage": True}}
    reasoning = content = finish = ""
    calls, usage = [], {}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=more, timeout=60) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                delta, finish = choice["delta"], choice["finish_reason"] or finish
                reasoning += delta.get("reasoning_content") or ""
                content += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    if "id" in call:
                        calls.append((call["function"]["name"], ""))
                    name, arguments = calls[call["index"]]
                    calls[call["index"]] = name, arguments + call["function"]["arguments"]
    return reasoning, content, calls, finish, usage["completion_tokens"], usage["prompt_cache_hit_tokens"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("thinking", [False, True])
def test_every_way_gives_the_same_answer(servers: tuple[Served, Served], kind: str, thinking: bool) -> None:
    """Streamed or whole, drafted or not, found in the prefix cache or not. A bias ends the reasoning early."""
    every_way(servers, kind, thinking)


@pytest.mark.parametrize("encoding", [name for name in ENCODINGS if name not in NEWER])
def test_every_way_in_older_formats(encoding: str) -> None:
    """The same for the formats of before, whatever each of them has."""
    with two_of(encoding) as servers:
        for kind, thinking in itertools.product(KINDS, (False, True)):
            every_way(servers, kind, thinking, hits_too=False)


def every_way(servers: tuple[Served, Served], kind: str, thinking: bool, hits_too: bool = True) -> None:
    end = {str(TOKENIZER.id_of("</think>")): 15, str(TOKENIZER.eos[0]): 6}
    body = {**KINDS[kind], "thinking": {"type": "enabled" if thinking else "disabled"}, "logit_bias": end}
    has = servers[0].service.encoding
    never = (
        (kind == "tools" and (has.tools == "never" or (thinking and has.tools == "chat")))
        or (thinking and has.thinking == "never")
        or (not thinking and has.thinking == "always")
    )
    if never:
        answer = httpx.post(
            servers[0].url + "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}], **body},
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] in ("thinking", "tools"), (
            answer.json()
        )
        return
    found: list[Any] = []
    hits: list[int] = []
    # More than a page, and not what another case begins with: a long prompt leaves no ring at its first pages.
    words = f"{kind}{thinking} Tell me " * 12
    for (number, server), stream, again in itertools.product(
        enumerate(servers), (False, True), (False, True)
    ):
        if again and (stream == (number == 0) or not hits_too):
            continue  # a hit of each server is enough
        messages = [
            {"role": "system", "content": words[:96]},
            {"role": "user", "content": "What?"},
        ]
        if "system" not in has.roles:
            messages = messages[1:]
        *answer, hit = ask(server, stream, messages=messages, **body)
        found.append(answer)
        hits.append(hit)
        if again:
            assert hit >= 64
    assert all(answer == found[0] for answer in found)
    assert found[0][0] == "" or thinking
    if kind == "schema" and found[0][3] == "stop" and found[0][1]:
        assert set(json.loads(found[0][1])) == {"a", "b"}
    if kind == "tools" and found[0][3] == "tool_calls":
        assert set(json.loads(found[0][2][0][1])) == {"a", "b"}


def test_the_answer_is_the_models_own(servers: tuple[Served, Served]) -> None:
    server, _ = servers
    model = server.service.model
    ids = model.encode("Hello world")
    alone = model.generate(ids, Sampling(0.0, max_new_tokens=20))
    done = httpx.post(
        server.url + "/v1/completions", json={"prompt": ids, "max_tokens": 20, "temperature": 0}
    ).json()
    assert done["choices"][0]["text"] == alone.text
    assert done["choices"][0]["finish_reason"] == alone.finish_reason


def test_many_at_once_some_leaving(servers: tuple[Served, Served]) -> None:
    """Answers don't mix, and who leaves takes nothing along."""
    server, _ = servers
    texts = [f"{n} times {n}" for n in range(8)]
    alone = [ask(server, False, messages=[{"role": "user", "content": text}])[:5] for text in texts]
    found: dict[int, Any] = {}

    def one(n: int) -> None:
        if n % 3 == 2:
            body = {
                "messages": [{"role": "user", "content": texts[n]}],
                "max_tokens": 3000,
                "stream": True,
                "temperature": 0,
            }
            with httpx.stream("POST", server.url + "/v1/chat/completions", json=body) as answer:
                next(answer.iter_raw())
        else:
            found[n] = ask(server, n % 2 == 0, messages=[{"role": "user", "content": texts[n]}])[:5]

    threads = [threading.Thread(target=one, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: alone[n] for n in found} and len(found) == 6
    until(lambda: not server.engine.busy and server.service.active == 0)
    server.engine.pages.check()
    assert server.engine.pages.available == server.engine.pages.total


def test_a_conversation_goes_on_where_it_stopped(servers: tuple[Served, Served]) -> None:
    """With the answer sent back, the next prompt begins with the last one and all that was answered."""
    server, _ = servers
    seen: list[list[int]] = []
    submit = server.engine.submit_answer

    def watched(answer: Any, priority: int = 0) -> Any:
        seen.append(answer.prompt)
        handle = submit(answer, priority)
        answers.append(answer.done)
        return handle

    answers: list[Any] = []
    server.engine.submit_answer = watched
    try:
        messages = [{"role": "user", "content": "What? " * 12}]
        options = {**KINDS["tools"], "thinking": {"type": "disabled"}, "max_tokens": 400}
        body = {"messages": messages, "temperature": 1.0, "seed": 1, **options}
        done = httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).json()
        message = done["choices"][0]["message"]
        assert done["choices"][0]["finish_reason"] == "tool_calls"
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "ok"} for c in message["tool_calls"]]
        again = {**body, "messages": [*messages, message, *results], "max_tokens": 2}
        used = httpx.post(server.url + "/v1/chat/completions", json=again, timeout=60).json()["usage"]
    finally:
        del server.engine.submit_answer
    before = [*seen[0], *answers[0].ids]
    assert seen[1][: len(before)] == before
    assert used["prompt_cache_hit_tokens"] >= (len(before) - 1) // 64 * 64
    assert used["prompt_cache_hit_tokens"] + used["prompt_cache_miss_tokens"] == len(seen[1])


def test_an_engine_of_ones_own() -> None:
    from rorqual.serve import Settings, create_app

    model = speaking("gqa", "chatml")
    app = create_app(model, Settings(name="tiny"), engine=Engine(model, memory=4_000_000, page_size=8))
    with serving(app) as server:
        assert ask(server, False)[3] in ("stop", "length")
        refused = httpx.post(
            server.url + "/chat/completions",
            json={"messages": [{"role": "user", "content": "x"}], "thinking": {"type": "enabled"}},
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "thinking"


def test_a_step_that_fails_outside_any_request(servers: tuple[Served, Served]) -> None:
    """Those under way are told; the engine goes on, with all its memory."""
    server, _ = servers
    plan, engine = server.engine.scheduler.plan, server.engine

    def failing(*args: Any) -> Any:
        engine.scheduler.plan = plan
        raise RuntimeError("a plan failed")

    engine.scheduler.plan = failing
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    assert httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).status_code == 500
    assert httpx.post(server.url + "/v1/chat/completions", json=body, timeout=60).status_code == 200
    until(lambda: not engine.busy)
    engine.pages.check()
    assert engine.pages.available == engine.pages.total
