"""Loading a checkpoint beside reading the same bytes with safetensors alone.

Both end with every byte in the process's own memory: ours with `mapped=False`, safetensors with its "pread"
backend. (By default both only map the file and read nothing until it is touched.) Every run is a process of
its own, so that neither finds memory that an earlier run has left over.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

import rorqual
from benchmarks.record import alternate, report, seconds
from rorqual import weights
from rorqual.family import GQA, MLA, Layer, MoE, Quantization, Rope, Router, SwiGLU


def _apart(work: Callable[[], object]) -> float:
    """Seconds that `work` takes in a forked process."""
    out, back = os.pipe()
    if os.fork() == 0:
        os.write(back, str(seconds(work)).encode())
        os._exit(0)
    os.wait()
    os.close(back)
    took = float(os.read(out, 100))
    os.close(out)
    return took


def _alone(directory: Path) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt", backend="pread") as shard:
            kept = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: F841, SIM118


def loading(rounds: int = 7) -> None:
    """Dense bf16, experts in bf16 (stacked on the way), experts in FP8 kept as codes; warm page cache."""
    torch.set_num_threads(1)  # a forked process has none of OpenMP's threads
    gqa = GQA(16, 16, 128, Rope(128))
    dense = (Layer(gqa, SwiGLU(5504)),) * 8
    mla = MLA(16, 512, 128, 64, 128, Rope(64, interleaved=True))
    router = Router("sigmoid", bias=True, group_score="top2", normalize=True)
    sparse = (Layer(mla, MoE(64, 6, 512, 2, router)),) * 2
    rows = []
    for what, kind, layers, quantization in (
        ("dense, bf16", "llama", dense, None),
        ("64 experts, bf16", "deepseek_v3", sparse, None),
        ("64 experts, FP8 codes", "deepseek_v3", sparse, Quantization()),
    ):
        config = rorqual.ModelConfig(
            kind, 32256, 2048, layers, 4096, quantization=quantization, bos=0, eos=(1,)
        )
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            rorqual.save(rorqual.Transformer(config, seed=0), directory)
            size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
            took = alternate(
                {
                    "ours": lambda d=directory: _apart(lambda: weights.load(d, mapped=False)),
                    "alone": lambda d=directory: _apart(lambda: _alone(d)),
                },
                rounds,
            )
        rows.append((f"{what}, {size:.2f} GB", size / took["ours"], size / took["alone"], "GB/s", 0.7))
    report("Loading: beside safetensors alone", rows)
