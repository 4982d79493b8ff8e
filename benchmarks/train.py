"""Training on one GPU: the "3b" geometry, tokens a second of the trainer's own steps, and where their time goes.

12 layers, width 1,536, first layer dense 8,192, 16 heads (128 + 64 and 128), latent 512, no query latent, then 64
routed experts of 768, top 6, and 2 shared; vocabulary 102,400: 3.05B parameters, 0.64B active without embedding.
Sequences of 4,096 random tokens, routing as it comes, AdamW with fp32 masters, V3's balancing.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks.record import console
from rorqual.data.shards import Entry, Manifest, write_shard
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.train.optim import AdamW, Muon
from rorqual.train.recipe import Recipe, Source
from rorqual.train.schedule import Schedule, Stage
from rorqual.train.trainer import Trainer

LENGTH = 4096


def geometry(layers: int = 12) -> ModelConfig:
    """The "3b" geometry; fewer layers for a trial."""
    attention = MLA(16, 512, 128, 64, 128, Rope(64, 50000.0, interleaved=True), q_rank=None)
    router = Router("sigmoid", bias=True, group_score="top2", normalize=True, scale=2.446)
    plan = (Layer(attention, SwiGLU(8192)),) + (Layer(attention, MoE(64, 6, 768, 2, router)),) * (layers - 1)
    return ModelConfig("deepseek_v3", 102400, 1536, plan, LENGTH, dtype="bfloat16", eos=())


def flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations a token of a training step: six for each weight it meets, and attention's over half
    of `length` keys."""
    from rorqual.nn import Transformer

    named = Transformer(config, device="meta").named_parameters()
    met = 0.0
    for name, p in named:
        share = 6 / 64 if ".experts." in name else 0.0 if name.startswith("embed.") else 1.0
        met += p.numel() * share
    return 6 * met + 6 * len(config.layers) * 16 * (192 + 128) * length / 2


