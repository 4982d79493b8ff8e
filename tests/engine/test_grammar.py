"""Grammars followed token by token: masks, drafts, markers, going back; and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import normalizers

from rorqual import Sampling
from rorqual.engine import SamplingError
from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarError, fill_masks
from rorqual.model import Model
from rorqual.nn import InputError
from rorqual.text import Tokenizer
from tests.engine.conftest import build
from tests.engine.grammars import (
    ENDS,
    THINK,
    TOKENIZER,
    USER,
    VOCAB,
    allowed,
    small,
)

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS)


@pytest.fixture(scope="module")
def drafter() -> Model:
    return small("v3")


# -------------------------------------------------------------------------------------------- states


REGEXES = [r"a*b", r"(ab|cd)+", r"[0-9]{1,3}(\.[0-9]+)?", r"é{1,2}x?", r'"(true|tru|[a-c]*)"']


@pytest.mark.parametrize("pattern", REGEXES)
def test_masks_are_what_may_follow(compiler: GrammarCompiler, pattern: str) -> None:
    """The mask against `validate` for every token, and against all ways of spelling a few matches."""
    rng = random.Random(pattern)
    state = compiler.state(Grammar.regex(pattern))
    for _ in range(12):
        may = allowed(state)
        fits = {t for t in range(VOCAB) if state.validate([t])}
        # Where only one text can follow, the library allows it in its usual tokens alone.
        assert may == fits or (may < fits and len(may) == 1 and not may & set(ENDS))
        assert bool(may & set(ENDS)) == state.complete == (set(ENDS) <= may)
        assert state.complete == (re.fullmatch(pattern, TOKENIZER.decode(state._tokens)) is not None)
        assert not {TOKENIZER.id_of(THINK), TOKENIZER.id_of(USER)} & may and max(may) < VOCAB - 5
        more = sorted(may - set(ENDS))
        assert state.done == (not more)
        if state.done:
            break
        state.advance(rng.choice(more))


@settings(max_examples=40)
@given(st.randoms(use_true_random=False), st.sampled_from([None, (3,), (3, 4), "ab"]))
def test_rollback_is_never_having_been_there(rng: random.Random, marker: Any) -> None:
    shared = _compiler()
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "boolean"}}}}
    grammar = Grammar.json_schema(schema)
    grammar = grammar if marker is None else grammar.after(marker)
    state = shared.state(grammar)
    path: list[int] = []
    for _ in range(30):
        may = allowed(state)
        if path and rng.random() < 0.35:
            back = rng.randint(1, min(len(path), 4))
            state.rollback(back)
            del path[-back:]
        else:
            likely = may & {3, 4, TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]} if state.free else may
            path.append(rng.choice(sorted(likely)))
            state.advance(path[-1])
        fresh = shared.state(grammar)
        fresh.replay(path)
        assert allowed(state) == allowed(fresh) and state.free == fresh.free
        assert (state.done, state.complete) == (fresh.done, fresh.complete)
    state.replay(path[:3])
    fresh.replay(path[:3])
    assert allowed(state) == allowed(fresh)


_kept: list[GrammarCompiler] = []


def _compiler() -> GrammarCompiler:
    if not _kept:
        _kept.append(GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS))
    return _kept[0]


def test_drafts_are_validated_and_masked_in_one_go(compiler: GrammarCompiler) -> None:
    state = compiler.state(Grammar.regex("ab*c"))
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    for draft, good in ([a, b, c], 3), ([a, c, b], 2), ([b, a], 0), ([a, c, ENDS[1], a], 3), ([], 0):
        out = compiler.bitmask(len(draft) + 1)
        assert state.validate(draft) == state.masks(out, draft) == good and not state._tokens
        walk = compiler.state(Grammar.regex("ab*c"))
        for t in range(len(draft) + 1):
            if t > good:
                assert out[t].eq(-1).all()
                continue
            row = compiler.bitmask(1)
            walk.mask(row[0])
            assert torch.equal(out[t], row[0])
            if t < good:
                walk.advance(draft[t])
    with pytest.raises(GrammarError, match="not allowed"):
        state.advance(c)
    state.advance(a)  # a refused token does no harm
    assert state.complete is False


def test_many_rows_are_the_rows_one_by_one(compiler: GrammarCompiler) -> None:
    free, ended = compiler.state(Grammar.regex("a").after("x")), compiler.state(Grammar.regex("a*"))
    ended.advance(ENDS[0])
    states = [compiler.state(Grammar.regex(p)) for p in REGEXES] + [None, free, ended]
    out = compiler.bitmask(len(states)).zero_()
    assert fill_masks(states, out) == []
    for state, row in zip(states, out, strict=True):
        one = compiler.bitmask(1)
        if state is not None:
            state.mask(one[0])
        assert torch.equal(one[0], row)
    assert allowed(ended) == set(ENDS) and len(allowed(free)) == 32 * compiler.width


def test_markers(compiler: GrammarCompiler) -> None:
    """A control token by its spelling or id counts only as that token; other text however it is cut."""
    think = TOKENIZER.id_of(THINK)
    for marker in (THINK, think, [think]):
        state = compiler.state(Grammar.regex("a").after(marker))
        spelled = TOKENIZER.encode(THINK, special=False)
        for token in [*spelled, ENDS[0]]:
            assert state.free and not state.complete
            state.advance(token)
        state.advance(think)
        assert not state.free and allowed(state) == {TOKENIZER.encode("a")[0]}
    for text in ("xxtrue", "tru", 'é":', "false true"):
        state = compiler.state(Grammar.regex("a").after("true" if "true" in text else text))
        for token in TOKENIZER.encode(text):
            assert state.free
            state.advance(token)
        assert not state.free
    drafts = [*TOKENIZER.encode("xx"), think, TOKENIZER.encode("a")[0], ENDS[0], 3]
    assert compiler.state(Grammar.regex("a").after(think)).validate(drafts) == 5


def test_gbnf_and_lark_say_the_same(compiler: GrammarCompiler) -> None:
    lark = 'start: item (", " item)*\nitem: "a" | NUMBER\nNUMBER: /[0-9]+/'
    gbnf = 'root ::= item (", " item)*\nitem ::= "a" | number\nnumber ::= [0-9]+'
    for text in ("a", "a, 12, a", "12", "a,", "b", ""):
        states = [compiler.state(Grammar.ebnf(grammar)) for grammar in (lark, gbnf)]
        ids = [*TOKENIZER.encode(text), ENDS[0]]
        took = [state.validate(ids) for state in states]
        assert took[0] == took[1]
        assert (took[0] == len(ids)) == (text in ("a", "a, 12, a", "12"))


@pytest.mark.parametrize("text", ["say <think> or </think>!", "e\u0301 ﬁ", "<end>", "\x00\x7f\u2028"])
def test_texts_are_followed_letter_by_letter(text: str) -> None:
    """The only text allowed is what comes out, whatever the tokenizer makes of its letters: control tokens
    spelled in it are letters, and a normaliser changes nothing."""
    backend = Backend.from_str(TOKENIZER.to_json())
    backend.normalizer = normalizers.NFKC()
    tokenizer = Tokenizer(backend, eos=TOKENIZER.eos)
    compiler = GrammarCompiler(tokenizer)
    for grammar in (Grammar.choice([text]), Grammar.json_schema({"const": text})):
        state, ids = compiler.state(grammar), []
        while not state.done:
            ids.append(min(allowed(state) - set(TOKENIZER.eos)))
            state.advance(ids[-1])
        written = tokenizer.decode(ids)
        assert (written if grammar.kind == "choice" else json.loads(written)) == text


def test_blanks_are_bounded(compiler: GrammarCompiler) -> None:
    state = compiler.state(Grammar.json_schema({"type": "array", "items": {"type": "null"}}))
    blank = TOKENIZER.encode("\n")[0]
    state.advance(TOKENIZER.encode("[")[0])
    assert state.validate([blank] * 100) == 64


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (Grammar.json_schema({"type": "objekt"}), "JSON schema can't be followed: Invalid type: objekt"),
        (Grammar.json_schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (Grammar.json_schema({"type": "object", "not": {}}), '"not"'),
        (Grammar.json_schema({"$ref": "#/$defs/none"}), "does not exist"),
        (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
        (Grammar.json_schema({"type": "integer", "minimum": 2, "maximum": 1}), "Unsatisfiable"),
        (Grammar.regex("a(b"), "regular expression can't be followed: unclosed group"),
        (Grammar.regex("(?=a)b"), "look-around"),
        (Grammar.ebnf("start: nothing"), "unknown name"),
        (Grammar.ebnf("start nothing"), "Expected token"),
        (Grammar.ebnf("root ::= ("), "grammar can't be followed"),
        (Grammar("sonnet", "x"), "unknown kind"),
    ],
    ids=str,
)
def test_bad_grammars_are_refused_with_the_reason(drafter: Model, grammar: Grammar, words: str) -> None:
    with pytest.raises(SamplingError, match=re.escape(words)) as caught:
        drafter.generate([3], Sampling(grammar=grammar))
    assert "\n" not in str(caught.value)


def test_bad_descriptions_are_refused_at_once() -> None:
    for make in (
        lambda: Grammar.json_schema("{"),
        lambda: Grammar.json_schema("[1]"),
        lambda: Grammar.json_schema(False),
        lambda: Grammar.json_schema({"enum": {1, 2}}),
        lambda: Grammar.choice([]),
        lambda: Grammar.choice([1]),  # type: ignore[list-item]
        lambda: Grammar.regex(5),  # type: ignore[arg-type]
        lambda: Grammar.regex("a").after(""),
        lambda: Grammar.regex("a").after(()),
        lambda: Grammar.regex("a").after([1.5]),  # type: ignore[list-item]
    ):
        with pytest.raises(SamplingError):
            make()
    with pytest.raises(SamplingError, match="ignore_eos"):
        Sampling(grammar=Grammar.regex("a"), ignore_eos=True)


def test_needs_tokenizer_end_token_and_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tokenizer"):
        build("gqa").generate([3], Sampling(grammar=Grammar.regex("a")))
    with pytest.raises(GrammarError, match="end token"):
        GrammarCompiler(TOKENIZER, ends=[])
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SamplingError, match="pip install llguidance"):
        small("gqa").generate([3], Sampling(grammar=Grammar.regex("a")))


def test_a_grammar_that_grows_too_complex_says_so(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llguidance import LLParserLimits

    monkeypatch.setattr(compiler, "_limits", LLParserLimits(max_items_in_row=8, verbose_errors=False))
    hard = compiler.state(Grammar.ebnf('start: a+\na: b b? b? b? b?\nb: "a" | "aa"'))
    easy = compiler.state(Grammar.regex("a+"))
    a = TOKENIZER.encode("a")[0]
    out = compiler.bitmask(2)
    while fill_masks([easy, hard], out) == []:
        with contextlib.suppress(GrammarError):
            hard.advance(a)
    assert out[1].eq(-1).all() and "items" in str(hard.error) and easy.error is None
    for touch in (lambda: hard.mask(out[1]), lambda: hard.advance(a)):
        with pytest.raises(GrammarError, match="any further: .*items"):
            touch()


def test_compiled_grammars_are_kept_and_shared() -> None:
    few = GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS, keep=2)
    one, two = few.state(Grammar.regex("ab")), few.state(Grammar.regex("ab"))
    one.advance(TOKENIZER.encode("a")[0])
    assert allowed(one) != allowed(two)  # copies: one does not move the other
    for n in range(5):
        few.state(Grammar.regex(f"a{n}"))
    assert len(few._kept) == 2
    assert copy.deepcopy(few) is few
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.regex("a").after(3)}) == 2


def test_what_is_kept_is_bounded_in_bytes() -> None:
    few = GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS, keep_bytes=1600)
    for n in range(30):
        few.state(Grammar.regex(f"a{n:02}" + "b" * 77))
    assert len(few._kept) == 20 and few._kept_bytes == 1600
    large = Grammar.regex("c" * 101)
    state = few.state(large)
    assert len(few._kept) == 20 and few.state(large)._compiled is state._compiled  # shared while it is used
    del state
    assert (large.kind, large.text) not in few._used


def test_a_slow_grammar_delays_no_other() -> None:
    shared = GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS)
    begun, go, compile_, count = threading.Event(), threading.Event(), shared._compile, []

    def slow(grammar: Grammar) -> Any:
        count.append(grammar.text)
        if grammar.text.startswith("slow"):
            begun.set()
            assert go.wait(20)
        return compile_(grammar)

    shared._compile = slow  # type: ignore[method-assign]
    with ThreadPoolExecutor(4) as pool:
        same = [pool.submit(shared.state, Grammar.regex("slow")) for _ in range(2)]
        bad = pool.submit(shared.state, Grammar.regex("slow("))
        assert begun.wait(20)
        assert allowed(shared.state(Grammar.regex("a")))
        go.set()
        assert allowed(same[0].result(20)) == allowed(same[1].result(20))
        with pytest.raises(GrammarError, match="can't be followed"):
            bad.result(20)
    assert count.count("slow") == 1 and not shared._compiling
    with pytest.raises(GrammarError, match="can't be followed"):
        shared.state(Grammar.regex("slow("))  # a failure is not kept


def test_grammars_have_a_largest_size() -> None:
    assert Grammar.choice(str(n) for n in range(10_000))
    with pytest.raises(GrammarError, match="10,001 texts, more than 10,000"):
        Grammar.choice(str(n) for n in range(10_001))
    for make in (Grammar.regex, Grammar.ebnf, Grammar.choice):
        with pytest.raises(GrammarError, match="bytes, more than 262,144"):
            make("é" * 140_000)
    with pytest.raises(GrammarError, match="this JSON schema has"):
        Grammar.json_schema({"title": "a" * 262_144})
    for wrong in ({"a": 1}, 5, b"ab", None, [1], []):
        with pytest.raises(GrammarError, match="choice needs"):
            Grammar.choice(wrong)  # type: ignore[arg-type]


def test_a_model_makes_one_compiler(drafter: Model) -> None:
    first = drafter.compiler
    assert drafter.compiler is first and first.ends == drafter.end_ids
    before = drafter.config
    drafter.config = before.replace(eos=(5,))
    assert drafter.compiler is not first and 5 in drafter.compiler.ends
    drafter.config = before
