"""A batch of prompts to completions, on a model and its cache: the plain loop everything else is held to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from rorqual.engine.draws import logprobs_of
from rorqual.engine.grammar import GrammarError, GrammarState, fill_masks
from rorqual.engine.inside import Inside, Look
from rorqual.engine.sampling import Sampler, Sampling
from rorqual.kernels.linear import packing
from rorqual.nn import Cache, ContextError, InputError, Rows, Transformer

PREFILL = 2048
"""Prompt tokens a pass, all rows together: bounds the memory of activations."""

RESERVE = 256
"""Tokens of answer that a cache has room for from the start; it grows as answers do."""


class StreamDecoder(Protocol):
    """Turns ids into text one at a time, never half a character."""

    def push(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass
class Completion:
    """An answer. `ids` include the end token if one was drawn; `text` (if the model has a tokenizer)
    leaves out the end token and stop strings. `finish_reason`: "stop" or "length"."""

    ids: list[int] = field(default_factory=list)
    text: str | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    drafted: int = 0
    """Tokens that MTP drafted for this answer, and how many of them stood."""
    accepted: int = 0
    inside: list[Look] | None = None
    """Where it was asked for: the tokens as seen from inside, in order, as far as that is known."""


@dataclass(frozen=True)
class Delta:
    """One token as it comes: its row, id, the text it settles (may be empty), and the reason if last. `inside`: what
    has become known of tokens by now, where it was asked for; often of the token before this one."""

    row: int
    id: int
    text: str
    finish_reason: str | None = None
    inside: tuple[Look, ...] = ()


class Answer:
    """A row under way: collects tokens, settles text, and knows when to stop."""

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        ends: frozenset[int],
        decoder: StreamDecoder | None,
        grammar: GrammarState | None = None,
        inside: Inside | None = None,
    ):
        self.prompt, self.sampling, self.ends, self.decoder = prompt, sampling, ends, decoder
        self.grammar = grammar
        """Where the answer stands in its sampling's grammar; moves on with every token taken."""
        self.inside = inside
        self.done = Completion(prompt_tokens=len(prompt), inside=None if inside is None else [])
        if decoder is not None:
            self.done.text = ""
        if sampling.logprobs is not False:
            self.done.logprobs = []
            self.done.top_logprobs = [] if sampling.logprobs is not True and sampling.logprobs else None
        self._held = ""
        """Text that could still turn out to begin a stop string."""

    def take(self, token: int) -> str:
        """One more token; returns the text that is now certain. Sets `done.finish_reason` at the end."""
        self.done.ids.append(token)
        if self.grammar is not None:
            self.grammar.advance(token)
        text = ""
        if token in self.ends and not self.sampling.ignore_eos:
            self.done.finish_reason = "stop"
        elif self.decoder is not None:
            text = self._settle(self.decoder.push(token))
        if self.done.finish_reason is None and len(self.done.ids) >= self.sampling.max_new_tokens:
            self.done.finish_reason = "length"
        if self.done.finish_reason is not None and self.decoder is not None:
            text += self._flush()
        if self.done.text is not None:
            self.done.text += text
        return text

    def _settle(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self.sampling.stop) if at >= 0]
        if found:
            self._held, self.done.finish_reason = "", "stop"
            self.decoder = None
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self.sampling.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _flush(self) -> str:
        """What was still held back when the answer ended by token or length."""
        assert self.decoder is not None
        text = self._settle(self.decoder.finish()) + self._held
        self._held = ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def check_prompts(model: Transformer, prompts: list[list[int]], samplings: list[Sampling]) -> None:
    """Refuse empty prompts, ids outside the vocabulary (in prompts and biases), and prompts that leave no room
    for an answer."""
    vocab, positions = model.config.vocab, model.config.max_positions
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(
                f"prompt {i} is empty: give at least one token (the model's BOS, if nothing else)"
            )
        bad = next((t for t in prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise InputError(
                f"prompt {i} holds token id {bad}, outside the vocabulary of {vocab}: wrong tokenizer?"
            )
        if len(prompt) >= positions:
            raise ContextError(
                f"prompt {i} has {len(prompt)} tokens, this model has {positions} positions: shorten the prompt"
            )
    if len(samplings) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(samplings)} samplings: give one, or one a prompt")
    for sampling in samplings:
        sampling.check_vocab(vocab)


def fit(prompt: list[int], sampling: Sampling, positions: int) -> Sampling:
    """`sampling` with `max_new_tokens` cut to what the model's positions leave after the prompt."""
    return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, positions - len(prompt)))


