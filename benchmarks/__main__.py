"""`python -m benchmarks NAME …`: those named, or all that run on a CPU."""

from __future__ import annotations

import sys
from functools import partial

from benchmarks import lite, tiny, turns
from benchmarks.context import context
from benchmarks.decode import latent, smollm2
from benchmarks.load import load
from benchmarks.loading import loading
from benchmarks.start import start

CPU = {"smollm2": smollm2, "latent": latent, "loading": loading, "tiny": tiny.main, "turns": turns.turns}
GPU = {
    "lite": lite.main,
    "lite-profile": partial(lite.main, True),
    "load": load,
    "start": start,
    "context": context,
}


def main() -> None:
    known = CPU | GPU
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(known)}")
    for name in sys.argv[1:] or CPU:
        known[name]()


if __name__ == "__main__":
    main()
