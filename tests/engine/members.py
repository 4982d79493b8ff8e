"""Every released language member at toy size: the released config with small numbers, its structure kept.

What makes a member different stays: the kind of attention, how many query heads share a key head, biases, norms,
the form of RoPE and of the router, hashed layers, compress rates (128 becomes 16), tied heads, MTP, how weights are
stored. Widths are the same for all, so that GPU kernels compiled for one serve the next.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache

import rorqual
from rorqual.family import (
    GQA,
    MLA,
    Compress,
    CompressedAttention,
    Index,
    Layer,
    LinearScaling,
    MoE,
    Rope,
    SwiGLU,
)
from rorqual.family.parts import Attention, FeedForward, ModelConfig
from rorqual.model import Model
from tests.parity.zoo import stir_ours

VOCAB, WIDTH, POSITIONS = 60, 32, 160


def _rope(rope: Rope) -> Rope:
    """Rotation over 8 channels; scaled forms were trained on 32 positions, so that most tested ones are new."""
    scaling = rope.scaling
    if scaling is not None and not isinstance(scaling, LinearScaling):
        scaling = replace(scaling, original=32)
    return replace(rope, dim=8, scaling=scaling)


def _index(index: Index | None, top_k: int) -> Index | None:
    return index and Index(16, 16, top_k)


def _attention(part: Attention) -> Attention:
    rope = _rope(part.rope)
    if isinstance(part, GQA):
        share = part.heads // part.kv_heads
        heads, kv = (4, 4) if share == 1 else (4, 1) if part.kv_heads == 1 else (2 * share, 2)
        return replace(part, heads=heads, kv_heads=kv, head_dim=8, rope=rope)
    if isinstance(part, MLA):
        index = _index(part.index, 6)
        return MLA(4, 16, 12, 8, 10, rope, q_rank=part.q_rank and 20, index=index)
    compress = part.compress
    if compress is not None:
        ratio = {128: 16}.get(compress.ratio, compress.ratio)
        compress = Compress(ratio, compress.overlap, _index(compress.index, 3))
    return CompressedAttention(4, 16, 20, 2, 10, 8, rope, compress)


def _feed_forward(part: FeedForward, wide: int) -> FeedForward:
    if isinstance(part, SwiGLU):
        return replace(part, width=wide or 48)
    router = part.router
    if router.groups > 1:
        router = replace(router, groups=4, keep=2)
    limit = part.limit and 2.0
    return MoE(8, 3, wide or 16, min(part.shared, 2), replace(router, scale=min(router.scale, 2.5)), limit)


def shrunk(config: ModelConfig, wide: int = 0) -> ModelConfig:
    """A member at toy size: one layer of each kind it has, at least two. `wide`: hidden and expert width instead of
    the usual ones, and the released quantisation kept."""

    def small(layer: Layer) -> Layer:
        return Layer(_attention(layer.attention), _feed_forward(layer.ff, wide))

    kinds = tuple(dict.fromkeys(small(layer) for layer in config.layers))
    return replace(
        config,
        vocab=VOCAB,
        hidden=wide or WIDTH,
        layers=kinds if len(kinds) > 1 else kinds * 2,
        mtp=tuple(small(layer) for layer in config.mtp),
        max_positions=POSITIONS,
        norm_eps=1e-6,
        quantization=config.quantization if wide else None,
        dtype="float32",
        bos=None,
        eos=(2,),
        pad=None,
        name="",
        extra={},
    )


@cache
def members() -> dict[str, ModelConfig]:
    """Those that differ at toy size, by the name of the first such release; then forms that no release has by
    itself, and weights held as codes."""
    found: dict[ModelConfig, str] = {}
    for card in rorqual.models():
        found.setdefault(shrunk(card.config), card.name)
    named = {name: config for config, name in found.items()}
    qwen, v3, v4 = (rorqual.config(f"deepseek-{x}") for x in ("r1-distill-qwen-1.5b", "v3", "v4-flash"))
    small = shrunk(v3)
    no_latent = tuple(replace(x, attention=replace(x.attention, q_rank=None)) for x in small.layers)
    plain = tuple(
        replace(x, attention=replace(x.attention, rope=Rope(8, 50000.0, interleaved=True))) for x in no_latent
    )
    named["tied head"] = replace(shrunk(qwen), tied=True)
    named["v3 without query latent"] = replace(small, layers=plain, mtp=plain[-1:])
    named["v4 of rates 2, 4, 8 and 32"] = _rates(shrunk(v4), (2, 4), (8, 32))
    named["v3 held as FP8"] = shrunk(v3, 128)
    named["v3.2 held as FP8, scales powers of two"] = shrunk(rorqual.config("deepseek-v3.2"), 128)
    named["v4 held as FP8, experts as FP4"] = shrunk(v4, 128)
    return named


def _rates(config: ModelConfig, sparse: tuple[int, ...], heavy: tuple[int, ...]) -> ModelConfig:
    """V4 with layers of these compress rates, with an indexer or without, one after the other."""
    kinds = {layer.attention.kind: layer for layer in config.layers}  # type: ignore[union-attr]
    layers = [kinds["SWA"]]
    for rate in (*sparse, *heavy):
        kind = kinds["CSA" if rate in sparse else "HCA"]
        part = kind.attention
        layers.append(replace(kind, attention=replace(part, compress=replace(part.compress, ratio=rate))))
    return replace(config, layers=tuple(layers))


def build_member(name: str, vocab: int | None = None) -> Model:
    """A member of `members` with random weights that make every part matter; quantised ones as their checkpoint
    would be loaded. `vocab`: another number of words."""
    config = members()[name].replace(vocab=vocab or VOCAB)
    model = Model(config.replace(quantization=None), seed=0)
    stir_ours(model)
    if config.quantization is None:
        return model
    model.config = config
    with tempfile.TemporaryDirectory() as place:
        rorqual.save(model, place)
        return rorqual.load(place, dtype=None, device="cpu")
