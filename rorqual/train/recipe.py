"""A run as facts: model, data, schedules, optimizer. State after step n is a function of these and n."""

from __future__ import annotations

import hashlib
import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

import torch

from rorqual.family import MLA, CompressedAttention, ModelConfig, MoE
from rorqual.family.parts import Attention
from rorqual.train.anticipate import Anticipation
from rorqual.train.balance import V2Balance
from rorqual.train.optim import AdamW, Settings
from rorqual.train.schedule import Schedule, Stage

DSA = ("", "dense", "warm-up", "sparse")
"""How models with indexers are trained: "" sparse, and the indexers learn nothing; "dense" without them; "warm-up"
dense, and they alone learn; "sparse", and all learn (V3.2 report 2.1; facts 3.8)."""

DTYPES = ("float32", "bfloat16", "float64")


@dataclass(frozen=True)
class Source:
    """A corpus and its weight in the mixture."""

    folder: str
    weight: float = 1.0


@dataclass(frozen=True)
class Guard:
    """Against loss spikes: a step whose gradient norm is more than `factor` times the median of the last `window`
    steps, or whose loss or gradient is not a number, moves nothing; after `most` such steps in a row the run stops.

    With `back` the run goes back to its newest checkpoint and leaves out what was seen from there to that step, that
    step's batch with it; `most` times to the same one at most. So it does, whatever `back` says, when weights are no
    longer numbers. To the bit on a CPU, stopped or not, as long as `save_every` stays."""

    factor: float = 10.0
    window: int = 50
    most: int = 5
    back: bool = False

    def __post_init__(self) -> None:
        if not (self.factor > 1 and self.window >= 1 and self.most >= 0):
            raise ValueError(
                f"a guard of factor {self.factor}, window {self.window} and most {self.most}: the first must be above "
                "1, the second above 0, the third not below; guard=none is without"
            )


@dataclass(frozen=True)
class Dropping:
    """V2's token dropping (V2 report 2.2.4): each device (a group of a router's experts) takes `capacity` times its
    even share of a micro-batch's tokens, those of highest affinity; from a share `exempt` of sequences none is dropped.
    """

    capacity: float = 1.0
    exempt: float = 0.1

    def __post_init__(self) -> None:
        if not (self.capacity > 0 and 0 <= self.exempt <= 1):
            raise ValueError(
                f"dropping at capacity {self.capacity} with {self.exempt} exempt: the first must be above 0, the "
                "second a share"
            )


@dataclass(frozen=True)
class Recipe:
    """Everything a run is made of. `tokens`: where it ends. `micro`: rows that go through the model at once.
    `v2`: V2's balance losses instead of V3's. `rate`, `mtp` (λ) and `speed` (γ of the routers' biases) are
    functions of tokens seen. `recompute`: less is kept for the backward pass, and made again there. `fp8`: layers
    multiply in FP8 (V3 report 3.3). `begin`: a checkpoint whose weights it begins with. `dsa`: how models with indexers
    are trained (`DSA`). `keep`: the last checkpoints that stay, beside the `keep_best` with the lowest held-out loss,
    of those at whose step it was evaluated."""

    name: str
    config: ModelConfig
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    tokens: int
    rate: Schedule
    optimizer: Settings = field(default_factory=AdamW)
    mtp: Schedule = field(default_factory=lambda: Schedule(0.3))
    speed: Schedule = field(default_factory=lambda: Schedule(0.001))
    balance: float = 1e-4
    v2: V2Balance | None = None
    clip: float | None = 1.0
    guard: Guard | None = field(default_factory=Guard)
    ema: float | None = None
    apart: bool = False
    begin: str = ""
    dsa: str = ""
    drop: Dropping | None = None
    anticipate: Anticipation | None = None
    recompute: bool = False
    fp8: bool = False
    micro: int = 8
    dtype: str = "float32"
    seed: int = 0
    evaluate_every: int = 0
    save_every: int = 0
    keep: int = 2
    keep_best: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "micro", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it can be {', '.join(DTYPES)}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; it must be above 0, or none")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is {self.ema}; it must lie between 0 and 1, or be none")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must not be below 0, and below 2^63")
        if not 0 <= self.balance < math.inf or min(self.evaluate_every, self.save_every, self.keep_best) < 0:
            raise ValueError("balance, evaluate_every, save_every and keep_best must not be below 0")
        layers = (*self.config.layers, *self.config.mtp)
        if self.dsa not in DSA:
            raise ValueError(f"dsa is {self.dsa!r}; it can be {', '.join(repr(kind) for kind in DSA)}")
        if self.dsa and not any(has_index(layer.attention) for layer in layers):
            raise ValueError(f"dsa is {self.dsa!r}, but the model has no indexers")
        if self.drop is not None and not any(
            isinstance(layer.ff, MoE) and layer.ff.router.groups > 1 for layer in layers
        ):
            raise ValueError(
                "tokens are dropped by device, and no router of this model has groups of experts"
            )

    def moves(self, name: str) -> bool:
        """Whether the parameter of that name learns."""
        return self.dsa != "warm-up" or ".index." in name

    def fingerprint(self) -> str:
        """What two runs compare, to know whether one goes on with the other. How often it is looked at and saved is
        left out, as is what of a folder's name, and what only decides how much memory a step takes (its bits may
        change with that)."""
        left_out = {
            "name",
            "evaluate_every",
            "save_every",
            "keep",
            "keep_best",
            "sources",
            "begin",
            "recompute",
        }
        if self.drop is None:  # whose room is a micro-batch's
            left_out.add("micro")
        facts = [(f.name, repr(getattr(self, f.name))) for f in fields(self) if f.name not in left_out]
        weights = [source.weight for source in self.sources]
        return hashlib.sha256(repr((facts, weights)).encode()).hexdigest()


