"""What stands at the head of every answer."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True, slots=True)
class Meta:
    """An answer's id, model and time. logprobs: they were asked for, with the `top` likeliest."""

    model: str
    prefix: str = "chatcmpl-"
    logprobs: bool = False
    top: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    number: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def id(self) -> str:
        return self.prefix + self.number

    @property
    def fingerprint(self) -> str:
        """What answers were computed with."""
        return f"fp_rorqual_torch{torch.__version__.split('+')[0]}"
