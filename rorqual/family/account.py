"""Exact arithmetic on a config: parameters, the cache a token costs, and FLOPs. No tensor is made.

Parameters are counted as the published figures are: every matrix and norm, no quantisation scales, no rotary
tables and no hash tables. The cache follows the V2 report (section 2.1), V3.2's FP8 layout (FlashMLA) and
V4's (V4 report, section 2.3).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from rorqual.family.parts import GQA, MLA, Attention, CompressedAttention, ConfigError, Layer, ModelConfig
from rorqual.family.pieces import Piece, all_mtp_pieces, layer_pieces, main_pieces

ATTENTION = ("attention", "index", "compressor")
"""The parts that make up attention."""


@dataclass(frozen=True)
class Parameters:
    """Parameter counts, all exact.

    `total` is the model without multi-token prediction; `active` what one token touches of it, the embedding
    table included; `parts` has (total, active) of each part. `mtp_unique` is what only the MTP layers have,
    `mtp_copies` the copies of embedding and head that V3's files add, `mtp_active` what a token touches of
    both. `hash_entries` counts the integers of V4's expert tables, which are no parameters.
    """

    total: int
    active: int
    embedding: int
    parts: dict[str, tuple[int, int]]
    mtp_unique: int
    mtp_copies: int
    mtp_active: int
    hash_entries: int
    tied: bool

    @property
    def active_without_embedding(self) -> int:
        """Active parameters, the embedding lookup left out unless the head shares its table."""
        return self.active if self.tied else self.active - self.embedding

    @property
    def with_mtp(self) -> int:
        """The model and what is unique to its MTP layers."""
        return self.total + self.mtp_unique

    @property
    def checkpoint(self) -> int:
        """What the released files hold, MTP's copies included."""
        return self.with_mtp + self.mtp_copies

    def part(self, *names: str, active: bool = False) -> int:
        """The parameters of some parts together (see `pieces.Piece.part`), zero for parts it lacks."""
        return sum(self.parts.get(name, (0, 0))[active] for name in names)

    @property
    def attention(self) -> int:
        """Attention with its indexers and compressors; norms between layers are counted apart."""
        return self.part(*ATTENTION)

    @property
    def routed(self) -> int:
        """All routed experts."""
        return self.part("routed")

    @property
    def routed_active(self) -> int:
        """The routed experts one token uses."""
        return self.part("routed", active=True)

    @property
    def shared(self) -> int:
        """The shared experts."""
        return self.part("shared")


def parameters(config: ModelConfig) -> Parameters:
    """Count a model's parameters."""
    main, mtp = main_pieces(config), all_mtp_pieces(config)
    parts: dict[str, tuple[int, int]] = {}
    for piece in main:
        total, active = parts.get(piece.part, (0, 0))
        parts[piece.part] = total + piece.total, active + piece.used
    copies = sum(piece.total for piece in mtp if piece.part == "copy")
    return Parameters(
        total=_total(main),
        active=_used(main),
        embedding=config.vocab * config.hidden,
        parts=parts,
        mtp_unique=_total(mtp) - copies,
        mtp_copies=copies,
        mtp_active=_used(mtp),
        hash_entries=sum(piece.each * piece.copies for piece in main if piece.store == "int64"),
        tied=config.tied,
    )


def _total(pieces: Iterable[Piece]) -> int:
    return sum(piece.total for piece in pieces)


def _used(pieces: Iterable[Piece]) -> int:
    return sum(piece.used for piece in pieces)


@dataclass(frozen=True)
class LayerCount:
    """One layer's parameters.

    `attention` has indexer and compressor with it; `always` is what every token uses of the feed-forward part
    (dense, shared experts, router); `rest` is norms and hyper-connections.
    """

    attention: int
    always: int
    routed: int
    routed_active: int
    rest: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.attention + self.always + self.routed + self.rest

    @property
    def active(self) -> int:
        """What a token touches."""
        return self.attention + self.always + self.routed_active + self.rest


def layer_parameters(config: ModelConfig, layer: Layer) -> LayerCount:
    """Count one layer."""
    pieces = layer_pieces(layer, config.residual, config.hidden, config.vocab)
    routed = [piece for piece in pieces if piece.part == "routed"]
    attention = [piece for piece in pieces if piece.part in ATTENTION]
    rest = [piece for piece in pieces if piece.part in ("norm", "residual")]
    always = _total(pieces) - _total(routed) - _total(attention) - _total(rest)
    return LayerCount(_total(attention), always, _total(routed), _used(routed), _total(rest))


# -------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class Cache:
    """What a sequence keeps.

    `elements` and `growing` (bytes) are for each token; `fixed` is bytes a sequence for V4's sliding windows,
    `pooling` bytes a sequence for its unfinished compression windows (fp32 values and gates).
    """

    elements: Fraction
    growing: Fraction
    fixed: int = 0
    pooling: int = 0

    def at(self, context: int, batch: int = 1) -> int:
        """Bytes for `batch` sequences of `context` tokens, pooling states included."""
        return batch * (int(self.growing * context) + self.fixed + self.pooling)


