"""One token's experts on a GPU, in two launches and in one: `python -m benchmarks.kernels.single_experts`.

Microseconds a layer of the "lite" geometry in a CUDA graph over four layers of distinct weights (276 MB and more, so
that L2 keeps nothing), each after a small kernel that is overlapped with it, and the share of the read ceiling.
`CHECK=1` compares with fp64 and compiles what will be timed; `SWEEP=1` tries other rings.
"""

from __future__ import annotations

import copy
import os
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.chain import replayed
from benchmarks.lite import READ
from rorqual.kernels import single, single_experts, single_ring
from rorqual.kernels.experts import Weights
from rorqual.kernels.quant import E8M0, FP8

LAYERS = 4
ROUNDS = 3
CHOSEN = 6
KINDS = ("bf16", "fp8")
ODD: list[tuple[str, tuple[int, ...], float | None]] = [
    ("bf16", (9, 256, 512, 0), 0.5),
    ("fp8", (9, 256, 512, 1), None),
    ("powers", (9, 384, 3072, 1), None),
    ("fp8", (9, 384, 3072, 2), 1.0),
    ("bf16", (9, 384, 3072, 1), None),
    ("bf16", (9, 2048, 7168, 1), None),
    ("fp8", (9, 2048, 7168, 1), None),
]
"""Kinds, experts, width, hidden and shared experts, and the limit."""
RINGS: list[dict[str, Any]] = [{}] + [
    {"how": how}
    for how in (
        {"LAYERS": 4, "LAYING": 80, "maxnreg": 80},
        {"BUFFERS": 2},
        {"BUFFERS": 8},
        {"STAGES": 4, "HELD": 1},
    )
]


