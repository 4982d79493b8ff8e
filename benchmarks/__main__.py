"""`python -m benchmarks [smollm2] [latent] [loading]`: those named, or all."""

from __future__ import annotations

import sys

from benchmarks.decode import latent, smollm2
from benchmarks.loading import loading

BENCHMARKS = {"smollm2": smollm2, "latent": latent, "loading": loading}


def main() -> None:
    unknown = [name for name in sys.argv[1:] if name not in BENCHMARKS]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}")
    for name in sys.argv[1:] or BENCHMARKS:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
