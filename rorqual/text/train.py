"""A tokenizer of one's own: byte-level BPE as the family's, learned from documents, for miniatures."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from rorqual.text import pretokenizers
from rorqual.text.tokenizer import Tokenizer
from rorqual.text.tokens import ASSISTANT, BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE, USER

SPECIAL = (BOS, EOS)
MORE = (USER, ASSISTANT, FIM_BEGIN, FIM_HOLE, FIM_END)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """`vocab` tokens in all: the family's special ones first, then bytes and what is frequent, cut as V3 cuts words.
    ValueError if `vocab` leaves no room for the bytes."""
    if vocab < 256 + len(SPECIAL) + len(MORE):
        raise ValueError(
            f"{vocab} tokens have no room for 256 bytes and {len(SPECIAL) + len(MORE)} special ones"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pretokenizers.build("deepseek-v3")
    backend.decoder = decoders.ByteLevel()
    added = [AddedToken(t, special=t in SPECIAL, normalized=False) for t in (*SPECIAL, *MORE)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    bos, eos = (backend.token_to_id(token) for token in SPECIAL)
    assert bos is not None and eos is not None
    return Tokenizer(backend, bos=bos, eos=[eos], adds_bos=True)
