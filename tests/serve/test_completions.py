"""`/v1/completions`, `/beta/completions` and `/tokenize`, with the real OpenAI client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rorqual.text.tokens import BOS, FIM_BEGIN, FIM_END, FIM_HOLE
from tests.serve.conftest import Served
from tests.serve.puppet import TOKENIZER

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx2")
Start = Callable[..., Served]
both = pytest.mark.parametrize("stream", [False, True])


def complete(
    server: Served, stream: bool, path: str = "/v1", **options: Any
) -> tuple[list[str], list[Any], Any]:
    """Texts, finish reasons and usage of the choices, whole or put together from a stream."""
    client = server.openai(path)
    given = {"model": "rorqual", **options}
    if not stream:
        done = client.completions.create(**given)
        return [c.text for c in done.choices], [c.finish_reason for c in done.choices], done.usage
    texts: dict[int, str] = {}
    ends: dict[int, Any] = {}
    usage = None
    for chunk in client.completions.create(stream=True, stream_options={"include_usage": True}, **given):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    return [texts[i] for i in sorted(texts)], [ends[i] for i in sorted(ends)], usage


@both
def test_text(puppet: Start, stream: bool) -> None:
    server = puppet(" world <think> é")
    texts, ends, usage = complete(server, stream, prompt="Hello", max_tokens=50)
    assert texts == [" world <think> é"] and ends == ["stop"]
    assert usage.prompt_tokens == 1 and server.engine.seen[0].prompt == TOKENIZER.encode("Hello")
    assert complete(server, stream, prompt="Hello", max_tokens=50, echo=True)[0] == ["Hello world <think> é"]
    assert complete(server, stream, prompt="Hello", max_tokens=50, stop=["<th"])[0] == [" world "]
    assert complete(server, stream, prompt="Hello", max_tokens=2)[1] == ["length"]


@both
def test_many_prompts_in_every_form(puppet: Start, stream: bool) -> None:
    server = puppet("a")
    ids = TOKENIZER.encode("Hello world")
    for prompt, count in ((["x", "y"], 2), (ids, 1), ([ids, ids[:1]], 2)):
        texts, _, usage = complete(server, stream, prompt=prompt, n=2)
        assert texts == ["a"] * 2 * count
        assert usage.completion_tokens == 2 * 2 * count
    assert usage.prompt_tokens == len(ids) + 1


@both
@pytest.mark.parametrize("path", ["/v1", "/beta"])
def test_fill_in_the_middle(puppet: Start, stream: bool, path: str) -> None:
    server = puppet("b")
    options = {"prompt": "a" + FIM_HOLE, "suffix": "c"}
    assert complete(server, stream, path, **options)[0] == ["b"]
    ids = server.engine.seen[0].prompt
    assert TOKENIZER.decode(ids) == f"{BOS}{FIM_BEGIN}a{FIM_HOLE}{FIM_HOLE}c{FIM_END}"
    assert ids.count(TOKENIZER.id_of(FIM_HOLE)) == 1  # the one in the text is letters
    assert server.engine.seen[0].sampling.max_new_tokens > 1000
    assert complete(server, stream, path, echo=True, **options)[0] == ["a" + FIM_HOLE + "b"]


@both
def test_logprobs(puppet: Start, stream: bool) -> None:
    server = puppet("Hello é")
    made = server.openai().completions.create(
        model="rorqual", prompt="x", logprobs=2, echo=True, stream=stream, max_tokens=30
    )
    found = [c.logprobs for chunk in (made if stream else [made]) for c in chunk.choices if c.logprobs]
    told = [token for one in found for token in one.tokens]
    offsets = [at for one in found for at in one.text_offset]
    assert "".join(told) == "Hello é" and offsets == [1, 6, 7][: len(offsets)]
    assert all(len(top) == 2 for one in found for top in one.top_logprobs or [])


def test_tokens_and_back(puppet: Start) -> None:
    server = puppet("x")
    text = "Hello é <think>"
    found = httpx.post(server.url + "/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == TOKENIZER.encode(text) and found["count"] == len(found["tokens"])
    letters = httpx.post(
        server.url + "/tokenize", json={"prompt": "Hello é", "return_token_strs": True}
    ).json()
    assert letters["token_strs"] == ["Hello", " ", "é"] and "token_strs" not in found
    back = httpx.post(server.url + "/detokenize", json={"tokens": found["tokens"]}).json()
    assert back == {"prompt": text}
    talk = {"messages": [{"role": "user", "content": "<think>"}]}
    prompt = httpx.post(server.url + "/tokenize", json=talk).json()["tokens"]
    server.openai().chat.completions.create(model="rorqual", messages=talk["messages"])
    assert server.engine.seen[-1].prompt == prompt
    assert httpx.post(server.url + "/detokenize", json={"tokens": [10**9]}).status_code == 400
    assert httpx.post(server.url + "/tokenize", json={}).status_code == 400


def test_a_base_model_completes_and_does_not_chat(puppet: Start) -> None:
    server = puppet("b", encoding=None)
    assert complete(server, False, prompt="a")[0] == ["b"]
    with pytest.raises(openai.BadRequestError, match="no chat format"):
        server.openai().chat.completions.create(model="rorqual", messages=[{"role": "user", "content": "x"}])
