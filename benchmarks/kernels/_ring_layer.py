"""Temporary: a layer and the whole model with the ring and without."""

import os
import traceback

import torch

from benchmarks.kernels.chain import Pass, compare, layer_time
from benchmarks.lite import decode, lite, quantise
from rorqual.engine.engine import Engine
from rorqual.kernels import route, single, single_ring
from rorqual.nn import Transformer
from rorqual.nn import single as way

PLAN = single.rows_plan


def wide(width, outputs, codes):
    if outputs == 2048:
        return {"BO": 4, "num_warps": 8}
    return PLAN(width, outputs, codes)


FORMS = {
    "old": (False, False, PLAN, 96),
    "old, route ahead": (False, True, PLAN, 96),
    "ring": (True, False, PLAN, 96),
    "ring, route ahead": (True, True, PLAN, 96),
    "ring, route ahead, o 4x8": (True, True, wide, 96),
    "ring 128, route ahead": (True, True, PLAN, 128),
}


def take(name):
    way.RING, route.AHEAD, single.rows_plan, single_ring.REGISTERS = FORMS[name]


torch.manual_seed(0)
model = Transformer(lite(5), device="cuda", seed=0)
for kind in ("bf16", "fp8"):
    if kind == "fp8":
        quantise(model)
    p = Pass(model)
    for name in FORMS:
        take(name)
        try:
            said = compare(p) if os.environ.get("CHECK") else f"{layer_time(p):.1f} us a layer"
            print(kind, name, said[:150], flush=True)
        except Exception:
            traceback.print_exc(limit=-4)
if not os.environ.get("CHECK"):
    del p, model
    model = Transformer(lite(), device="cuda", seed=0)
    for kind in ("bf16", "fp8"):
        if kind == "fp8":
            quantise(model)
        for name in list(FORMS)[:5]:
            take(name)
            try:
                engine = Engine(model, prefix_cache=False, step_tokens=4096, memory=8 * 2**30)
                decode(engine, 1, 512, 8)
                rate = max(decode(engine, 1, 512)[0] for _ in range(2))
                print(kind, name, f"{rate:.0f} tok/s", flush=True)
                del engine
            except Exception:
                traceback.print_exc(limit=-4)
