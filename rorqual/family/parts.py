"""The parts a model is described with: frozen dataclasses, no tensors, no torch.

A released checkpoint is a page of facts: a tuple of `Layer`s, each an attention part and a
feed-forward part, plus what surrounds them. `rorqual.nn` builds one brick from each part; no brick
asks which model it stands in.

Every part checks its own numbers when it is made, so a contradictory config cannot exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A config that is unsupported or contradicts itself. The text says what is wrong and what to do."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def _positive(owner: object, *names: str) -> None:
    """Every named field of `owner` must be a whole number above zero (None is let through)."""
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(
            whole and value > 0, f"{type(owner).__name__}.{name} must be a positive integer, got {value!r}"
        )


def _finite(owner: object, *names: str, above: float | None = 0.0) -> None:
    """Every named field of `owner` must be a finite number, above `above` if given (None is let through)."""
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(
            number and math.isfinite(value) and (above is None or value > above),
            f"{type(owner).__name__}.{name} must be a finite number"
            + (f" above {above:g}, got {value!r}" if above is not None else f", got {value!r}"),
        )


# --------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (DeepSeek-Coder)."""

    factor: float

    def __post_init__(self) -> None:
        _finite(self, "factor")


@dataclass(frozen=True)
class Yarn:
    """YaRN (V2 report section 3.1.4): low frequencies divided by `factor`, high ones kept.

    `mscale_all_dim` scales the softmax by (0.1 * mscale_all_dim * ln(factor) + 1)^2; `amplitude`, if
    given, replaces the multiplier of cos and sin that follows from `mscale`.
    """

    factor: float
    original: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    amplitude: float | None = None

    def __post_init__(self) -> None:
        _finite(self, "factor", "beta_fast", "beta_slow", "amplitude")
        _finite(self, "mscale", "mscale_all_dim", above=None)
        _positive(self, "original")
        require(
            self.beta_fast > self.beta_slow > 0,
            f"YaRN needs beta_fast > beta_slow > 0, got {self.beta_fast} and {self.beta_slow}",
        )

    @staticmethod
    def _mscale(factor: float, m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    def rotation_amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.amplitude is not None:
            return self.amplitude
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.factor, self.mscale) / self._mscale(self.factor, self.mscale_all_dim)
        return self._mscale(self.factor, 1.0)

    def softmax_factor(self) -> float:
        """What MLA's softmax scale is multiplied by (facts: 1.87385 at factor 40, mscale 1)."""
        return self._mscale(self.factor, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's frequency bands: long waves divided by `factor`, a smooth band between."""

    factor: float
    original: int
    low: float = 1.0
    high: float = 4.0

    def __post_init__(self) -> None:
        _finite(self, "factor", "low", "high")
        _positive(self, "original")
        require(self.high > self.low, f"llama3 scaling needs high > low, got {self.high} and {self.low}")


@dataclass(frozen=True)
class Rope:
    """Rotary positions over `dim` channels. `interleaved` pairs (2i, 2i+1); otherwise (i, i + dim/2)."""

    dim: int
    theta: float = 10000.0
    scaling: LinearScaling | Yarn | Llama3Scaling | None = None
    interleaved: bool = False

    def __post_init__(self) -> None:
        _positive(self, "dim")
        require(self.dim % 2 == 0, f"rotary dimension must be even, got {self.dim}")
        _finite(self, "theta")
        yarn = isinstance(self.scaling, Yarn)  # its correction range divides by ln(theta)
        require(not yarn or self.theta > 1, f"YaRN needs a rope_theta above 1, got {self.theta}")


# --------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class GQA:
    """Multi-head (kv_heads = heads), grouped-query or multi-query (kv_heads = 1) attention."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_heads", "head_dim")
        require(
            self.heads % self.kv_heads == 0,
            f"attention heads ({self.heads}) must be a multiple of key/value heads ({self.kv_heads})",
        )
        require(self.rope.dim <= self.head_dim, f"rope dim {self.rope.dim} exceeds head dim {self.head_dim}")


@dataclass(frozen=True)
class Index:
    """The lightning indexer (V3.2 report section 2.1): `heads` small query heads, one shared key."""

    heads: int
    dim: int
    top_k: int

    def __post_init__(self) -> None:
        _positive(self, "heads", "dim", "top_k")


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (V2 report section 2.1). `index` makes it sparse (DSA, V3.2)."""

    heads: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope: Rope
    q_rank: int | None = None
    index: Index | None = None

    def __post_init__(self) -> None:
        _positive(self, "heads", "kv_rank", "nope_dim", "rope_dim", "v_dim", "q_rank")
        require(self.rope.dim == self.rope_dim, f"MLA rope dim {self.rope_dim} differs from {self.rope.dim}")
        if self.index is not None:
            require(
                self.q_rank is not None,
                "sparse attention (DSA) reads the query latent: q_lora_rank is needed",
            )
            require(
                self.index.dim >= self.rope_dim,
                f"index_head_dim ({self.index.dim}) must hold the {self.rope_dim} rotary channels",
            )

    @property
    def qk_dim(self) -> int:
        """Width of a query or key head in the expanded form."""
        return self.nope_dim + self.rope_dim

    @property
    def scale(self) -> float:
        """Softmax scale, YaRN's correction included."""
        yarn = self.rope.scaling
        return self.qk_dim**-0.5 * (yarn.softmax_factor() if isinstance(yarn, Yarn) else 1.0)


@dataclass(frozen=True)
class Compress:
    """V4's compressor (V4 report section 2.3): one entry for every `ratio` tokens.

    `overlap` pools the previous and the present window (CSA); `index` picks top-k entries, without it
    every finished entry is attended (HCA).
    """

    ratio: int
    overlap: bool = False
    index: Index | None = None

    def __post_init__(self) -> None:
        _positive(self, "ratio")
        require(
            self.overlap == (self.index is not None),
            "V4 compresses either with overlap and an indexer (CSA) or with neither (HCA)",
        )


@dataclass(frozen=True)
class CompressedAttention:
    """V4's attention: a sliding window of shared key-values, plus compressed entries if `compress`.

    Window only when `compress` is None (SWA), else CSA or HCA by the compressor's kind.
    """

    heads: int
    head_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    window: int
    rope: Rope
    compress: Compress | None = None

    def __post_init__(self) -> None:
        _positive(self, "heads", "head_dim", "q_rank", "o_groups", "o_rank", "window")
        require(self.rope.dim <= self.head_dim, f"rope dim {self.rope.dim} exceeds head dim {self.head_dim}")
        require(
            self.heads % self.o_groups == 0,
            f"attention heads ({self.heads}) must be a multiple of o_groups ({self.o_groups})",
        )
        if self.compress is not None and self.compress.index is not None:
            require(
                self.compress.index.dim >= self.rope.dim,
                f"index_head_dim ({self.compress.index.dim}) must hold the {self.rope.dim} rotary channels",
            )

    @property
    def kind(self) -> str:
        """ "SWA", "CSA" or "HCA"."""
        if self.compress is None:
            return "SWA"
        return "CSA" if self.compress.index is not None else "HCA"


Attention = GQA | MLA | CompressedAttention


# ------------------------------------------------------------------------------------ feed-forward


@dataclass(frozen=True)
class SwiGLU:
    """silu(x W_gate) * (x W_up) W_down. `limit` clamps gate from above and up on both sides (V4)."""

    width: int
    limit: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "width")
        require(self.limit is None or self.limit > 0, f"swiglu limit must be positive, got {self.limit}")


