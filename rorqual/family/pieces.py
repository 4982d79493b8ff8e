"""Every tensor of a checkpoint as a `Piece`: its shape, how many there are, and how it is stored.

All counts of `account` are sums over these, so parameters, bytes and FLOPs can't disagree. Shapes follow
docs/parameters.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from rorqual.family.parts import (
    GQA,
    MLA,
    Attention,
    Compress,
    CompressedAttention,
    FeedForward,
    HyperConnection,
    Index,
    Layer,
    ModelConfig,
    SwiGLU,
)


@dataclass(frozen=True)
class Piece:
    """`copies` tensors of `rows` x `cols`, `active` of which one token uses.

    `part` is what it belongs to: embedding, head, attention, index, compressor, dense, routed, shared,
    router, norm, residual, mtp (what only MTP has) or copy (MTP's own embedding and head in V3 files).
    `store` is how quantised files keep it: linear (FP8 in blocks), expert (FP8, or FP4 in V4), bf16, fp32, or
    int64 for the hash tables, which are no parameters. `product` marks matrices a token is multiplied with. `cut`:
    ranks that share a layer's heads and widths hold a part of it each (`nn.spread`); the rest they hold whole.
    """

    part: str
    rows: int
    cols: int = 1
    store: str = "linear"
    copies: int = 1
    active: int = 1
    product: bool = True
    cut: bool = False

    @property
    def each(self) -> int:
        """Elements of one tensor."""
        return self.rows * self.cols

    @property
    def total(self) -> int:
        """Parameters of all the tensors."""
        return 0 if self.store == "int64" else self.each * self.copies

    @property
    def used(self) -> int:
        """Parameters one token touches."""
        return 0 if self.store == "int64" else self.each * self.active

    def bytes(self, linear: str, expert: str, block: tuple[int, int], scale: int) -> int:
        """Bytes on disk and in memory.

        Args:
            linear: bf16 or fp8, for the linears.
            expert: bf16, fp8 or fp4, for the routed experts.
            block: rows and columns of an FP8 block.
            scale: bytes of a block's scale, 4 for fp32 and 1 for powers of two.
        """
        form = {"linear": linear, "expert": expert}.get(self.store, self.store)
        if form == "fp8":
            one = self.each + ceil(self.rows / block[0]) * ceil(self.cols / block[1]) * scale
        elif form == "fp4":  # two codes a byte and a one-byte scale for every 32 inputs
            one = self.rows * (ceil(self.cols / 2) + ceil(self.cols / 32))
        else:
            one = self.each * {"bf16": 2, "fp32": 4, "int64": 8}[form]
        return one * self.copies


def _vector(part: str, size: int, store: str = "bf16") -> Piece:
    return Piece(part, size, store=store, product=False)


def _cut(part: str, rows: int, cols: int) -> Piece:
    return Piece(part, rows, cols, cut=True)


def _norm(size: int) -> Piece:
    return _vector("norm", size)


def _gqa(a: GQA, d: int) -> Iterator[Piece]:
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    yield from (_cut("attention", q, d), _cut("attention", kv, d), _cut("attention", kv, d))
    yield _cut("attention", d, q)
    if a.qkv_bias:
        yield replace(_vector("attention", q + 2 * kv), cut=True)
    if a.out_bias:
        yield _vector("attention", d)
    if a.qk_norm:
        yield _vector("attention", 2 * a.head_dim)


def _mla(a: MLA, d: int) -> Iterator[Piece]:
    if a.q_rank is None:
        yield _cut("attention", a.heads * a.qk_dim, d)
    else:
        yield Piece("attention", a.q_rank, d)
        yield _vector("attention", a.q_rank)
        yield _cut("attention", a.heads * a.qk_dim, a.q_rank)
    yield Piece("attention", a.kv_rank + a.rope_dim, d)
    yield _vector("attention", a.kv_rank)
    yield _cut("attention", a.heads * (a.nope_dim + a.v_dim), a.kv_rank)
    yield _cut("attention", d, a.heads * a.v_dim)
    if a.index is not None and a.q_rank is not None:
        yield from _index_queries(a.index, a.q_rank, d)
        yield Piece("index", a.index.dim, d)
        yield _vector("index", 2 * a.index.dim, "fp32")  # LayerNorm: weight and bias


def _index_queries(index: Index, q_rank: int, d: int) -> Iterator[Piece]:
    yield Piece("index", index.heads * index.dim, q_rank)
    yield Piece("index", index.heads, d, "bf16")


def _compressor(part: str, c: Compress, dim: int, d: int) -> Iterator[Piece]:
    width = dim * (2 if c.overlap else 1)
    yield from (Piece(part, width, d, "bf16"), Piece(part, width, d, "bf16"))
    yield Piece(part, c.ratio, width, "fp32", product=False)
    yield _vector(part, dim)


def _compressed(a: CompressedAttention, d: int) -> Iterator[Piece]:
    yield Piece("attention", a.q_rank, d)
    yield _vector("attention", a.q_rank)
    yield _cut("attention", a.heads * a.head_dim, a.q_rank)
    yield Piece("attention", a.head_dim, d)
    yield _vector("attention", a.head_dim)
    yield _cut("attention", a.o_groups * a.o_rank, a.heads * a.head_dim // a.o_groups)
    yield _cut("attention", d, a.o_groups * a.o_rank)
    yield replace(_vector("attention", a.heads, "fp32"), cut=True)  # sinks
    if a.compress is not None:
        yield from _compressor("compressor", a.compress, a.head_dim, d)
        if a.compress.index is not None:
            yield from _index_queries(a.compress.index, a.q_rank, d)
            yield from _compressor("index", a.compress, a.compress.index.dim, d)


def attention_pieces(a: Attention, d: int) -> Iterator[Piece]:
    """The tensors of an attention part in a model `d` wide."""
    if isinstance(a, GQA):
        return _gqa(a, d)
    return _mla(a, d) if isinstance(a, MLA) else _compressed(a, d)


def feed_forward_pieces(ff: FeedForward, d: int, vocab: int) -> Iterator[Piece]:
    """The tensors of a feed-forward part."""
    if isinstance(ff, SwiGLU):
        yield from (_cut("dense", ff.width, d), _cut("dense", ff.width, d), _cut("dense", d, ff.width))
        return
    for rows, cols in ((ff.width, d), (ff.width, d), (d, ff.width)):
        yield Piece("routed", rows, cols, "expert", ff.routed, ff.top_k)
        if ff.shared:  # one wide SwiGLU
            wide = (rows * ff.shared, cols) if cols == d else (rows, cols * ff.shared)
            yield Piece("shared", *wide)
    yield Piece("router", ff.routed, d, "bf16")
    if ff.router.bias:
        yield _vector("router", ff.routed, "fp32")
    if ff.router.hashed:
        yield Piece("router", vocab, ff.top_k, "int64", product=False)


def _mixers(residual: HyperConnection | None, d: int) -> Iterator[Piece]:
    """The two hyper-connections of a layer."""
    if residual is None:
        return
    n = residual.streams
    for _ in ("attention", "ff"):
        yield Piece("residual", n * (2 + n), n * d, "fp32")
        yield _vector("residual", n * (2 + n) + 3, "fp32")


def _mix_head(residual: HyperConnection | None, d: int) -> Iterator[Piece]:
    """What makes one stream of several at the model's end."""
    if residual is not None:
        yield Piece("residual", residual.streams, residual.streams * d, "fp32")
        yield _vector("residual", residual.streams + 1, "fp32")


@lru_cache(maxsize=512)
def layer_pieces(layer: Layer, residual: HyperConnection | None, d: int, vocab: int) -> tuple[Piece, ...]:
    """The tensors of a layer, its two norms and hyper-connections included."""
    parts = (*attention_pieces(layer.attention, d), *feed_forward_pieces(layer.ff, d, vocab))
    return (*parts, _norm(d), _norm(d), *_mixers(residual, d))


def outer_pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """The embedding, the head, the final norm and the model-end hyper-connection."""
    d = config.hidden
    table = Piece("embedding", config.vocab, d, "bf16", product=config.tied)
    head = () if config.tied else (Piece("head", config.vocab, d, "bf16"),)
    return (table, *head, _norm(d), *_mix_head(config.residual, d))


def mtp_pieces(config: ModelConfig, layer: Layer) -> tuple[Piece, ...]:
    """The tensors of one MTP layer beside its block; V3 files also carry copies of embedding and head."""
    d = config.hidden
    norms = (_norm(d), _norm(d), _norm(d))
    if config.residual is not None:
        project = (Piece("mtp", d, d), Piece("mtp", d, d))
        return (*project, *norms, *_mix_head(config.residual, d))
    copies = (Piece("copy", config.vocab, d, "bf16", product=False), Piece("copy", config.vocab, d, "bf16"))
    return (Piece("mtp", d, 2 * d, "bf16"), *norms, *copies)


@dataclass(frozen=True)
class Run:
    """Layers `start` to `start + len(period) * count - 1`: `period`, `count` times over."""

    start: int
    period: tuple[Layer, ...]
    count: int

    @property
    def layers(self) -> int:
        """How many layers the run has."""
        return len(self.period) * self.count

    @property
    def span(self) -> str:
        """The layer numbers: `0`, or `3-60`."""
        return f"{self.start}" if self.layers == 1 else f"{self.start}-{self.start + self.layers - 1}"


def runs(layers: Sequence[Layer], longest: int = 2) -> tuple[Run, ...]:
    """The layers as repetitions of one layer, or of up to `longest` in turn, from the first layer on."""
    out: list[Run] = []
    at = 0
    while at < len(layers):
        best = Run(at, (layers[at],), 1)
        for length in range(1, longest + 1):
            period = tuple(layers[at : at + length])
            count = 1
            while tuple(layers[at + count * length : at + (count + 1) * length]) == period:
                count += 1
            if count > 1 and length * count > best.layers:
                best = Run(at, period, count)
        out.append(best)
        at += best.layers
    return tuple(out)


def scaled(piece: Piece, times: int) -> Piece:
    """The piece as many times over, all of it active `times` as often."""
    return replace(piece, copies=piece.copies * times, active=piece.active * times)


def main_pieces(config: ModelConfig) -> list[Piece]:
    """Every tensor of the model but MTP's; equal layers are folded into `copies`."""
    out = list(outer_pieces(config))
    counts: dict[Layer, int] = {}
    for layer in config.layers:
        counts[layer] = counts.get(layer, 0) + 1
    for layer, times in counts.items():
        pieces = layer_pieces(layer, config.residual, config.hidden, config.vocab)
        out += [scaled(piece, times) for piece in pieces]
    return out


def all_mtp_pieces(config: ModelConfig) -> list[Piece]:
    """Every tensor of the MTP layers."""
    out: list[Piece] = []
    for layer in config.mtp:
        out += layer_pieces(layer, config.residual, config.hidden, config.vocab)
        out += mtp_pieces(config, layer)
    return out
