"""A picture of a model as SVG: its layers to scale, its attention heads, its experts and its cache.

Everything is drawn from the config alone. The tower is to scale: a stripe is a layer, and its area is its
parameters, so the dense first layers of V3 are slivers beside the ones with experts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from rorqual.family import account, words
from rorqual.family.canvas import INK, SOFT, Canvas
from rorqual.family.parts import (
    GQA,
    MLA,
    Attention,
    CompressedAttention,
    Layer,
    ModelConfig,
    MoE,
    SwiGLU,
)
from rorqual.family.pieces import Run, runs

WIDTH, HEIGHT = 1120, 840
TOWER_X, TOWER_TOP, TOWER_BOTTOM, TOWER_WIDTH = 210, 118, 742, 372
PANEL_X, PANEL_WIDTH = 640, 440
MOST = 2048
"""Squares drawn one by one; a made-up model with more heads or experts shows the first of them."""

ATTENTION = {
    "MHA": "#3f6fb5",
    "GQA": "#3f6fb5",
    "MQA": "#3f6fb5",
    "MLA": "#12857c",
    "DSA": "#0b5f8a",
    "SWA": "#7c8ba1",
    "CSA": "#6a4fb3",
    "HCA": "#b0468f",
}
"""Colours by attention kind, apart in lightness too so that they part without hue."""
DENSE, ROUTED, IDLE, SHARED, TABLE, REST = "#d9942b", "#e2622f", "#f6d3bd", "#9c3a1f", "#8d8a84", "#c9c4b8"
NAMES = {
    "MHA": "multi-head attention",
    "GQA": "grouped-query attention",
    "MQA": "multi-query attention",
    "MLA": "multi-head latent attention",
    "DSA": "sparse latent attention",
    "SWA": "sliding-window attention",
    "CSA": "compressed sparse attention",
    "HCA": "heavily compressed attention",
}


def draw(config: ModelConfig, title: str = "") -> str:
    """The model as an SVG document of 1120 by 840 units, on its own light ground.

    Args:
        config: the model.
        title: its heading; the config's name or type if empty.
    """
    p = account.parameters(config)
    title = title or config.name or config.model_type
    attention = ", ".join(NAMES[kind] for kind in _kinds(config))
    described = (
        f"{len(config.layers)} layers, {config.hidden} wide, {words.count(p.total)} parameters of which"
        f" {words.count(p.active)} are active for a token. Attention: {attention}."
        f" Cache: {words.per_token(account.cache(config))} bytes a token."
    )
    canvas = Canvas(WIDTH, HEIGHT, title, described)
    shown = title if len(title) <= 56 else f"\u2026{title[-55:]}"
    canvas.text(40, 54, shown, size=26, weight=700)
    summary = f"{words.count(p.total)} parameters, {words.count(p.active)} active a token"
    shape = f"{len(config.layers)} layers, {config.hidden:,} wide, {config.max_positions:,} positions"
    canvas.text(40, 80, f"{summary}; {shape}", size=14, fill=SOFT)
    _tower(canvas, config)
    panels = (_attention_panel, _expert_panel, _cache_panel)
    free = TOWER_BOTTOM - TOWER_TOP - sum(panel(Canvas(0, 0, "", ""), config, 0.0) for panel in panels)
    y = float(TOWER_TOP)
    for panel in panels:
        y = panel(canvas, config, y) + free / (len(panels) - 1)
    _legend(canvas, config, 796)
    return canvas.document()


def _kinds(config: ModelConfig) -> list[str]:
    """The attention kinds in order of appearance."""
    return list(dict.fromkeys(words.attention_kind(layer.attention) for layer in config.layers))


# -------------------------------------------------------------------------------------------- tower


@dataclass(frozen=True)
class _Bar:
    """One stripe of the tower: coloured lengths in parameters, lower and upper edge."""

    parts: tuple[tuple[str, int], ...]
    top: float
    height: float


def _layer_bar(config: ModelConfig, layer: Layer) -> tuple[tuple[str, int], ...]:
    count = account.layer_parameters(config, layer)
    colour = ATTENTION[words.attention_kind(layer.attention)]
    always = DENSE if isinstance(layer.ff, SwiGLU) else SHARED
    idle = count.routed - count.routed_active
    lengths = ((colour, count.attention), (always, count.always), (ROUTED, count.routed_active), (IDLE, idle))
    return ((REST, count.rest), *lengths) if config.residual is not None else lengths


def _tower(canvas: Canvas, config: ModelConfig) -> None:
    """Every layer as a stripe, the embedding below, head and MTP above."""
    table = config.vocab * config.hidden
    rows: list[tuple[tuple[tuple[str, int], ...], float]] = [(((TABLE, table),), 3)]
    rows += [(_layer_bar(config, layer), 0) for layer in config.layers]
    rows.append((((TABLE, table),), 3))
    rows += [(_layer_bar(config, layer), 3) for layer in config.mtp]
    space = TOWER_BOTTOM - TOWER_TOP - sum(gap for _, gap in rows) - 6
    pitch = min(27.0, space / len(rows))
    stroke = pitch - (1.0 if pitch > 4 else 0.5)
    longest = max(sum(length for _, length in parts) for parts, _ in rows)
    bars: list[_Bar] = []
    y = float(TOWER_BOTTOM)
    for number, (parts, gap) in enumerate(rows):
        y -= pitch + (gap if number != 0 else 0)
        bars.append(_Bar(parts, y, stroke))
        if number == 0:
            y -= gap
    canvas.text(TOWER_X, TOWER_BOTTOM + 22, "area = parameters", size=12, fill=SOFT)
    width = words.count(longest)
    canvas.text(
        TOWER_X + TOWER_WIDTH, TOWER_BOTTOM + 22, f"full width {width}", size=12, fill=SOFT, anchor="end"
    )
    for bar in bars:
        x = float(TOWER_X)
        for colour, length in bar.parts:
            wide = TOWER_WIDTH * length / longest
            if wide > 0:
                canvas.rect(x, bar.top, max(wide, 0.6), bar.height, colour)
                x += wide
    _tower_labels(canvas, config, bars)


def _tower_labels(canvas: Canvas, config: ModelConfig, bars: list[_Bar]) -> None:
    """What each run of layers is, to the left of its stripes; labels are pushed apart where runs are thin."""
    marks: list[tuple[float, float, str, str]] = [
        (bars[0].top, bars[0].top + bars[0].height, "embedding", "")
    ]
    if config.tied:
        marks[0] = (*marks[0][:2], "embedding", "shared with the head")
    for run in runs(config.layers):
        high = bars[run.start + run.layers]
        low = bars[run.start + 1]
        marks.append((high.top, low.top + low.height, *_run_label(run)))
    count = len(config.layers)
    head = bars[count + 1]
    marks.append(
        (head.top, head.top + head.height, "output head", "" if not config.tied else "the embedding")
    )
    if config.mtp:
        high, low = bars[-1], bars[count + 2]
        name = "MTP layer" if len(config.mtp) == 1 else f"{len(config.mtp)} MTP layers"
        marks.append((high.top, low.top + low.height, name, ""))
    heights = [32.0 if second else 17.0 for *_, second in marks]
    centres = _spread([(top + bottom) / 2 for top, bottom, *_ in marks], heights)
    for (top, bottom, first, second), centre in zip(marks, centres, strict=True):
        middle = (top + bottom) / 2
        canvas.line(TOWER_X - 6, top, TOWER_X - 6, bottom, SOFT, 1.5)
        canvas.path(f"M{TOWER_X - 6} {middle:.1f} H{TOWER_X - 10} L{TOWER_X - 18} {centre:.1f}", SOFT)
        base = centre + 4 if not second else centre - 3
        canvas.text(TOWER_X - 22, base, first, size=12.5, weight=600, anchor="end")
        if second:
            canvas.text(TOWER_X - 22, base + 14, second, size=11.5, fill=SOFT, anchor="end")


def _run_label(run: Run) -> tuple[str, str]:
    kinds = " ".join(words.attention_kind(layer.attention) for layer in run.period)
    ff = words.feed_forward_kind(run.period[0].ff)
    if len(run.period) == 1:
        number = f"layer {run.span}" if run.count == 1 else f"{run.count} layers"
        return number, f"{kinds} + {ff}"
    return f"{run.count} x {len(run.period)} layers", f"{kinds.replace(' ', ', ')} + {ff}"


def _spread(centres: list[float], heights: list[float]) -> list[float]:
    """Centres (from low to high on the page, so falling) moved apart until labels don't touch."""
    out = list(centres)
    for _ in range(200):
        moved = False
        for i in range(len(out) - 1):
            need = (heights[i] + heights[i + 1]) / 2
            short = need - (out[i] - out[i + 1])
            if short > 0.01:
                out[i] += short / 2
                out[i + 1] -= short / 2
                moved = True
        if not moved:
            break
    return out


