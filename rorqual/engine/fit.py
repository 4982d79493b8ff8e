"""What a machine holds of a model that is served: weights and caches by rank, and how many sequences that leaves room
for. Arithmetic, not a measurement: weights and caches to the byte as the engine lays them out, activations estimated.

The engine's own rule decides: caches get what a GPU has left beside the weights but a tenth of it, which is for
activations; on a CPU, a quarter of the machine's memory.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from rorqual.family import MLA, ConfigError, ModelConfig, MoE, words
from rorqual.family.memory import DEVICES, GB, PRECISIONS, Device, activation_bytes, released
from rorqual.family.parts import GQA, SwiGLU
from rorqual.family.pieces import all_mtp_pieces, main_pieces
from rorqual.nn import Transformer
from rorqual.nn.paged import page_bytes, ring_bytes

RUNTIME = 2 * GB
"""What CUDA, NCCL and compiled kernels keep for themselves on a GPU; an estimate, on the high side."""

NAMES = {"b200": 0, "h200": 1, "h100": 2, "a100": 3, "l40s": 4, "4090": 5, "rtx4090": 5}


@dataclass(frozen=True)
class Machine:
    """`count` devices of one kind; `cpu`: the memory is a computer's own."""

    name: str
    device: Device
    count: int = 1
    cpu: bool = False


@dataclass(frozen=True)
class Room:
    """A model on a machine. Bytes are of the rank that holds most.

    `data` rows of `tensor` ranks; `weights`; `windows`: what requests take whatever their length (V4); `token`: cache
    bytes a token; `caches`: bytes left for pages; `activations`: the estimate, `spared` what is kept for them;
    `sequences` of the context asked for that fit at once, over all rows.
    """

    machine: Machine
    data: int
    tensor: int
    precision: str
    weights: int
    windows: int
    token: float
    caches: int
    activations: int
    spared: int
    sequences: int
    requests: int

    @property
    def fits(self) -> bool:
        """Whether all requests asked for run at once."""
        return self.sequences >= self.requests and self.activations <= self.spared

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        names = (
            "data",
            "tensor",
            "precision",
            "weights",
            "windows",
            "token",
            "caches",
            "activations",
            "spared",
        )
        told = {name: getattr(self, name) for name in (*names, "sequences", "requests", "fits")}
        return {"machine": self.machine.name, **told}


def machine(text: str) -> Machine:
    """A machine by name: "8xH200", "H100", "2x4090"; "48gb" for a GPU of so much memory; "cpu16gb" for a computer
    without one. Raises ConfigError."""
    found = re.fullmatch(r"(?:(\d{1,4})x)?(?:(cpu)?(\d{1,6})gb|([a-z0-9]+))", text.lower().replace(" ", ""))
    count = int(found[1] or 1) if found else 0
    if found is None or count < 1 or (found[4] and found[4] not in NAMES) or (found[2] and count > 1):
        known = ", ".join(name.upper() for name in NAMES)
        raise ConfigError(f"machine {text!r:.60} is unknown: use 8xH200 ({known}), 2x48gb, or cpu16gb")
    if found[4]:
        return Machine(text, DEVICES[NAMES[found[4]]], count)
    return Machine(text, Device(text, int(found[3]) * GB), count, bool(found[2]))


def rank_bytes(config: ModelConfig, data: int, tensor: int, precision: str | None = None) -> int:
    """Bytes of the weights on one rank of `data` x `tensor`, MTP modules with it, experts spread over all ranks."""
    linear, expert = PRECISIONS[precision or released(config)]
    stored = config.quantization
    block = stored.block if stored is not None else (128, 128)
    scale = 1 if stored is not None and stored.ue8m0 else 4
    total = 0
    for piece in [*main_pieces(config), *all_mtp_pieces(config)]:
        if piece.part == "copy":  # the engine has no copies of embedding and head
            continue
        ranks = data * tensor if piece.part in ("routed", "shared") else tensor if piece.cut else 1
        total += ceil(piece.bytes(linear, expert, block, scale) / ranks)
    return total


