"""`python -m benchmarks NAME …`: those named, or all that run on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from benchmarks import invariant, lite, spec, tiny, turns, two
from benchmarks.context import context
from benchmarks.decode import latent, smollm2
from benchmarks.load import load
from benchmarks.loading import loading
from benchmarks.start import start

K = 1024


def later(module: str, name: str) -> Callable[[], None]:
    """A benchmark that needs more than the library alone: the server's."""

    def run() -> None:
        getattr(import_module(module), name)()

    return run


CPU = {
    "smollm2": smollm2,
    "latent": latent,
    "loading": loading,
    "tiny": tiny.main,
    "turns": turns.turns,
    "serve-tiny": later("benchmarks.serving", "cpu"),
    "train-tiny": later("benchmarks.train_tiny", "main"),
}
LONG = {"soak": later("benchmarks.soak", "main"), "vllm-tiny": later("benchmarks.vllm_tiny", "main")}
"""Run only where named: these take many minutes, or need a peer."""
GPU = {
    "lite": lite.main,
    "lite-profile": partial(lite.main, True),
    "lite-prefill": lite.prefill,
    "invariant": invariant.main,
    "invariant-profile": partial(invariant.main, True),
    "spec": spec.main,
    "load": load,
    "serve": later("benchmarks.serving", "gpu"),
    "start": start,
    "context-v32": partial(context, "v32", "deepseek-v3.2", [4 * K, 16 * K, 64 * K, 128 * K]),
    "context-v3": partial(context, "v3", "deepseek-v3", [4 * K, 16 * K, 64 * K, 128 * K]),
    "context-v4": partial(context, "v4", "deepseek-v4-flash", [4 * K, 16 * K, 64 * K, 256 * K, 1024 * K]),
    "train": later("benchmarks.train", "main"),
    "train-optimizers": later("benchmarks.train", "optimizers"),
    "train-profile": later("benchmarks.train", "profile"),
    "train-profile-fp8": later("benchmarks.train", "profile_fp8"),
    "two": two.main,
    "two-profile": partial(two.main, True),
    "two-nccl": partial(two.main, True, False),
}


def main() -> None:
    known = CPU | LONG | GPU
    unknown = [name for name in sys.argv[1:] if name not in known]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]!r}: choose from {', '.join(known)}")
    on_gpu = [name for name in sys.argv[1:] if name in GPU]
    if on_gpu and not torch.cuda.is_available():
        raise SystemExit(
            f"{on_gpu[0]} needs a GPU (the figures in docs are an H200's), and PyTorch sees none here: "
            f"on a CPU run {', '.join(CPU)}"
        )
    for name in sys.argv[1:] or CPU:
        known[name]()


if __name__ == "__main__":
    main()
