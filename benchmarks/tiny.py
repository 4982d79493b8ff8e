"""The engine on the CPU: a tiny V3 (3 layers, width 256, latent 512, 16 experts), one request and eight at once."""

from __future__ import annotations

import statistics
import time

import torch

from benchmarks.record import console, where
from rorqual.engine import Engine, Sampling
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.nn import Transformer


def tiny() -> ModelConfig:
    """The geometry that peers' figures are for."""
    attention = MLA(4, 512, 64, 32, 64, Rope(32, interleaved=True))
    moe = MoE(16, 4, 256, 1, Router("sigmoid", bias=True, group_score="top2", normalize=True))
    plan = (Layer(attention, SwiGLU(1024)), *(Layer(attention, moe),) * 2)
    return ModelConfig("deepseek_v3", 32000, 256, plan, 4096, dtype="bfloat16", eos=())


def rate(engine: Engine, requests: int, logprobs: bool) -> float:
    """Tokens a second of so many answers of 128 tokens to prompts of 64, from the first token of each on."""
    sampling = Sampling(0.0, max_new_tokens=128, ignore_eos=True, logprobs=logprobs)
    prompts = torch.randint(0, 32000, (requests, 64)).tolist()
    handles = [engine.submit(prompt, sampling) for prompt in prompts]
    while min(len(handle.completion.ids) for handle in handles) < 1:
        engine.step()
    before, begun = sum(len(handle.completion.ids) for handle in handles), time.perf_counter()
    while engine.busy:
        engine.step()
    return (128 * requests - before) / (time.perf_counter() - begun)


def main() -> None:
    """Medians of five rounds in turn."""
    cases = [(1, False), (8, False), (8, True)]
    for dtype in (torch.bfloat16, torch.float32):
        engine = Engine(Transformer(tiny(), dtype=dtype, seed=0))
        found: dict[tuple[int, bool], list[float]] = {case: [] for case in cases}
        for turn in range(6):
            for case in cases:
                got = rate(engine, *case)
                if turn:
                    found[case].append(got)
        for (requests, logprobs), rates in found.items():
            what = f"{dtype}, {requests} at once{', logprobs' if logprobs else ''}"
            console.print(
                f"{what}: {statistics.median(rates):.0f} tok/s ({min(rates):.0f} to {max(rates):.0f})"
            )
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")


if __name__ == "__main__":
    main()
