"""Speculation with one MTP module on the "lite" geometry: what a pass with a draft costs, and what tokens a second
become where drafts stand.

Weights are random, so true drafts hardly ever stand; there the rate shows the cost. Then every second
draft, and every draft, is taken for right whatever the model says (in this benchmark alone): the answers
are nonsense, the work is that of real ones.
"""

from __future__ import annotations

import itertools
import time
import traceback
from typing import Any

import torch

from benchmarks.lite import lite, wait
from rorqual.engine.engine import Engine
from rorqual.engine.sampling import Sampling
from rorqual.engine.staging import Coming
from rorqual.family import ModelConfig
from rorqual.nn import Transformer


def forced(engine: Engine, share: float) -> None:
    """Take this share of drafts for right."""
    sampler = engine.runner.sampler
    genuine = sampler.judge

    def judge(*what: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, stands = genuine(*what)
        return tokens, torch.rand(len(stands), device=stands.device) < share

    if share:
        sampler.judge = judge  # type: ignore[method-assign]


def rate(
    engine: Engine, batch: int, context: int, steps: int, sampling: Sampling
) -> tuple[float, float, float]:
    """Tokens a second of `batch` answers in step, milliseconds a pass, and how many of these the host worked."""
    prompts = torch.randint(0, engine.model.config.vocab, (batch, context)).tolist()
    handles = [engine.submit(p, sampling) for p in prompts]

    def count() -> int:
        return sum(len(h.completion.ids) for h in handles)

    while min(len(h.completion.ids) for h in handles) < 12:
        engine.step()
    before, waited, genuine = count(), 0.0, Coming.land

    def land(self: Coming) -> list[torch.Tensor]:
        nonlocal waited
        begun = time.perf_counter()
        found = genuine(self)
        waited += time.perf_counter() - begun
        return found

    Coming.land = land  # type: ignore[method-assign]
    wait(engine)
    begun = time.perf_counter()
    for _ in range(steps):
        engine.step()
    worked = time.perf_counter() - begun - waited
    wait(engine)
    took = time.perf_counter() - begun
    Coming.land = genuine  # type: ignore[method-assign]
    tokens = count() - before
    for handle in handles:
        handle.cancel()
    while engine.busy:
        engine.step()
    return tokens / took, 1e3 * took / steps, 1e3 * worked / steps


KINDS = {
    "greedy": Sampling(0.0, max_new_tokens=400, ignore_eos=True),
    "top_p": Sampling(0.6, top_p=0.95, max_new_tokens=400, ignore_eos=True),
}


def main(
    config: ModelConfig | None = None,
    cases: tuple[tuple[int, int], ...] = ((1, 512), (32, 4096)),
    steps: int = 48,
    device: str = "cuda",
) -> None:
    """Plain decoding beside speculation, at acceptance 0, a half and 1 if greedy."""
    config = config or lite()
    begun = time.perf_counter()
    model = Transformer(config.replace(mtp=(config.layers[-1],)), device=device, seed=0)
    print(f"built {len(config.layers)} layers in {time.perf_counter() - begun:.1f} s", flush=True)
    for (batch, context), (kind, sampling) in itertools.product(cases, KINDS.items()):
        told = []
        shares = (0.0, 0.5, 1.0) if kind == "greedy" else (0.0,)
        for speculate, share in ((False, 0.0), *((True, s) for s in shares)):
            name = f"drafts {share:.0%} forced" if speculate else "plain"
            options = {"prefix_cache": False, "speculate": speculate}
            try:
                with Engine(model, step_tokens=16384, memory=16 * 2**30, **options) as engine:
                    forced(engine, share)
                    rate(engine, batch, context, 4, sampling)
                    speed, ms, host = rate(engine, batch, context, steps, sampling)
                told.append(f"{name} {speed:,.0f} tok/s, {ms:.2f} ms a pass (host {host:.2f})")
            except Exception:
                told.append(f"{name} failed: {traceback.format_exc(limit=-3)}")
        print(f"{kind}, batch {batch}, context {context}: {'; '.join(told)}", flush=True)


if __name__ == "__main__":
    main()
