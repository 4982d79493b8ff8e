"""Looking inside: what a request may have told of the model while it answers, token by token.

A token's experts, and the earlier tokens it looked at, are those of its own way through the model: of the pass that
took it in to predict the next one. They are known one pass after the token was drawn; the last token of an answer goes
through no pass (unless it was a draft that stood), and tokens of the prompt are not told of.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rorqual.family import account
from rorqual.family.parts import GQA, MLA, Attention, MoE
from rorqual.nn import InputError, Transformer
from rorqual.nn.paged import page_bytes


@dataclass(frozen=True)
class Inside:
    """What a request wants told: the experts that each layer chose, drafts that stood or were refused, the earlier
    tokens that sparse attention picked (in all layers, or in those of these numbers: V3.2 picks 2,048 in each of 61).
    What a model does not have is told as None or empty. Raises InputError for what is no such thing."""

    experts: bool = False
    drafts: bool = False
    seen: bool | tuple[int, ...] = False

    def __post_init__(self) -> None:
        if isinstance(self.seen, list | tuple) and all(type(layer) is int for layer in self.seen):
            object.__setattr__(self, "seen", tuple(sorted(set(self.seen))))
        elif not isinstance(self.seen, bool):
            raise InputError(f"inside.seen must be True, False or layers' numbers, got {self.seen!r:.40}")
        for name in ("experts", "drafts"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"inside.{name} must be True or False, got {getattr(self, name)!r:.40}")

    def __or__(self, other: Inside | None) -> Inside:
        """What a pass has to tell for both."""
        if other is None:
            return self
        seen = bool(self.seen or other.seen)
        return Inside(self.experts or other.experts, self.drafts or other.drafts, seen)

    @property
    def watches(self) -> bool:
        """Whether passes have to keep what they chose."""
        return self.experts or bool(self.seen)


@dataclass(frozen=True, slots=True)
class Sight:
    """Earlier positions that a token looked at in a layer, ascending, the token's own among them. Each stands for
    itself and the `every` - 1 after it: V4's layers look at entries made of that many tokens."""

    layer: int
    positions: array[int]
    every: int = 1


@dataclass(frozen=True, slots=True)
class Look:
    """One token of an answer, seen from inside. index: its place in the answer. experts: by layer of
    `Facts.expert_layers`, best first. drafted: MTP drafted it and it stood. refused: the draft that was refused in its
    place. What was not asked for, or is not there, is None or empty."""

    index: int
    experts: list[list[int]] | None = None
    drafted: bool = False
    refused: tuple[int, ...] = ()
    seen: list[Sight] | None = None


@dataclass(frozen=True)
class Facts:
    """What there is to see in a model as an engine runs it.

    expert_layers: those with experts, of which each token takes `chosen` of `experts`, beside `shared` ones for all.
    attention: by layer "gqa", "mla", "dsa", "window", "csa" or "hca". every: tokens an entry, where a layer looks at
    entries. window: the last tokens that V4's layers see besides. cache: what a sequence keeps, as `rorqual inspect`
    counts it, in the engine's types; mha_bytes: of a token, if every head had its own key and value in that type.
    drafts: tokens that MTP drafts a pass.
    """

    layers: int
    expert_layers: tuple[int, ...]
    experts: int
    chosen: int
    shared: int
    attention: tuple[str, ...]
    every: tuple[int, ...]
    window: int
    drafts: int
    cache: account.Cache
    mha_bytes: int
    widths: tuple[int, ...] = ()
    """Experts that a token takes in each of `expert_layers`."""
    picked: tuple[int, ...] = ()
    """By layer, places that a token's `Sight` may have at most; 0 where there is none."""

    @classmethod
    def of(cls, model: Transformer, fp8_cache: bool = False, speculate: bool = False) -> Facts:
        """Those of a model."""
        config = model.config
        mixed = [(n, layer.ff) for n, layer in enumerate(config.layers) if isinstance(layer.ff, MoE)]
        parts = [layer.attention for layer in config.layers]
        first = mixed[0][1] if mixed else None
        return cls(
            layers=len(config.layers),
            expert_layers=tuple(n for n, _ in mixed),
            experts=first.routed if first else 0,
            chosen=first.top_k if first else 0,
            shared=first.shared if first else 0,
            attention=tuple(_kind(part) for part in parts),
            every=tuple(_every(part) for part in parts),
            window=max((getattr(part, "window", 0) for part in parts), default=0),
            drafts=int(speculate),
            cache=_cache(model, fp8_cache),
            mha_bytes=account.mha_elements(config) * model.dtype.itemsize,
            widths=tuple(ff.top_k for _, ff in mixed),
            picked=tuple(_picked(part, config.max_positions) for part in parts),
        )

    @property
    def indexed(self) -> list[int]:
        """Layers whose indexer picks what a token looks at."""
        return [n for n, kind in enumerate(self.attention) if kind in ("dsa", "csa")]

    def told(self, inside: Inside) -> Inside:
        """Of what a request wants, what this model has."""
        return Inside(
            inside.experts and bool(self.expert_layers),
            inside.drafts and bool(self.drafts),
            inside.seen if self.indexed else False,
        )


def _kind(part: Attention) -> str:
    if isinstance(part, GQA):
        return "gqa"
    if isinstance(part, MLA):
        return "mla" if part.index is None else "dsa"
    return {"SWA": "window", "CSA": "csa", "HCA": "hca"}[part.kind]


def _picked(part: Attention, positions: int) -> int:
    kind, every = _kind(part), _every(part)
    index = getattr(part, "index", None) or getattr(getattr(part, "compress", None), "index", None)
    if index is not None:
        return min(int(index.top_k), positions // every)
    return positions // every if kind == "hca" else 0


def _every(part: Attention) -> int:
    compress = getattr(part, "compress", None)
    return compress.ratio if compress is not None else 1


def _cache(model: Transformer, fp8: bool) -> account.Cache:
    """`family.account.cache` of the types that this model's caches have."""
    plain = account.cache(model.config)
    lanes = model.lanes(fp8)[: len(model.layers)]
    rings = [
        (name, lane.keep * lane.bytes_per_item())
        for kinds in lanes
        for name, lane in kinds.items()
        if lane.keep is not None
    ]
    return account.Cache(
        elements=plain.elements,
        growing=sum((_growing(kinds) for kinds in lanes), Fraction(0)),
        fixed=sum(size for name, size in rings if name == "window"),
        pooling=sum(size for name, size in rings if name != "window"),
    )


def _growing(kinds: Any) -> Fraction:
    every = max((lane.every for lane in kinds.values()), default=1)
    return Fraction(page_bytes([kinds], every), every)
