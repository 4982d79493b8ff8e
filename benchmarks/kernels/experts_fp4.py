"""FP4 experts at V4-Flash's widths (256 experts, D 4096, W 2048, top 6): checks against fp64, then us a layer beside
FP8 and bf16 matrices and beside the bytes that have to be read. SWEEP=1 tries other tiles."""

import faulthandler
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import BF16, DEVICE, guarded, line, micros
from rorqual.kernels import experts, experts_packed
from rorqual.kernels.experts import Weights
from rorqual.kernels.experts_packed import Plan, Tiles
from rorqual.kernels.experts_run import Batch
from rorqual.kernels.quant import E8M0, FP8

COUNT, HIDDEN, WIDTH, CHOSEN = 256, 4096, 2048, 6
SHAPES = ((COUNT, WIDTH, HIDDEN), (COUNT, WIDTH, HIDDEN), (COUNT, HIDDEN, WIDTH))
TOKENS = (1, 2, 4, 8, 32, 64, 256, 2048)


def matrices(kind: str, count: int = COUNT) -> list[Weights]:
    """Random codes: their values don't change the work."""
    made = []
    for _, rows, columns in SHAPES:
        if kind == "fp4":
            codes = torch.randint(-128, 128, (count, rows, columns // 2), dtype=torch.int8, device=DEVICE)
            scale = torch.randint(118, 123, (count, rows, columns // 32), dtype=torch.uint8, device=DEVICE)
            made.append(Weights(codes, scale.view(E8M0)))
        elif kind == "fp8":
            codes = torch.randint(0, 100, (count, rows, columns), dtype=torch.uint8, device=DEVICE).view(FP8)
            scale = torch.full((count, rows // 128, columns // 128), 1e-3, device=DEVICE)
            made.append(Weights(codes, scale, (128, 128)))
        else:
            made.append(
                Weights(
                    torch.empty(count, rows, columns, dtype=torch.bfloat16, device=DEVICE).normal_(0, 0.02)
                )
            )
    return made


class Case:
    """`tokens` tokens of one layer."""

    def __init__(self, tokens: int, stacks: list[Weights]) -> None:
        count = stacks[0].codes.shape[0]
        self.stacks, self.tokens = stacks, tokens
        self.x = torch.randn(tokens, HIDDEN, device=DEVICE).bfloat16()
        self.ids = torch.rand(tokens, count, device=DEVICE).topk(CHOSEN).indices
        self.weights = torch.rand(tokens, CHOSEN, device=DEVICE)
        self.distinct = int(self.ids.unique().numel())

    def run(self, how: Plan | None = None) -> Tensor:
        if how is None:
            return experts.experts(self.x, self.ids, self.weights, *self.stacks, limit=10.0)
        scales = [w.scale.view(torch.uint8) for w in self.stacks if w.scale is not None]
        stacks = (self.stacks[0], self.stacks[1], self.stacks[2])
        batch = Batch(self.x, self.ids, self.weights, stacks, stacks, 0, 10.0, None)
        return experts_packed.fast(batch, scales, how)


def bytes_of(kind: str, distinct: int) -> float:
    return distinct * 3 * HIDDEN * WIDTH * {"fp4": 0.5 + 1 / 32, "fp8": 1.0, "bf16": 2.0}[kind]


def check(tokens: int) -> None:
    case = Case(tokens, matrices("fp4", 8))
    got = case.run().double()
    some = slice(0, min(tokens, 24))
    want = experts.reference(
        case.x[some].double(), case.ids[some], case.weights[some].double(), *case.stacks, limit=10.0
    )
    error = float((got[some] - want).abs().max() / want.abs().max())
    same = torch.equal(case.run().double(), got)
    print(f"check {tokens} tokens: {error:.4f} {'ok' if error < 0.01 and same else 'WRONG'}", flush=True)


def options(tokens: int) -> list[Plan]:
    """Tiles to try."""
    if tokens <= experts_packed.FEW:
        tiles = [
            Tiles(4, 16, 128, 4, 3),
            Tiles(4, 16, 256, 4, 3),
            Tiles(8, 16, 128, 8, 3),
            Tiles(4, 32, 128, 8, 3),
        ]
        tiles += [Tiles(2, 16, 256, 4, 4), Tiles(4, 16, 128, 4, 5)]
        return [Plan(one, one, True) for one in tiles]
    rows = experts_packed.plan(tokens, CHOSEN, COUNT, True).up.rows
    ups = [(64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3), (32, 256, 4, 3), (64, 256, 8, 3)]
    downs = [(128, 128, 4, 3), (128, 128, 4, 4), (64, 256, 4, 3), (64, 128, 4, 4), (128, 256, 8, 3)]
    return [Plan(Tiles(rows, *up), Tiles(rows, *down)) for up, down in zip(ups, downs, strict=True)]


def warm(task: tuple[int, Plan | None]) -> None:
    tokens, how = task
    try:
        case = Case(tokens, matrices("fp4", 8))
        case.run(how or experts_packed.plan(tokens, CHOSEN, COUNT, True))
        torch.cuda.synchronize()
    except Exception:
        pass


def measure(tokens: int, kind: str, stacks: list[Weights]) -> None:
    case = Case(tokens, stacks)
    us = micros([case.run], budget=0.02)
    flops = 6.0 * tokens * CHOSEN * HIDDEN * WIDTH
    line(f"{kind} {tokens} tokens, {case.distinct} experts", us, bytes_of(kind, case.distinct), flops, BF16)


def sweep(tokens: int, stacks: list[Weights]) -> None:
    case, found = Case(tokens, stacks), []
    for how in options(tokens):
        try:
            found.append((micros([lambda h=how: case.run(h)], budget=0.01), tuple(how.up), tuple(how.down)))
        except Exception as error:
            print("   ", how, str(error).strip().splitlines()[-1][:100])
    print(f"sweep {tokens}: " + "; ".join(f"{us:.1f} {u} {d}" for us, u, d in sorted(found)), flush=True)


def main() -> None:
    faulthandler.dump_traceback_later(int(os.environ.get("LIMIT", "58")), exit=True)
    begun, sweeping = time.perf_counter(), os.environ.get("SWEEP") == "1"
    pool = ThreadPoolExecutor(6)
    tasks: list[Any] = [(tokens, None) for tokens in TOKENS]
    if sweeping:
        tasks += [(tokens, how) for tokens in (1, 8, 64, 2048) for how in options(tokens)]
    list(pool.map(warm, tasks, timeout=45))
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    for tokens in (1, 3, 8, 100):
        guarded(check, tokens)
    for kind in os.environ.get("KINDS", "fp4 fp8 bf16").split():
        stacks = matrices(kind)
        for tokens in TOKENS:
            guarded(measure, tokens, kind, stacks)
        if kind == "fp4" and sweeping:
            for tokens in (1, 8, 64, 2048):
                guarded(sweep, tokens, stacks)
        del stacks
        torch.cuda.empty_cache()
    print(f"done after {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
