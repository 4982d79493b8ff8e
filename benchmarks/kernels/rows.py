"""One row through the FP8 matrices beside attention, by plain products and by tensor cores on boxes of codes:
`python -m benchmarks.kernels.rows`.

Microseconds of a call in a CUDA graph over enough distinct weights that L2 keeps nothing, each overlapped with the one
before (in brackets: of the same weights over and over), and of a whole layer of the "lite" geometry. `COMPARE=1`
compares with fp64 and compiles what will be timed (`LAYERS=1`: what the layers need).
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.chain import Pass, compare, layer_time, replayed
from benchmarks.kernels.timing import guarded
from benchmarks.lite import READ, lite, quantise
from rorqual.kernels import single, single_boxes
from rorqual.kernels.fuse import swiglu_reference
from rorqual.kernels.quant import E8M0, FP8, dequantize_fp8
from rorqual.nn import Transformer

Plan = dict[str, int] | None
BYTES = 120e6
CASES: list[tuple[str, int, tuple[int, ...], bool, bool]] = [
    ("q, kv", 2048, (3072, 576), True, False),
    ("o", 2048, (2048,), False, True),
    ("gate, up", 2048, (11264, 11264), True, False),
    ("down", 11264, (2048,), False, True),
    ("q_a, kv of V3", 7168, (1536, 576), True, False),
    ("q_b of V3", 1536, (24576,), True, False),
]
PLAIN: list[dict[str, int]] = [{"BO": 8, "num_warps": 8}, {"BO": 4, "num_warps": 8}]
BOXED: list[dict[str, int]] = [
    {"BOXES": b, "num_warps": w} for b, w in ((1, 8), (2, 8), (4, 8), (1, 4), (2, 4))
]
FEW = [PLAIN[0], *BOXED[:3]]
"""For the larger shapes."""
ODD: list[tuple[int, int, tuple[int, ...], bool, bool, bool]] = [
    (2, 2048, (3072, 576), True, False, True),
    (2, 384, (9, 130), True, False, False),
    (1, 128, (5,), True, True, True),
    (2, 2176, (129,), False, True, False),
    (2, 7168, (1536, 576), True, False, False),
    (1, 5120, (100, 3), True, False, True),
    (2, 8192, (300,), False, True, False),
    (2, 11264, (30,), False, True, True),
]


class Call:
    """Random weights, a row, and what else a product takes."""

    def __init__(
        self, count: int, width: int, outs: Sequence[int], norm: bool, residual: bool, powers: bool = False
    ) -> None:
        self.x = torch.randn(count, width, device="cuda").bfloat16()
        self.weights = [(torch.randn(o, width, device="cuda") * 50).to(FP8) for o in outs]
        self.scales = [
            (torch.rand(-(-o // 128), -(-width // 128), device="cuda") + 0.5) / 50 / width**0.5 for o in outs
        ]
        if powers:
            self.scales = [s.to(E8M0) for s in self.scales]
        self.norm = (torch.rand(width, device="cuda").bfloat16() + 0.5, 1e-6) if norm else None
        gated = width > 10000
        self.up = torch.randn(count, width, device="cuda").bfloat16() if gated else None
        self.residual = torch.randn(count, outs[0], device="cuda").bfloat16() if residual else None

    def run(self, how: Plan) -> list[Tensor]:
        return single.rows(
            self.x, self.weights, self.scales, self.norm, self.residual, how=how, up_ND=self.up
        )

    def exact(self) -> list[Tensor]:
        """In fp64 from the row's codes."""
        x = self.x if self.up is None else swiglu_reference(self.x, self.up, None)
        if self.norm is not None:
            x = torch.nn.functional.rms_norm(x, (x.shape[1],), *self.norm)
        runs = x.float().unflatten(1, (-1, 128))
        step = (runs.abs().amax(2, keepdim=True).clamp(min=1e-4) / 448).double()
        x = ((runs / step.float()).clamp(-448, 448).to(FP8).double() * step).flatten(1)
        out = []
        for w, s in zip(self.weights, self.scales, strict=True):
            y = (x @ dequantize_fp8(w, s.float(), (128, 128), torch.float64).T).bfloat16()
            out.append(y if self.residual is None else y + self.residual)
        return out


