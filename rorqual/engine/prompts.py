"""Prompts and samplings as a caller gives them, made into answers to work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.inside import Inside
from rorqual.engine.loop import Answer, check_prompts, fit
from rorqual.engine.sampling import Sampling
from rorqual.nn import InputError, Transformer

Prompt = str | Sequence[int] | Tensor
"""One prompt: text, token ids, or a 1-D tensor of ids."""


def answers_of(
    model: Transformer,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] | None,
    inside: Inside | None = None,
) -> list[Answer]:
    """An answer to make for each prompt. Text, stop strings and grammars need a model with a tokenizer
    (`rorqual.Model`); ids do not. Raises `InputError`, `ContextError` or `SamplingError` for what can't be."""
    if inside is not None and not isinstance(inside, Inside):
        raise InputError(f"inside must be an Inside or None, got {inside!r:.80}")
    given: Any = model
    tokenizer = getattr(model, "tokenizer", None)
    ends: frozenset[int] = given.end_ids if hasattr(model, "end_ids") else frozenset(model.config.eos)
    if not prompts:
        raise InputError("no prompts: give at least one")
    ids = [_encoded(model, p) if isinstance(p, str) else _ids(p, i) for i, p in enumerate(prompts)]
    if sampling is None:
        sampling = Sampling()
    if isinstance(sampling, Sampling):
        each = [_own_seed(sampling, i) for i in range(len(ids))]
    elif isinstance(sampling, Sequence) and all(isinstance(s, Sampling) for s in sampling):
        each = list(sampling)
    else:
        raise InputError(f"sampling must be a Sampling, or one a prompt, got {sampling!r:.80}")
    check_prompts(model, ids, each)
    if tokenizer is None and any(s.stop or s.grammar for s in each):
        raise InputError("stop strings and grammars need a tokenizer, and this checkpoint came without one")
    return [
        Answer(
            p,
            fit(p, s, model.config.max_positions),
            ends,
            tokenizer.stream() if tokenizer is not None else None,
            None if s.grammar is None else given.compiler.state(s.grammar),
            inside,
        )
        for p, s in zip(ids, each, strict=True)
    ]


def _encoded(model: Any, text: str) -> list[int]:
    if not hasattr(model, "encode"):
        raise InputError("text needs a model with a tokenizer (rorqual.load gives one): give token ids")
    ids: list[int] = model.encode(text)
    return ids


def is_batch(prompts: Any) -> bool:
    """Whether `prompts` is a list of prompts rather than one."""
    if isinstance(prompts, str):
        return False
    if isinstance(prompts, bytes | bytearray):
        raise InputError("a prompt must be text or token ids, got bytes: decode them first")
    if isinstance(prompts, Tensor):
        return prompts.dim() > 1
    if not isinstance(prompts, Sequence):
        raise InputError(
            f"prompts must be text, token ids, or a list of either, got {type(prompts).__name__}"
        )
    return not prompts or not isinstance(prompts[0], int)


def _ids(prompt: Any, index: int) -> list[int]:
    if isinstance(prompt, Tensor):
        if prompt.dim() != 1 or prompt.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise InputError(
                f"prompt {index}: a tensor of ids must be 1-D and of integers, got {tuple(prompt.shape)}"
            )
        return [int(t) for t in prompt.tolist()]
    if isinstance(prompt, Sequence) and all(isinstance(t, int) and not isinstance(t, bool) for t in prompt):
        return list(prompt)
    raise InputError(f"prompt {index} must be text or a list of token ids, got {prompt!r:.80}")


def _own_seed(sampling: Sampling, index: int) -> Sampling:
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)
