"""What is told of a model's inside over HTTP: every token once, in order, with what the engine says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from rorqual.engine import Inside, Sampling
from rorqual.serve.inside import some_layers
from rorqual.text import tokens as t
from tests.serve.conftest import Served, serving
from tests.serve.puppet import FACTS, TOKENIZER, dsml, insight
from tests.serve.test_real import speaking

httpx = pytest.importorskip("httpx2")

Start = Callable[..., Served]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def chunks_of(server: Served, **body: Any) -> list[dict[str, Any]]:
    given = {"messages": [{"role": "user", "content": "What?"}], "stream": True, **body}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=given, timeout=60) as answer:
        lines = list(answer.iter_lines())
    assert lines[-2] == "data: [DONE]", lines
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


def told(chunks: list[dict[str, Any]], choice: int | None = None) -> list[dict[str, Any]]:
    panes = [chunk["inside"] for chunk in chunks if "inside" in chunk]
    return [token for pane in panes if pane.get("choice") == choice for token in pane["tokens"]]


def refused(server: Served, **body: Any) -> tuple[int, str]:
    given = {"messages": [{"role": "user", "content": "x"}], "stream": True, **body}
    answer = httpx.post(server.url + "/v1/chat/completions", json=given)
    return answer.status_code, answer.json()["error"]["param"]


def test_every_token_once_with_all_that_is_known(puppet: Start) -> None:
    server = puppet("Hm.</think>Hello world é", encoding="v4")
    chunks = chunks_of(server, inside=True, thinking={"type": "enabled"})
    tokens = told(chunks)
    ids = [*TOKENIZER.encode("Hm.</think>Hello world é"), TOKENIZER.eos[0]]
    assert [token["id"] for token in tokens] == ids
    assert [token["index"] for token in tokens] == list(range(len(ids)))
    prompt = server.engine.seen[0].prompt
    assert server.engine.seen[0].done.inside == [], "what went out is not kept"
    for number, token in enumerate(tokens):
        assert token["text"] == TOKENIZER.bytes_of(ids[number]).decode("utf-8", "replace")
        assert token["logprob"] == -0.5 and [one["id"] for one in token["top"]] == [ids[number], 0]
        chosen = insight(ids[number], number)
        if number == len(ids) - 1:
            assert token["experts"] is token["seen"] is None
            continue
        assert token["experts"] == [chosen.first.experts[:2], chosen.first.experts[2:]]  # type: ignore[index]
        one, other = token["seen"]
        assert one == {"layer": 0, "positions": sorted([number, 0]), "every": 1, "weights": None}
        assert other == {"layer": 2, "positions": [0, 4], "every": 4, "weights": None}
    # A draft refused in the pass over token n stands beside token n + 1.
    assert [n for n, token in enumerate(tokens) if token["refused"]] == list(range(3, len(ids), 3))
    assert tokens[3]["refused"] == [{"id": 67, "text": TOKENIZER.bytes_of(67).decode()}]
    parts = "".join({"reasoning": "r", "content": "c", "markup": "m"}[token["part"]] for token in tokens)
    assert parts.strip("r").strip("m").strip("c") == "" and parts.startswith("rrrm") and parts.endswith("cm")
    for chunk in chunks:
        if "inside" in chunk:
            cache, newest = chunk["inside"]["cache"], chunk["inside"]["tokens"][-1]["index"]
            assert cache["tokens"] - len(prompt) in (newest, newest + 1)
            assert cache["bytes"] == FACTS.cache.at(cache["tokens"])
            assert cache["mha_bytes"] == 500 * cache["tokens"]


@pytest.mark.parametrize("step_tokens", [1, 7])
def test_letters_come_first_or_with_their_token(puppet: Start, step_tokens: int) -> None:
    text = "Some</think>Hello " + "world " * 8 + dsml(("f", {"a": "true>x y"}))
    server = puppet(text, encoding="v4", step_tokens=step_tokens)
    chunks = chunks_of(
        server, inside={"experts": True}, tools=TOOLS, thinking={"type": "enabled"}, max_tokens=2000
    )
    said, shown = "", ""
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        said += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
        for token in chunk.get("inside", {}).get("tokens", ()):
            shown += token["text"] if token["part"] in ("reasoning", "content") else ""
        assert said.startswith(shown)
    assert shown == said == "SomeHello " + "world " * 7 + "world "
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


CALLS = {
    "v4": ("x</think>" + dsml(("find", {"a": "true>one two", "b": "false>12"})), "find", ["one two", "12"]),
    "v31": (
        f'Hi{t.CALLS_BEGIN}{t.CALL_BEGIN}find{t.SEP}{{"a": 12}}{t.CALL_END}{t.CALLS_END}',
        "find",
        ['{"a": 12}'],
    ),
}


@pytest.mark.parametrize("encoding", CALLS)
def test_letters_of_calls_and_markup(puppet: Start, encoding: str) -> None:
    text, name, arguments = CALLS[encoding]
    server = puppet(text, encoding=encoding)
    thinking = {"thinking": {"type": "enabled"}} if encoding == "v4" else {}
    tokens = told(chunks_of(server, inside=True, tools=TOOLS, max_tokens=900, **thinking))
    assert "".join(token["text"] for token in tokens) == text + t.EOS
    called = "".join(token["text"] for token in tokens if token["part"] == "call")
    assert called == name + "".join(arguments)
    assert all(
        token["part"] == "markup" for token in tokens if token["text"] in (t.DSML, t.CALL_BEGIN, t.EOS)
    )


def test_only_what_was_asked_for(puppet: Start) -> None:
    server = puppet("Hello world and more")
    tokens = told(chunks_of(server, inside={"alternatives": 1, "drafts": True}))
    assert all(token["experts"] is token["seen"] is None and len(token["top"]) == 1 for token in tokens)
    assert any(token["refused"] for token in tokens)
    assert server.engine.seen[-1].inside == Inside(drafts=True)
    chunks = chunks_of(server, inside={})
    assert all(
        (token["experts"], token["seen"], token["refused"], token["top"]) == (None, None, [], [])
        for token in told(chunks)
    )
    assert server.engine.seen[-1].inside is None and server.engine.seen[-1].sampling.logprobs is True
    for chunk in chunks:  # then nothing is waited for: letters bring their tokens
        said = chunk["choices"][0]["delta"].get("content")
        shown = "".join(token["text"] for token in chunk.get("inside", {}).get("tokens", ()))
        assert not said or shown == said


def test_large_models_tell_of_a_few_layers() -> None:
    picked = tuple(0 if layer < 3 else 2048 for layer in range(61))
    assert some_layers(replace(FACTS, picked=picked)) == (10, 24, 39, 53)
    assert some_layers(replace(FACTS, picked=(0, 10_000, 0))) is True
    assert some_layers(replace(FACTS, picked=(10_000, 10_000))) == (1,)
    assert some_layers(replace(FACTS, picked=(4096, 4096))) is True
    assert some_layers(replace(FACTS, picked=(0, 0))) is True


def test_layers_by_number(puppet: Start) -> None:
    server = puppet("Hello world and more")
    tokens = told(chunks_of(server, inside={"seen": [2, 1]}))
    assert all([sight["layer"] for sight in token["seen"]] == [2] for token in tokens[:-1])
    assert server.engine.seen[-1].inside == Inside(seen=(1, 2))


def test_logprobs_stay_as_they_were_asked_for(puppet: Start) -> None:
    server = puppet("Hello world")
    plain = chunks_of(server, logprobs=True, top_logprobs=1)
    looking = chunks_of(server, logprobs=True, top_logprobs=1, inside={"alternatives": 2})

    def listed(chunks: list[dict[str, Any]]) -> list[Any]:
        found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
        return [token for logprobs in found if logprobs for token in logprobs["content"]]

    assert listed(looking) == listed(plain) and all(
        len(token["top_logprobs"]) == 1 for token in listed(plain)
    )
    assert all(len(token["top"]) == 2 for token in told(looking))
    assert not any(chunk["choices"][0]["logprobs"] for chunk in chunks_of(server, inside=True))


def test_who_does_not_ask_gets_the_same_bytes(puppet: Start) -> None:
    server = puppet("Hm</think>Hello" + dsml(("f", {"a": "true>x"})))

    def raw(**body: Any) -> list[str]:
        found = []
        for chunk in chunks_of(server, tools=TOOLS, thinking={"type": "enabled"}, max_tokens=500, **body):
            del chunk["id"], chunk["created"]
            calls = chunk["choices"][0]["delta"].get("tool_calls") or [] if chunk["choices"] else []
            for call in calls:
                call.pop("id", None)
            found.append(json.dumps(chunk))
        return found

    plain = raw()
    assert raw(inside=False) == raw(inside=None) == plain
    assert not any("inside" in line for line in plain)
    assert server.engine.seen[-1].inside is None and server.engine.seen[-1].sampling.logprobs is False


def test_several_choices(puppet: Start) -> None:
    server = puppet("Hello", "world wide")
    chunks = chunks_of(server, inside=True, n=2, thinking={"type": "disabled"})
    for index in (0, 1):
        said = "".join(
            c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"][0]["index"] == index
        )
        tokens = told(chunks, index)
        assert "".join(token["text"] for token in tokens) == said + t.EOS
        assert [token["index"] for token in tokens] == list(range(len(tokens)))
    assert all(c["inside"]["choice"] == c["choices"][0]["index"] for c in chunks if "inside" in c)


def test_a_stop_string_loses_no_token(puppet: Start) -> None:
    server = puppet("Hello world and more")
    tokens = told(chunks_of(server, inside=True, stop=["world"]))
    text = "".join(token["text"] for token in tokens)
    assert text.startswith("Hello") and "world".startswith(text[6:11].strip()[:1])
    assert [token["index"] for token in tokens] == list(range(len(tokens)))


def test_bad_wishes(puppet: Start) -> None:
    server = puppet("Hello")
    assert refused(server, inside={"alternatives": 21}) == (400, "inside.alternatives")
    assert refused(server, inside={"alternatives": -1}) == (400, "inside.alternatives")
    assert refused(server, inside={"alternatives": True}) == (422, "inside.alternatives")
    assert refused(server, inside={"alternatives": "5"}) == (422, "inside.alternatives")
    assert refused(server, inside={"experts": 1}) == (422, "inside.experts")
    assert refused(server, inside={"seen": [3]}) == (400, "inside.seen")
    assert refused(server, inside={"seen": [True]}) == (400, "inside.seen")
    assert refused(server, inside={"seen": {}}) == (422, "inside.seen")
    assert refused(server, inside={"expert": True}) == (400, "inside.expert")
    assert refused(server, inside="all") == (422, "inside")
    assert refused(server, inside=[True]) == (422, "inside")
    assert refused(server, inside=True, stream=False) == (400, "inside")
    assert not server.engine.seen


def test_what_there_is_to_see(puppet: Start) -> None:
    server = puppet("Hello", name="tiny")
    model = httpx.get(server.url + "/inside").json()
    assert model["enabled"] is True
    assert model["model"] == {
        "name": "tiny", "layers": 3, "expert_layers": [1, 2], "experts": 8, "chosen": 2, "shared": 1, "drafts": 1,
        "attention": ["dsa", "window", "csa"], "every": [1, 1, 4], "window": 16, "cache_bytes_per_token": 20.5,
        "cache_bytes_per_sequence": 96, "mha_bytes_per_token": 500, "vocab": TOKENIZER.vocab_size, "context": 20_000,
    }  # fmt: skip


def test_switched_off(puppet: Start) -> None:
    server = puppet("Hello", inside=False)
    answer = httpx.get(server.url + "/inside")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_enabled"
    assert refused(server, inside=True) == (400, "inside")
    assert told(chunks_of(server, inside=False)) == []


def test_keys_count(puppet: Start) -> None:
    server = puppet("Hello", keys=("secret",))
    assert httpx.get(server.url + "/inside").status_code == 401
    good = {"authorization": "Bearer secret"}
    assert httpx.get(server.url + "/inside", headers=good).json()["enabled"] is True


def test_openai_clients_pass_it_on(puppet: Start) -> None:
    client = puppet("Hello world").openai()
    stream = client.chat.completions.create(
        model="rorqual",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        extra_body={"inside": {"experts": True}},
    )
    tokens = [
        token for chunk in stream for token in (chunk.model_extra.get("inside") or {}).get("tokens", ())
    ]
    assert "".join(token["text"] for token in tokens) == "Hello world" + t.EOS


# ---------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module", params=["v3", "v32", "v4"])
def real(request: pytest.FixtureRequest) -> Iterator[Served]:
    from rorqual.serve import create_app

    model = speaking(
        request.param, "v4" if request.param == "v4" else "v32" if request.param == "v32" else "v31"
    )
    app = create_app(model, memory=40_000_000, max_requests=4, page_size=64, speculate=True)
    with serving(app) as server:
        yield server


def test_it_is_what_the_engine_tells(real: Served) -> None:
    """And the answer is the same without."""
    body = {"temperature": 0, "max_tokens": 24, "messages": [{"role": "user", "content": "What? " * 20}]}
    plain = chunks_of(real, **body)
    looking = chunks_of(real, inside=True, **body)

    def said(chunks: list[dict[str, Any]]) -> str:
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        return "".join((d.get("reasoning_content") or "") + (d.get("content") or "") for d in deltas)

    assert said(looking) == said(plain)
    tokens = told(looking)
    prompt = httpx.post(real.url + "/tokenize", json={"messages": body["messages"]}).json()["tokens"]
    model = real.service.model
    from rorqual.engine import Engine

    with Engine(model, memory=40_000_000, page_size=64, speculate=True) as engine:
        everything = Inside(experts=True, drafts=True, seen=True)
        done = engine.generate(prompt, Sampling(0.0, max_new_tokens=24, logprobs=5), inside=everything)
        facts = engine.facts
    assert [token["id"] for token in tokens] == done.ids
    for token, look, logprob, top in zip(tokens, done.inside, done.logprobs, done.top_logprobs, strict=True):
        assert (token["index"], token["experts"]) == (look.index, look.experts)
        assert token["draft"] == ("accepted" if look.drafted else "none")
        assert [one["id"] for one in token["refused"]] == list(look.refused)
        assert token["logprob"] == pytest.approx(logprob, abs=1e-5)
        assert [one["id"] for one in token["top"]] == [number for number, _ in top]
        seen = None if look.seen is None else [(s.layer, list(s.positions), s.every) for s in look.seen]
        assert seen == (token["seen"] and [(s["layer"], s["positions"], s["every"]) for s in token["seen"]])
    assert any(token["refused"] for token in tokens)
    model_told = httpx.get(real.url + "/inside").json()["model"]
    assert model_told["attention"] == list(facts.attention) and model_told["drafts"] == 1
    assert model_told["cache_bytes_per_token"] == float(facts.cache.growing)
    last = [chunk["inside"]["cache"] for chunk in looking if "inside" in chunk][-1]
    assert last["tokens"] == len(prompt) + len(done.ids) - 1
    assert last["bytes"] == facts.cache.at(last["tokens"])