def prefill(model: Transformer, prompts: list[list[int]], cache: Cache) -> Iterator[tuple[Tensor, Rows]]:
    """Run the prompts through the model in passes of about `PREFILL` tokens: each pass's state and rows.

    Rows whose prompt has ended bring no tokens to later passes.
    """
    longest, step = max(map(len, prompts)), max(1, PREFILL // len(prompts))
    for start in range(0, longest, step):
        counts = [min(max(len(p) - start, 0), step) for p in prompts]
        width = max(counts)
        starts = [min(len(p), start) for p in prompts]
        ids = torch.tensor(
            [p[start : start + width] + [0] * (width - c) for p, c in zip(prompts, counts, strict=True)],
            device=model.device,
        )
        rows = Rows(starts, counts, width, model.device)
        yield model.run(ids, rows, cache), rows


def last_states(state: Tensor, rows: Rows, before: Tensor | None) -> Tensor:
    """The state of each row's last real token `[B, 1, ...]`; rows without one keep `before`."""
    column = torch.tensor([max(c - 1, 0) for c in rows.counts], device=state.device)
    last = state[torch.arange(len(rows), device=state.device), column][:, None]
    if before is None:
        return last
    fresh = torch.tensor([c > 0 for c in rows.counts], device=state.device)
    return torch.where(fresh.view(-1, *[1] * (last.dim() - 1)), last, before)


def note_logprobs(answers: list[Answer], rows: list[int], logits_BV: Tensor, tokens: list[int]) -> None:
    """Write down the log-probability of each row's token, and the likeliest alternatives, where asked."""
    asking = [b for b, r in enumerate(rows) if answers[r].done.logprobs is not None]
    if not asking:
        return
    tops = [0 if answers[r].done.top_logprobs is None else int(answers[r].sampling.logprobs) for r in rows]
    drawn = torch.tensor([tokens[b] for b in asking], device=logits_BV.device)
    chosen, ids, values = logprobs_of(logits_BV[asking], drawn, max(tops[b] for b in asking))
    for b, logprob, best in zip(
        asking, chosen.tolist(), zip(ids.tolist(), values.tolist(), strict=True), strict=True
    ):
        done = answers[rows[b]].done
        if done.logprobs is not None:
            done.logprobs.append(logprob)
        if done.top_logprobs is not None:
            done.top_logprobs.append(list(zip(*best, strict=True))[: tops[b]])


def room(answers: list[Answer]) -> int:
    """Tokens that a cache for these answers should hold from the start."""
    return max(len(a.prompt) + min(a.sampling.max_new_tokens, RESERVE) for a in answers)


def seat(model: Transformer, answers: list[Answer]) -> Sampler:
    """A sampler in which answer i has slot i."""
    sampler = Sampler(model.config.vocab, model.device, len(answers))
    for slot, answer in enumerate(answers):
        sampler.admit(slot, answer.sampling, answer.prompt)
    return sampler


def masks_of(answers: list[Answer], device: torch.device) -> Tensor | None:
    """What the answers' grammars allow next, as a bitmask on the device; None where none has a grammar."""
    states = [a.grammar for a in answers]
    compiler = next((s.compiler for s in states if s is not None), None)
    if compiler is None:
        return None
    bits_BW = compiler.bitmask(len(states))
    for b in fill_masks(states, bits_BW):
        state = states[b]
        raise GrammarError(f"the grammar can't be followed any further: {state and state.error}")
    return bits_BW.to(device, non_blocking=True)


def generate(model: Transformer, answers: list[Answer]) -> Iterator[Delta]:
    """Answer every row token by token, yielding each as it is drawn. Rows that end leave the batch."""
    with packing(model.packs()):
        yield from _generate(model, answers)


@torch.inference_mode()
def _generate(model: Transformer, answers: list[Answer]) -> Iterator[Delta]:
    active = list(range(len(answers)))
    prompts = [a.prompt for a in answers]
    sampler = seat(model, answers)
    cache = model.new_cache(len(answers), room(answers))
    state = None
    for chunk, rows in prefill(model, prompts, cache):
        state = last_states(chunk, rows, state)
    assert state is not None
    while True:
        logits_BV = model.logits(model.finish(state))[:, -1]
        drawn = sampler.draw(logits_BV, active, masks_of([answers[r] for r in active], model.device))
        sampler.saw(active, drawn)
        sampler.check(active)
        tokens = drawn.tolist()
        note_logprobs(answers, active, logits_BV, tokens)
        for r, token in zip(active, tokens, strict=True):
            text = answers[r].take(token)
            yield Delta(r, token, text, answers[r].done.finish_reason)
        keep = [b for b, r in enumerate(active) if answers[r].done.finish_reason is None]
        if not keep:
            return
        if len(keep) < len(active):
            active = [active[b] for b in keep]
            cache.select(keep)
            drawn = drawn[keep]
        rows = Rows(cache.lengths, [1] * len(active), 1, model.device)
        state = model.run(drawn[:, None], rows, cache)
