"""The family and the anatomy of one model as tables for a terminal (rich), and as plain data for `--json`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from rorqual.family import account, memory, words
from rorqual.family.cards import MODEL_LICENCE, Card
from rorqual.family.parts import CompressedAttention, ModelConfig, require
from rorqual.family.pieces import runs
from rorqual.family.registry import models

WIDE = 148
"""Columns from which the family's table has one line a model."""

PARTS = {
    "embedding": "embedding",
    "head": "output head",
    "attention": "attention",
    "index": "indexer",
    "compressor": "compressor",
    "dense": "dense feed-forward",
    "routed": "routed experts",
    "shared": "shared experts",
    "router": "router",
    "norm": "norms",
    "residual": "hyper-connections",
}


# ------------------------------------------------------------------------------------------- family


def models_as_dict() -> list[dict[str, Any]]:
    """The family as plain data: one record a model, counts as exact integers, bytes a token as numbers."""
    return [_summary(card) for card in models()]


def _summary(card: Card) -> dict[str, Any]:
    config = card.config
    p, c = account.parameters(config), account.cache(config)
    return {
        "name": card.name,
        "aliases": list(card.aliases),
        "hub_id": card.hub_id,
        "released": card.released,
        "model_type": config.model_type,
        "layers": len(config.layers),
        "hidden": config.hidden,
        "parameters": p.total,
        "parameters_active": p.active,
        "parameters_active_without_embedding": p.active_without_embedding,
        "parameters_with_mtp": p.with_mtp,
        "parameters_in_checkpoint": p.checkpoint,
        "cache_bytes_per_token": float(c.growing),
        "cache_bytes_per_sequence": c.fixed,
        "context": card.context,
        "max_positions": config.max_positions,
        "licence": card.licence,
        "encoding": card.encoding,
        "source": card.source,
        "unverified": list(card.unverified),
        "note": card.note,
    }


def show_models(console: Console) -> None:
    """Print the whole family, oldest first: shape, exact parameter counts, cache, context and licence."""
    cards = models()
    width = console.width
    console.print(_family_wide(cards) if width >= WIDE else _family_narrow(cards, width))
    notes = [
        "Cache: bytes a token in bf16; V4 adds a fixed window (rorqual inspect NAME).",
        "Active: what one token touches, the embedding table included.",
        "(u) some values of this model were recalled, not read in a primary source: rorqual inspect NAME.",
    ]
    console.print(Text("\n".join(notes), style="dim"))


def _mark(card: Card) -> Text:
    text = Text(card.name, style="bold")
    return text.append(" (u)", style="yellow") if card.unverified else text


def _licence(card: Card) -> str:
    return card.licence.replace(MODEL_LICENCE, "Model License")


def _shape(config: ModelConfig) -> str:
    return f"{len(config.layers)}x{config.hidden}"


