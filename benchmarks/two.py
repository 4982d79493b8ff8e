"""Decoding on several GPUs of one machine against one of them: the "lite" geometry, the same run.

    torchrun --nproc-per-node 2 -m benchmarks two

One GPU alone (rank 0, the others wait), then all of them with data-parallel attention and experts spread over
all, then tensor-parallel. Random weights, made directly in shares.
"""

from __future__ import annotations

import gc
import time

import torch
import torch.distributed as dist

from benchmarks.lite import decode, lite, profile
from rorqual.engine.engine import Engine
from rorqual.nn import Transformer
from rorqual.nn.layout import Layout
from rorqual.nn.spread import fresh

BATCH, CONTEXT = 256, 1024
MEMORY = 16 * 2**30
"""Bytes of cache a GPU: all answers of the batch at once."""


def measure(engine: Engine, batch: int, context: int, steps: int) -> tuple[float, float]:
    """Tokens a second of decoding and of reading prompts; what a first, short run compiles and records is not in it."""
    decode(engine, batch, context, 4)
    return decode(engine, batch, context, steps)


def main(with_profile: bool = False, direct: bool = True, layers: int = 27, steps: int = 64) -> None:
    """The table, printed by rank 0; `with_profile` also says which kernels take its time."""
    batch, context = BATCH, CONTEXT
    begun = time.perf_counter()
    both = Layout(direct=direct)
    if both.world == 1:
        raise SystemExit(
            "start this benchmark with several processes: torchrun --nproc-per-node 2 -m benchmarks two"
        )
    options = {"prefix_cache": False, "step_tokens": 16384, "memory": MEMORY}
    alone = 0.0
    if both.rank == 0:
        model = Transformer(lite(layers), device=both.device, seed=0)
        engine = Engine(model, max_requests=batch, **options)
        alone, read = measure(engine, batch, context, steps)
        _say("one GPU", alone, read, alone, batch, begun)
        del engine, model
        _tidy()
    dist.barrier(both.host)
    ranks = both.world
    for name, layout in (
        (f"data {ranks}, experts over {ranks}", both),
        (f"tensor {ranks}, experts over {ranks}", Layout(tensor=ranks, direct=direct)),
    ):
        model = fresh(lite(layers), layout)
        with Engine(model, layout=layout, max_requests=batch // layout.data, **options) as engine:
            if engine.leads:
                rate, read = measure(engine, batch, context, steps)
                _say(name, rate, read, alone, batch, begun)
                if with_profile:
                    profile(engine, batch, context)
            else:
                engine.follow()
        del engine, model
        _tidy()


def _tidy() -> None:
    """Give the memory of a model and its engine back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def _say(name: str, rate: float, read: float, alone: float, batch: int, begun: float) -> None:
    print(
        f"{name}: decode {rate:,.0f} tok/s ({rate / alone:.2f}x), {batch / rate * 1e3:.2f} ms a pass; "
        f"prefill {read:,.0f} tok/s; {time.perf_counter() - begun:.0f} s so far",
        flush=True,
    )


if __name__ == "__main__":
    main()
