"""What it takes to serve a model: bytes of weights, cache and activations, and the devices that hold them.

Weights and cache are exact; activations and what a runtime keeps for itself are estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rorqual.family.account import cache
from rorqual.family.parts import MLA, ConfigError, ModelConfig, MoE, SwiGLU, require
from rorqual.family.pieces import all_mtp_pieces, main_pieces

PRECISIONS = {"bf16": ("bf16", "bf16"), "fp8": ("fp8", "fp8"), "fp4": ("fp8", "fp4")}
"""How linears and routed experts are held; embedding, head, norms and routers stay in bf16 or fp32."""

PREFILL = 2048
"""Tokens that pass through the layers at once while a prompt is read, for the estimate of activations."""


@dataclass(frozen=True)
class Device:
    """A place to serve from.

    `memory` is in bytes (marketing gigabytes of 10^9), `usable` the share of it that is ours, `most` how many
    of them are worth joining.
    """

    name: str
    memory: int
    usable: float = 0.9
    most: int = 1024


GB = 10**9
DEVICES = (
    Device("B200 192 GB", 192 * GB),
    Device("H200 141 GB", 141 * GB),
    Device("H100 80 GB", 80 * GB),
    Device("A100 80 GB", 80 * GB),
    Device("L40S 48 GB", 48 * GB, most=16),
    Device("RTX 4090 24 GB", 24 * GB, most=8),
    Device("Mac 512 GB", 512 * GB, usable=0.75, most=1),
    Device("Mac 128 GB", 128 * GB, usable=0.75, most=1),
    Device("Mac 64 GB", 64 * GB, usable=0.75, most=1),
)
"""What `fits` tries. A Mac shares its memory with the system, which keeps a quarter."""


def precisions(config: ModelConfig) -> tuple[str, ...]:
    """The precisions that make sense for a model: FP4 is for routed experts."""
    experts = any(isinstance(layer.ff, MoE) for layer in config.layers)
    return ("bf16", "fp8", "fp4") if experts else ("bf16", "fp8")


def released(config: ModelConfig) -> str:
    """The precision of the released files."""
    if config.quantization is None:
        return "bf16"
    return config.quantization.experts


def weight_bytes(config: ModelConfig, precision: str | None = None, *, mtp: bool = False) -> int:
    """Bytes of the weights with their scales.

    Args:
        config: the model.
        precision: bf16, fp8 or fp4 (experts; the other linears FP8); as released if None.
        mtp: with the MTP layers and V3's copies of embedding and head.

    Raises:
        ConfigError: an unknown precision.
    """
    precision = precision or released(config)
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is unknown: use bf16, fp8 or fp4")
    linear, expert = PRECISIONS[precision]
    stored = config.quantization
    block = stored.block if stored is not None else (128, 128)
    scale = 1 if stored is not None and stored.ue8m0 else 4
    pieces = main_pieces(config) + (all_mtp_pieces(config) if mtp else [])
    return sum(piece.bytes(linear, expert, block, scale) for piece in pieces)


def activation_bytes(config: ModelConfig, context: int, batch: int) -> int:
    """An estimate of what a forward pass needs beside weights and cache, on each device.

    Residual streams, one layer's widest intermediates and the logits, for a prefill chunk of 2,048 tokens or
    one token a sequence, whichever is more; and 1 GB for the runtime.
    """
    tokens = max(batch, min(PREFILL, context * batch))
    streams = config.residual.streams if config.residual is not None else 1
    width = 0
    for layer in {layer: None for layer in config.layers}:
        a, ff = layer.attention, layer.ff
        inner = ff.width if isinstance(ff, SwiGLU) else ff.width * (ff.top_k + ff.shared)
        key = a.qk_dim if isinstance(a, MLA) else a.head_dim
        width = max(width, 3 * inner, 3 * a.heads * key)
    return tokens * 2 * (config.hidden * (streams + 4) + width) + batch * config.vocab * 4 + GB


@dataclass(frozen=True)
class Fit:
    """How many of a device hold the model, None where no sensible number does."""

    device: Device
    count: int | None


@dataclass(frozen=True)
class Serving:
    """Bytes to serve at one precision, and the devices that have room for them."""

    precision: str
    weights: int
    cache: int
    activations: int
    fits: tuple[Fit, ...]

    @property
    def total(self) -> int:
        """Weights, cache and one device's activations."""
        return self.weights + self.cache + self.activations


def serving(config: ModelConfig, *, context: int, batch: int = 1, precision: str | None = None) -> Serving:
    """What serving `batch` sequences of `context` tokens takes, the cache in its serving layout.

    Weights and cache are thought of as spread evenly over the devices. The count is rounded up to a power of
    two within a node of eight, and to whole nodes beyond.

    Raises:
        ConfigError: an unknown precision, or a context or batch below one.
    """
    require(context >= 1 and batch >= 1, f"context and batch must be at least 1, got {context} and {batch}")
    weights = weight_bytes(config, precision)
    kept = cache(config, "serving").at(context, batch)
    activations = activation_bytes(config, context, batch)
    fits = []
    for device in DEVICES:
        room = int(device.memory * device.usable) - activations
        count = _round(ceil((weights + kept) / room)) if room > 0 else None
        fits.append(Fit(device, count if count is not None and count <= device.most else None))
    return Serving(precision or released(config), weights, kept, activations, tuple(fits))


def _round(count: int) -> int:
    """1, 2, 4, 8, then whole nodes of eight."""
    return 1 << (count - 1).bit_length() if count <= 8 else 8 * ceil(count / 8)