@dataclass(frozen=True)
class Router:
    """How a token chooses its experts. The generations differ in these values and in nothing else.

    `score`: "softmax" (V1, V2), "sigmoid" (V3), "sqrtsoftplus" (V4).
    `bias`: a balance bias is added for choosing only (V3, V4: auxiliary-loss-free balancing).
    `groups`, `keep`: experts stand in `groups`; only the best `keep` groups take part. A group is worth
    its best score (`group_score` = "max", V2) or the sum of its two best (`"top2"`, V3).
    `hashed`: experts come from a fixed table by token id (V4's first layers).
    `normalize`: the chosen scores are divided by their sum. `scale` multiplies the weights at the end.
    """

    score: str = "softmax"
    bias: bool = False
    groups: int = 1
    keep: int = 1
    group_score: str = "max"
    hashed: bool = False
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.score in ("softmax", "sigmoid", "sqrtsoftplus"),
            f"router score {self.score!r} is unknown: use softmax, sigmoid or sqrtsoftplus",
        )
        require(
            self.group_score in ("max", "top2"),
            f"group score {self.group_score!r} is unknown: use max or top2",
        )
        _positive(self, "groups", "keep")
        require(self.keep <= self.groups, f"topk_group ({self.keep}) exceeds n_group ({self.groups})")
        require(math.isfinite(self.scale), f"routed scaling factor must be finite, got {self.scale}")
        require(not (self.hashed and self.bias), "a hash router chooses by table and takes no balance bias")