def room(
    config: ModelConfig,
    place: Machine,
    *,
    context: int,
    requests: int = 1,
    data: int | None = None,
    tensor: int | None = None,
    fp8_cache: bool = False,
) -> Room:
    """What `place` holds of a model as it was released, for `requests` sequences of `context` tokens at once.

    The layout is `rorqual serve`'s own unless given: rows of data for models with experts, else tensor ranks. Raises
    ConfigError for numbers that make no sense, InputError for a cache layout that the model has not.
    """
    if context < 1 or requests < 1:
        raise ConfigError(f"context and requests must be at least 1, got {context} and {requests}")
    sparse = any(isinstance(layer.ff, MoE) for layer in config.layers)
    if tensor is None:
        tensor = max(1, place.count // (data or (place.count if sparse else 1)))
    data = data or max(1, place.count // tensor)
    if data * tensor != place.count:
        raise ConfigError(
            f"{data} data x {tensor} tensor ranks are not the {place.count} devices of {place.name}"
        )
    _check_divides(config, tensor, data * tensor)
    model = Transformer(config, dtype=torch.bfloat16, device="meta")
    lanes = model.lanes(fp8_cache)[: len(model.layers)]
    size = math.lcm(64, *(lane.every for kinds in lanes for lane in kinds.values() if lane.keep is None))
    # Ranks of a row share the heads of GQA; what MLA and V4 keep has no heads, and is whole on each.
    shares = tensor if all(isinstance(layer.attention, GQA) for layer in config.layers) else 1
    page = page_bytes(lanes, size) // shares
    rows = ceil(requests / data)
    windows = 2 * rows * ring_bytes(lanes)
    weights = rank_bytes(config, data, tensor)
    memory = place.device.memory
    if place.cpu:
        spared, caches = memory // 4, memory // 4 - windows  # the rest is weights' and the system's
        if weights > memory // 2:
            caches = 0
    else:
        spared = memory // 10
        caches = memory - RUNTIME - weights - spared - windows
    fit = max(0, caches) // page // ceil(context / size) * data
    needed = activation_bytes(config, context, rows)
    precision = released(config)
    return Room(
        place,
        data,
        tensor,
        precision,
        weights,
        windows,
        page / size,
        max(0, caches),
        needed,
        spared,
        fit,
        requests,
    )


def lines(found: Room, context: int) -> list[str]:
    """The figures to be read, one a line."""
    place, each = found.machine, "" if found.machine.count == 1 else " on each"
    out = [
        f"{place.name}: {place.count} x {words.size(place.device.memory)}"
        + (f", {found.data} data x {found.tensor} tensor ranks" if place.count > 1 else ""),
        f"weights{each}, {found.precision}: {words.size(found.weights)}",
        f"kept for activations{each}: {words.size(found.spared)} (estimated need {words.size(found.activations)})",
        f"left for caches{each}: {words.size(found.caches)}, {found.token:,.0f} bytes a token"
        + (f", beside windows of {words.size(found.windows)}" if found.windows else ""),
        f"sequences of {context:,} tokens at once: {found.sequences:,}",
        f"{'fits' if found.fits else 'does not fit'} {found.requests} at once (arithmetic, not a run)",
    ]
    return out


def _check_divides(config: ModelConfig, tensor: int, world: int) -> None:
    """Refuse layouts that `spread` would refuse."""
    for layer in {layer: None for layer in config.layers}:
        a, ff = layer.attention, layer.ff
        groups = a.kv_heads if isinstance(a, GQA) else a.heads if isinstance(a, MLA) else a.o_groups
        wide = ff.width if isinstance(ff, SwiGLU) else tensor
        for count, what, ranks in (
            (groups, "heads or groups of them", tensor),
            (wide, "feed-forward channels", tensor),
            (ff.routed if isinstance(ff, MoE) else world, "routed experts", world),
        ):
            if count % ranks:
                raise ConfigError(
                    f"{count} {what} don't divide by {ranks}: choose other data and tensor ranks"
                )
