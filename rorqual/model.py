"""`Model`: the same modules, plus what a user of a checkpoint wants: text in and out, answers, chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor

from rorqual import weights
from rorqual.engine import (
    Answer,
    Completion,
    Delta,
    Sampling,
    check_prompts,
    fit,
    generate,
    generate_speculative,
)
from rorqual.nn import InputError, Transformer
from rorqual.text import Encoding, StreamParser, Tokenizer, detect, get_encoding

Prompt = str | Sequence[int] | Tensor
"""One prompt: text, token ids, or a 1-D tensor of ids."""


class Model(Transformer):
    """A family member with its tokenizer and chat encoding (either may be None: then ids still work)."""

    tokenizer: Tokenizer | None = None
    encoding: Encoding | None = None

    # ------------------------------------------------------------------------------------ generate

    @overload
    def generate(
        self, prompts: str | Sequence[int], sampling: Sampling | None = None, *, speculate: bool = False
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Tensor,
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        speculate: bool = False,
    ) -> Any: ...

    def generate(self, prompts: Any, sampling: Any = None, *, speculate: bool = False) -> Any:
        """Answer a prompt, or a list of them as one batch: a `Completion`, or a list.

        A prompt is text, token ids, or a 1-D tensor (a 2-D tensor is a list). `sampling` is one for all
        (prompt i then draws with seed + i) or one a prompt. `speculate` drafts with the checkpoint's MTP
        module: the same greedy answers, the same distribution of sampled ones.
        """
        many = _is_batch(prompts)
        answers = self._answers(list(prompts) if many else [prompts], sampling)
        for _ in self._deltas(answers, speculate):
            pass
        done = [answer.done for answer in answers]
        return done if many else done[0]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, speculate: bool = False
    ) -> Iterator[Delta]:
        """The answer to one prompt, token by token. Dropping the iterator stops the work."""
        answers = self._answers([prompt], sampling)
        return self._deltas(answers, speculate)

    def _deltas(self, answers: list[Answer], speculate: bool) -> Iterator[Delta]:
        return (generate_speculative if speculate else generate)(self, answers)

    def _answers(self, prompts: list[Prompt], sampling: Sampling | Sequence[Sampling] | None) -> list[Answer]:
        if not prompts:
            raise InputError("no prompts: give at least one")
        ids = [self.encode(p) if isinstance(p, str) else _ids(p, i) for i, p in enumerate(prompts)]
        if sampling is None:
            sampling = Sampling()
        if isinstance(sampling, Sampling):
            each = [_own_seed(sampling, i) for i in range(len(ids))]
        elif isinstance(sampling, Sequence) and all(isinstance(s, Sampling) for s in sampling):
            each = list(sampling)
        else:
            raise InputError(f"sampling must be a Sampling, or one a prompt, got {sampling!r:.80}")
        check_prompts(self, ids, each)
        stops = any(s.stop for s in each)
        if stops and self.tokenizer is None:
            raise InputError("stop strings need a tokenizer, and this checkpoint came without one")
        ends = self.end_ids
        return [
            Answer(
                p,
                fit(p, s, self.config.max_positions),
                ends,
                self.tokenizer.stream() if self.tokenizer else None,
            )
            for p, s in zip(ids, each, strict=True)
        ]

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the config's, the tokenizer's and the chat encoding's."""
        ends = set(self.config.eos)
        if self.tokenizer is not None:
            ends.update(self.tokenizer.eos)
            for text in self.encoding.stops if self.encoding is not None else ():
                token = self.tokenizer.id_of(text)
                if token is not None:
                    ends.add(token)
        return frozenset(ends)

    # ---------------------------------------------------------------------------------------- text

    def encode(self, text: str) -> list[int]:
        """Text to ids, special tokens recognised, with the BOS token in front where the tokenizer's own
        settings put one."""
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint came without a tokenizer (tokenizer.json): give token ids, or put the file beside it"
            )
        return self.tokenizer.encode(text, bos=self.tokenizer.adds_bos)

    def encode_chat(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Chat messages to ids in the checkpoint's own format; `options` as of `Encoding.encode`. Special tokens
        spelled out in a message's text stay plain text."""
        if self.tokenizer is None:
            raise InputError("chat needs a tokenizer (tokenizer.json), and this checkpoint came without one")
        return self._chat_encoding().encode_ids(messages, self.tokenizer, **options)

    def chat(
        self,
        messages: list[dict[str, Any]],
        sampling: Sampling | None = None,
        *,
        speculate: bool = False,
        on_delta: Callable[[Delta], None] | None = None,
        **options: Any,
    ) -> Completion:
        """Answer a conversation. `parse(completion.text)` splits reasoning, content and tool calls."""
        answers = self._answers([self.encode_chat(messages, **options)], sampling)
        for delta in self._deltas(answers, speculate):
            if on_delta is not None:
                on_delta(delta)
        return answers[0].done

    def parser(self, **options: Any) -> StreamParser:
        """A fresh parser for an answer of this model; `options` as of `Encoding.parser`."""
        return self._chat_encoding().parser(**options)

    def _chat_encoding(self) -> Encoding:
        if self.encoding is None:
            raise InputError(
                "no chat format is known for this checkpoint (a base model?): use generate with plain text, "
                "or set model.encoding = rorqual.text.get_encoding(name)"
            )
        return self.encoding


def load(
    path: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    encoding: str | None = None,
) -> Model:
    """A released checkpoint as a `Model`: a directory, a .gguf file, or a hub id.

    `dtype=None` keeps what is stored (FP8 and FP4 matrices stay codes and scales); a dtype multiplies
    them out. `encoding` names the chat format if it can't be told from the files. Errors are
    `weights.CheckpointError` and `family.ConfigError`, both `ValueError`s.
    """
    place = weights.resolve(path, revision=revision)
    model = cast(Model, weights.load(place, dtype=dtype, device=device, build=Model))
    model.tokenizer = _tokenizer(place)
    if encoding is not None:
        model.encoding = get_encoding(encoding)
    elif model.tokenizer is not None:
        model.encoding = detect(model.tokenizer, model.config.model_type)
    return model


def save(model: Transformer, directory: str | PathLike[str], **options: Any) -> None:
    """Write a model under the released names and format, with its tokenizer if it has one; `options` as of
    `weights.save`."""
    weights.save(model, directory, **options)
    if isinstance(model, Model) and model.tokenizer is not None:
        model.tokenizer.save(directory)


def _tokenizer(place: Path) -> Tokenizer | None:
    if place.suffix == ".gguf":
        return Tokenizer.from_gguf(weights.gguf_fields(place))
    return Tokenizer.from_dir(place) if (place / "tokenizer.json").exists() else None


def _is_batch(prompts: Any) -> bool:
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
