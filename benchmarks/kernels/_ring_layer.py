"""Temporary: a layer and the whole model with the ring and without."""

import os, traceback
import torch
from benchmarks.kernels import chain
from benchmarks.kernels.chain import Pass, compare, layer_time
from benchmarks.lite import decode, lite, quantise
from rorqual.engine.engine import Engine
from rorqual.nn import Transformer
from rorqual.nn import single as way

torch.manual_seed(0)
model = Transformer(lite(5), device="cuda", seed=0)
for kind in ("bf16", "fp8"):
    if kind == "fp8":
        quantise(model)
    p = Pass(model)
    for way.RING in (False, True):
        try:
            print(kind, "ring", way.RING, compare(p), flush=True)
            if not os.environ.get("CHECK"):
                print(kind, "ring", way.RING, f"{layer_time(p):.1f} us a layer", flush=True)
        except Exception:
            traceback.print_exc(limit=-4)
if not os.environ.get("CHECK"):
    del p, model
    model = Transformer(lite(), device="cuda", seed=0)
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            quantise(model)
        for way.RING in (False, True):
            try:
                engine = Engine(model, prefix_cache=False, step_tokens=4096, memory=8 * 2**30)
                decode(engine, 1, 512, 8)
                print(
                    kind,
                    "ring",
                    way.RING,
                    f"{max(decode(engine, 1, 512)[0] for _ in range(2)):.0f} tok/s",
                    flush=True,
                )
                del engine
            except Exception:
                traceback.print_exc(limit=-4)