# ------------------------------------------------------------------------------------------- panels


def _heading(canvas: Canvas, y: float, title: str, note: str) -> None:
    canvas.text(PANEL_X, y, title, size=15, weight=700)
    canvas.text(PANEL_X, y + 18, note, size=12.5, fill=SOFT)


def _dots(canvas: Canvas, x: float, y: float, number: int, width: float, colour: str, rows: int) -> None:
    """`number` squares (as many as can be seen) in `rows` rows over `width`."""
    number = min(number, MOST)
    columns = -(-number // rows)
    pitch = min(width / columns, 14)
    for i in range(number):
        column, row = i % columns, i // columns
        canvas.rect(x + column * pitch, y + row * pitch, pitch - 1.4, pitch - 1.4, colour, radius=1.5)


def _attention_panel(canvas: Canvas, config: ModelConfig, y: float) -> float:
    """Query heads above, and below them what a token leaves in the cache. Returns the lower edge."""
    shown = _shown(config)
    kind = words.attention_kind(shown)
    colour = ATTENTION[kind]
    title = " and ".join(_kinds(config)) if len(_kinds(config)) < 3 else ", ".join(_kinds(config))
    _heading(canvas, y + 6, f"Attention: {title}", f"{shown.heads} query heads")
    rows = 1 if shown.heads <= 32 else 2 if shown.heads <= 64 else 4
    _dots(canvas, PANEL_X, y + 34, shown.heads, PANEL_WIDTH, colour, rows)
    below = y + 34 + rows * min(PANEL_WIDTH / -(-min(shown.heads, MOST) // rows), 14) + 16
    if isinstance(shown, GQA):
        return _gqa_cache(canvas, shown, below, colour)
    if isinstance(shown, MLA):
        return _mla_cache(canvas, shown, below, colour)
    return _v4_cache(canvas, config, below)


def _shown(config: ModelConfig) -> Attention:
    """The attention part that stands for the model: V4's sparse one, else the first layer's."""
    for layer in config.layers:
        a = layer.attention
        if isinstance(a, CompressedAttention) and a.compress is not None and a.compress.index is not None:
            return a
    return config.layers[0].attention


def _gqa_cache(canvas: Canvas, a: GQA, y: float, colour: str) -> float:
    per = a.heads // a.kv_heads
    plural = "s" if a.kv_heads > 1 else ""
    share = "one for every query head" if per == 1 else f"{per} query heads share one"
    note = f"{a.kv_heads} key and value head{plural} of {a.head_dim}: {share}"
    canvas.text(PANEL_X, y + 6, note, size=12.5, fill=SOFT)
    pitch = min(PANEL_WIDTH / min(a.kv_heads, MOST), 55.0)
    for i in range(min(a.kv_heads, MOST)):
        for row in range(2):
            wide = pitch - (1.4 if pitch > 6 else 0.2 * pitch)
            canvas.rect(PANEL_X + i * pitch, y + 16 + row * 16, wide, 13, colour, radius=1.5, opacity=0.55)
    wide = 2 * a.kv_heads * a.head_dim
    canvas.text(PANEL_X, y + 68, f"{wide:,} values a token and layer", size=12.5, weight=600)
    return y + 72


def _mla_cache(canvas: Canvas, a: MLA, y: float, colour: str) -> float:
    total = a.kv_rank + a.rope_dim
    canvas.text(PANEL_X, y + 6, "one latent for all heads, and one rotary key", size=12.5, fill=SOFT)
    wide = (PANEL_WIDTH - 4) * a.kv_rank / total
    canvas.rect(PANEL_X, y + 16, wide, 24, colour, radius=2, opacity=0.55)
    canvas.rect(PANEL_X + wide + 4, y + 16, PANEL_WIDTH - 4 - wide, 24, colour, radius=2, opacity=0.9)
    canvas.text(PANEL_X + 8, y + 33, f"latent {a.kv_rank}", size=12.5)
    canvas.text(
        PANEL_X + wide + 4 + (PANEL_WIDTH - 4 - wide) / 2,
        y + 33,
        f"{a.rope_dim}",
        12.5,
        "#ffffff",
        400,
        "middle",
    )
    kept = f"{total} values a token and layer"
    if a.index is not None:
        kept = f"{total} + {a.index.dim} values a token and layer; the indexer picks {a.index.top_k:,}"
    canvas.text(PANEL_X, y + 60, kept, size=12.5, weight=600)
    return y + 64


def _v4_cache(canvas: Canvas, config: ModelConfig, y: float) -> float:
    """A stretch of tokens: the window in full, older ones compressed 4 to 1 and 128 to 1."""
    parts: dict[str, CompressedAttention] = {}
    for layer in config.layers:
        if isinstance(layer.attention, CompressedAttention):
            parts.setdefault(layer.attention.kind, layer.attention)
    one = next(iter(parts.values()))
    note = f"one {one.head_dim}-wide key is the value too; the last {one.window} tokens, and"
    canvas.text(PANEL_X, y + 6, note, size=12.5, fill=SOFT)
    row = y + 18
    for kind in ("CSA", "HCA", "SWA"):
        a = parts.get(kind)
        if a is None:
            continue
        compress = a.compress
        if compress is None:
            what, cells = "nothing else", 0
        else:
            picks = (
                f", best {compress.index.top_k:,} of them" if compress.index is not None else ", all of them"
            )
            what = f"1 entry for {compress.ratio} tokens{picks}"
            cells = 18 if compress.ratio <= 16 else 3
        canvas.text(PANEL_X, row + 13, kind, size=12.5, weight=600, fill=ATTENTION[kind])
        left, right = PANEL_X + 40, PANEL_X + 172
        for i in range(cells):
            step = (right - left - 34) / cells
            lit = compress is None or compress.index is None or i % 3 != 1
            canvas.rect(left + i * step, row + 2, step - 1.4, 14, ATTENTION[kind], 1, 0.75 if lit else 0.2)
        for i in range(10):
            canvas.rect(right - 30 + i * 3, row + 2, 2, 14, ATTENTION["SWA"], 0.5)
        canvas.text(right + 12, row + 13, what, size=12.5)
        row += 22
    return row


def _expert_panel(canvas: Canvas, config: ModelConfig, y: float) -> float:
    """A layer's experts with those of one token lit, or a dense layer's width. Returns the lower edge."""
    moe = next((layer.ff for layer in reversed(config.layers) if isinstance(layer.ff, MoE)), None)
    if moe is None:
        dense = config.layers[0].ff
        assert isinstance(dense, SwiGLU)
        _heading(
            canvas, y + 6, "Feed-forward: SwiGLU", f"every token uses all {dense.width:,} of its channels"
        )
        _widths(canvas, config.hidden, dense.width, y + 40)
        return y + 200
    shared = f" and {moe.shared} shared" if moe.shared else ""
    router = moe.router
    note = f"a token uses {moe.top_k} of {moe.routed} routed experts{shared}, each {moe.width:,} wide"
    _heading(canvas, y + 6, f"Experts, chosen by {router.score}", note)
    columns = 32 if moe.routed > 160 else 20 if moe.routed > 64 else 16
    number = min(moe.routed, MOST)
    rows = -(-number // columns)
    pitch = min(PANEL_WIDTH / columns, 150 / rows, 22.0)
    lit, kept = _chosen(moe)
    per_group = moe.routed // router.groups
    shared_drawn = min(moe.shared, 12)
    top = y + 38
    for i in range(number):
        x, here = PANEL_X + (i % columns) * pitch, top + (i // columns) * pitch
        colour = ROUTED if i in lit else IDLE
        faded = router.groups > 1 and i // per_group not in kept
        canvas.rect(x, here, pitch - 1.6, pitch - 1.6, colour, 2, 0.45 if faded else 1.0)
    below = top + rows * pitch + 6
    for i in range(shared_drawn):
        canvas.rect(PANEL_X + i * (pitch + 2), below, pitch - 1.6, pitch - 1.6, SHARED, radius=2)
    notes = ["shared, for every token"] if moe.shared else []
    if router.groups > 1:
        notes.append(f"{router.keep} of {router.groups} groups take part")
    hashed = sum(isinstance(layer.ff, MoE) and layer.ff.router.hashed for layer in config.layers)
    if hashed:
        notes.append(f"first {hashed} layers choose by token id")
    start = PANEL_X + shared_drawn * (pitch + 2) + 6
    canvas.text(start, below + pitch - 4, "; ".join(notes), size=12.5, fill=SOFT)
    return below + pitch


def _chosen(moe: MoE) -> tuple[set[int], set[int]]:
    """Experts and groups for a made-up token, always the same."""
    if moe.routed > MOST:
        return set(range(min(moe.top_k, MOST))), {0}
    chance = random.Random(moe.routed * 1000 + moe.top_k)
    groups = set(chance.sample(range(moe.router.groups), moe.router.keep))
    per_group = moe.routed // moe.router.groups
    open_to = [i for i in range(moe.routed) if i // per_group in groups]
    return set(chance.sample(open_to, moe.top_k)), groups


def _widths(canvas: Canvas, hidden: int, width: int, y: float) -> None:
    """The residual stream widening and narrowing again, to scale."""
    widest = max(hidden, width)
    centre = PANEL_X + PANEL_WIDTH / 2
    half_in, half_up = PANEL_WIDTH / 2 * hidden / widest, PANEL_WIDTH / 2 * width / widest
    canvas.polygon(
        [
            (centre - half_up, y + 54),
            (centre + half_up, y + 54),
            (centre + half_in, y),
            (centre - half_in, y),
        ],
        DENSE,
        0.35,
    )
    canvas.polygon(
        [
            (centre - half_in, y + 140),
            (centre + half_in, y + 140),
            (centre + half_up, y + 86),
            (centre - half_up, y + 86),
        ],
        DENSE,
        0.35,
    )
    canvas.rect(centre - half_up, y + 58, 2 * half_up, 24, DENSE, radius=2)
    canvas.text(centre, y + 75, f"{width:,}, silu(gate) x up", 12.5, INK, 600, "middle")
    canvas.text(centre, y + 32, "down", 12.5, INK, 400, "middle")
    canvas.text(centre, y + 118, "gate and up", 12.5, INK, 400, "middle")
    canvas.text(centre, y + 160, f"{hidden:,} wide residual stream", 12.5, SOFT, 400, "middle")


def _cache_panel(canvas: Canvas, config: ModelConfig, y: float) -> float:
    """Bytes a token, to scale beside multi-head attention of the same shape. Returns the lower edge."""
    plain, served = account.cache(config), account.cache(config, "serving")
    rows = [("this model", float(plain.growing), True)]
    if served.growing != plain.growing:
        rows.append(("as served", float(served.growing), True))
    if account.gqa_elements(config) != plain.elements:
        rows.append(("GQA, 8 groups", 2.0 * account.gqa_elements(config), False))
    if account.mha_elements(config) != plain.elements:
        rows.append(("MHA", 2.0 * account.mha_elements(config), False))
    fixed = f" (and {words.size(plain.fixed)} a sequence for windows)" if plain.fixed else ""
    _heading(canvas, y + 6, "Cache", f"bytes a token in bf16, to scale{fixed}")
    longest = max(value for _, value, _ in rows)
    room = PANEL_WIDTH - 210
    colour = ATTENTION[words.attention_kind(_shown(config))]
    for i, (label, value, ours) in enumerate(rows):
        top = y + 36 + i * 26
        canvas.text(PANEL_X, top + 13, label, size=12.5, weight=600 if ours else 400)
        wide = max(room * value / longest, 1.0)
        canvas.rect(PANEL_X + 100, top, wide, 17, colour if ours else REST, radius=1.5)
        more = "" if value == rows[0][1] else f", {words.times(value / rows[0][1])}"
        canvas.text(PANEL_X + 106 + wide, top + 13, f"{words.size(value)}{more}", size=12.5)
    return y + 36 + len(rows) * 26


def _legend(canvas: Canvas, config: ModelConfig, y: float) -> None:
    """What the colours mean, as many as the picture uses."""
    ffs = [layer.ff for layer in config.layers]
    extra = {words.attention_kind(layer.attention): None for layer in config.mtp}
    entries = [(ATTENTION[kind], kind) for kind in dict.fromkeys([*_kinds(config), *extra])]
    if any(isinstance(ff, SwiGLU) for ff in ffs):
        entries.append((DENSE, "dense feed-forward"))
    if any(isinstance(ff, MoE) for ff in ffs):
        entries += [(SHARED, "shared experts, router"), (ROUTED, "routed, active"), (IDLE, "routed, idle")]
    if config.residual is not None:
        entries.append((REST, "hyper-connections, norms"))
    entries.append((TABLE, "embedding, head"))
    x = 40.0
    canvas.line(40, y - 20, WIDTH - 40, y - 20, REST, 1)
    for colour, label in entries:
        canvas.rect(x, y - 1, 13, 13, colour, radius=2)
        canvas.text(x + 19, y + 10, label, size=12.5)
        x += 19 + 7.1 * len(label) + 20
