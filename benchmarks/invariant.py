"""What batch-invariant mode costs: decoding of the "lite" geometry on one GPU, with it and without, in one run."""

from __future__ import annotations

import time

import torch

from benchmarks.lite import decode, lite, profile
from rorqual.engine.engine import Engine
from rorqual.nn import Transformer

BATCH = 32


def main(with_profile: bool = False, layers: int = 27) -> None:
    """Tokens a second of 32 answers in step, after prompts of 1,024 and 4,096; `with_profile`: by kernel too."""
    begun = time.perf_counter()
    model = Transformer(lite(layers), device="cuda", seed=0)
    print(f"built in {time.perf_counter() - begun:.1f} s", flush=True)
    for context in (1024, 4096):
        rates = {}
        for name, on in (("plain", False), ("invariant", True)):
            engine = Engine(model, prefix_cache=False, step_tokens=16384, memory=10 * 2**30, invariant=on)
            rates[name], read = decode(engine, BATCH, context)
            print(
                f"{name:9} context {context}: decode {rates[name]:,.0f}, prefill {read:,.0f} tok/s",
                flush=True,
            )
            if with_profile and context == 1024:
                profile(engine, BATCH, context)
            del engine
            torch.cuda.empty_cache()
        print(f"context {context}: invariant / plain = {rates['invariant'] / rates['plain']:.3f}", flush=True)


if __name__ == "__main__":
    main()
