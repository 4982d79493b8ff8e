"""Loading a checkpoint beside reading the same bytes with safetensors alone."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import rorqual
from benchmarks.record import alternate, report, seconds
from rorqual import weights
from rorqual.family import GQA, MLA, Layer, MoE, Rope, Router, SwiGLU


def _touch(tensors: Any) -> None:
    """Read every byte: a mapped file is only opened until then."""
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).view(torch.int64 if tensor.nbytes % 8 == 0 else torch.uint8).max()


def _alone(directory: Path) -> None:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            _touch(shard.get_tensor(name) for name in shard.keys())  # noqa: SIM118


def _ours(directory: Path) -> None:
    _touch(weights.load(directory).state_dict().values())


def loading(rounds: int = 5) -> None:
    """A dense and a mixture-of-experts checkpoint of about a gigabyte each, bf16, in the page cache."""
    gqa = GQA(16, 16, 128, Rope(128))
    dense = [Layer(gqa, SwiGLU(5504))] * 8
    mla = MLA(16, 512, 128, 64, 128, Rope(64, interleaved=True))
    router = Router("sigmoid", bias=True, group_score="top2", normalize=True)
    sparse = [Layer(mla, MoE(64, 6, 512, 2, router))] * 2
    rows = []
    for what, kind, layers in (("dense", "llama", dense), ("64 experts a layer", "deepseek_v3", sparse)):
        config = rorqual.ModelConfig(kind, 32256, 2048, tuple(layers), 4096, bos=0, eos=(1,))
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            rorqual.save(rorqual.Transformer(config, seed=0), directory)
            size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
            took = alternate(
                {
                    "ours": lambda d=directory: seconds(lambda: _ours(d)),
                    "alone": lambda d=directory: seconds(lambda: _alone(d)),
                },
                rounds,
            )
        rows.append((f"{what}, {size:.2f} GB", size / took["ours"], size / took["alone"], "GB/s", 0.7))
    report("Loading: beside safetensors alone", rows)
