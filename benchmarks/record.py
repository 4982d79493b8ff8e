"""What every benchmark shares: alternating rounds, medians, and a record of where it was run."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

console = Console(highlight=False)


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Each run once to warm up, then all in turn `rounds` times: the median figure of each.

    Peers are measured in the same minutes on the same machine, so that what else it does meets both.
    """
    for run in runs.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(run())
    return {name: statistics.median(values) for name, values in figures.items()}


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def where() -> dict[str, Any]:
    """Commit, hardware, versions, date, command."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
        "commit": commit.stdout.strip() or "unknown",
        "hardware": device,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(title: str, rows: list[tuple[str, float, float, str, float | None]]) -> None:
    """Print and write down rows of (what, ours, theirs, unit, ratio that is asked for).

    Rates (a unit that ends in "/s") are better when higher, times when lower; the ratio is how many times
    better ours is.
    """
    table = Table(title=title, title_justify="left")
    for column in ("what", "ours", "peer", "ratio", "asked"):
        table.add_column(column, justify="left" if column == "what" else "right")
    record: dict[str, Any] = {"title": title, **where(), "rows": []}
    for what, ours, theirs, unit, asked in rows:
        ratio = ours / theirs if unit.endswith("/s") else theirs / ours
        cells = (
            f"{ours:.4g} {unit}",
            f"{theirs:.4g} {unit}",
            f"{ratio:.2f}×",
            f"{asked:.2f}×" if asked else "",
        )
        table.add_row(what, *cells)
        record["rows"].append(dict(what=what, ours=ours, peer=theirs, unit=unit, ratio=ratio, asked=asked))
    console.print(table)
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
    file = Path("build/benchmarks") / f"{title.split(':')[0].strip().lower().replace(' ', '_')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1))
