"""Speculative decoding with the model's own MTP module (V3 report sections 2.2 and 5.4.3).

Every pass takes the last token and one drafted token. The draft stands with probability
min(1, p / q), else the token is drawn from what p has over q; so the answers have exactly the
distribution of the plain loop, and greedy ones are the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rorqual.engine.draws import ACCEPT, DRAFT, RESIDUAL, judge
from rorqual.engine.loop import Answer, Delta, last_states, masks_of, note_logprobs, prefill, room, seat
from rorqual.kernels.linear import packing
from rorqual.nn import InputError, Rows, Transformer


def generate_speculative(model: Transformer, answers: list[Answer]) -> Iterator[Delta]:
    """Like `generate`, with one token drafted a pass by MTP module 0."""
    if not len(model.mtp):
        raise InputError("speculative decoding needs an MTP module, and this checkpoint has none")
    with packing(model.packs()):
        yield from _generate(model, answers)


@torch.inference_mode()
def _generate(model: Transformer, answers: list[Answer]) -> Iterator[Delta]:
    run = _Run(model, answers)
    yield from run.deliver([[(token, run.first_logits[b])] for b, token in enumerate(run.last)])
    while run.active:
        run.draft()
        yield from run.deliver(run.verify())


class _Run:
    """The rows under way: what the main cache holds, the last token (not yet in it), the MTP state.

    `last[b]` is the newest token of row b; the main cache holds everything before it, and the MTP cache
    one pair (state of token i, id of token i + 1) for every token but the last.
    """

    def __init__(self, model: Transformer, answers: list[Answer]) -> None:
        self.model, self.answers = model, answers
        self.active = list(range(len(answers)))
        prompts = [a.prompt for a in answers]
        size = len(answers), room(answers) + 1
        self.cache, self.mtp_cache = model.new_cache(*size), model.new_mtp_cache(*size)
        self.sampler = seat(model, answers)
        state = None
        for chunk, rows in prefill(model, prompts, self.cache):
            self._feed_prompt(self._mtp_state(chunk), rows, prompts)
            state = last_states(chunk, rows, state)
        assert state is not None
        self.first_logits = model.logits(model.finish(state))[:, -1]
        drawn = self.sampler.draw(self.first_logits, self.active, masks_of(answers, model.device))
        self.sampler.saw(self.active, drawn)
        self.sampler.check(self.active)
        self.last: list[int] = drawn.tolist()
        # Pairs that MTP has not seen yet: states [B, t, ...], the ids that follow them, and how many are real.
        self.pending = (self._mtp_state(state), [[t] for t in self.last], [1] * len(answers))

    def _mtp_state(self, state: Tensor) -> Tensor:
        """What MTP reads: V4's raw streams, or V3's hidden state after the final norm."""
        return state if self.model.config.residual is not None else self.model.finish(state)

    def _feed_prompt(self, state: Tensor, rows: Rows, prompts: list[list[int]]) -> None:
        """Give MTP every pair of this prompt chunk whose next token is in the prompt."""
        counts = [
            min(count, max(len(p) - 1 - start, 0))
            for p, start, count in zip(prompts, rows.starts, rows.counts, strict=True)
        ]
        if not max(counts):
            return
        following = [p[s + 1 : s + 1 + c] for p, s, c in zip(prompts, rows.starts, counts, strict=True)]
        self._further(state, following, counts)

    def _further(self, state: Tensor, following: list[list[int]], counts: list[int]) -> tuple[Tensor, Rows]:
        width = max(counts)
        ids = torch.tensor([f[:width] + [0] * (width - len(f)) for f in following], device=self.model.device)
        rows = Rows(self.mtp_cache.lengths, counts, width, self.model.device)
        return self.model.predict_further(state[:, :width], ids, rows, cache=self.mtp_cache)[0], rows

    def draft(self) -> None:
        """Draw one drafted token of each row from MTP's distribution q. A grammar's mask holds for it too, or
        drafts would be made that p can't have."""
        state, following, counts = self.pending
        logits, rows = self._further(state, following, counts)
        self.mask = masks_of(self._answers(), self.model.device)
        self.q_BV = self.sampler.distribution(last_states(logits, rows, None)[:, 0], self.active, self.mask)
        self.drafts: list[int] = self.sampler.draw_from(self.q_BV, self.active, DRAFT).tolist()

    def verify(self) -> list[list[tuple[int, Tensor]]]:
        """One pass over (last, draft): each row's one or two new tokens with the logits they came from."""
        device, batch = self.model.device, len(self.active)
        ids = torch.tensor(list(zip(self.last, self.drafts, strict=True)), device=device)
        before = list(self.cache.lengths)
        state = self.model.run(ids, Rows(before, [2] * batch, 2, device), self.cache)
        logits = self.model.logits(self.model.finish(state))
        sampler, slots = self.sampler, self.active
        p_BV = sampler.distribution(logits[:, 0], slots, self.mask)
        drafts = ids[:, 1]
        stands_B, rest = judge(p_BV, self.q_BV, drafts, sampler.uniforms(slots, ACCEPT))
        first_B = torch.where(stands_B, drafts, sampler.draw_from(rest, slots, RESIDUAL))
        sampler.saw(slots, first_B)
        bonus_B = sampler.draw(logits[:, 1], slots, self._masks_after_drafts())
        sampler.saw(slots, bonus_B, stands_B)
        sampler.check(slots)
        stands, instead, bonus = stands_B.tolist(), first_B.tolist(), bonus_B.tolist()
        new = []
        for b, ok in enumerate(stands):
            done = self.answers[self.active[b]].done
            done.drafted, done.accepted = done.drafted + 1, done.accepted + ok
            first = (self.drafts[b] if ok else instead[b], logits[b, 0])
            new.append([first, (bonus[b], logits[b, 1])] if ok else [first])
        self.last = [tokens[-1][0] for tokens in new]
        self.cache.truncate([n + len(tokens) for n, tokens in zip(before, new, strict=True)])
        self.pending = (
            self._mtp_state(state),
            [[t for t, _ in tokens] for tokens in new],
            [len(t) for t in new],
        )
        return new

    def _answers(self) -> list[Answer]:
        return [self.answers[r] for r in self.active]

    def _masks_after_drafts(self) -> Tensor | None:
        """Grammars' masks for the token after the draft (of no account where the draft breaks the grammar)."""
        states = [a.grammar for a in self._answers()]
        took = [0 if s is None else s.validate([d]) for s, d in zip(states, self.drafts, strict=True)]
        for state, draft, ok in zip(states, self.drafts, took, strict=True):
            if state is not None and ok:
                state.advance(draft)
        mask = masks_of(self._answers(), self.model.device)
        for state, ok in zip(states, took, strict=True):
            if state is not None and ok:
                state.rollback(1)
        return mask

    def deliver(self, new: list[list[tuple[int, Tensor]]]) -> Iterator[Delta]:
        """Hand the new tokens to their answers; rows that end leave the batch."""
        for b, tokens in enumerate(new):
            r = self.active[b]
            for token, logits_V in tokens:
                note_logprobs(self.answers, [r], logits_V[None], [token])
                text = self.answers[r].take(token)
                yield Delta(r, token, text, self.answers[r].done.finish_reason)
                if self.answers[r].done.finish_reason is not None:
                    break
        keep = [b for b, r in enumerate(self.active) if self.answers[r].done.finish_reason is None]
        if len(keep) < len(self.active):
            self.active = [self.active[b] for b in keep]
            self.last = [self.last[b] for b in keep]
            state, following, counts = self.pending
            self.pending = (state[keep], [following[b] for b in keep], [counts[b] for b in keep])
            if keep:
                self.cache.select(keep)
                self.mtp_cache.select(keep)
