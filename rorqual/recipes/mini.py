"""Miniatures: a family member small enough for a laptop, on text that every machine with Python has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from rorqual.data import Options, build
from rorqual.data.shards import write_atomically
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.text import Tokenizer
from rorqual.text.train import train_tokenizer
from rorqual.train.optim import AdamW
from rorqual.train.recipe import Recipe, Source
from rorqual.train.schedule import Phase, Schedule, Stage, wsd

VOCAB = 2048


def embedded_text() -> list[str]:
    """Documents of English on any machine: the language reference that Python carries for its `help`."""
    found = importlib.util.find_spec("pydoc_data.topics")
    if found is None or found.loader is None:
        raise ValueError(
            "this Python came without pydoc_data: build a corpus of your own and name it with --data"
        )
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 200]


def prepare(folder: Path) -> None:
    """Build the corpus that `mini_cpu` is trained on, if it is not there."""
    if not (folder / "corpus" / "manifest.json").is_file():
        texts = embedded_text()
        source = folder / "text.jsonl"
        if not source.is_file():  # what a build was begun with stays
            folder.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            write_atomically(source, text.encode())
        tokenizer = _tokenizer(folder / "tokenizer", texts)
        build([str(source)], folder / "corpus", tokenizer, Options(held=0.05), workers=1)


def mini_cpu(folder: Path, tokens: int = 1_000_000) -> Recipe:
    """V3 in miniature: MLA without a query latent, one dense layer, then experts balanced by bias, one MTP module (V3
    report 2.1 and 2.2); learns to write about Python in minutes on two cores."""
    attention = MLA(4, 64, 32, 16, 32, Rope(16, interleaved=True))
    moe = MoE(8, 2, 160, 1, Router("sigmoid", bias=True, group_score="top2", normalize=True))
    sparse = Layer(attention, moe)
    config = ModelConfig(
        "deepseek_v3", VOCAB, 160, (Layer(attention, SwiGLU(448)), *(sparse,) * 3), 1024,
        mtp=(sparse,), dtype="float32", eos=(1,),
    )  # fmt: skip
    return Recipe(
        name="mini-cpu",
        config=config,
        sources=(Source(str(folder / "corpus")),),
        stages=(Stage(length=128, batch=16),),
        tokens=tokens,
        rate=wsd(4e-3, 0.03 * tokens, tokens, decay=0.3),
        optimizer=AdamW(),
        mtp=Schedule(0.3),  # V3 report 4.2
        speed=Schedule(0.0, (Phase(0.95 * tokens, 0.001), Phase(tokens, 0.0))),
        balance=1e-4,
        micro=16,
        save_every=200,
        evaluate_every=100,
    )


def _tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(texts, VOCAB).save(folder)
    return Tokenizer.from_dir(folder)
