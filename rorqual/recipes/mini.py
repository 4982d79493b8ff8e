"""Miniatures: a family member small enough for a laptop, on text that every machine with Python has."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from rorqual.data import Options, build
from rorqual.data.shards import write_atomically
from rorqual.family import (
    GQA,
    MLA,
    Compress,
    CompressedAttention,
    HyperConnection,
    Index,
    Layer,
    ModelConfig,
    MoE,
    Rope,
    Router,
    SwiGLU,
)
from rorqual.text import Tokenizer
from rorqual.text.train import train_tokenizer
from rorqual.train.balance import V2Balance
from rorqual.train.optim import AdamW, Muon
from rorqual.train.recipe import Recipe, Source
from rorqual.train.schedule import Phase, Schedule, Stage, constant, cosine, multi_step, v3, wsd

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
    """Build the corpus that miniatures are trained on, if it is not there."""
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


# Each generation's own parts and schedules, the latter as shares of a short run.


def mini_v1(folder: Path, tokens: int = 1_000_000) -> Recipe:
    """V1: multi-head attention, SwiGLU, and the rate in three steps. Without norms on latents 0.02 begins slowly at
    such a width."""
    layer = Layer(GQA(6, 6, 32, Rope(32)), SwiGLU(512))
    config = ModelConfig("llama", VOCAB, 192, (layer,) * 6, 1024, dtype="float32", init_std=0.06, eos=(1,))
    rate = multi_step(3e-3, 0.03 * tokens, tokens, [(0.8, 0.316), (0.9, 0.1)])
    return _mini("mini-v1", config, folder, tokens, rate=rate, balance=0.0)


def mini_v2(folder: Path, tokens: int = 1_000_000) -> Recipe:
    """V2: MLA with a query latent, softmax routing within 2 of 4 devices, three balance losses, a growing batch."""
    attention = MLA(4, 64, 32, 16, 32, Rope(16, interleaved=True), q_rank=96)
    moe = MoE(16, 4, 96, 2, Router("softmax", groups=4, keep=2, scale=2.0))
    config = ModelConfig(
        "deepseek_v2", VOCAB, 160, (Layer(attention, SwiGLU(448)), *(Layer(attention, moe),) * 3), 1024,
        dtype="float32", eos=(1,),
    )  # fmt: skip
    return _mini(
        "mini-v2", config, folder, tokens,
        stages=(Stage(length=128, batch=8, to=16, ramp=tokens // 8),),
        rate=multi_step(3e-3, 0.03 * tokens, tokens, [(0.6, 0.316), (0.9, 0.316**2)]),
        v2=V2Balance(expert=0.003, device=0.05, communication=0.02),
    )  # fmt: skip


def mini_v3(folder: Path, tokens: int = 1_000_000) -> Recipe:
    """V3: sigmoid routing within 2 of 4 groups balanced by bias, one MTP module, and V3's own schedules."""
    return _mini_v3("mini-v3", None, folder, tokens, rate=v3(3e-3, 0.03 * tokens, tokens))


def mini_v32_warm_up(folder: Path, tokens: int = 100_000) -> Recipe:
    """V3.2's first stage: indexers alone, by what dense attention looks at."""
    index = Index(heads=8, dim=32, top_k=32)
    return _mini_v3("mini-v3.2-warm-up", index, folder, tokens, rate=constant(1e-3), dsa="warm-up")


def mini_v32(folder: Path, tokens: int = 500_000) -> Recipe:
    """V3.2's second stage: attention to the 32 tokens that the indexers pick."""
    index = Index(heads=8, dim=32, top_k=32)
    rate = wsd(1e-3, 0.03 * tokens, tokens)
    return _mini_v3("mini-v3.2", index, folder, tokens, rate=rate, dsa="sparse")


def _mini_v3(name: str, index: Index | None, folder: Path, tokens: int, **changes: Any) -> Recipe:
    attention = MLA(4, 64, 32, 16, 32, Rope(16, interleaved=True), q_rank=96, index=index)
    router = Router("sigmoid", bias=True, groups=4, keep=2, group_score="top2", normalize=True, scale=2.5)
    sparse = Layer(attention, MoE(16, 4, 96, 1, router))
    config = ModelConfig(
        "deepseek_v3" if index is None else "deepseek_v32", VOCAB, 160,
        (Layer(attention, SwiGLU(448)), *(sparse,) * 3), 1024, mtp=(sparse,), dtype="float32", eos=(1,),
    )  # fmt: skip
    changes = {
        "stages": (Stage(length=128, batch=8, to=16, ramp=tokens // 8),),
        "mtp": Schedule(0.3, (Phase(10 / 14.8 * tokens, 0.3), Phase(tokens, 0.1))),
        "speed": Schedule(0.001, (Phase(14.3 / 14.8 * tokens, 0.001), Phase(tokens, 0.0))),
    } | changes
    return _mini(name, config, folder, tokens, **changes)


def mini_v4(folder: Path, tokens: int = 1_000_000) -> Recipe:
    """V4: window, CSA and HCA in turn on four residual streams, a first layer routed by token id, Muon, sequences that
    lengthen."""
    rope = Rope(16, interleaved=True)

    def layer(compress: Compress | None, *, hashed: bool = False) -> Layer:
        attention = CompressedAttention(4, 48, 96, 2, 48, 32, rope, compress)
        router = Router("sqrtsoftplus", bias=not hashed, hashed=hashed, normalize=True, scale=1.5)
        return Layer(attention, MoE(16, 4, 96, 1, router, limit=10.0))

    csa, hca = Compress(4, overlap=True, index=Index(heads=8, dim=32, top_k=16)), Compress(16)
    config = ModelConfig(
        "deepseek_v4", VOCAB, 160, (layer(None, hashed=True), layer(csa), layer(hca), layer(csa)), 1024,
        residual=HyperConnection(), mtp=(layer(None),), dtype="float32", eos=(1,),
    )  # fmt: skip
    return _mini(
        "mini-v4", config, folder, tokens,
        stages=(Stage(length=128, batch=16), Stage(length=256, batch=8, start=tokens * 3 // 4)),
        rate=cosine(3e-3, 0.03 * tokens, tokens, 3e-4),
        optimizer=Muon(),
        mtp=Schedule(0.3, (Phase(10 / 14.8 * tokens, 0.3), Phase(tokens, 0.1))),
    )  # fmt: skip


def _mini(name: str, config: ModelConfig, folder: Path, tokens: int, **changes: Any) -> Recipe:
    """What all of them share."""
    facts: dict[str, Any] = {
        "stages": (Stage(length=128, batch=16),), "micro": 16, "save_every": 200, "evaluate_every": 100,
    }  # fmt: skip
    sources = (Source(str(folder / "corpus")),)
    return Recipe(name=name, config=config, sources=sources, tokens=tokens, **(facts | changes))


def _tokenizer(folder: Path, texts: list[str]) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        train_tokenizer(texts, VOCAB).save(folder)
    return Tokenizer.from_dir(folder)
