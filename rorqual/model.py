"""`Model`: the same modules, plus what a user of a checkpoint wants: text in and out, answers, chat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    generate,
    generate_speculative,
)
from rorqual.engine.grammar import GrammarCompiler
from rorqual.engine.prompts import Prompt, answers_of, is_batch
from rorqual.nn import InputError, Transformer
from rorqual.text import Encoding, StreamParser, Tokenizer, detect, get_encoding


class Model(Transformer):
    """A family member with its tokenizer and chat encoding (either may be None: then ids still work)."""

    tokenizer: Tokenizer | None = None
    encoding: Encoding | None = None
    _compiler: GrammarCompiler | None = None

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
        many = is_batch(prompts)
        answers = answers_of(self, list(prompts) if many else [prompts], sampling)
        for _ in self._deltas(answers, speculate):
            pass
        done = [answer.done for answer in answers]
        return done if many else done[0]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, *, speculate: bool = False
    ) -> Iterator[Delta]:
        """The answer to one prompt, token by token. Dropping the iterator stops the work."""
        answers = answers_of(self, [prompt], sampling)
        return self._deltas(answers, speculate)

    def _deltas(self, answers: list[Answer], speculate: bool) -> Iterator[Delta]:
        return (generate_speculative if speculate else generate)(self, answers)

    @property
    def compiler(self) -> GrammarCompiler:
        """What compiles grammars for this model's tokenizer, made at first use."""
        if self.tokenizer is None:
            raise InputError("a grammar needs a tokenizer, and this checkpoint came without one")
        made = self._compiler
        if made is None or made.tokenizer is not self.tokenizer or made.ends != self.end_ids:
            made = GrammarCompiler(self.tokenizer, vocab=self.config.vocab, ends=self.end_ids)
            self._compiler = made
        return made

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
        answers = answers_of(self, [self.encode_chat(messages, **options)], sampling)
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
    model.tokenizer = tokenizer_at(place)
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


def export(model: Transformer, tokenizer: str | PathLike[str], directory: str | PathLike[str]) -> Path:
    """Write a trained model in the released format, with the tokenizer in a folder: what `load` and transformers
    take."""
    place = Path(directory)
    weights.save(model, place)
    Tokenizer.from_dir(tokenizer).save(place)
    return place


def load_tokenizer(path: str | PathLike[str], *, revision: str | None = None) -> Tokenizer:
    """The tokenizer of what `load` takes, without its weights. Raises `weights.CheckpointError` if there is none."""
    place = weights.resolve(path, revision=revision, patterns=weights.TEXT)
    found = tokenizer_at(place)
    if found is None:
        raise weights.CheckpointError(
            f"{place} has no tokenizer.json: name a folder or checkpoint that has one"
        )
    return found


def tokenizer_at(place: Path) -> Tokenizer | None:
    """The tokenizer in a folder or .gguf file, if it has one."""
    if place.suffix == ".gguf":
        return Tokenizer.from_gguf(weights.gguf_fields(place))
    return Tokenizer.from_dir(place) if (place / "tokenizer.json").exists() else None