def _family_wide(cards: tuple[Card, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)
    table.add_column("released", no_wrap=True)
    for name in ("layers", "parameters", "", "active", "", "cache", "context"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    for card in cards:
        p, c = account.parameters(card.config), account.cache(card.config)
        numbers = (f"{p.total:,}", words.count(p.total), f"{p.active:,}", words.count(p.active))
        cache, context = f"{int(c.growing):,}", words.tokens(card.context)
        table.add_row(
            _mark(card), card.released, _shape(card.config), *numbers, cache, context, _licence(card)
        )
    return table


def _family_narrow(cards: tuple[Card, ...], width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=width < 100)
    table.add_column("model\nreleased, layers, licence", ratio=1)
    table.add_column("parameters\nexactly", justify="right", no_wrap=True)
    table.add_column("active\nexactly", justify="right", no_wrap=True)
    table.add_column("cache\ncontext", justify="right", no_wrap=True)
    for card in cards:
        p, c = account.parameters(card.config), account.cache(card.config)
        facts = f"{card.released}, {_shape(card.config)}, {_licence(card)}"
        table.add_row(
            _mark(card).append(f"\n{facts}", style="not bold dim"),
            f"{words.count(p.total)}\n[dim]{p.total:,}",
            f"{words.count(p.active)}\n[dim]{p.active:,}",
            f"{int(c.growing):,}\n[dim]{words.tokens(card.context)}",
        )
    return table


# ------------------------------------------------------------------------------------------- anatomy


def _split(subject: Card | ModelConfig) -> tuple[Card | None, ModelConfig]:
    return (subject, subject.config) if isinstance(subject, Card) else (None, subject)


def as_dict(subject: Card | ModelConfig, *, context: int | None = None, batch: int = 1) -> dict[str, Any]:
    """The anatomy of a model as plain data, the numbers of `show_inspect`.

    Args:
        subject: a card, or a config.
        context: tokens a sequence, for cache, FLOPs and memory; the advertised context if None.
        batch: sequences served at once.

    Raises:
        ConfigError: a context or batch below one.
    """
    card, config = _split(subject)
    context = _checked(subject, context, batch)
    p, f = account.parameters(config), account.flops(config, context)
    return {
        "model": _summary(card) if card is not None else {"name": config.name, "parameters": p.total},
        "context": context,
        "batch": batch,
        "runs": [
            {
                "layers": run.span,
                "count": run.count,
                "period": [
                    {
                        "attention": words.attention(layer.attention),
                        "positions": words.rope(layer.attention.rope),
                        "feed_forward": words.feed_forward(layer.ff),
                        "parameters": account.layer_parameters(config, layer).total,
                        "parameters_active": account.layer_parameters(config, layer).active,
                    }
                    for layer in run.period
                ],
            }
            for run in runs(config.layers)
        ],
        "parameters": {
            "total": p.total,
            "active": p.active,
            "active_without_embedding": p.active_without_embedding,
            "parts": {name: {"total": both[0], "active": both[1]} for name, both in p.parts.items()},
            "mtp_unique": p.mtp_unique,
            "mtp_copies": p.mtp_copies,
            "mtp_active": p.mtp_active,
            "with_mtp": p.with_mtp,
            "checkpoint": p.checkpoint,
            "hash_table_integers": p.hash_entries,
        },
        "flops_per_token": {"matmul": f.matmul, "attention": f.attention, "index": f.index, "total": f.total},
        "cache": [
            {"what": what, "bytes_per_token": each, "bytes": whole}
            for what, each, whole in _caches(config, context, batch)
        ],
        "serving": [
            {
                "precision": s.precision,
                "weights": s.weights,
                "cache": s.cache,
                "activations_estimate": s.activations,
                "devices": {fit.device.name: fit.count for fit in s.fits},
            }
            for s in _servings(config, context, batch)
        ],
    }


def _checked(subject: Card | ModelConfig, context: int | None, batch: int) -> int:
    """The context to show, the advertised one by default."""
    if context is None:
        context = subject.context if isinstance(subject, Card) else subject.max_positions
    require(context >= 1 and batch >= 1, f"context and batch must be at least 1, got {context} and {batch}")
    return context


def _caches(config: ModelConfig, context: int, batch: int) -> Iterator[tuple[str, float, int]]:
    """(what, bytes a token, bytes in all): this model, its serving layout, and MHA and GQA of its shape."""
    plain, served = account.cache(config), account.cache(config, "serving")
    yield "this model, bf16", float(plain.growing), plain.at(context, batch)
    if served != plain:
        yield "this model, serving layout", float(served.growing), served.at(context, batch)
    for name, elements in (
        ("GQA with 8 groups", account.gqa_elements(config)),
        ("MHA of this shape", account.mha_elements(config)),
    ):
        yield f"{name}, bf16", 2.0 * elements, 2 * elements * context * batch


def _servings(config: ModelConfig, context: int, batch: int) -> list[memory.Serving]:
    options = memory.precisions(config)
    return [memory.serving(config, context=context, batch=batch, precision=option) for option in options]


def show_inspect(
    subject: Card | ModelConfig, console: Console, *, context: int | None = None, batch: int = 1
) -> None:
    """Print a model's anatomy: layers by kind, parameters, FLOPs, cache, and what it takes to serve it.

    Args:
        subject: a card, or a config.
        console: where to print; 80 columns are enough.
        context: tokens a sequence; the advertised context if None.
        batch: sequences served at once.

    Raises:
        ConfigError: a context or batch below one.
    """
    card, config = _split(subject)
    context = _checked(subject, context, batch)
    sections = [
        _title(card, config),
        _section("Layers", _layers(config)),
        _section("Parameters", _parameters(config)),
        _section(f"Cache, {batch} x {context:,} tokens", _cache_table(config, context, batch)),
        _section("FLOPs a token, forward", _flops_table(config, context)),
        _section(f"To serve {batch} x {context:,} tokens", _serving_table(config, context, batch)),
    ]
    if card is not None and card.unverified:
        note = f"(u) recalled, not read in a primary source: {', '.join(card.unverified)}"
        sections.append(Text(f"\n{note}", style="yellow"))
    if card is not None and card.note:
        sections.append(Text(f"\nNote: {card.note}", style="yellow"))
    console.print(Group(*sections))


def _section(title: str, body: RenderableType) -> Group:
    return Group(Text(""), Rule(Text(title, style="bold"), align="left", style="dim"), body)


def _grid(*columns: str, header: bool = True) -> Table:
    """A plain table; a column whose name starts with `>` is numbers."""
    table = Table(box=None, pad_edge=False, show_header=header, header_style="dim", padding=(0, 2, 0, 0))
    for name in columns:
        right = name.startswith(">")
        table.add_column(name.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def _title(card: Card | None, config: ModelConfig) -> RenderableType:
    p = account.parameters(config)
    head = Text(card.name if card is not None else config.name or config.model_type, style="bold")
    if card is not None:
        head.append(f"  {card.hub_id}, {card.released}, {_licence(card)}", style="not bold dim")
    lines = [
        f"{words.count(p.total)} parameters, {words.count(p.active)} active a token;"
        f" {len(config.layers)} layers, {config.hidden:,} wide, {config.vocab:,} tokens",
    ]
    context = f"{config.max_positions:,} positions"
    if card is not None:
        context = f"{words.tokens(card.context)} context advertised, {context}"
    stored = config.quantization
    form = config.dtype
    if stored is not None:
        scales = "power-of-two" if stored.ue8m0 else "fp32"
        form = f"FP8, {stored.block[0]}x{stored.block[1]} blocks, {scales} scales"
        form += ", FP4 experts" if stored.experts == "fp4" else ""
    lines += [context, f"stored as {form}"]
    ropes = {layer.attention.rope: None for layer in config.layers}
    lines += [f"positions: {words.rope(rope)}" for rope in ropes]
    if config.residual is not None:
        r = config.residual
        lines.append(f"{r.streams} residual streams, hyper-connections with {r.iterations} Sinkhorn rounds")
    if card is not None:
        lines.append(
            f"source: {card.source}" + (f"; chat encoding: {card.encoding}" if card.encoding else "")
        )
    return Group(head, Text("\n".join(lines)))


def _layers(config: ModelConfig) -> Table:
    table = _grid("layers", "parts", ">parameters", ">active")
    for run in runs(config.layers):
        for position, layer in enumerate(run.period):
            count = account.layer_parameters(config, layer)
            if len(run.period) == 1:
                name = run.span
            else:
                name = run.span if position == 0 else "in turn"
            repeat = f"{run.count} x " if run.count > 1 else ""
            table.add_row(
                name,
                f"{words.attention(layer.attention)}\n{words.feed_forward(layer.ff)}",
                f"{repeat}{words.count(count.total)}\n[dim]{count.total:,}",
                f"{words.count(count.active)}\n[dim]{count.active:,}",
            )
    for layer in {layer: None for layer in config.mtp}:
        count = account.layer_parameters(config, layer)
        table.add_row(
            "MTP",
            f"{words.attention(layer.attention)}\n{words.feed_forward(layer.ff)}",
            f"{words.count(count.total)}\n[dim]{count.total:,}",
            f"{words.count(count.active)}\n[dim]{count.active:,}",
        )
    return table


def _parameters(config: ModelConfig) -> Table:
    p = account.parameters(config)
    table = _grid("", ">total", ">active a token", ">share")
    for name, label in PARTS.items():
        if name in p.parts:
            total, active = p.parts[name]
            table.add_row(label, f"{total:,}", f"{active:,}", f"{100 * total / p.total:.1f}%")
    table.add_row("all", f"{p.total:,}", f"{p.active:,}", "", style="bold")
    if not p.tied:
        table.add_row("without embedding", "", f"{p.active_without_embedding:,}", "")
    if p.mtp_unique:
        table.add_row("MTP, unique", f"{p.mtp_unique:,}", f"{p.mtp_active:,}", "")
        table.add_row("all with MTP", f"{p.with_mtp:,}", "", "")
    if p.mtp_copies:
        table.add_row("all with MTP's copies", f"{p.checkpoint:,}", "", "")
    if p.hash_entries:
        table.add_row("hash tables, integers", f"{p.hash_entries:,}", "", "")
    return table


def _cache_table(config: ModelConfig, context: int, batch: int) -> RenderableType:
    table = _grid("", ">bytes a token", ">in all", ">to the first")
    rows = list(_caches(config, context, batch))
    ours = rows[0][2]
    for what, each, whole in rows:
        ratio = words.times(whole / ours)
        table.add_row(what, f"{each:,.2f}".rstrip("0").rstrip("."), words.size(whole), ratio)
    if not any(isinstance(layer.attention, CompressedAttention) for layer in config.layers):
        return table
    served = account.cache(config, "serving")
    note = (
        f"Serving: exactly {words.per_token(served)} a sequence for the windows,"
        f" and {served.pooling:,} for unfinished compression windows."
    )
    return Group(table, Text(note, style="dim"))


def _flops_table(config: ModelConfig, context: int) -> Table:
    table = _grid("at position", ">matmul", ">attention", ">indexer", ">total", ">attention's share")
    for position in sorted({4096, 32768, context} & set(range(1, max(context, 4096) + 1))):
        f = account.flops(config, position)
        share = 100 * (f.attention + f.index) / f.total
        index = words.count(f.index) if f.index else "-"
        cells = (
            words.count(f.matmul),
            words.count(f.attention),
            index,
            words.count(f.total),
            f"{share:.0f}%",
        )
        table.add_row(f"{position:,}", *cells)
    return table


def _serving_table(config: ModelConfig, context: int, batch: int) -> RenderableType:
    options = _servings(config, context, batch)
    table = _grid(
        "", *(f">{'FP4 experts' if s.precision == 'fp4' else s.precision.upper()}" for s in options)
    )
    for label, values in (
        ("weights", [s.weights for s in options]),
        ("cache", [s.cache for s in options]),
        ("activations (estimate)", [s.activations for s in options]),
    ):
        table.add_row(label, *(words.size(value) for value in values))
    for fits in zip(*(s.fits for s in options), strict=True):
        counts = ("-" if fit.count is None else f"{fit.count}" for fit in fits)
        table.add_row(fits[0].device.name, *counts)
    note = f"Released as {memory.released(config)}. Devices: how many it takes, all spread evenly."
    return Group(table, Text(note, style="dim"))