@dataclass(frozen=True)
class MoE:
    """`routed` fine-grained experts of `width`, `top_k` of them a token, and `shared` ones for every token."""

    routed: int
    top_k: int
    width: int
    shared: int
    router: Router = field(default_factory=Router)
    limit: float | None = None

    def __post_init__(self) -> None:
        _positive(self, "routed", "top_k", "width")
        require(self.shared >= 0, f"shared experts must not be negative, got {self.shared}")
        require(self.limit is None or self.limit > 0, f"swiglu limit must be positive, got {self.limit}")
        require(
            self.top_k <= self.routed,
            f"num_experts_per_tok ({self.top_k}) exceeds the routed experts ({self.routed})",
        )
        r = self.router
        require(
            self.routed % r.groups == 0,
            f"routed experts ({self.routed}) don't divide into n_group ({r.groups}) groups",
        )
        per_group = self.routed // r.groups
        require(
            self.top_k <= r.keep * per_group,
            f"num_experts_per_tok ({self.top_k}) exceeds the {r.keep * per_group} experts of the kept groups",
        )
        require(
            r.groups == 1 or r.group_score != "top2" or per_group >= 2,
            f"groups of {per_group} expert can't be scored by their two best: lower n_group",
        )


FeedForward = SwiGLU | MoE


# ------------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class HyperConnection:
    """Manifold-constrained hyper-connections (V4 report section 2.2): `streams` residual streams."""

    streams: int = 4
    iterations: int = 20
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _positive(self, "streams", "iterations")
        _finite(self, "eps", above=None)
        require(self.eps >= 0, f"HyperConnection.eps must not be negative, got {self.eps}")


@dataclass(frozen=True)
class Layer:
    """One transformer layer: an attention part and a feed-forward part."""

    attention: Attention
    ff: FeedForward


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint stores its matrices.

    FP8 E4M3 with one scale a `block` (rows, columns), fp32 or power-of-two (`ue8m0`) scales;
    `experts = "fp4"` stores routed experts as E2M1 pairs with a ue8m0 scale for every 32 inputs (V4).
    """

    block: tuple[int, int] = (128, 128)
    ue8m0: bool = False
    experts: str = "fp8"

    def __post_init__(self) -> None:
        require(
            len(self.block) == 2 and all(isinstance(b, int) and b > 0 for b in self.block),
            f"weight_block_size must be two positive integers, got {self.block}",
        )
        require(self.experts in ("fp8", "fp4"), f"expert format {self.experts!r} is unknown: use fp8 or fp4")


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes a model's function. Built by `rorqual.config(name)` or from a hub config.json."""

    model_type: str
    vocab: int
    hidden: int
    layers: tuple[Layer, ...]
    max_positions: int
    norm_eps: float = 1e-6
    tied: bool = False
    residual: HyperConnection | None = None
    mtp: tuple[Layer, ...] = ()
    quantization: Quantization | None = None
    dtype: str = "bfloat16"
    init_std: float = 0.02
    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None
    name: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Bookkeeping fields of the hub's config.json that don't change the function; written back as they were."""

    def __post_init__(self) -> None:
        _positive(self, "vocab", "hidden", "max_positions")
        for name in ("layers", "mtp"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        eos = self.eos if isinstance(self.eos, (tuple, list)) else () if self.eos is None else (self.eos,)
        object.__setattr__(self, "eos", tuple(eos))
        require(len(self.layers) > 0, "a model needs at least one layer")
        _finite(self, "norm_eps", "init_std")
        self._check_ids()
        require(
            self.dtype in ("float64", "float32", "bfloat16", "float16"),
            f"dtype {self.dtype!r} is unknown: use float32, bfloat16 or float16",
        )
        compressed = [isinstance(layer.attention, CompressedAttention) for layer in (*self.layers, *self.mtp)]
        require(
            all(compressed) or not any(compressed),
            "V4 attention can't be mixed with other kinds in one model",
        )
        require(
            not any(
                self.layers[0].attention.__class__ is not layer.attention.__class__ for layer in self.mtp
            ),
            "an MTP layer must use the attention kind of the main layers",
        )

    def _check_ids(self) -> None:
        """Token ids are whole numbers inside the vocabulary; a padding id of -1 means none."""
        ids: list[tuple[str, Any, int]] = [
            ("bos", self.bos, 0),
            *(("eos", i, 0) for i in self.eos),
            ("pad", self.pad, -1),
        ]
        for name, value, least in ids:
            if value is None and name != "eos":
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(
                whole and least <= value < self.vocab,
                f"{name}_token_id {value!r} is not a token: vocab_size is {self.vocab}",
            )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)
