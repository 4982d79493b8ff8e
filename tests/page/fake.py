"""A server with the page and an inside made up: what the browser shows of it must not depend on any model."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from rorqual.serve import Settings, pages

MODEL = {
    "name": "tiny-v3", "layers": 16, "expert_layers": list(range(3, 16)), "experts": 48, "chosen": 4, "shared": 1, "drafts": 1,
    "attention": ["dsa"] * 16, "cache_bytes_per_token": 1152 * 16, "mha_bytes_per_token": 65536 * 16, "vocab": 1000,
    "context": 4096,
}  # fmt: skip
THOUGHT = "The user asks how whales sing. I recall that they move air between larynx and sacs."
ANSWER = """Rorquals sing **without letting air out**: it goes round between the lungs and a sac below the larynx.

1. Folds in the larynx vibrate at 10 to 40 Hz.
2. The sac gives the sound back to the water.

A pipe of length $L$ open at one end sounds at $f = c / 4L$, so a low voice needs a long way:

$$L = \\frac{c}{4f} = \\frac{350}{4 \\cdot 20} \\approx 4.4\\ \\mathrm{m}$$

```python
def length(hertz: float, speed: float = 350.0) -> float:
    \"\"\"Metres of a pipe closed at one end.\"\"\"
    return speed / (4 * hertz)  # a quarter of a wave
```
"""


def pieces(text: str) -> list[str]:
    """Words with the space before them, newlines apart: near enough to tokens."""
    found: list[str] = []
    for letter in text:
        if found and letter.isalnum() and (found[-1][-1:].isalnum() or found[-1] == " "):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def chosen(layer: int, draw: random.Random) -> list[int]:
    """Four experts, some of each layer's liked more."""
    found: list[int] = []
    while len(found) < 4:
        expert = (17 * int(48 * draw.random() ** 1.6) + 5 * layer) % 48
        if expert not in found:
            found.append(expert)
    return found


def inside_of(at: int, text: str, part: str, draw: random.Random) -> dict[str, Any]:
    """All that the contract tells of one token."""
    low = draw.random() < 0.25
    logprob = draw.uniform(-2.6, -0.7) if low else draw.uniform(-0.25, -0.001)
    rest = 1 - math.exp(logprob)
    others = enumerate((" the", " a", "\n", ","))
    top = [(text, 7, logprob), *((word, 10 + n, math.log(rest * 0.6 * 0.45**n)) for n, word in others)]
    top.sort(key=lambda guess: -guess[2])
    drafted = at % 2 == 1
    experts = [chosen(layer, draw) for layer in range(13)]
    seen = [
        {"layer": n, "positions": sorted(draw.sample(range(12 + at), 5)), "weights": None} for n in (3, 9, 15)
    ]
    return {
        "index": at, "id": 7, "text": text, "logprob": logprob,
        "top": [{"id": n, "text": word, "logprob": p} for word, n, p in top], "part": part, "experts": experts,
        "draft": "accepted" if drafted and not low else "none", "refused": [{"id": 9, "text": " song"}] if low and at % 2 else [],
        "seen": seen,
    }  # fmt: skip


def create(answer: str = ANSWER, thought: str = THOUGHT, pause: float = 0.0) -> FastAPI:
    """The application. `app.state.asked` gathers the bodies of its requests; an answer waits at `gate` if it is clear."""
    app = FastAPI()
    app.state.asked, app.state.service = [], SimpleNamespace(engine=None, settings=Settings())
    app.state.gate = asyncio.Event()
    app.state.gate.set()
    app.include_router(pages.router())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"data": [{"id": MODEL["name"], "context_window": MODEL["context"]}]}

    @app.get("/inside")
    async def inside() -> dict[str, Any]:
        return {"enabled": True, "model": MODEL}

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        words = pieces("".join(m["content"] for m in (await request.json())["messages"]))
        texts = ["<|begin|>", "<|user|>", *(words + ["\n"] * 8)[:8], "<|assistant|>", "<think>"]
        return {"tokens": [1] * 12, "count": 12, "max_model_len": 4096, "token_strs": texts}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> StreamingResponse:
        body = await request.json()
        app.state.asked.append(body)

        async def events() -> AsyncIterator[str]:
            draw = random.Random(1)
            words = [("reasoning", w) for w in pieces(thought)] + [("content", w) for w in pieces(answer)]
            for at, (part, text) in enumerate(words):
                delta = {"reasoning_content" if part == "reasoning" else "content": text}
                chunk: dict[str, Any] = {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
                if body.get("inside"):
                    tokens, per = 13 + at, MODEL["cache_bytes_per_token"]
                    cache = {
                        "tokens": tokens,
                        "bytes": tokens * per,
                        "mha_bytes": tokens * MODEL["mha_bytes_per_token"],
                    }  # type: ignore[operator]
                    chunk["inside"] = {"tokens": [inside_of(at, text, part, draw)], "cache": cache}
                yield f"data: {json.dumps(chunk)}\n\n"
                await asyncio.sleep(pause)
                if at == 40:
                    await app.state.gate.wait()
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
            usage = {"completion_tokens": len(words), "prompt_tokens": 12, "prompt_cache_hit_tokens": 8}
            yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    return app
