"""What the sampler keeps per slot beside a few numbers: tokens seen, and logit biases. Memory only where asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small list on the device, without waiting for it."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


class Seen:
    """How often each penalised slot's answer holds each token, and whether its prompt does. Memory grows with
    the number of such slots; line 0 belongs to all others, and what it holds is multiplied by nothing."""

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self._line_S = torch.zeros(slots, dtype=torch.int64, device=device)
        self._line: dict[int, int] = {}
        self._free: list[int] = []
        self._count = torch.zeros(0, vocab, dtype=torch.int32, device=device)
        self._prompt = torch.zeros(0, vocab, dtype=torch.bool, device=device)

    def admit(self, slot: int, prompt: Sequence[int], answer: Sequence[int]) -> None:
        if not self._free:
            have, want = len(self._count), max(2, 2 * len(self._count))
            self._count = torch.cat((self._count, self._count.new_zeros(want - have, self.vocab)))
            self._prompt = torch.cat((self._prompt, self._prompt.new_zeros(want - have, self.vocab)))
            self._free = list(range(max(have, 1), want))
        line = self._line[slot] = self._free.pop()
        # Writing a number into one element waits for the device; filling a slice does not.
        self._line_S[slot : slot + 1].fill_(line)
        self._count[line].zero_()
        self._prompt[line].zero_()
        self._prompt[line].index_fill_(0, upload(sorted(set(prompt)), torch.int64, self.device), True)
        drawn = Counter(answer)
        self._count[line].index_add_(
            0,
            upload(list(drawn), torch.int64, self.device),
            upload(list(drawn.values()), torch.int32, self.device),
        )

    def release(self, slot: int) -> None:
        self._free.append(self._line.pop(slot))
        self._line_S[slot : slot + 1].zero_()

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """The line of each slot, and all lines: counts int32 and prompt flags `[lines, V]`."""
        return self._line_S, self._count, self._prompt

    def of(self, slots_R: Tensor) -> tuple[Tensor, Tensor]:
        """Counts int32 and prompt flags [R, V]."""
        line = self._line_S[slots_R]
        return self._count[line], self._prompt[line]

    def add(self, slots_R: Tensor, tokens_R: Tensor, new_R: Tensor) -> None:
        flat = self._line_S[slots_R] * self.vocab + tokens_R
        self._count.view(-1).index_add_(0, flat, new_R.int())


class Bias:
    """Logit biases as (token, value) pairs, as many columns as the longest list of any slot so far."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self.device = device
        self._ids = torch.zeros(slots, 0, dtype=torch.int64, device=device)
        self._values = torch.zeros(slots, 0, device=device)

    def admit(self, slot: int, pairs: Sequence[tuple[int, float]]) -> None:
        more = len(pairs) - self._ids.shape[1]
        if more > 0:  # what fills up a line adds 0 to token 0
            self._ids, self._values = F.pad(self._ids, (0, more)), F.pad(self._values, (0, more))
        self._ids[slot, : len(pairs)] = upload([t for t, _ in pairs], torch.int64, self.device)
        self._values[slot, : len(pairs)] = upload([v for _, v in pairs], torch.float32, self.device)

    def release(self, slot: int) -> None:
        self._ids[slot].zero_()
        self._values[slot].zero_()

    def add(self, logits_RV: Tensor, slots_R: Tensor) -> Tensor:
        return logits_RV.scatter_add(1, self._ids[slots_R], self._values[slots_R])
