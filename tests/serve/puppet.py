"""A vocabulary with DeepSeek's tokens, and an engine that writes what a test tells it to."""

from __future__ import annotations

import threading
import time
from collections import deque
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rorqual.engine import Delta, EngineFull, Facts, Handle
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.looks import Chosen, Insight, Looks
from rorqual.engine.loop import Answer
from rorqual.engine.runner import Drawn
from rorqual.family.account import Cache
from rorqual.text import Tokenizer, get_encoding
from rorqual.text import tokens as t

SPECIAL = (t.BOS, t.EOS)
ADDED = (
    *SPECIAL, t.USER, t.ASSISTANT, t.THINK, t.END_THINK, t.CALLS_BEGIN, t.CALLS_END, t.CALL_BEGIN, t.CALL_END,
    t.OUTPUTS_BEGIN, t.OUTPUTS_END, t.OUTPUT_BEGIN, t.OUTPUT_END, t.SEP, t.DSML, t.FIM_BEGIN, t.FIM_HOLE, t.FIM_END,
    t.LATEST_REMINDER, t.IM_START, t.IM_END,
)  # fmt: skip


def tokenizer() -> Tokenizer:
    """All bytes, a few longer words, and the family's added tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(letters), []
    for run in ("Hello", "Ġworld", "call", '":', "ĊĊ", "Ã©"):
        for n in range(1, len(run)):
            merges.append((run[:n], run[n]))
            words.append(run[: n + 1])
    vocab = {word: n for n, word in enumerate(dict.fromkeys(words))}
    backend = Backend(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=token in SPECIAL, normalized=False) for token in ADDED])
    return Tokenizer(backend, bos=backend.token_to_id(t.BOS), eos=[backend.token_to_id(t.EOS)])


TOKENIZER = tokenizer()


class PuppetModel:
    """As much of a model as the server asks for."""

    def __init__(self, encoding: str | None = "v4", positions: int = 20_000) -> None:
        self.device = torch.device("cpu")
        self.tokenizer: Tokenizer | None = TOKENIZER
        self.encoding = None if encoding is None else get_encoding(encoding)
        self.config = SimpleNamespace(max_positions=positions, vocab=TOKENIZER.vocab_size, eos=TOKENIZER.eos)
        self.end_ids = frozenset(TOKENIZER.eos)
        self.compiler = GrammarCompiler(TOKENIZER)

    def encode(self, text: str) -> list[int]:
        return TOKENIZER.encode(text)


FACTS = Facts(
    layers=3,
    expert_layers=(1, 2),
    experts=8,
    chosen=2,
    shared=1,
    attention=("dsa", "window", "csa"),
    every=(1, 1, 4),
    window=16,
    drafts=1,
    cache=Cache(Fraction(10), Fraction(41, 2), 64, 32),
    mha_bytes=500,
    widths=(2, 2),
)
"""What there is to see in a puppet."""


def insight(token: int, number: int) -> Insight:
    """What a pass over this token, the answer's `number`-th, chose; every third pass refuses a draft."""
    picked = np.array([[number, -1, 0], [0, 1, -1]])
    return Insight(
        Chosen([token % 8, 7, number % 8, 1], picked), draft=65 + number % 26 if number % 3 == 2 else None
    )


class Puppet:
    """An engine that writes texts, one a request, in the order of `script` (the last for ever), then the end token;
    "\\0" at a text's end leaves that out. A request's grammar must allow what is written."""

    def __init__(self, *script: str, step_tokens: int = 1) -> None:
        self.script = deque(script)
        self.live: dict[Handle, deque[int]] = {}
        self.seen: list[Answer] = []
        self.cancelled = 0
        self.most = 1000
        self.fail: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.step_tokens = step_tokens
        self.facts: Facts | None = FACTS
        self.looks: dict[Handle, Looks] = {}

    @property
    def busy(self) -> bool:
        return bool(self.live)

    def submit_answer(self, answer: Answer, priority: int = 0) -> Handle:
        if len(self.live) >= self.most:
            raise EngineFull("too many")
        handle = Handle(self)  # type: ignore[arg-type]
        handle.request = SimpleNamespace(
            answer=answer, finished=False, running=True, cached=len(answer.prompt) // 2
        )  # type: ignore[assignment]
        text = self.script[0] if len(self.script) == 1 else self.script.popleft()
        ids = TOKENIZER.encode(text.removesuffix("\0"))
        self.live[handle] = deque(ids if text.endswith("\0") else [*ids, TOKENIZER.eos[0]])
        self.seen.append(answer)
        if answer.inside is not None and answer.done.inside is not None:
            self.looks[handle] = Looks(answer.inside, FACTS, len(answer.prompt), answer.done.inside)
        return handle

    def step(self) -> bool:
        self.gate.wait()
        time.sleep(0.0003)  # as a model would take
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        for handle, ids in list(self.live.items()):
            for _ in range(self.step_tokens):
                if not self._one(handle, ids):
                    break
        return True

    def _one(self, handle: Handle, ids: deque[int]) -> bool:
        answer = handle.request.answer  # type: ignore[union-attr]
        if not ids:
            self._end(handle, "length")
            return False
        token = ids.popleft()
        done = answer.done
        if done.logprobs is not None:
            done.logprobs.append(-0.5)
        if done.top_logprobs is not None:
            done.top_logprobs.append([(token, -0.5), (0, -1.5)][: int(answer.sampling.logprobs)])
        try:
            text = answer.take(token)
        except ValueError as error:  # what the test wrote breaks the grammar
            handle.error = error
            self._end(handle, None)
            return False
        known = ()
        if handle in self.looks:
            number = len(done.ids) - 2  # of the token before this one
            drawn = Drawn([token], insight=None if number < 0 else insight(done.ids[number], number))
            known = self.looks[handle].take(drawn, 0, last=done.finish_reason is not None)  # type: ignore[assignment]
        handle._put(Delta(0, token, text, done.finish_reason, known))
        if done.finish_reason is not None:
            self._end(handle, done.finish_reason)
        return done.finish_reason is None

    def _end(self, handle: Handle, reason: str | None) -> None:
        handle.request.answer.done.finish_reason = reason  # type: ignore[union-attr]
        handle.request.finished = True  # type: ignore[union-attr,misc]
        self.live.pop(handle, None)

    def _cancel(self, handle: Handle) -> None:
        if handle in self.live:
            self.cancelled += 1
            self._end(handle, "cancelled")

    def fail_all(self, error: Exception) -> None:
        for handle in list(self.live):
            handle.error = error
            self._end(handle, None)


def dsml(*calls: tuple[str, dict[str, str]], block: str = "tool_calls") -> str:
    """A V4 block of calls whose parameters are given as text after `string=`: "true>x" or "false>1"."""
    told = "".join(
        f'<{t.DSML}invoke name="{name}">\n'
        + "".join(
            f'<{t.DSML}parameter name="{key}" string="{value.split(">", 1)[0]}">{value.split(">", 1)[1]}</{t.DSML}parameter>\n'
            for key, value in parameters.items()
        )
        + f"</{t.DSML}invoke>\n"
        for name, parameters in calls
    )
    return f"\n\n<{t.DSML}{block}>\n{told}</{t.DSML}{block}>"
