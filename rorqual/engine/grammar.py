"""Structured output: answers that keep to a JSON schema, a regular expression, a grammar or a list of choices.

A `Grammar` says what; a `GrammarCompiler` turns it, for one tokenizer, into `GrammarState`s; a state follows
one answer token by token and says which tokens may come next. The parsing is llguidance's (an optional
dependency); this file holds it to our tokenizers, end tokens, speculation and errors.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rorqual.engine.draws import apply_bitmask
from rorqual.engine.sampling import SamplingError, brief
from rorqual.text import Tokenizer
from rorqual.text.tokenizer import MARK

__all__ = ["Grammar", "GrammarCompiler", "GrammarError", "GrammarState", "apply_bitmask", "fill_masks"]

Marker = str | tuple[int, ...]

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between JSON's tokens. Bounded, since a model that is held to a schema may otherwise write blanks for ever."""

MOST_TEXT = 256 * 1024
"""Bytes of a grammar's text."""
MOST_CHOICES = 10_000
"""Entries of a choice."""


class GrammarError(SamplingError):
    """A grammar that cannot be read or followed, or a token that breaks it."""


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like. Build one with a class method; errors in it show when it is compiled. Its text
    may have 256 KB.

    `start_after`: the grammar holds only from the token after this text or token id(s) on, such as
    "</think>"; all before is free. If a text's last token goes on past it, so much is free too.
    """

    kind: str
    text: str
    start_after: Marker | None = None

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str | bool = True) -> Grammar:
        """JSON valid under a schema (a dict, or JSON text); True: any JSON value. Properties come in the
        schema's order; blanks between tokens are as the model likes, up to 64 together."""
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps({} if value is True else value, allow_nan=False, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise GrammarError(f"the JSON schema is not JSON: {error}") from error
        if value is not True and not isinstance(value, Mapping):
            raise GrammarError(f"a JSON schema must be an object or True, got {text:.80}")
        return cls("json_schema", text)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches as a whole (Rust's syntax, without look-around)."""
        return cls("regex", pattern)

    @classmethod
    def ebnf(cls, text: str) -> Grammar:
        """Text of a context-free grammar in Lark's notation (its rule `start`; a control token is `<[id]>`), or,
        where `::=` stands in the text, in GBNF's, llama.cpp's (its rule `root`)."""
        return cls("ebnf", text)

    @classmethod
    def choice(cls, options: Iterable[str]) -> Grammar:
        """One of these texts, of which there may be 10,000."""
        listed = isinstance(options, Iterable) and not isinstance(options, Mapping | bytes)
        texts = [options] if isinstance(options, str) else list(options) if listed else []
        if not texts or not all(isinstance(text, str) for text in texts):
            raise GrammarError(f"choice needs one or more texts, got {brief(options)}")
        if len(texts) > MOST_CHOICES:
            raise GrammarError(f"choice holds {len(texts):,} texts, more than {MOST_CHOICES:,}")
        return cls("choice", json.dumps(texts))

    def after(self, marker: str | int | Sequence[int]) -> Grammar:
        """The same grammar, `start_after` this text or token id(s)."""
        start = marker if isinstance(marker, str) else (marker,) if isinstance(marker, int) else tuple(marker)
        return replace(self, start_after=start)

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise GrammarError(f"a grammar ({self.kind}) must be text, got {brief(self.text)}")
        if self.size > MOST_TEXT:
            raise GrammarError(f"this {self._name} has {self.size:,} bytes, more than {MOST_TEXT:,}")
        start = self.start_after
        whole = isinstance(start, tuple) and all(
            isinstance(t, int) and not isinstance(t, bool) for t in start
        )
        if start is not None and (not start or not (isinstance(start, str) or whole)):
            raise GrammarError(f"start_after must be a text or token ids, got {start!r:.80}")

    @property
    def size(self) -> int:
        """Bytes of its text."""
        return len(self.text.encode(errors="surrogatepass"))

    @property
    def _name(self) -> str:
        return {"json_schema": "JSON schema", "regex": "regular expression"}.get(self.kind, "grammar")


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Compiled:
    """A grammar in the library's form, shared by all answers that keep to it: they follow copies."""

    matcher: Any
    size: int


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Safe to share between threads: a grammar is compiled once, by the first that
    asks for it, and others wait only for their own. The last `keep` are kept, as long as their texts have `keep_bytes`
    together; one with more than a sixteenth of that only while an answer keeps to it.

    `vocab`: rows of the model's embedding, if there are more than tokens; `ends`: the tokens that end an
    answer, if they aren't the tokenizer's alone. Building it takes about a second for 130,000 tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab: int | None = None,
        ends: Iterable[int] | None = None,
        keep: int = 256,
        keep_bytes: int = 1 << 20,
    ) -> None:
        self._ll = _library()
        self.tokenizer = tokenizer
        self.ends = frozenset(tokenizer.eos if ends is None else ends)
        if not self.ends:
            raise GrammarError("a grammar needs an end token, and neither config nor tokenizer names one")
        self.vocab = max(tokenizer.vocab_size, vocab or 0)
        self._words = self._ll.LLTokenizer(
            _definition(tokenizer), n_vocab=self.vocab, eos_token=sorted(self.ends)
        )
        self._limits = self._ll.LLParserLimits(verbose_errors=False)
        self._executor = self._ll.LLExecutor()
        self._lock, self._keep, self._keep_bytes = threading.Lock(), keep, keep_bytes
        self._compiling: dict[tuple[str, str], Future[_Compiled]] = {}
        self._kept: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self._kept_bytes = 0
        self._used: weakref.WeakValueDictionary[tuple[str, str], _Compiled] = weakref.WeakValueDictionary()
        """All that are kept, by us or by an answer."""
        only_end = torch.zeros(32 * self.width, dtype=torch.int64)
        only_end[sorted(self.ends)] = 1
        self._only_end = (only_end.view(-1, 32) << torch.arange(32)).sum(-1).to(torch.int32)

    def __deepcopy__(self, memo: dict[int, Any]) -> GrammarCompiler:
        return self  # a copied model may share it

    @property
    def width(self) -> int:
        """Words of a bitmask: one bit a token."""
        return -(-self.vocab // 32)

    def state(self, grammar: Grammar) -> GrammarState:
        """A state at the beginning of an answer. Raises `GrammarError` for a grammar that can't be read, or
        that asks what is not supported."""
        key = grammar.kind, grammar.text
        with self._lock:
            compiled, future = self._used.get(key), self._compiling.get(key)
            if key in self._kept:
                self._kept.move_to_end(key)
            mine = compiled is None and future is None
            if mine:
                future = self._compiling[key] = Future()
        if compiled is None:
            assert future is not None
            if mine:
                self._fill(future, key, grammar)
            compiled = future.result()
        return GrammarState(self, self._marker(grammar.start_after), compiled)

    def _fill(self, future: Future[_Compiled], key: tuple[str, str], grammar: Grammar) -> None:
        """Compile a grammar for all who wait for it; it may take seconds, so no lock is held meanwhile."""
        try:
            compiled = _Compiled(self._compile(grammar), grammar.size)
        except BaseException as error:
            with self._lock:
                del self._compiling[key]
            future.set_exception(error)
            return
        with self._lock:
            del self._compiling[key]
            self._used[key] = compiled
            if compiled.size <= self._keep_bytes // 16:
                self._kept[key] = compiled
                self._kept_bytes += compiled.size
            while len(self._kept) > self._keep or self._kept_bytes > self._keep_bytes:
                self._kept_bytes -= self._kept.popitem(last=False)[1].size
        future.set_result(compiled)

    def bitmask(self, rows: int) -> Tensor:
        """Memory for the bitmasks of so many rows, everything allowed: int32 [rows, width], pinned where that
        speeds up the way to a GPU."""
        return torch.full((rows, self.width), -1, dtype=torch.int32, pin_memory=torch.cuda.is_available())

    def _compile(self, grammar: Grammar) -> Any:
        try:
            matcher = self._ll.LLMatcher(self._words, self._source(grammar), log_level=0, limits=self._limits)
            error = matcher.get_error() if matcher.is_error() else ""
        except ValueError as problem:
            error = str(problem)
        if error:
            raise GrammarError(f"this {grammar._name} can't be followed: {_reason(error)}")
        return matcher

    def _source(self, grammar: Grammar) -> str:
        make = self._ll.LLMatcher
        if grammar.kind == "json_schema":
            return str(
                make.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": _WHITESPACE})
            )
        if grammar.kind == "regex":
            return str(make.grammar_from_regex(grammar.text))
        if grammar.kind == "choice":
            options = (json.dumps(text) for text in json.loads(grammar.text))
            return str(make.grammar_from_lark("start: " + " | ".join(options)))
        if grammar.kind != "ebnf":
            raise GrammarError(f"unknown kind of grammar: {grammar.kind!r}")
        return str(make.grammar_from_lark(_lark(grammar.text) if "::=" in grammar.text else grammar.text))

    def _marker(self, start_after: Marker | None) -> Marker | None:
        """A text that spells an added token becomes its id: the same letters in ordinary tokens don't count."""
        if not isinstance(start_after, str):
            return start_after
        ids = self.tokenizer.encode(start_after)
        added = len(ids) == 1 and ids != self.tokenizer.encode(start_after, special=False)
        return tuple(ids) if added else start_after


class GrammarState:
    """Where one answer stands in its grammar. `advance` for every token of the answer, end token included: after
    one of those only they are allowed."""

    def __init__(self, compiler: GrammarCompiler, marker: Marker | None, compiled: _Compiled) -> None:
        self.compiler, self._marker, self._matcher = compiler, marker, compiled.matcher.deep_copy()
        self._compiled = compiled  # so that it stays known while it is used
        self._tokens: list[int] = []
        self._begun: int | None = None if marker is not None else 0
        """Tokens of the answer before the grammar holds; None: not known yet."""
        self._ends = 0
        """End tokens taken; the matcher gets none, since it does not count them in rollbacks."""

    @property
    def free(self) -> bool:
        """Whether every token is still allowed, since the grammar has not begun."""
        return self._begun is None

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._ends > 0 or (not self.free and bool(self._matcher.is_accepting()))

    @property
    def done(self) -> bool:
        """Whether the answer must end here: nothing but an end token may follow."""
        return self._ends > 0 or (not self.free and self.complete and bool(self._matcher.is_stopped()))

    @property
    def error(self) -> str | None:
        """Why the grammar can't be followed any further (it grew too complex), if so."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else None

    def mask(self, out_W: Tensor) -> None:
        """Fill one row of a bitmask with the tokens that may come next; see `GrammarCompiler.bitmask`. Raises
        `GrammarError` if the grammar can't be followed any further."""
        if not self._easy_mask(out_W):
            self._matcher.unsafe_compute_mask_ptr(out_W.data_ptr(), 4 * self.compiler.width)
        self._check()

    def _check(self) -> None:
        if self.error is not None:
            raise GrammarError(f"the grammar can't be followed any further: {self.error}")

    def _easy_mask(self, out_W: Tensor) -> bool:
        """Fill the row if that takes no parsing."""
        assert out_W.shape == (self.compiler.width,) and out_W.dtype == torch.int32 and out_W.is_contiguous()
        if self.free:
            out_W.fill_(-1)
        elif self._ends:
            out_W.copy_(self.compiler._only_end)
        return self.free or self._ends > 0

    def masks(self, out_TW: Tensor, draft: Sequence[int]) -> int:
        """Fill row t with what may follow the first t tokens of `draft`, for t from 0 to len(draft), and stay
        where we are. Returns how many tokens of the draft are valid; rows past them allow everything."""
        self.mask(out_TW[0])
        for t, token in enumerate(draft):
            if not self._consume(token):
                out_TW[t + 1 :] = -1
                self.rollback(t)
                return t
            self.mask(out_TW[t + 1])
        self.rollback(len(draft))
        return len(draft)

    def advance(self, token: int) -> None:
        """One more token of the answer. Raises `GrammarError` if it isn't allowed here."""
        if not self._consume(token):
            self._check()
            raise GrammarError(f"token {token} is not allowed here by the grammar: was its mask applied?")

    def _consume(self, token: int) -> bool:
        if self.free:
            self._tokens.append(token)
            if self._marked():
                self._begun = len(self._tokens)
            return True
        if token in self.compiler.ends:
            if not self.complete:
                return False
            self._ends += 1
        elif self._ends or self._matcher.try_consume_tokens([token]) != 1:
            return False
        self._tokens.append(token)
        return True

    def validate(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, one after the other, would be allowed; stays where we are."""
        took = next((t for t, token in enumerate(tokens) if not self._consume(token)), len(tokens))
        self.rollback(took)
        return took

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens."""
        keep = len(self._tokens) - count
        assert 0 <= keep <= len(self._tokens), (count, len(self._tokens))
        if self._marker is not None and self._begun is not None and keep < self._begun:
            self._matcher.reset()
            self._begun, self._ends = None, 0
        elif self._begun is not None:
            ends = min(count, self._ends)
            self._ends -= ends
            self._matcher.rollback(count - ends)
        del self._tokens[keep:]

    def replay(self, tokens: Sequence[int]) -> None:
        """Start over and advance through an answer's tokens so far."""
        self.rollback(len(self._tokens))
        for token in tokens:
            self.advance(token)

    def _marked(self) -> bool:
        """Whether the newest token completes the marker."""
        if isinstance(self._marker, str):
            # Each token brings a byte or more, so the marker lies within as many tokens as it has bytes.
            near = self._tokens[-len(self._marker.encode()) :]
            return self._marker in self.compiler.tokenizer.decode(near)
        return self._marker is not None and tuple(self._tokens[-len(self._marker) :]) == self._marker


def fill_masks(states: Sequence[GrammarState | None], out_RW: Tensor) -> list[int]:
    """Fill row r with what `states[r]` allows (None: everything), on several threads where several parse. The
    states must come of one compiler, `out_RW` of its `bitmask`. Returns rows whose grammar can't be followed
    any further (their state's `error` says why); they allow everything."""
    hard = []
    for r, state in enumerate(states):
        if state is None:
            out_RW[r] = -1
        elif not state._easy_mask(out_RW[r]):
            hard.append((r, state))
    if hard:
        compiler = hard[0][1].compiler
        assert out_RW.is_contiguous() and all(state.compiler is compiler for _, state in hard)
        compiler._executor.unsafe_compute_mask_ptr(
            [(state._matcher, r) for r, state in hard], out_RW.data_ptr(), 4 * compiler.width, len(out_RW)
        )
    failed = [r for r, state in hard if state.error is not None]
    out_RW[failed] = -1
    return failed


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(
            "structured output needs the library llguidance, which is not installed: pip install llguidance"
        ) from error
    return llguidance


def _lark(text: str) -> str:
    """GBNF to Lark."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    try:
        return str(gbnf_to_lark(text))
    except GbnfToLarkError as error:
        raise ValueError(str(error)) from error


def _definition(tokenizer: Tokenizer) -> str:
    """The tokenizer's JSON with its control tokens marked special and their spelling made one that no text has:
    in a grammar `<think>` means these seven letters, and the control token is not a way to write them. Nor is
    a grammar's text normalised."""
    value = json.loads(tokenizer.to_json()) | {"normalizer": None}
    vocab, merges = value["model"]["vocab"], value["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    written = {piece for a, b in pairs for piece in (a, b, a + b)}
    for token in value["added_tokens"]:
        name = token["content"]
        if len(name) > 1 and not name.isspace() and name not in written:
            token["special"], token["content"] = True, f"{MARK}{token['id']}{MARK}"
            if name in vocab:
                vocab[token["content"]] = vocab.pop(name)
    return json.dumps(value, ensure_ascii=False)


def _reason(message: str) -> str:
    """One line out of the library's several: the one that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")]
    return (told or lines or ["no reason given"])[0].removeprefix("error: ")[:300]