def cache(config: ModelConfig, layout: str = "bf16") -> Cache:
    """What the main layers cache.

    Args:
        config: the model.
        layout: `bf16`, two bytes an element; or `serving`, the published FP8 and FP4 layouts of V3.2 and V4
            (bf16 for the others, which have none).

    Raises:
        ConfigError: another layout.
    """
    if layout not in ("bf16", "serving"):
        raise ConfigError(f"cache layout {layout!r} is unknown: use bf16 or serving")
    parts = [_layer_cache(layer.attention, layout == "serving") for layer in config.layers]
    return Cache(
        elements=sum((part.elements for part in parts), Fraction(0)),
        growing=sum((part.growing for part in parts), Fraction(0)),
        fixed=sum(part.fixed for part in parts),
        pooling=sum(part.pooling for part in parts),
    )


def _layer_cache(a: Attention, serving: bool) -> Cache:
    if isinstance(a, GQA):
        elements = 2 * a.kv_heads * a.head_dim
        return Cache(Fraction(elements), Fraction(2 * elements))
    if isinstance(a, MLA):
        entry, key = a.kv_rank + a.rope_dim, a.index.dim if a.index is not None else 0
        if serving and a.index is not None:  # FP8 with an fp32 scale for 128 values; the rotary part in bf16
            latent = a.kv_rank + 4 * ceil(a.kv_rank / 128) + 2 * a.rope_dim
            return Cache(Fraction(entry + key), Fraction(latent + key + 4 * ceil(key / 128)))
        return Cache(Fraction(entry + key), Fraction(2 * (entry + key)))
    return _compressed_cache(a, serving)


def _compressed_cache(a: CompressedAttention, serving: bool) -> Cache:
    def entry(dim: int) -> int:
        """Bytes of a window or compressed entry: FP8 with a one-byte scale for 64 values, padded to 8."""
        if not serving:
            return 2 * dim
        plain = dim - a.rope.dim
        return plain + 8 * ceil(ceil(plain / 64) / 8) + 2 * a.rope.dim

    def key(dim: int) -> int:
        """Bytes of an indexer key: FP4 with a one-byte scale for 32 values."""
        return dim // 2 + dim // 32 if serving else 2 * dim

    fixed = a.window * entry(a.head_dim)
    if a.compress is None:
        return Cache(Fraction(0), Fraction(0), fixed)
    c = a.compress
    index = c.index.dim if c.index is not None else 0
    slots = c.ratio * (2 if c.overlap else 1)
    width = (a.head_dim + index) * (2 if c.overlap else 1)
    return Cache(
        elements=Fraction(a.head_dim + index, c.ratio),
        growing=Fraction(entry(a.head_dim) + key(index), c.ratio),
        fixed=fixed,
        pooling=2 * slots * width * 4,
    )


def mha_elements(config: ModelConfig) -> int:
    """Cache elements a token if every query head had its own key and value, rotary channels aside."""
    return sum(layer.attention.heads * _pair(layer.attention) for layer in config.layers)


def gqa_elements(config: ModelConfig, groups: int = 8) -> int:
    """Cache elements a token with `groups` key-value heads of this width (of 128 for V4, as its report)."""
    out = 0
    for layer in config.layers:
        a = layer.attention
        pair = 2 * 128 if isinstance(a, CompressedAttention) else _pair(a)
        out += min(groups, a.heads) * pair
    return out


def _pair(a: Attention) -> int:
    """Width of one head's key and value together."""
    return a.nope_dim + a.v_dim if isinstance(a, MLA) else 2 * a.head_dim


# -------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of a token: `matmul` with parameters, `attention` over the cache, `index` for scores."""

    matmul: int
    attention: int
    index: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.matmul + self.attention + self.index


def flops(config: ModelConfig, context: int, *, absorbed: bool = True) -> Flops:
    """Forward FLOPs of the token at position `context` (it attends `context` tokens, itself included).

    A multiply-add is two FLOPs. Embedding lookup, norms, softmax and rotations are left out.

    Args:
        config: the model.
        context: tokens in the sequence so far.
        absorbed: MLA in the form used for decoding (latents as keys and values), else in the expanded form of
            training and prefill, where keys and values were built when their tokens passed.

    Raises:
        ConfigError: a context below one token.
    """
    if context < 1:
        raise ConfigError(f"context must be at least one token, got {context}")
    matmul = sum(2 * piece.used for piece in main_pieces(config) if piece.product)
    attention = index = 0
    for layer in config.layers:
        ours, scores = _attention_flops(layer.attention, context, absorbed)
        attention, index = attention + ours, index + scores
    return Flops(matmul, attention, index)


def _attention_flops(a: Attention, t: int, absorbed: bool) -> tuple[int, int]:
    """FLOPs of scores and weighted sums, and of the indexer, for one token in one layer."""
    if isinstance(a, GQA):
        return 4 * a.heads * a.head_dim * t, 0
    if isinstance(a, MLA):
        seen = t if a.index is None else min(t, a.index.top_k)
        index = 0 if a.index is None else 2 * a.index.heads * a.index.dim * t
        if absorbed or a.index is not None:
            return 2 * a.heads * (2 * a.kv_rank + a.rope_dim) * seen, index
        return 2 * a.heads * (a.qk_dim + a.v_dim) * seen, index
    seen, index = min(t, a.window), 0
    if a.compress is not None:
        entries = t // a.compress.ratio
        if a.compress.index is not None:
            index = 2 * a.compress.index.heads * a.compress.index.dim * entries
            entries = min(entries, a.compress.index.top_k)
        seen += entries
    return 4 * a.heads * a.head_dim * seen, index
