"""One run of one arm: trained to its end, measured, and put down as a file of its own."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.frame import Outcome
from rorqual.data import Batch
from rorqual.data.shards import write_atomically
from rorqual.train.recipe import Recipe
from rorqual.train.trainer import Report, Trainer, TrainError

LAST = 0.2
"""The share of a run at its end over which training loss and balance are taken."""
POINTS = 100
"""Of a curve."""
HELD = 64, 0.1
"""Held-out samples: at least so many, and up to this share of those that were learnt from."""
STARVED = 0.1
"""An expert with less than this share of the mean load."""


class Run(Trainer):
    """A trainer that keeps no checkpoints, and counts what experts get in the last part of a run."""

    def __init__(self, recipe: Recipe, folder: str, device: str) -> None:
        super().__init__(recipe, folder, device=device, warn=lambda text: None)
        self.load: dict[int, Tensor] = {}

    def save(self) -> None:
        pass

    def gradients(self, batch: Batch, seen: float) -> Any:
        told, load, found = super().gradients(batch, seen)
        if seen >= (1 - LAST) * self.recipe.tokens:
            for number, counts in load.items():
                self.load[number] = self.load.get(number, 0) + counts
        return told, load, found


def key(recipe: Recipe, device: str) -> str:
    """What names a run: recipe, data and kind of device. Arms that are the same run share it."""
    data = [(Path(source.folder) / "manifest.json").read_text(encoding="utf-8") for source in recipe.sources]
    facts = repr((recipe.fingerprint(), data, torch.device(device).type))
    return hashlib.sha256(facts.encode()).hexdigest()[:20]


def outcome(recipe: Recipe, device: str) -> Outcome:
    """Train and measure. A run that breaks down (NaN, spikes without end) is a result, without measures."""
    began = time.perf_counter()
    found: Outcome = {"steps": 0, "failed": "", "measures": {}, "curves": {}}
    reports: list[Report] = []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(recipe, str(Path(folder) / "run"), device)
        found["parameters"] = sum(p.numel() for p in run.model.parameters())
        try:
            reports.extend(run)
            found["measures"] = measures(run, reports)
        except TrainError as error:
            found["failed"] = str(error)
    found |= {"steps": len(reports), "curves": curves(run, reports), "seconds": time.perf_counter() - began}
    found["step seconds"] = statistics.median(r.values["seconds"] for r in reports) if reports else None
    found |= {"hardware": hardware(device), "torch": torch.__version__}
    return found


def measures(run: Run, reports: list[Report]) -> dict[str, float | None]:
    """By name; losses in nats a token."""
    last = reports[-max(1, round(LAST * len(reports))) :]
    learnt = sum(run.steps[n][2] for n in range(len(reports)))
    found = {
        "held-out loss": run.evaluate(rows=max(HELD[0], round(HELD[1] * learnt))).get("held", math.nan),
        "training loss": statistics.fmean(report.values["next"] for report in last),
    }
    layers = [n for n in run.load if n < len(run.model.layers)]  # those of MTP modules aren't the model's
    if layers:
        seen = [statistics.fmean(r.values[f"violation {n}"] for n in layers) for r in last]
        found["violation"] = statistics.fmean(seen)
        shares = torch.stack([run.load[n] / run.load[n].double().mean() for n in layers])
        found["starved"] = float((shares < STARVED).double().mean())
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def curves(run: Run, reports: list[Report]) -> dict[str, list[tuple[float, float]]]:
    """Tokens and values, averaged over as many steps as leave `POINTS` of them."""
    width = max(1, len(reports) // POINTS)
    parts = [reports[at : at + width] for at in range(0, len(reports), width)]
    made: dict[str, list[tuple[float, float]]] = {"training loss": [], "violation": []}
    for part in parts:
        at = statistics.fmean(report.values["tokens"] for report in part)
        made["training loss"].append((at, statistics.fmean(report.values["next"] for report in part)))
        names = [f"violation {n}" for n in range(len(run.model.layers)) if f"violation {n}" in part[0].values]
        if names:
            worst = statistics.fmean(r.values[name] for r in part for name in names)
            made["violation"].append((at, worst))
    whole = {name: [point for point in curve if math.isfinite(point[1])] for name, curve in made.items()}
    return {name: curve for name, curve in whole.items() if curve}


def hardware(device: str) -> str:
    """In words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def begin(threads: int) -> None:
    """What a worker does first."""
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def work(recipe: Recipe, device: str, place: str, facts: dict[str, Any]) -> Outcome:
    """What a worker does: `outcome`, written to `place` when it is whole."""
    found = outcome(recipe, device) | facts
    write_atomically(Path(place), json.dumps(found).encode())
    return found


def kept(place: Path) -> Outcome | None:
    """An outcome that lies there."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return found if {"measures", "curves", "failed"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
