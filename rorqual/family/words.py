"""Numbers and parts in few words, for tables and drawings."""

from __future__ import annotations

from rorqual.family.account import Cache
from rorqual.family.parts import (
    GQA,
    MLA,
    Attention,
    FeedForward,
    Layer,
    LinearScaling,
    Llama3Scaling,
    Rope,
    SwiGLU,
)


def count(number: float) -> str:
    """A count to four figures: 671.0B, 1.573T, 235.7M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            scaled = number / size
            digits = 3 if scaled < 10 else 2 if scaled < 100 else 1
            return f"{scaled:.{digits}f}{letter}"
    return f"{number:g}"


def size(number: float) -> str:
    """Bytes in decimal units: 70.3 KB, 6.9 GB."""
    for unit, letter in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if number >= unit:
            scaled = number / unit
            return f"{scaled:.0f} {letter}" if scaled >= 100 else f"{scaled:.1f} {letter}"
    return f"{number:g} B"


def tokens(number: int) -> str:
    """A context length: 4K, 128K, 1M."""
    if number % (1 << 20) == 0:
        return f"{number >> 20}M"
    return f"{number >> 10}K" if number % 1024 == 0 else f"{number:,}"


def times(ratio: float) -> str:
    """A ratio: 56.9x, 1.0x."""
    return f"{ratio:,.0f}x" if ratio >= 1000 else f"{ratio:.1f}x"


def per_token(cache: Cache) -> str:
    """Exact bytes a token, with its fraction, and the fixed part: 3,514 1/4 + 3,214,336 fixed."""
    whole, rest = divmod(cache.growing.numerator, cache.growing.denominator)
    text = f"{whole:,}" + (f" {rest}/{cache.growing.denominator}" if rest else "")
    return f"{text} + {cache.fixed:,} fixed" if cache.fixed else text


def attention_kind(a: Attention) -> str:
    """MHA, GQA, MQA, MLA, DSA, SWA, CSA or HCA."""
    if isinstance(a, GQA):
        return "MHA" if a.kv_heads == a.heads else "MQA" if a.kv_heads == 1 else "GQA"
    if isinstance(a, MLA):
        return "MLA" if a.index is None else "DSA"
    return a.kind


def attention(a: Attention) -> str:
    """One line on an attention part."""
    kind = attention_kind(a)
    if isinstance(a, GQA):
        heads = f"{a.heads} heads" if kind == "MHA" else f"{a.heads} heads on {a.kv_heads}"
        extra = (", biases" if a.qkv_bias else "") + (", q/k norm" if a.qk_norm else "")
        return f"{kind}: {heads} of {a.head_dim}{extra}"
    if isinstance(a, MLA):
        query = f", query latent {a.q_rank:,}" if a.q_rank else ""
        index = f"; indexer {a.index.heads} x {a.index.dim}, top {a.index.top_k:,}" if a.index else ""
        return f"{kind}: {a.heads} heads, latent {a.kv_rank} + {a.rope_dim}{query}{index}"
    text = f"{kind}: {a.heads} heads on one {a.head_dim}-wide key-value, window {a.window}"
    if a.compress is not None:
        text += f", 1 entry for {a.compress.ratio} tokens"
        if a.compress.index is not None:
            text += f", top {a.compress.index.top_k:,}"
    return text


def feed_forward_kind(ff: FeedForward) -> str:
    """dense, experts or hashed experts."""
    if isinstance(ff, SwiGLU):
        return "dense"
    return "hashed experts" if ff.router.hashed else "experts"


def feed_forward(ff: FeedForward) -> str:
    """One line on a feed-forward part."""
    if isinstance(ff, SwiGLU):
        return f"SwiGLU {ff.width:,} wide"
    router = ff.router
    shared = f" + {ff.shared} shared" if ff.shared else ""
    how = "by token id" if router.hashed else router.score
    groups = f", {router.keep} of {router.groups} groups" if router.groups > 1 else ""
    return f"{ff.top_k} of {ff.routed}{shared} experts {ff.width:,} wide, {how}{groups}"


def layer(part: Layer) -> str:
    """A layer's kinds: MLA + experts."""
    return f"{attention_kind(part.attention)} + {feed_forward_kind(part.ff)}"


def rope(r: Rope) -> str:
    """One line on the positions of a part."""
    text = f"{r.dim} channels, base {r.theta:,.0f}"
    s = r.scaling
    if s is None:
        return text
    if isinstance(s, LinearScaling):
        return f"{text}, linear x{s.factor:g}"
    if isinstance(s, Llama3Scaling):
        return f"{text}, Llama 3 x{s.factor:g}"
    return f"{text}, YaRN x{s.factor:g} from {s.original:,}"
