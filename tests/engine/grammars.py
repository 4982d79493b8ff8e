"""A tokenizer of bytes, models that use it, and random schemas with a validator: what the grammar tests share."""

from __future__ import annotations

import json
import random
import re
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rorqual.engine.grammar import GrammarState
from rorqual.model import Model
from rorqual.text import Tokenizer
from tests.engine.conftest import build

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


def small(kind: str) -> Model:
    model = build(kind, vocab=VOCAB)
    model.tokenizer = TOKENIZER
    model.config = model.config.replace(eos=(ENDS[1],))
    return model


def allowed(state: GrammarState) -> set[int]:
    bits = state.compiler.bitmask(1)
    state.mask(bits[0])
    return {t for t in range(32 * bits.shape[1]) if int(bits[0, t // 32]) >> (t % 32) & 1}


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