def has_index(part: Attention) -> bool:
    """Whether an indexer chooses what attention of this kind sees."""
    if isinstance(part, CompressedAttention):
        return part.compress is not None and part.compress.index is not None
    return isinstance(part, MLA) and part.index is not None


def override(recipe: Any, path: str, value: str) -> Any:
    """`recipe` with the field at `path` ("optimizer.decay", "stages.0.batch") read from text in the field's type; what
    is none so far ("drop.capacity") begins with its defaults. ValueError names what is there instead."""
    head, _, rest = path.partition(".")
    if isinstance(recipe, tuple):
        if not head.isdigit() or int(head) >= len(recipe):
            raise ValueError(f"{head!r} is no place in a list of {len(recipe)}: they are numbered from 0")
        at = int(head)
        new = override(recipe[at], rest, value) if rest else _read(recipe[at], value, head, type(recipe[at]))
        return (*recipe[:at], new, *recipe[at + 1 :])
    if not is_dataclass(recipe) or isinstance(recipe, type):
        raise ValueError(f"nothing lies under {head!r} here")
    names = [f.name for f in fields(recipe) if not f.name.startswith("_")]
    if head not in names:
        raise ValueError(f"{type(recipe).__name__} has no {head!r}; it has {', '.join(names)}")
    old, kind = getattr(recipe, head), get_type_hints(type(recipe))[head]
    old = _default(kind) if old is None else old
    return replace(recipe, **{head: override(old, rest, value) if rest else _read(old, value, head, kind)})


def _default(kind: Any) -> Any:
    """What a field of settings or none is when it isn't none; None for all other fields."""
    found: list[Any] = [part for part in get_args(kind) if is_dataclass(part)]
    if len(found) != 1 or any(f.default is f.default_factory is MISSING for f in fields(found[0])):
        return None
    return found[0]()


def _read(old: Any, value: str, name: str, kind: Any) -> Any:
    """`value` as a field's type has it."""
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    low = value.lower()
    if low == "none" and NoneType in kinds:
        return None
    try:
        if bool in kinds:
            return {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}[low]
        if Schedule in kinds:
            return Schedule(float(value))
        if torch.dtype in kinds:
            return {name: getattr(torch, name) for name in DTYPES}[low]
        if str in kinds:
            return value
        if int in kinds:
            number = float(value)  # so that 1e6 is one, too
            if not number.is_integer():
                raise ValueError
            return int(number)
        if float in kinds:
            return float(value)
    except (KeyError, ValueError, OverflowError):
        now = "a schedule now; a number makes it constant" if isinstance(old, Schedule) else f"{old!r} now"
        raise ValueError(f"{name}={value} can't be read as one of its kind: it is {now}") from None
    inner = next((f.name for f in fields(old)), "") if is_dataclass(old) else "0"
    raise ValueError(f"{name} is {old!r}: name a field of it, such as {name}.{inner}")