class Layer:
    """Matrices of a mixture layer: 64 routed experts (fewer for a trial) and two shared."""

    def __init__(
        self, kind: str, experts: int = 24, width: int = 1408, hidden: int = 2048, shared: int = 2
    ) -> None:
        self.kind, self.width, self.hidden, self.shared = kind, width, hidden, shared
        self.stacks = (
            self.make(experts, width, hidden), self.make(experts, width, hidden), self.make(experts, hidden, width)
        )  # fmt: skip
        self.common: Any = None
        if shared:
            self.common = (
                self.make(shared * width, hidden), self.make(shared * width, hidden), self.make(hidden, shared * width)
            )  # fmt: skip
        self.state = single_ring.new_state(CHOSEN + shared, width, torch.device("cuda"))
        self.ids = torch.randperm(experts, device="cuda")[None, :CHOSEN].int().contiguous()
        self.by = torch.rand(1, CHOSEN, device="cuda")

    def make(self, *shape: int) -> Weights:
        """Random weights."""
        w = torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        if self.kind == "bf16":
            return Weights(w.mul_(shape[-1] ** -0.5), None, None)
        scale = (torch.rand(*shape[:-2], -(-shape[-2] // 128), shape[-1] // 128, device="cuda") + 0.5) / 30
        if self.kind == "powers":
            scale = scale.to(E8M0)
        return Weights((w * 50).to(FP8), scale, (128, 128))

    def bytes(self) -> int:
        """Of the weights that a token needs."""
        item = self.stacks[0].codes.element_size()
        return 3 * (CHOSEN + self.shared) * self.width * self.hidden * item

    def run(self, x: Tensor, residual: Tensor, ring: dict[str, Any] | None, **more: Any) -> Tensor:
        """In one launch, or two (`ring` None)."""
        return single_experts.through_experts(
            x, (self.ids, self.by), *self.stacks, shared=self.common, residual_1D=residual,
            state=None if ring is None else self.state, ring=ring, **more,
        )  # fmt: skip

    def exact(self, x: Tensor, limit: float | None = None) -> Tensor:
        """In fp64, inner rounded to bf16."""
        y = torch.zeros(self.hidden, device="cuda", dtype=torch.float64)
        for k, expert in enumerate(self.ids[0].tolist()):
            if 0 <= expert < self.stacks[0].codes.shape[0]:
                parts = [plain(Weights(w.codes[expert], None if w.scale is None else w.scale[expert], w.block))
                         for w in self.stacks]  # fmt: skip
                y += through(parts, x[0].double(), float(self.by[0, k]), limit)
        for s in range(self.shared):
            part = slice(s * self.width, (s + 1) * self.width)
            gate, up, down = (plain(w) for w in self.common)
            y += through([gate[part], up[part], down[:, part]], x[0].double(), 1.0, limit)
        return y


def plain(w: Weights) -> Tensor:
    """A matrix in fp64."""
    if w.scale is None:
        return w.codes.double()
    scale = w.scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return w.codes.double() * scale[: w.codes.shape[0], : w.codes.shape[1]]


def through(parts: list[Tensor], x: Tensor, weight: float, limit: float | None) -> Tensor:
    """One expert."""
    g, u = parts[0] @ x, parts[1] @ x
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    inner = g * torch.sigmoid(g) * u * weight
    return parts[2] @ inner.bfloat16().double()


def guarded(name: str, work: Callable[[], Any]) -> Any:
    """What `work` gives; its error, shortly, if it fails."""
    try:
        return work()
    except Exception:
        print(name, "FAILED", traceback.format_exc(limit=-3)[-700:], flush=True)
        return None


def check(layer: Layer, ring: dict[str, Any] | None, limit: float | None = None) -> None:
    """Against fp64, and against itself."""
    x = torch.randn(1, layer.hidden, device="cuda").bfloat16()
    res = torch.randn(1, layer.hidden, device="cuda").bfloat16()
    want = layer.exact(x, limit).bfloat16() + res[0]
    ys = [layer.run(x, res, ring, limit=limit) for _ in range(50)]
    torch.cuda.synchronize()
    error = (ys[0][0].double() - want.double()).abs().max() / want.double().abs().max()
    same = all(torch.equal(y, ys[0]) for y in ys)
    good = "ok" if error < 1e-2 and same else "WRONG"
    print(
        f"check {layer.kind} W{layer.width} D{layer.hidden} F{layer.shared} {ring}: {error:.1e} same {same} {good}",
        flush=True,
    )
    if good != "ok":
        words = (layer.state[0] >> 16).to(torch.int16).view(torch.bfloat16).view(-1, layer.width)
        lost = (~words.isfinite()).sum(1).tolist()
        print(
            "not finite:",
            (~ys[0].isfinite()).sum().item(),
            "of y, and of inner by slot",
            lost[: 6 + layer.shared],
        )


def timed(layers: list[Layer], ring: dict[str, Any] | None, alone: bool = False) -> float:
    """Microseconds a layer, less those of the small kernel in front."""
    x = torch.randn(1, layers[0].hidden, device="cuda").bfloat16()
    norm = torch.ones(layers[0].hidden, device="cuda", dtype=torch.bfloat16), 1e-6
    small = torch.randn(64, layers[0].hidden, device="cuda").bfloat16()

    def once() -> list[Tensor]:
        kept = []
        for _ in range(ROUNDS):
            for layer in layers:
                normed = torch.empty_like(x)
                kept += single.rows(x, [small], [None], norm, normed_ND=normed, out_dtype=torch.float32)
                if not alone:
                    kept.append(layer.run(normed, x, ring))
        return kept

    return replayed(once, 25) / (ROUNDS * len(layers))


def check_all(rings: list[dict[str, Any] | None]) -> None:
    """Compile all forms at once, then compare."""
    jobs: list[tuple[Layer, dict[str, Any] | None, float | None]] = []
    for kind in KINDS:
        layer = Layer(kind)
        jobs += [(layer, ring, None) for ring in rings]
    for kind, shape, limit in ODD:
        layer = Layer(kind, *shape)
        layer.ids[0, 2:4] = torch.tensor([99, -1], device="cuda")
        jobs.append((layer, {}, limit))
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda job: guarded(f"compile {job[1]}", lambda: warm(*job)), jobs))
    for job in jobs:
        guarded(f"check {job[0].kind} {job[1]}", lambda job=job: check(*job))  # type: ignore[misc]


def warm(layer: Layer, ring: dict[str, Any] | None, limit: float | None) -> None:
    """Compile one form, on state of its own."""
    x = torch.zeros(1, layer.hidden, device="cuda", dtype=torch.bfloat16)
    if ring is None:
        layer.run(x, x, None, limit=limit)
        return
    layer = copy.copy(layer)
    layer.state = single_ring.new_state(CHOSEN + layer.shared, layer.width, x.device)
    layer.run(x, x, ring, limit=limit)
    if not ring and layer.width == 1408:
        for part in (1, 2):  # the second product alone finds what the first one left
            layer.run(x, x, {"part": part})
    torch.cuda.synchronize()


def main() -> None:
    """Check or time."""
    begun = time.perf_counter()
    rings: list[dict[str, Any] | None] = [None, {}]
    if os.environ.get("SWEEP"):
        rings = [None, *RINGS]
    if os.environ.get("CHECK"):
        check_all(rings)
        print(f"{time.perf_counter() - begun:.0f} s", flush=True)
        return
    if os.environ.get("SWEEP"):
        rings += [{"part": 1}, {"part": 2}]
    for shape, tried in (((24, 1408, 2048, 2), rings), ((9, 2048, 7168, 1), [None, {}])):
        for kind in KINDS:
            layers = [Layer(kind, *shape) for _ in range(LAYERS)]
            base = timed(layers, None, alone=True)
            for ring in tried:
                took = guarded(f"{kind} {ring}", lambda ring=ring, layers=layers: timed(layers, ring))  # type: ignore[misc]
                if took is not None:
                    share = layers[0].bytes() / READ * 1e6 / (took - base)
                    print(
                        f"{kind} {shape} {ring}: {took - base:.1f} us and {base:.1f} in front, {share:.0%}",
                        flush=True,
                    )
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