def check(name: str, call: Call, how: Plan) -> None:
    """Against fp64, and against itself."""
    wants, first, again = call.exact(), call.run(how), call.run(how)
    torch.cuda.synchronize()
    errors = []
    for y, want, same in zip(first, wants, again, strict=True):
        error = (y.double() - want.double()).abs() / want.double().abs().max()
        errors.append(f"{error.mean():.0e} {error.max():.0e}{'' if torch.equal(y, same) else ' DIFFERS'}")
        if not error.max() < 1e-2:
            errors.append("WRONG")
    print(f"check {name} {list(call.x.shape)} {how}: {'; '.join(errors)}", flush=True)


def plans(name: str, width: int) -> list[dict[str, int]]:
    """What is tried for a case."""
    tried = [*PLAIN, *BOXED] if name in ("q, kv", "o") else FEW
    return [how for how in tried if how.get("BOXES", 0) * -(-width // 2048) * 16384 <= 200000]


def alone(name: str, width: int, outs: tuple[int, ...], norm: bool, residual: bool) -> None:
    """Microseconds of a call."""
    calls = [Call(1, width, outs, norm, residual) for _ in range(max(1, int(BYTES / (sum(outs) * width))))]
    for call in calls:
        call.x, call.up, call.norm, call.residual = calls[0].x, calls[0].up, calls[0].norm, calls[0].residual
    found = []
    for how in plans(name, width):
        took = guarded(replayed, lambda how=how: [call.run(how) for call in calls])
        if took is not None:
            hot = replayed(lambda how=how: [calls[0].run(how) for _ in range(20)])  # type: ignore[misc]
            words = " ".join(str(v) for v in how.values())
            found.append(f"{words}: {took / len(calls):.2f} ({hot / 20:.2f})")
    print(f"{name}, reading {sum(outs) * width / READ * 1e6:.1f} us: {', '.join(found)}", flush=True)


def layers() -> None:
    """Microseconds of a mixture layer."""
    torch.manual_seed(0)
    model = Transformer(lite(5), device="cuda", seed=0)
    quantise(model)
    p = Pass(model)
    print(compare(p), flush=True)
    if os.environ.get("COMPARE"):
        return
    rule, took = single_boxes.plan, single_boxes.supported

    def planned(q: dict[str, int] | None, o: dict[str, int] | None) -> Any:
        def plan(count: int, width: int, outputs: int) -> dict[str, int]:
            return (q if outputs == 3648 else o if outputs == 2048 else None) or rule(count, width, outputs)

        return plan

    trials: list[tuple[str, Plan, Plan]] = [
        ("before", None, None),
        ("plan", None, None),
        *((f"q {' '.join(str(v) for v in how.values())}", how, None) for how in BOXED),
        *((f"o {' '.join(str(v) for v in how.values())}", None, how) for how in BOXED),
    ]
    found: dict[str, list[float]] = {name: [] for name, _, _ in trials}
    for _ in range(3):
        for name, q, o in trials:
            single_boxes.plan = planned(q, o)
            single_boxes.supported = (lambda *_: False) if name == "before" else took
            us = guarded(layer_time, p)
            if us is not None:
                found[name].append(us)
    single_boxes.plan, single_boxes.supported = rule, took
    texts = [f"{name} {' '.join(f'{us:.2f}' for us in times)}" for name, times in found.items()]
    print("us a layer: " + "; ".join(texts), flush=True)


def main() -> None:
    begun = time.perf_counter()
    torch.manual_seed(0)
    if os.environ.get("LAYERS"):
        guarded(layers)
    elif os.environ.get("COMPARE"):
        cases: list[tuple[str, Call, Plan]] = [
            (name, call, how)
            for name, *rest in CASES
            for call in [Call(1, *rest)]
            for how in plans(name, rest[0])
        ]
        cases += [("odd", Call(*odd), None) for odd in ODD]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda case: guarded(check, *case), cases))
    else:
        for case in CASES:
            guarded(alone, *case)
            print(f"{time.perf_counter() - begun:.0f} s", flush=True)
        guarded(layers)
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
