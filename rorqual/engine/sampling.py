"""How the next token is drawn: `Sampling` says it, `Sampler` does it on the device for a batch."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from rorqual.engine import draws, fused, fused_judge
from rorqual.engine.tallies import Bias, Seen, upload

if TYPE_CHECKING:
    from rorqual.engine.grammar import Grammar

Slots = Tensor | Sequence[int]
"""The slot of each row: a list, or int64 [R] on the device."""

UNSOUND = (
    "the model gave NaN or infinite logits: the weights are damaged or overflow in this dtype; "
    "try dtype=torch.float32 or bfloat16"
)


class SamplingError(ValueError):
    """Sampling values out of range, or logits nothing can be drawn from."""


def brief(value: object) -> str:
    """A value for an error message: Python writes no integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.80}"


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    `temperature` 0 is greedy. Filters apply in the order penalties, `logit_bias`, `grammar`, temperature,
    `top_k` (0: off), `top_p`, `min_p` (share of the likeliest token's probability). `repetition_penalty`
    divides positive and multiplies negative logits of every token in prompt or answer; `presence_penalty`
    and `frequency_penalty` are subtracted once, and once an occurrence, for tokens of the answer.
    `logit_bias` is added to the logits of the token ids it maps; it may be any mapping and is kept as
    (id, value) pairs in order of id, so that a Sampling can be hashed. `grammar` allows only tokens that keep
    to it, and the end only where it may end.
    `stop` strings end the answer and are left out of its text. `seed` makes an answer repeatable; prompt
    i of a list draws with seed + i. `logprobs`: True for each chosen token's natural log-probability,
    n for the n likeliest alternatives too; both under the model's own distribution, before temperature
    and filters. `ignore_eos` goes on to `max_new_tokens` past the end token (not with a grammar).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 256
    stop: str | Sequence[str] = ()
    seed: int | None = None
    logprobs: bool | int = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise SamplingError(f"stop must be one or more non-empty strings, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        self._in_range("temperature", 0.0, 100.0)
        self._in_range("top_p", 0.0, 1.0, open_low=True)
        self._in_range("min_p", 0.0, 1.0)
        self._in_range("repetition_penalty", 0.0, 100.0, open_low=True)
        self._in_range("presence_penalty", -100.0, 100.0)
        self._in_range("frequency_penalty", -100.0, 100.0)
        self._whole("top_k", 0, math.inf)
        object.__setattr__(self, "top_k", min(self.top_k, 2**31 - 1))  # more than any vocabulary
        self._whole("max_new_tokens", 1)
        if not isinstance(self.logprobs, bool):
            self._whole("logprobs", 0)
        if self.seed is not None:
            self._whole("seed", 0, math.inf)
            if self.seed >= 2**62:
                raise SamplingError(f"seed must be below 2^62, got {brief(self.seed)}")
        object.__setattr__(self, "logit_bias", _pairs(self.logit_bias))
        if self.grammar is not None:
            self._check_grammar()

    def _check_grammar(self) -> None:
        from rorqual.engine.grammar import Grammar  # which imports this module

        if not isinstance(self.grammar, Grammar):
            raise SamplingError(
                f"grammar must be a Grammar, as of Grammar.json_schema, got {self.grammar!r:.80}"
            )
        if self.ignore_eos:
            raise SamplingError("ignore_eos can't go with a grammar: nothing may follow where a grammar ends")

    def check_vocab(self, vocab: int) -> None:
        """Refuse what names tokens outside a vocabulary of this size."""
        bad = next((token for token, _ in self.bias if token >= vocab), None)
        if bad is not None:
            raise SamplingError(f"logit_bias names token id {bad}, outside the vocabulary of {vocab}")

    def _in_range(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != value or value > high or value < low or (open_low and value == low):
            bracket = "(" if open_low else "["
            raise SamplingError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {brief(value)}")

    def _whole(self, name: str, low: int, high: float = 2**62) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise SamplingError(f"{name} must be a whole number of at least {low}, got {brief(value)}")
        if value > high:
            raise SamplingError(f"{name} is too large: {brief(value)}")

    @property
    def greedy(self) -> bool:
        """Always the likeliest token."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are left out of the draw for being unlikely."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as it is kept."""
        return cast(tuple[tuple[int, float], ...], self.logit_bias)


def _pairs(bias: object) -> tuple[tuple[int, float], ...]:
    """A mapping (or pairs) of token ids to values, checked, in order of id."""
    try:
        pairs = sorted(dict(cast(Mapping[int, float], bias)).items())
    except (TypeError, ValueError):
        pairs = [(-1, math.nan)]
    for token, value in pairs:
        whole = isinstance(token, int) and not isinstance(token, bool) and token >= 0
        number = isinstance(value, int | float) and not isinstance(value, bool) and -100 <= value <= 100
        if not whole or not number:
            raise SamplingError(f"logit_bias must map token ids to numbers in [-100, 100], got {bias!r:.80}")
    return tuple((token, float(value)) for token, value in pairs)


class Sampler:
    """Draws for requests that each hold a slot. What a request draws depends on its seed, the number of tokens
    it has drawn, and its logits alone: not on the batch, nor on having been put off and taken up again.

    Calls name the rows of `logits_RV` by their slots, best as a list: then only the rows that need filters
    or counts pay for them. For slots in a device tensor, all rows take part as soon as any admitted slot needs
    something. A slot may stand in several rows. Nothing waits for the device but `check`. A slot that nobody
    was admitted to draws greedily, so rows that only fill up a batch can have one.
    """

    def __init__(self, vocab: int, device: torch.device, slots: int) -> None:
        self.vocab, self.device = vocab, device
        self._rows: list[Sampling | None] = [None] * slots
        self._knobs_SK = torch.tensor(_knobs(None), dtype=torch.float64, device=device).repeat(slots, 1)
        self._key_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._drawn_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._unsound_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self.newest_S = torch.zeros(slots, dtype=torch.int64, device=device)
        """The last token that `take` drew for each slot, for passes that start before the host has seen it."""
        self._q_SV: Tensor | None = None
        """What each slot's draft was drawn from, once any is sampled."""
        self._seen = Seen(slots, vocab, device)
        self._bias = Bias(slots, device)
        self._plans: dict[tuple[int, ...], _Plan] = {}
        self._any: _Plan | None = None

    @torch.inference_mode()
    def admit(
        self, slot: int, sampling: Sampling, prompt: Sequence[int] = (), answer: Sequence[int] = ()
    ) -> int:
        """Give `slot` to a request. `answer`: tokens it drew before, if it was put off. Returns its seed: one
        drawn now if it has none of its own, to be kept by a caller who may have to put the request off."""
        sampling.check_vocab(self.vocab)
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
        self._set(slot, sampling, draws.key_of(seed), len(answer))
        if sampling.penalised:
            self._seen.admit(slot, prompt, answer)
        if sampling.bias:
            self._bias.admit(slot, sampling.bias)
        return seed

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Take the slot back."""
        self._set(slot, None, 0, 0)

    def _set(self, slot: int, sampling: Sampling | None, key: int, drawn: int) -> None:
        before, self._rows[slot] = self._rows[slot], sampling
        if before is not None and before.penalised:
            self._seen.release(slot)
        if before is not None and before.bias:
            self._bias.release(slot)
        self._plans.clear()
        self._any = None
        self._knobs_SK[slot] = upload(_knobs(sampling), torch.float64, self.device)
        state = upload([key, drawn, 0], torch.int64, self.device)
        self._key_S[slot], self._drawn_S[slot], self._unsound_S[slot] = state

    @torch.inference_mode()
    def draw(self, logits_RV: Tensor, slots_R: Slots, mask: Tensor | None = None) -> Tensor:
        """One token of each row, int64 [R] on the device. `mask`: bool [R, V], true where allowed, or a bitmask
        as of `draws.apply_bitmask`. A row with NaN or infinite logits gets some token; see `failed`."""
        plan = self._plan(slots_R)
        if fused.supported(logits_RV):
            return self._fused(logits_RV, plan, mask)[0]
        logits_RV = self._shaped(logits_RV, plan, mask)
        best_R, ids_R = self._best(logits_RV, plan)
        if plan.all_greedy:
            return ids_R
        drawn_R = draws.pick(self._heated(logits_RV, best_R, plan), self._uniforms(plan, draws.TARGET))
        if not plan.any_greedy:
            return drawn_R
        return torch.where(self._knobs_SK[plan.slots_R, _GREEDY] > 0, ids_R, drawn_R)

    @torch.inference_mode()
    def take(
        self, logits_RV: Tensor, slots_R: Slots, mask: Tensor | None = None, where_R: Tensor | None = None
    ) -> Tensor:
        """`draw`, and `saw` of what it gave: int64 [2, R], tokens and what is above 0 where the slot has `failed`.
        With `where_R` (bool) only the rows where it is true have drawn. Slots must differ."""
        plan = self._plan(slots_R)
        if fused.supported(logits_RV):
            return self._fused(logits_RV, plan, mask, saw=True, told_R=where_R)
        ids_R = self.draw(logits_RV, slots_R, mask)
        self.saw(slots_R, ids_R, where_R)
        at = plan.slots_R
        self.newest_S[at] = ids_R if where_R is None else torch.where(where_R, ids_R, self.newest_S[at])
        return torch.stack((ids_R, self._unsound_S[at]))

    def _fused(self, logits_RV: Tensor, plan: _Plan, mask: Tensor | None, **options: Any) -> Tensor:
        """Tokens and failures, int64 [2, R], by the kernels."""
        penalised = plan.penalised is not None
        if plan.biased is not None or (mask is not None and mask.dtype == torch.bool):
            logits_RV, mask = self._shaped(logits_RV, plan, mask), None
            options["counts"] = penalised
            penalised = False
        return fused.draw(
            logits_RV, plan.slots_R, self._tables, random=not plan.all_greedy, filters=plan.filtered is not None,
            bits_RW=mask, penalties=penalised, **options,
        )  # fmt: skip

    def rehearse(self, logits_RV: Tensor, slots_R: Slots) -> None:
        """Launch the kernels of `take`, if it has any: for `compiled_ahead`, which has them compiled and not run."""
        if fused.supported(logits_RV):
            self._fused(logits_RV, self._plan(slots_R), None, saw=True)

    @property
    def _tables(self) -> fused.Tables:
        kept = self._knobs_SK, self._key_S, self._drawn_S, self._unsound_S, self.newest_S
        return fused.Tables(*kept, *self._seen.tables)

    @torch.inference_mode()
    def draft(self, logits_RV: Tensor, slots_R: Slots, mask: Tensor | None = None) -> Tensor:
        """Draw a draft for each row from the logits of an MTP module, int64 [R], to be brought before `judge`."""
        plan = self._plan(slots_R)
        if plan.all_greedy:
            return self.draw(logits_RV, slots_R, mask)
        if self._q_SV is None:
            self._q_SV = torch.zeros(len(self._rows), self.vocab, device=self.device)
        if fused.supported(logits_RV):
            return self._fused(logits_RV, plan, mask, stream=draws.DRAFT, p_SV=self._q_SV)[0]
        q_RV = self.distribution(logits_RV, slots_R, mask)
        self._q_SV[plan.slots_R] = q_RV
        return self.draw_from(q_RV, slots_R, draws.DRAFT)

    @torch.inference_mode()
    def judge(
        self, logits_RV: Tensor, slots_R: Slots, drafts_R: Tensor, tries_R: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`take`, with a draft in each row where `tries_R` is above 0: tokens int64 [R], and whether a row's is its
        draft, bool [R]. A draft d stands with probability min(1, p(d) / q(d)), else the token is drawn from
        what p has over q; a greedy one stands if it is what p says."""
        plan = self._plan(slots_R)
        if plan.all_greedy or self._q_SV is None:
            ids_R = self.take(logits_RV, slots_R, mask)[0]
            return ids_R, (ids_R == drafts_R) & (tries_R > 0)
        if fused.supported(logits_RV):
            p_RV = torch.empty(logits_RV.shape, device=self.device)
            self._fused(logits_RV, plan, mask, p_RV=p_RV)
            counts = plan.penalised is not None
            out = fused_judge.judge(
                p_RV, self._q_SV, plan.slots_R, drafts_R, tries_R, self._tables, counts=counts
            )
            return out[0], out[1] > 0
        p_RV = self.distribution(logits_RV, slots_R, mask)
        from_q_R = (tries_R > 0) & (self._knobs_SK[plan.slots_R, _GREEDY] == 0)
        q_RV = self._q_SV[plan.slots_R] * from_q_R[:, None]
        stands_R, rest_RV = draws.judge(p_RV, q_RV, drafts_R, self.uniforms(slots_R, draws.ACCEPT))
        stands_R &= tries_R > 0
        ids_R = torch.where(stands_R, drafts_R, self.draw_from(rest_RV, slots_R, draws.RESIDUAL))
        self.saw(slots_R, ids_R)
        self.newest_S[plan.slots_R] = ids_R
        return ids_R, stands_R

    @torch.inference_mode()
    def distribution(self, logits_RV: Tensor, slots_R: Slots, mask: Tensor | None = None) -> Tensor:
        """What each row draws from, fp32 [R, V], each row summing to one; greedy rows have all of it on the
        likeliest token."""
        plan = self._plan(slots_R)
        logits_RV = self._shaped(logits_RV, plan, mask)
        best_R, ids_R = self._best(logits_RV, plan)
        sure_RV = None
        if plan.any_greedy:
            sure_RV = torch.zeros_like(logits_RV, dtype=torch.float32).scatter_(1, ids_R[:, None], 1.0)
        if plan.all_greedy and sure_RV is not None:
            return sure_RV
        p_RV = self._heated(logits_RV, best_R, plan)
        if sure_RV is None:
            return p_RV
        return torch.where(self._knobs_SK[plan.slots_R, _GREEDY, None] > 0, sure_RV, p_RV)

    def draw_from(self, p_RV: Tensor, slots_R: Slots, stream: int = draws.TARGET, ahead: int = 0) -> Tensor:
        """One token of each row from given probabilities (they need not sum to one), int64 [R]. `stream`: one
        of `draws`' names; `ahead`: tokens that the row has drawn and `saw` has not been told of."""
        return draws.pick(p_RV, self.uniforms(slots_R, stream, ahead))

    def uniforms(self, slots_R: Slots, stream: int, ahead: int = 0) -> Tensor:
        """Each row's number in [0, 1) for its next token, fp64 [R]."""
        return self._uniforms(self._plan(slots_R), stream, ahead)

    @torch.inference_mode()
    def saw(self, slots_R: Slots, tokens_R: Tensor | Sequence[int], where_R: Tensor | None = None) -> None:
        """Each row's answer has one more token; with `where_R` (bool) only the rows where it is true."""
        plan = self._plan(slots_R)
        tokens_R = tokens_R if isinstance(tokens_R, Tensor) else upload(tokens_R, torch.int64, self.device)
        new_R = torch.ones_like(plan.slots_R) if where_R is None else where_R.long()
        self._drawn_S.index_add_(0, plan.slots_R, new_R)
        if plan.penalised is not None:
            at = plan.penalised
            self._seen.add(plan.slots_R[at], tokens_R[at], new_R[at])

    def failed(self, slots_R: Slots) -> Tensor:
        """Rows whose slot has had logits that nothing can be drawn from since it was admitted, bool [R] on the
        device: NaN, +inf, or -inf everywhere."""
        return self._unsound_S[self._plan(slots_R).slots_R] > 0

    def index(self, slots_R: Slots) -> Tensor:
        """The slots on the device, int64 [R]; of a list in use it is there already."""
        return self._plan(slots_R).slots_R

    def check(self, slots_R: Slots) -> None:
        """Raise `SamplingError` if any row has `failed`. Waits for the device."""
        if bool(self.failed(slots_R).any()):
            raise SamplingError(UNSOUND)

    # -------------------------------------------------------------------------------------- inside

    def _plan(self, slots_R: Slots) -> _Plan:
        if isinstance(slots_R, Tensor):
            if self._any is None:
                self._any = self._plan_of([row for row in self._rows if row is not None], slots_R)
            return replace(self._any, slots_R=slots_R)
        key = tuple(slots_R)
        if key not in self._plans:
            if len(self._plans) >= 64:
                self._plans.clear()
            index = upload(key, torch.int64, self.device)
            self._plans[key] = self._plan_of([self._rows[slot] for slot in key], index, exact=True)
        return self._plans[key]

    def _plan_of(self, rows: list[Sampling | None], slots_R: Tensor, exact: bool = False) -> _Plan:
        """What rows need. `exact`: `rows` are the rows' own; else they are all there may be among them."""

        def those(asked: list[bool]) -> Tensor | slice | None:
            if not any(asked):
                return None
            if not exact or all(asked):
                return slice(None)
            return upload([r for r, one in enumerate(asked) if one], torch.int64, self.device)

        greedy = [row is None or row.greedy for row in rows]
        return _Plan(
            slots_R,
            all_greedy=all(greedy),
            any_greedy=not exact or any(greedy),
            penalised=those([row is not None and row.penalised for row in rows]),
            biased=those([row is not None and bool(row.bias) for row in rows]),
            filtered=those([row is not None and row.filtered for row in rows]),
            top_k=any(row is not None and row.top_k > 0 for row in rows),
            top_p=any(row is not None and row.top_p < 1 for row in rows),
        )

    def _shaped(self, logits_RV: Tensor, plan: _Plan, mask: Tensor | None) -> Tensor:
        """The logits with penalties, bias and mask; in fp32 unless these rows need none of it. Never in place."""
        if plan.penalised is not None:
            logits_RV = self._on(plan.penalised, logits_RV.float(), plan, self._penalise)
        if plan.biased is not None:
            logits_RV = self._on(plan.biased, logits_RV.float(), plan, self._bias.add)
        if mask is None:
            return logits_RV
        if mask.dtype == torch.bool:
            return logits_RV.masked_fill(~mask, -torch.inf)
        return draws.apply_bitmask(logits_RV, mask)

    def _on(
        self, rows: Tensor | slice, x_RV: Tensor, plan: _Plan, change: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`x_RV` with `change(rows of x, their slots)` in place of the rows named."""
        new = change(x_RV[rows], plan.slots_R[rows])
        return new if isinstance(rows, slice) else x_RV.index_copy(0, rows, new)

    def _penalise(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        count_RV, prompt_RV = self._seen.of(slots_R)
        repeat, presence, frequency = self._knobs_SK[slots_R, _REPEAT:, None].float().unbind(1)
        drawn_RV = count_RV > 0
        scaled = torch.where(logits_RV > 0, logits_RV / repeat, logits_RV * repeat)
        logits_RV = torch.where(prompt_RV | drawn_RV, scaled, logits_RV)
        return logits_RV - presence * drawn_RV - frequency * count_RV

    def _best(self, logits_RV: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        """Each row's greatest logit and its token. The greatest is NaN if any is; -inf below it is what a mask
        leaves."""
        best_R, ids_R = logits_RV.max(-1)
        self._unsound_S.index_add_(0, plan.slots_R, (~best_R.isfinite()).long())
        return best_R, ids_R

    def _heated(self, logits_RV: Tensor, best_R: Tensor, plan: _Plan) -> Tensor:
        """Probabilities after temperature and filters, fp32 [R, V]."""
        knobs = self._knobs_SK[plan.slots_R]
        p_RV = (logits_RV.float() - best_R.float()[:, None]).div_(knobs[:, _HEAT, None].float()).softmax(-1)
        if plan.filtered is None:
            return p_RV

        def leave(p_RV: Tensor, slots_R: Tensor) -> Tensor:
            knobs = self._knobs_SK[slots_R]
            top_k, top_p, min_p, on = knobs[:, _TOP_K : _FILTERED + 1].unbind(1)
            left_RV = draws.filtered(
                p_RV, top_k if plan.top_k else None, top_p if plan.top_p else None, min_p
            )
            # With slots from the device, rows without filters come here too and must stay what they were.
            return torch.where(on[:, None] > 0, left_RV, p_RV)

        return self._on(plan.filtered, p_RV, plan, leave)

    def _uniforms(self, plan: _Plan, stream: int, ahead: int = 0) -> Tensor:
        slots = plan.slots_R
        return draws.uniforms(self._key_S[slots], self._drawn_S[slots] + ahead, stream)


@dataclass(frozen=True)
class _Plan:
    """What the rows of a call need: their slots on the device, and per feature the rows that have it: indices,
    slice(None) for all, None for none."""

    slots_R: Tensor
    all_greedy: bool
    any_greedy: bool
    penalised: Tensor | slice | None
    biased: Tensor | slice | None
    filtered: Tensor | slice | None
    top_k: bool
    """Whether any of the filtered rows may have a top-k, and likewise a top-p."""
    top_p: bool


# Columns of the sampler's table of numbers a slot; `fused` reads the first five.
_GREEDY, _HEAT, _TOP_K, _TOP_P, _MIN_P, _FILTERED, _REPEAT = range(7)


def _knobs(sampling: Sampling | None) -> list[float]:
    s = sampling or Sampling(temperature=0.0)
    # Below 1e-30 a temperature's quotients could leave fp32's range; all of them are greedy in effect.
    heat = 1.0 if s.greedy else max(s.temperature, 1e-30)
    return [s.greedy, heat, s.top_k, s.top_p, s.min_p, s.filtered,
            s.repetition_penalty, s.presence_penalty, s.frequency_penalty]  # fmt: skip