def corpus(folder: Path, tokens: int, vocab: int = 102400) -> str:
    """Random tokens as a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(0).integers(0, vocab, tokens)
    path = folder / "train-00000.safetensors"
    write_shard(path, [drawn], vocab)
    data = path.read_bytes()
    entry = Entry(path.name, "train", tokens, 1, len(data), hashlib.sha256(data).hexdigest())
    Manifest("", vocab, {}, (entry,)).write(folder)
    return str(folder)


def recipe(source: str, batch: int, **changes: Any) -> Recipe:
    """Steps of `batch` sequences."""
    made = Recipe(
        "3b", geometry(), (Source(source),), (Stage(LENGTH, batch),), tokens=10**9, rate=Schedule(1e-4),
        optimizer=AdamW(), mtp=Schedule(0.0), micro=batch, dtype="bfloat16", guard=None,
    )  # fmt: skip
    return replace(made, **changes)


class Bench:
    """Trainers made one after the other in one folder."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.source = corpus(self.folder / "corpus", 2**21)
        self.flops = flops(geometry(), LENGTH)
        self.table = Table("what", "tokens/s", "ms a step", "model TFLOP/s", "GB at most", "loss")
        self.runs = 0

    def run(
        self, name: str, batch: int, steps: int = 5, profile: bool = False, warm: int = 3, **changes: Any
    ) -> float:
        """Tokens a second over some steps, after others."""
        self.runs += 1
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        plan = recipe(self.source, batch, **changes)
        trainer = Trainer(plan, self.folder / f"run{self.runs}", device="cuda")
        step = iter(trainer)
        for _ in range(warm):
            report = next(step)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            report = next(step)
        torch.cuda.synchronize()
        took = (time.perf_counter() - begun) / steps
        speed = batch * LENGTH / took
        self._tell(name, speed, took, report.values["loss"])
        if profile:
            self._profile(step)
        return speed

    def _profile(self, step: Any) -> None:
        """What a step's kernels take, the longest first."""
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as found:
            next(step)
            torch.cuda.synchronize()
        times: dict[str, tuple[float, int]] = {}
        for event in found.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                took, count = times.get(event.name, (0.0, 0))
                times[event.name] = took + event.device_time, count + 1
        total = sum(took for took, _ in times.values())
        console.print(f"kernels take {total / 1e3:.1f} ms")
        for kernel, (took, count) in sorted(times.items(), key=lambda item: -item[1][0])[:45]:
            console.print(f"{took / 1e3:8.2f} ms {count:5d} x  {kernel[:110]}", markup=False)

    def peer(self, batch: int, steps: int = 5) -> float:
        """Tokens a second of transformers at the same: its grouped experts, PyTorch's attention, fused AdamW on bf16
        weights alone."""
        transformers = import_module("transformers")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        sizes = transformers.DeepseekV3Config(
            vocab_size=102400, hidden_size=1536, intermediate_size=8192, moe_intermediate_size=768,
            num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16, n_shared_experts=2,
            n_routed_experts=64, routed_scaling_factor=2.446, kv_lora_rank=512, q_lora_rank=None,
            qk_rope_head_dim=64, v_head_dim=128, qk_nope_head_dim=128, n_group=1, topk_group=1,
            num_experts_per_tok=6, first_k_dense_replace=1, max_position_embeddings=LENGTH, norm_topk_prob=True,
        )  # fmt: skip
        sizes._attn_implementation, sizes._experts_implementation = "sdpa", "grouped_mm"
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model = transformers.DeepseekV3ForCausalLM(sizes).train()
        finally:
            torch.set_default_dtype(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        ids_BT = torch.randint(0, 102400, (batch, LENGTH), device="cuda")

        def step() -> float:
            loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        for _ in range(3):
            loss = step()
        begun = time.perf_counter()
        for _ in range(steps):
            loss = step()
        took = (time.perf_counter() - begun) / steps
        speed = batch * LENGTH / took
        self._tell(f"transformers {transformers.__version__}, bf16, {batch} x {LENGTH}", speed, took, loss)
        return speed

    def _tell(self, name: str, speed: float, took: float, loss: float) -> None:
        most = torch.cuda.max_memory_allocated() / 1e9
        self.table.add_row(
            name, f"{speed:,.0f}", f"{took * 1e3:.1f}", f"{speed * self.flops / 1e12:.0f}", f"{most:.1f}",
            f"{loss:.4f}",
        )  # fmt: skip
        console.print(f"{name}: {speed:,.0f} tokens/s, {took * 1e3:.1f} ms, {most:.1f} GB, loss {loss:.4f}")


def main() -> None:
    """The table of docs/benchmarks.md."""
    bench = Bench()
    bench.peer(4)
    for batch in (8, 16):
        bench.run(f"bf16, {batch} x {LENGTH}", batch)
    halves = AdamW(moments=torch.bfloat16)
    bench.run(f"bf16, 16 x {LENGTH}, bf16 moments", 16, optimizer=halves)
    bench.run(f"bf16, 24 x {LENGTH}, recomputing, bf16 moments", 24, recompute=True, optimizer=halves)
    for batch in (8, 16):
        bench.run(f"FP8, {batch} x {LENGTH}", batch, fp8=True)
    bench.run(f"FP8, 16 x {LENGTH}, bf16 moments", 16, fp8=True, optimizer=halves)
    console.print(bench.table)


def optimizers() -> None:
    """Muon's step beside AdamW's, at a batch of half a million tokens."""
    bench = Bench()
    for name, settings in (("AdamW", AdamW()), ("Muon", Muon())):
        bench.run(f"{name}, 128 x {LENGTH} in 8", 128, steps=1, warm=1, micro=16, optimizer=settings)
    console.print(bench.table)


def profile() -> None:
    """One step's kernels."""
    Bench().run(f"bf16, 8 x {LENGTH}", 8, profile=True)


def profile_fp8() -> None:
    """The same in FP8."""
    Bench().run(f"FP8, 16 x {LENGTH}", 16, profile=True, fp8=True)
