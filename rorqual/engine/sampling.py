"""How the next token is drawn: `Sampling` says it, `Sampler` does it for a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class SamplingError(ValueError):
    """Sampling values out of range, or logits nothing can be drawn from."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens.

    `temperature` 0 is greedy. Filters apply in the order penalties, temperature, `top_k` (0: off),
    `top_p`, `min_p` (share of the likeliest token's probability). `repetition_penalty` divides positive
    and multiplies negative logits of every token in prompt or answer; `presence_penalty` and
    `frequency_penalty` are subtracted once, and once an occurrence, for tokens of the answer.
    `stop` strings end the answer and are left out of its text. `seed` makes an answer repeatable; prompt
    i of a list draws with seed + i. `logprobs`: True for each chosen token's natural log-probability,
    n for the n likeliest alternatives too; both under the model's own distribution, before temperature
    and filters. `ignore_eos` goes on to `max_new_tokens` past the end token.
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
        self._whole("top_k", 0)
        self._whole("max_new_tokens", 1)
        if not isinstance(self.logprobs, bool):
            self._whole("logprobs", 0)
        if self.seed is not None:
            self._whole("seed", 0)
            if self.seed >= 2**62:
                raise SamplingError(f"seed must be below 2^62, got {self.seed}")

    def _in_range(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value > high or value < low or (open_low and value == low):
            bracket = "(" if open_low else "["
            raise SamplingError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}")

    def _whole(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise SamplingError(f"{name} must be a whole number of at least {low}, got {value!r}")

    @property
    def greedy(self) -> bool:
        """Always the likeliest token."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Sampler:
    """Draws for a batch, one `Sampling` a row. A row's draws depend on its own seed and logits alone."""

    def __init__(
        self, rows: list[Sampling], prompts: list[list[int]], vocab: int, device: torch.device
    ) -> None:
        self.rows, self.device, self.vocab = rows, device, vocab
        self.generators = [_generator(row.seed) for row in rows]
        self._all_greedy = all(row.greedy for row in rows)
        self._filtered = any(row.top_k or row.top_p < 1 or row.min_p > 0 for row in rows if not row.greedy)
        self._prompt_BV: Tensor | None = None
        self._count_BV: Tensor | None = None
        if any(row.penalised for row in rows):
            self._count_BV = torch.zeros(len(rows), vocab, device=device)
            self._prompt_BV = torch.zeros(len(rows), vocab, dtype=torch.bool, device=device)
            for b, prompt in enumerate(prompts):
                self._prompt_BV[b, torch.tensor(prompt, dtype=torch.long, device=device)] = True

    def select(self, keep: list[int]) -> None:
        """Keep only the given rows."""
        self.rows = [self.rows[i] for i in keep]
        self.generators = [self.generators[i] for i in keep]
        self._all_greedy = all(row.greedy for row in self.rows)
        if self._count_BV is not None and self._prompt_BV is not None:
            self._count_BV, self._prompt_BV = self._count_BV[keep], self._prompt_BV[keep]

    def saw(self, tokens_B: list[int | None]) -> None:
        """Count one new answer token of each row (None: nothing new in that row)."""
        if self._count_BV is not None:
            for b, token in enumerate(tokens_B):
                if token is not None:
                    self._count_BV[b, token] += 1

    def draw(self, logits_BV: Tensor) -> Tensor:
        """One token of each row, [B] int64."""
        if self._all_greedy:
            return self._checked(self._penalised(logits_BV)).argmax(-1)
        return self.draw_from(self.distribution(logits_BV))

    def distribution(self, logits_BV: Tensor) -> Tensor:
        """What each row draws from, fp32 [B, V], each row summing to one: penalties, temperature and filters
        applied; greedy rows have all of it on the likeliest token."""
        logits = self._checked(self._penalised(logits_BV.float()))
        greedy_B = torch.tensor([row.greedy for row in self.rows], device=self.device)
        heat_B = self._column([row.temperature if not row.greedy else 1.0 for row in self.rows])
        p = ((logits - logits.amax(-1, keepdim=True)) / heat_B).softmax(-1)
        if self._filtered:
            p = self._filter(p)
        best = torch.zeros_like(p).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return torch.where(greedy_B[:, None], best, p)

    def draw_from(self, p_BV: Tensor) -> Tensor:
        """One token of each row from given probabilities (they need not sum to one), [B] int64."""
        total = p_BV.double().cumsum(-1)
        u = self.uniforms().double()[:, None] * total[:, -1:]
        return torch.searchsorted(total, u, right=True).squeeze(-1).clamp(max=self.vocab - 1)

    def uniforms(self) -> Tensor:
        """One number in [0, 1) of each row's own stream, [B]."""
        drawn = [torch.rand((), generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn).to(self.device)

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, device=self.device)[:, None]

    def _penalised(self, logits_BV: Tensor) -> Tensor:
        if self._count_BV is None or self._prompt_BV is None:
            return logits_BV
        repeat = self._column([row.repetition_penalty for row in self.rows])
        seen = self._prompt_BV | (self._count_BV > 0)
        scaled = torch.where(logits_BV > 0, logits_BV / repeat, logits_BV * repeat)
        logits = torch.where(seen, scaled, logits_BV)
        presence = self._column([row.presence_penalty for row in self.rows])
        frequency = self._column([row.frequency_penalty for row in self.rows])
        return logits - presence * (self._count_BV > 0) - frequency * self._count_BV

    def _filter(self, p_BV: Tensor) -> Tensor:
        """What top-k, top-p and min-p leave, summing to one again; the likeliest token always stays."""
        top_k = self._column([row.top_k or self.vocab for row in self.rows])
        top_p = self._column([row.top_p for row in self.rows])
        min_p = self._column([row.min_p for row in self.rows])
        ranked, order = p_BV.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(self.vocab, device=self.device)
        ranked = ranked * (rank < top_k)
        before = ranked.cumsum(-1) - ranked
        keep = (before < top_p * ranked.sum(-1, keepdim=True)) | (rank == 0)
        keep &= ranked >= min_p * ranked[:, :1]
        kept = ranked * keep
        return torch.zeros_like(p_BV).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))

    @staticmethod
    def _checked(logits_BV: Tensor) -> Tensor:
        # The greatest logit of a row is NaN if any is; -inf below it is what a mask leaves.
        if not bool(logits_BV.amax(-1).isfinite().all()):
            raise SamplingError(
                "the model gave NaN or infinite logits: the weights are damaged or overflow in this dtype; "
                "try dtype=torch.float32 or bfloat16"
            )
        return logits_BV


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    generator.manual_seed(torch.seed() if seed is None else seed)
    return generator
