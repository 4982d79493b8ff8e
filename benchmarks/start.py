"""From process start to the first token with a checkpoint of about 2 GB on a GPU, twice: the second start finds
compiled kernels on disk. Says where the time goes, and what Triton compiled."""

from __future__ import annotations

import compileall
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def start(layers: int = 2, place: str | None = None) -> None:
    """Two processes one after the other, the first with an empty kernel cache. Asked: under 15 s, and no compilation
    in the second. `place`: a checkpoint that is there already (START_PLACE in the environment)."""
    from benchmarks.record import console, where

    place = place or os.environ.get("START_PLACE")
    with tempfile.TemporaryDirectory() as own, tempfile.TemporaryDirectory() as cache:
        if place is None:
            place = make(own, layers)
        size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors")) / 1e9
        print("| start | first token | parts, s | kernels compiled, found |\n|---|---|---|---|")
        compileall.compile_dir(
            Path(__file__).parents[1] / "rorqual", quiet=1
        )  # as installing the package does
        for turn in ("first", "second"):
            env = {**os.environ, "TRITON_CACHE_DIR": cache, "STARTED": str(time.time())}
            command = [sys.executable, "-m", "benchmarks.start", place]
            said = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
            marks = list(said["marks"].items())
            ends = [0.0, *(at for _, at in marks)]
            parts = ", ".join(f"{name} {at - ends[i]:.1f}" for i, (name, at) in enumerate(marks))
            made = [kernel for kernel in said["kernels"] if not kernel[2]]
            print(
                f"| {turn}, {size:.1f} GB | {said['marks']['first token']:.1f} s | {parts} | {len(made)} in "
                f"{sum(ms for _, ms, _ in made) / 1e3:.1f} s, {len(said['kernels']) - len(made)} |",
                flush=True,
            )
            if made:
                slow = sorted(made, key=lambda kernel: -kernel[1])[:12]
                print("compiled: " + ", ".join(f"{name} {ms / 1e3:.2f}" for name, ms, _ in slow))
                print("by stage: " + ", ".join(f"{k} {v:.1f}" for k, v in said["stages"].items()), flush=True)
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")


def make(place: str, layers: int) -> str:
    """A checkpoint of random weights: "lite" with fewer layers."""
    import rorqual
    from benchmarks.lite import lite
    from rorqual.nn import Transformer

    rorqual.save(Transformer(lite(layers), device="cuda", seed=0), place)
    return place


def child(place: str) -> None:
    """One start; prints seconds from the process's start to each mark, and each kernel's milliseconds as JSON."""
    begun = float(os.environ["STARTED"])
    marks = {"interpreter": time.time() - begun}
    import torch

    import rorqual

    marks["imports"] = time.time() - begun
    kernels: list[tuple[str, float, bool]] = []
    stages: dict[str, float] = {}
    try:
        from triton import knobs

        def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
            kernels.append((src.name, times.total / 1e3, cache_hit))
            for stage, took in [("ir", times.ir_initialization), *times.lowering_stages]:
                stages[stage] = stages.get(stage, 0.0) + took / 1e6

        knobs.compilation.listener = note
    except ImportError:
        pass
    torch.zeros(1, device="cuda")
    marks["device"] = time.time() - begun
    model = rorqual.load(place, device="cuda")
    marks["load"] = time.time() - begun
    engine = rorqual.Engine(model)
    marks["engine"] = time.time() - begun
    stream = iter(engine.submit(list(range(100)), rorqual.Sampling(0.0, max_new_tokens=4, ignore_eos=True)))
    next(stream)
    marks["first token"] = time.time() - begun
    next(stream)
    marks["second"] = time.time() - begun
    print(json.dumps({"marks": marks, "kernels": kernels, "stages": stages}))


if __name__ == "__main__":
    child(sys.argv[1])
