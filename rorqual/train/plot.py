"""A run's curves as one SVG file, drawn from its log."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rorqual.data.shards import write_atomically
from rorqual.family.canvas import INK, SOFT, Canvas

NAME = "curves.svg"
COLOURS = ("#3f6fb5", "#12857c", "#b0468f", "#c07a1c", "#6a4fb3", "#5b6470")
LEFT, TOP, WIDTH, HEIGHT, ACROSS, DOWN = 84, 104, 400, 220, 110, 84
POINTS = 400
"""A curve has about so many at most; each is the mean of equally many steps."""

Curve = list[tuple[float, float]]


@dataclass
class Panel:
    """One chart: named curves over tokens; `powers`: y goes by powers of ten."""

    title: str
    curves: dict[str, Curve]
    powers: bool = False


def read(log: Path) -> list[dict[str, float]]:
    """The lines of a log.jsonl; one half written ends it."""
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            break
    return lines


def draw(folder: Path, log: str = "log.jsonl") -> Path | None:
    """The curves of the run in a folder, beside its log; None where nothing has been told yet."""
    path = folder / log
    lines = read(path) if path.is_file() else []
    if not lines:
        return None
    place = folder / NAME
    write_atomically(place, chart(lines).encode())
    return place


def chart(lines: list[dict[str, float]]) -> str:
    """What a log says, as a whole SVG file."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    further = [name for name in names if name.startswith("mtp") and name[-1].isdigit()]
    losses = {"next": "next token", **{name: name.replace("mtp", "MTP") for name in further}}
    shown = [
        Panel("loss a token, nats", {
            **{shown: _curve(lines, name) for name, shown in losses.items()},
            "held out": _curve(lines, "held"),
        }),
        Panel("gradient's norm", {"all": _curve(lines, "norm")}, powers=True),
        Panel("learning rate", {"rate": _curve(lines, "rate")}),
        Panel("busiest expert, above its share", {"the layer with most": _curve(lines, _most)}),
    ]  # fmt: skip
    panels = [panel for panel in shown if any(panel.curves.values())]
    each = max(1, math.ceil(len(lines) / POINTS))
    skipped = sum("skipped" in line for line in lines)
    note = f"{len(lines):,} steps, {lines[-1]['tokens']:,.0f} tokens" + (
        f"; {skipped} moved nothing" if skipped else ""
    )
    note += f"; each point is the mean of {each} steps" if each > 1 else ""
    rows = math.ceil(len(panels) / 2)
    canvas = Canvas(
        LEFT + 2 * WIDTH + ACROSS + 40, TOP + rows * (HEIGHT + DOWN), "How the training went", note
    )
    canvas.text(LEFT - 50, 36, "How the training went", 18, INK, 700)
    canvas.text(LEFT - 50, 58, note, 12, SOFT)
    for number, panel in enumerate(panels):
        _panel(
            canvas, panel, LEFT + number % 2 * (WIDTH + ACROSS), TOP + number // 2 * (HEIGHT + DOWN),
            lines[-1]["tokens"],
        )  # fmt: skip
    return canvas.document()


def _most(line: dict[str, float]) -> float | None:
    return max((value for name, value in line.items() if name.startswith("violation ")), default=None)


def _curve(lines: list[dict[str, float]], of: str | Callable[[dict[str, float]], float | None]) -> Curve:
    """(tokens, value) where there is a number, thinned to `POINTS`."""
    told = [(line["tokens"], line.get(of) if isinstance(of, str) else of(line)) for line in lines]
    points = [(float(x), float(y)) for x, y in told if y is not None and math.isfinite(y)]
    each = max(1, math.ceil(len(points) / POINTS))
    groups = [points[at : at + each] for at in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, equally far apart, from at most `low` to at least `high`: three to seven of them."""
    if high <= low:
        low, high = (0.0, 1.0) if low == 0 else (low - abs(low) / 2, low + abs(low) / 2)
    power = 10.0 ** math.floor(math.log10(high - low))
    apart = next(step for n in (0.2, 0.25, 0.5, 1, 2, 2.5, 5) if (high - low) / (step := n * power) <= 5)
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [n * apart for n in range(first, last + 1)]


def _panel(canvas: Canvas, panel: Panel, left: float, top: float, tokens: float) -> None:
    def scale(y: float) -> float:
        return math.log10(max(y, 1e-12)) if panel.powers else y

    values = [scale(y) for curve in panel.curves.values() for _, y in curve]
    marks = ticks(min(values), max(values))

    def place(x: float, y: float) -> tuple[float, float]:
        up = (scale(y) - marks[0]) / (marks[-1] - marks[0])
        return left + x / tokens * WIDTH, top + HEIGHT * (1 - up)

    canvas.text(left, top - 14, panel.title, 12.5, INK, 600)
    for mark in marks:
        y = top + HEIGHT * (1 - (mark - marks[0]) / (marks[-1] - marks[0]))
        canvas.line(left, y, left + WIDTH, y, "#d9d6cc", 1)
        canvas.text(left - 8, y + 4, f"{10**mark if panel.powers else mark:.3g}", 11, SOFT, anchor="end")
    for x in (mark for mark in ticks(0, tokens) if mark <= tokens):
        canvas.text(left + x / tokens * WIDTH, top + HEIGHT + 18, _short(x), 11, SOFT, anchor="middle")
    canvas.text(left + WIDTH / 2, top + HEIGHT + 36, "tokens", 11, SOFT, anchor="middle")
    drawn = [(name, curve) for name, curve in panel.curves.items() if curve]
    for number, (name, curve) in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        corners = [place(x, y) for x, y in curve]
        canvas.path("M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in corners), colour, 1.6)
        if len(corners) == 1:
            canvas.rect(corners[0][0] - 2, corners[0][1] - 2, 4, 4, colour)
        if len(drawn) > 1:
            canvas.rect(left + WIDTH - 96, top + 8 + 18 * number, 14, 4, colour)
            canvas.text(left + WIDTH - 76, top + 14 + 18 * number, name, 11)


def _short(tokens: float) -> str:
    """1500000 -> 1.5M."""
    for power, letter in ((12, "T"), (9, "B"), (6, "M"), (3, "K")):
        if tokens >= 10**power:
            return f"{tokens / 10**power:.3g}{letter}"
    return f"{tokens:.3g}"
