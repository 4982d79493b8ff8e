"""Small documents, and a tokenizer of all bytes with a few longer tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from rorqual.text import Tokenizer
from rorqual.text import tokens as t

ADDED = (t.BOS, t.EOS, t.FIM_BEGIN, t.FIM_HOLE, t.FIM_END)


def tokenizer(*more: str) -> Tokenizer:
    """Tokens of one byte, "the", and punctuation together with line breaks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: n for n, letter in enumerate(letters)}
    merges = []
    for word in ("the", ".Ċ", ".ĊĊ", ");Ċ", "ĊĊ", *more):
        for n in range(1, len(word)):
            merges.append((word[:n], word[n]))
            vocab.setdefault(word[: n + 1], len(vocab))
    backend = Backend(models.BPE(vocab=vocab, merges=list(dict.fromkeys(merges))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    return Tokenizer(backend, bos=backend.token_to_id(t.BOS), eos=[backend.token_to_id(t.EOS)])


TOKENIZER = tokenizer()


def texts(count: int, start: int = 0) -> list[str]:
    """Documents that tell themselves apart."""
    return [
        f"document {n} of the sea.\nIt has {n % 7 * 'many '}words.\n\n" for n in range(start, start + count)
    ]


def json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(documents)))
    return path
