"""The server beside its own engine: tokens a second of many streams through HTTP, and the time to a first token.

One model, one engine; by turns the engine is driven directly and through the server by a client in another process,
with the same prompts. Both are timed from the first request sent to the last token come.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import string
import subprocess
import sys
import threading
import time
from typing import Any

import uvicorn
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from benchmarks import lite, tiny
from benchmarks.record import console, where
from rorqual.engine import Engine, Handle, Sampling
from rorqual.family import ModelConfig
from rorqual.model import Model
from rorqual.serve import Settings, create_app
from rorqual.serve.run import configure
from rorqual.text import Tokenizer, get_encoding
from rorqual.text import tokens as t

MARKS = (t.BOS, t.EOS, t.USER, t.ASSISTANT, t.THINK, t.END_THINK)


def vocabulary(size: int) -> Tokenizer:
    """A tokenizer of as many tokens: words of up to four letters, each with the space before it."""
    letters = string.ascii_lowercase
    words = ["Ġ" + "".join(w) for n in (1, 2, 3, 4) for w in itertools.product(letters, repeat=n)]
    words = words[: size - len(MARKS)]
    backend = Backend(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" [a-z]+|\S+"), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(mark, special=mark in MARKS[:2], normalized=False) for mark in MARKS])
    ends = backend.token_to_id(t.EOS)
    return Tokenizer(backend, bos=backend.token_to_id(t.BOS), eos=[ends])


def talkative(config: ModelConfig, device: str) -> Model:
    """A model of random weights that can chat."""
    model = Model(config, device=device, seed=0)
    model.tokenizer, model.encoding = vocabulary(config.vocab), get_encoding("v4")
    return model


def words_of(count: int) -> str:
    """Text of so many tokens."""
    return " " + " ".join("".join(random.choices(string.ascii_lowercase, k=3)) for _ in range(count))


class Bench:
    """A model's engine, and a server over it."""

    def __init__(self, model: Model, **options: Any) -> None:
        self.model = model
        self.engine = Engine(model, prefix_cache=False, **options)
        if model.device.type == "cuda":  # as `rorqual serve` does
            for _ in self.engine.warm(64):
                pass
        app = create_app(model, Settings(name="bench"), engine=self.engine)
        self.driver = app.state.service.driver
        self.server = uvicorn.Server(configure(app, port=0))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.driver.stop()
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        assert model.tokenizer is not None
        self.ends = {str(token): -100.0 for token in model.end_ids}

    def close(self) -> None:
        """End the server and the engine."""
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()

    def requests(self, count: int, words: int, answer: int) -> list[dict[str, Any]]:
        """Chats of random words, each answered by exactly `answer` tokens."""
        texts = [words_of(words) for _ in range(count)]
        options = {
            "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0, "max_tokens": answer,
            "logit_bias": self.ends, "thinking": {"type": "disabled"},
        }  # fmt: skip
        return [{"messages": [{"role": "user", "content": text}], **options} for text in texts]

    def direct(self, requests: list[dict[str, Any]]) -> list[tuple[float, float, int]]:
        """The same prompts given to the engine, all at once: as `streams` tells it."""
        prompts = [self.model.encode_chat(request["messages"], thinking=False) for request in requests]
        bias = {int(token): value for token, value in self.ends.items()}
        sampling = Sampling(0.0, max_new_tokens=requests[0]["max_tokens"], logit_bias=bias)
        begun = time.perf_counter()
        handles: list[Handle] = [self.engine.submit(prompt, sampling) for prompt in prompts]
        first, last = {}, {}
        while self.engine.busy:
            self.engine.step()
            now = time.perf_counter() - begun
            for i, handle in enumerate(handles):
                if i not in first and handle.completion.ids:
                    first[i] = now
                if i not in last and handle.done:
                    last[i] = now
        return [(first[i], last[i], len(handle.completion.ids)) for i, handle in enumerate(handles)]

    def served(self, requests: list[dict[str, Any]], *options: str) -> list[tuple[float, float, int]]:
        """The same through HTTP."""
        self.driver.start()
        try:
            command = [sys.executable, "-m", "benchmarks.streams", self.url, *options]
            done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            return [(a, b, c) for a, b, c in json.loads(done.stdout)]
        finally:
            self.driver.stop()


def rate(found: list[tuple[float, float, int]]) -> float:
    """Tokens a second from the first request to the last token."""
    return sum(tokens for _, _, tokens in found) / max(end for _, end, _ in found)


def compare(bench: Bench, name: str, streams: int, words: int, answer: int, rounds: int) -> None:
    """One row: medians of rounds in turn, after one that warms up."""
    inside, outside, near, far = [], [], [], []
    for turn in range(rounds + 1):
        requests = bench.requests(streams, words, answer)
        direct, served = bench.direct(requests), bench.served(requests)
        if {n for _, _, n in direct + served} != {answer}:
            raise RuntimeError("not all answers have the length asked for")
        ones = bench.requests(20, words, 4)
        alone = [bench.direct([one])[0][0] for one in ones]
        http = [first for first, _, _ in bench.served(ones, "--in-turn")]
        if turn:
            inside.append(rate(direct))
            outside.append(rate(served))
            near.append(statistics.median(alone) * 1e3)
            far.append(statistics.median(http) * 1e3)
    shares = [b / a for a, b in zip(inside, outside, strict=True)]
    print(
        f"| {name}, {streams} streams | {statistics.median(inside):,.0f} | {statistics.median(outside):,.0f} | "
        f"{statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%}) | {statistics.median(near):.1f} | "
        f"{statistics.median(far):.1f} | {statistics.median(far) - statistics.median(near):.1f} |",
        flush=True,
    )


HEAD = (
    "| | engine, tok/s | through HTTP | share | first token, ms | through HTTP | more |\n"
    "|---|---|---|---|---|---|---|"
)


def gpu(config: ModelConfig | None = None, device: str = "cuda", answer: int = 256, rounds: int = 3) -> None:
    """The "lite" geometry in bf16 and FP8, 64 streams of 256 tokens."""
    model = talkative(config or lite.lite(), device)
    print(HEAD)
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            lite.quantise(model)
        bench = Bench(model, **({"memory": 16 * 2**30} if device == "cuda" else {}))
        compare(bench, f"lite, {kind}", 64, 128, answer, rounds)
        bench.close()
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")


def cpu() -> None:
    """The tiny V3, 8 streams of 128 tokens."""
    print(HEAD)
    bench = Bench(talkative(tiny.tiny(), "cpu"))
    compare(bench, "tiny V3, bf16", 8, 64, 128, 5)
    bench.close()
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
