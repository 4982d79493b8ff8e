"""From process start to the first token with a checkpoint of about 2 GB on a GPU, twice: the second start finds
compiled kernels on disk. Says where the time goes, and what Triton compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any


def start(layers: int = 2) -> None:
    """Two processes one after the other, the first with an empty kernel cache. Asked: under 15 s, and no compilation
    in the second."""
    import torch

    import rorqual
    from benchmarks.lite import lite
    from benchmarks.record import console, where
    from rorqual.nn import Transformer

    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryDirectory() as cache:
        rorqual.save(Transformer(lite(layers), device="cuda", seed=0), place)
        torch.cuda.empty_cache()
        size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors")) / 1e9
        print("| start | first token | parts | kernels compiled, found |\n|---|---|---|---|")
        for turn in ("first", "second"):
            env = {**os.environ, "TRITON_CACHE_DIR": cache, "STARTED": str(time.time())}
            command = [sys.executable, "-m", "benchmarks.start", place]
            said = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
            marks = list(said["marks"].items())
            parts = ", ".join(
                f"{name} {at - before:.1f}"
                for (name, at), before in zip(marks, [0.0, *(m[1] for m in marks)], strict=False)
            )
            made = Counter(name for name, _, hit in said["kernels"] if not hit)
            took = sum(ms for _, ms, hit in said["kernels"] if not hit) / 1e3
            found = sum(hit for *_, hit in said["kernels"])
            print(
                f"| {turn}, {size:.1f} GB | {said['marks']['first token']:.1f} s | {parts} | "
                f"{sum(made.values())} in {took:.1f} s, {found} |"
            )
            if turn == "first" or made:
                slow = sorted(said["kernels"], key=lambda k: -k[1])[:8]
                print("slowest: " + ", ".join(f"{name} {ms / 1e3:.2f} s" for name, ms, _ in slow))
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")


def child(place: str) -> None:
    """One start; prints seconds from the process's start to each mark, and each kernel's milliseconds as JSON."""
    begun = float(os.environ["STARTED"])
    marks = {"interpreter": time.time() - begun}
    import torch

    import rorqual

    marks["imports"] = time.time() - begun
    kernels: list[tuple[str, float, bool]] = []
    try:
        from triton import knobs

        def note(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
            kernels.append((src.name, times.total / 1e3, cache_hit))

        knobs.compilation.listener = note
    except ImportError:
        pass
    torch.zeros(1, device="cuda")
    marks["device"] = time.time() - begun
    model = rorqual.load(place, device="cuda")
    marks["load"] = time.time() - begun
    engine = rorqual.Engine(model)
    marks["engine"] = time.time() - begun
    next(iter(engine.submit([1, 2, 3], rorqual.Sampling(0.0, max_new_tokens=4, ignore_eos=True))))
    marks["first token"] = time.time() - begun
    print(json.dumps({"marks": marks, "kernels": kernels}))


if __name__ == "__main__":
    child(sys.argv[1])
