"""Speculation with one MTP module on the "lite" geometry: what a pass with a draft costs, and what tokens a second
become where drafts stand.

Weights are random, so true drafts hardly ever stand; there the rate shows the cost. Then every second
draft, and every draft, is taken for right whatever the model says (in this benchmark alone): the answers
are nonsense, the work is that of real ones.
"""

from __future__ import annotations

import time

import torch

from benchmarks.lite import decode, lite
from rorqual.engine.engine import Engine
from rorqual.nn import Transformer


def forced(engine: Engine, share: float) -> None:
    """Take this share of drafts for right."""
    runner = engine.runner
    if share:
        runner._same = lambda first, drafts: torch.rand(len(first), device=first.device) < share  # type: ignore[method-assign]


def main(layers: int = 27, cases: tuple[tuple[int, int], ...] = ((1, 512), (32, 4096))) -> None:
    """Plain decoding beside speculation at acceptance 0, a half and 1."""
    config = lite(layers)
    begun = time.perf_counter()
    model = Transformer(config.replace(mtp=(config.layers[-1],)), device="cuda", seed=0)
    print(f"built {layers} layers in {time.perf_counter() - begun:.1f} s", flush=True)
    for batch, context in cases:
        told = []
        for speculate, share in ((False, 0.0), (True, 0.0), (True, 0.5), (True, 1.0)):
            engine = Engine(
                model, prefix_cache=False, step_tokens=16384, memory=16 * 2**30, speculate=speculate
            )
            forced(engine, share)
            try:
                decode(engine, batch, context, 8)
                rate, _ = decode(engine, batch, context, 48)
            except Exception as error:
                told.append(f"failed {error!r:.200}")
                continue
            told.append(f"{f'drafts {share:.0%} forced' if speculate else 'plain'} {rate:,.0f}")
            del engine
        print(f"batch {batch} context {context}: {'; '.join(told)} tok/s", flush=True)


if __name__ == "__main__":
    main()
