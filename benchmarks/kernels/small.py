"""The small fused operations of a step, at the lite and V3 geometries: right, and how long in a CUDA graph.

`python -m benchmarks.kernels.small` checks each against its reference in fp64 or fp32 and times 27 launches in
a row, replayed; `SWEEP=1` also tries other shapes of the launches.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import replays_us
from rorqual.kernels import cache_write, fuse, route

LAYERS = 27
PEAK = 4.3e12
BF = torch.bfloat16
CHAINED = fuse.chained
DEFAULTS = cache_write.TILE, cache_write.WARPS, route.CHOOSING_WARPS
WORKERS = 14


class Geometry:
    def __init__(
        self, name: str, hidden: int, experts: int, heads: int, rule: route.Rule, bias: bool
    ) -> None:
        self.name, self.hidden, self.experts, self.heads, self.rule = name, hidden, experts, heads, rule
        self.bias = torch.randn(experts, device="cuda") * 0.02 if bias else None
        self.weights = [random(experts, hidden) * hidden**-0.5 for _ in range(LAYERS)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(BF)


def geometries() -> list[Geometry]:
    torch.manual_seed(0)
    return [
        Geometry("lite", 2048, 64, 16, route.Rule(6, "softmax"), False),
        Geometry("V3", 7168, 256, 128, route.Rule(8, "sigmoid", 8, 4, "top2", True, 2.5), True),
    ]


def restore() -> None:
    cache_write.TILE, cache_write.WARPS, route.CHOOSING_WARPS = DEFAULTS


def chain(on: bool) -> None:
    """Whether kernels are launched while the one before still runs."""
    for module in (fuse, route, cache_write):
        module.chained = CHAINED if on else (lambda x, n: {"CHAINED": False})  # type: ignore[attr-defined]


def replayed(step: Callable[[int], Any], replays: int = 12) -> float:
    """Microseconds of one of `LAYERS` calls in a row, in a CUDA graph: the median replay."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for i in range(LAYERS):
            step(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    keep = []
    with torch.cuda.graph(graph):
        for i in range(LAYERS):
            keep.append(step(i))
    return replays_us(graph, replays) / LAYERS


# ---------------------------------------------------------------------------------------------- cases


def plain_route(x: Tensor, weight: Tensor, bias: Tensor | None, rule: route.Rule) -> tuple[Tensor, Tensor]:
    logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
    score = logits.softmax(-1) if rule.score == "softmax" else logits.sigmoid()
    ranked = score if bias is None else score + bias
    if rule.groups > 1:
        grouped = ranked.unflatten(-1, (rule.groups, -1))
        worth = grouped.topk(2, -1).values.sum(-1)
        kept = torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, worth.topk(rule.keep, -1).indices, True)
        ranked = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    ids = ranked.topk(rule.top_k, -1).indices
    weights = score.gather(-1, ids)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * rule.scale


def plain_mla(case: MlaCase) -> None:
    latent = F.rms_norm(case.kv[:, :512], (512,), case.norm, 1e-6)
    rope = cache_write.turned(case.kv[:, 512:], case.cos, case.sin, True)
    entry = torch.cat((latent, rope), -1)
    if case.fp8:
        entry = cache_write.fp8_entry(entry, 512)
    case.pages.view(-1, case.pages.shape[-1]).index_copy_(0, case.slots, entry)
    q = case.q[..., 128:]
    q.copy_(cache_write.turned(q, case.cos[:, None], case.sin[:, None], True))


class MlaCase:
    def __init__(self, tokens: int, heads: int, fp8: bool) -> None:
        self.fp8 = fp8
        self.kv, self.norm, self.q = random(tokens, 576), random(512), random(tokens, heads, 192)
        angle = torch.rand(tokens, 32, device="cuda") * 6.28
        self.cos, self.sin = angle.cos(), angle.sin()
        shape = (tokens // 64 + 2, 64, 656 if fp8 else 576)
        self.pages = torch.zeros(shape, device="cuda", dtype=torch.uint8 if fp8 else BF)
        self.slots = torch.randperm(shape[0] * 64, device="cuda")[:tokens]
        self.moved = tokens * (2 * 576 + shape[-1] * (1 if fp8 else 2) + 4 * heads * 64)

    def write(self, operation: Callable[..., None] = cache_write.mla_write) -> None:
        operation(
            self.kv, self.norm, 1e-6, self.cos, self.sin, self.q[..., 128:], self.pages, self.slots,
            rank=512, interleaved=True,
        )  # fmt: skip


class GqaCase:
    """Heads of a Qwen3 distill: 32 query heads, 8 of keys, normed, half-split."""

    def __init__(self, tokens: int) -> None:
        self.q, self.k, self.v = random(tokens, 32, 128), random(tokens, 8, 128), random(tokens, 8, 128)
        self.norm = random(128)
        angle = torch.rand(tokens, 64, device="cuda") * 6.28
        self.cos, self.sin = angle.cos(), angle.sin()
        self.pages = torch.zeros(2, tokens // 64 + 2, 64, 8, 128, device="cuda", dtype=BF)
        self.slots = torch.randperm(self.pages.shape[1] * 64, device="cuda")[:tokens]
        self.moved = tokens * 128 * 2 * (2 * 32 + 4 * 8)

    def write(self, operation: Callable[..., None] = cache_write.gqa_write) -> None:
        operation(
            self.q, self.k, self.v, self.cos, self.sin, self.pages[0], self.pages[1], self.slots,
            interleaved=False, q_norm=self.norm, k_norm=self.norm, eps=1e-6,
        )  # fmt: skip


def plain_gqa(case: GqaCase) -> None:
    q, k = (F.rms_norm(x, (128,), case.norm, 1e-6) for x in (case.q, case.k))
    cos, sin = case.cos[:, None], case.sin[:, None]
    case.q.copy_(cache_write.turned(q, cos, sin, False))
    for pages, x in zip(case.pages, (cache_write.turned(k, cos, sin, False), case.v), strict=True):
        pages.view(-1, 8, 128).index_copy_(0, case.slots, x)


# --------------------------------------------------------------------------------------------- checks


def far(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 1e-3) -> str:
    """What is wrong where numbers differ by more than `tolerance` of their size, or of `floor`."""
    error = ((actual.double() - expected.double()).abs() / (expected.double().abs() + floor)).max().item()
    return "" if error <= tolerance else f"off by {error:.1e}"


def check_route(g: Geometry, tokens: int) -> str:
    x = random(tokens, g.hidden)
    logits = torch.full((tokens, g.experts), float("nan"), device="cuda")
    ids, weights = route.fast(x, g.weights[0], g.bias, g.rule, logits_NE=logits)
    exact = x.double() @ g.weights[0].double().t()
    wrong = [far(logits, exact, 1e-4, 1.0)]
    ids_of_these, weights_of_these = route.choose_reference(logits, g.bias, g.rule)
    same = (ids == ids_of_these).all(-1)
    if (~same).sum() > tokens * 1e-3:  # scores a rounding apart may stand the other way
        wrong.append(f"{int((~same).sum())} of {tokens} choices differ")
    wrong.append(far(weights[same], weights_of_these[same], 5e-6))
    again = route.fast(x, g.weights[0], g.bias, g.rule, early=True)
    if not (torch.equal(again[0], ids) and torch.equal(again[1], weights)):
        wrong.append("a second call differs")
    return " ".join(filter(None, wrong))


def check_fuse(g: Geometry, tokens: int) -> str:
    x, residual, weight = random(tokens, g.hidden), random(tokens, g.hidden), random(g.hidden)
    normed, total = fuse.add_rmsnorm(x, residual, weight, 1e-6)
    exact = total.double() / (total.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    wrong = ["" if torch.equal(total, x + residual) else "sum", far(normed, exact, 2**-8)]
    reference = fuse.rmsnorm_reference(total, weight, 1e-6)
    wrong.append("" if (normed != reference).float().mean() < 0.01 else "norm rounds otherwise")
    gate, up = random(tokens, 2 * g.hidden).chunk(2, -1)
    for limit in (None, 1.0):
        y, expected = fuse.swiglu(gate, up, limit), fuse.swiglu_reference(gate, up, limit)
        wrong.append(far(y, expected, 2**-6))
        wrong.append("" if (y != expected).float().mean() < 0.01 else "swiglu rounds otherwise")
    one = fuse.add_rmsnorm(x[-1:], residual[-1:], weight, 1e-6)[0]
    wrong.append("" if torch.equal(one, normed[-1:]) else "depends on its neighbours")
    return " ".join(filter(None, wrong))


def check_mla(heads: int, tokens: int, fp8: bool) -> str:
    case = MlaCase(tokens, heads, fp8)
    q = case.q.clone()
    if tokens > 1:
        case.slots[tokens // 2] = -1
    case.pages.fill_(7)
    case.write(cache_write.mla_write_fast)
    fast_q, fast_pages = case.q.clone(), case.pages.clone()
    case.q.copy_(q)
    case.pages.fill_(7)
    case.write(cache_write.mla_write_reference)
    wrong = ["" if torch.equal(fast_q, case.q) else "queries"]
    tail = 128 if fp8 else 64
    wrong.append("" if torch.equal(fast_pages[..., -tail:], case.pages[..., -tail:]) else "rotary keys")
    differ = (fast_pages != case.pages).float().mean().item()
    wrong.append("" if differ < 2e-3 else f"{differ:.4f} of the pages differ")
    if not fp8:
        wrong.append(far(fast_pages, case.pages, 2**-6, 1.0))
    return " ".join(filter(None, wrong))


def check_gqa(tokens: int) -> str:
    case = GqaCase(tokens)
    q = case.q.clone()
    case.write(cache_write.gqa_write_fast)
    fast_q, fast_pages = case.q.clone(), case.pages.clone()
    case.q.copy_(q)
    case.pages.zero_()
    case.write(cache_write.gqa_write_reference)
    wrong = [far(fast_q, case.q, 2**-6, 1.0), far(fast_pages, case.pages, 2**-6, 1.0)]
    wrong.append("" if (fast_q != case.q).float().mean() < 0.01 else "queries round otherwise")
    wrong.append("" if torch.equal(fast_pages[1], case.pages[1]) else "values")
    return " ".join(filter(None, wrong))


def check_chain(g: Geometry, tokens: int) -> str:
    """Operations that feed each other, with copies and PyTorch's own kernels between: a replayed graph whose
    launches overlap must give the bits of plain launches."""
    x, weight = random(tokens, g.hidden), random(g.hidden)
    mla = MlaCase(tokens, g.heads, False)
    q, still = mla.q.clone(), torch.empty_like(x)
    square = random(g.hidden, 576) * g.hidden**-0.5

    def run() -> list[Tensor]:
        still.copy_(x)
        mla.q.copy_(q)
        stream, out = still, still
        for i in range(6):
            out, stream = fuse.add_rmsnorm(out, stream, weight, 1e-6)
            ids, weights = route.fast(out, g.weights[i], g.bias, g.rule, early=True)
            mla.kv.copy_(out @ square if i % 2 else out[:, :576])
            mla.write(cache_write.mla_write_fast)
            out = fuse.swiglu(out, stream) * weights.sum(-1, keepdim=True).to(BF)
            out[:, :64] += mla.q[:, 0, 128:]
            out[:, 64 : 64 + ids.shape[1]] += ids * 0.01
        return [out, stream, mla.pages.clone(), mla.q.clone()]

    before = fuse.chained
    chain(False)
    expected = run()
    chain(before is CHAINED)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run()
    for _ in range(5):
        for t in actual:
            t.fill_(7)
        graph.replay()
        if not all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)):
            return "an overlapped chain differs"
    return ""


def checks() -> list[tuple[str, Callable[[], str]]]:
    out: list[tuple[str, Callable[[], str]]] = []
    for g in geometries():
        for tokens in (1, 2, 3, 32, 100, 256, 4096):
            out.append((f"route {g.name} {tokens}", lambda g=g, n=tokens: check_route(g, n)))
        out.extend((f"chain {g.name} {n}", lambda g=g, n=n: check_chain(g, n)) for n in (1, 33, 512))
        out.extend((f"fuse {g.name} {n}", lambda g=g, n=n: check_fuse(g, n)) for n in (1, 33))
        out.extend(
            (f"mla {g.name} {n} {fp8}", lambda g=g, n=n, fp8=fp8: check_mla(g.heads, n, fp8))
            for n in (1, 33)
            for fp8 in (False, True)
        )
    out.extend((f"gqa {n}", lambda n=n: check_gqa(n)) for n in (1, 33))
    return out


# --------------------------------------------------------------------------------------------- timing


def guarded(name: str, fn: Callable[[], Any]) -> Any:
    try:
        return fn()
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        print(f"FAILED {name}: {' | '.join(lines[-3:])[:400]}")
        return None


def timed(name: str, step: Callable[[int], Any], plain: Callable[[int], Any], moved: float) -> None:
    """One line: microseconds chained and not, share of the copy rate, PyTorch's own form."""

    def line() -> None:
        chain(True)
        with_overlap = replayed(step)
        chain(False)
        without = replayed(step)
        other = replayed(plain)
        share = moved / (with_overlap * 1e-6) / PEAK
        print(
            f"{name:26s} {with_overlap:7.2f} us  unchained {without:7.2f}  torch {other:8.2f}  {share:5.1%} of copy"
        )

    guarded(name, line)


def times() -> None:
    for g in geometries():
        for tokens in (1, 32, 256, 4096):
            x, residual, weight = random(tokens, g.hidden), random(tokens, g.hidden), random(g.hidden)
            timed(
                f"route {g.name} N={tokens}",
                lambda i, g=g, x=x: route.fast(x, g.weights[i], g.bias, g.rule, early=True),
                lambda i, g=g, x=x: plain_route(x, g.weights[i], g.bias, g.rule),
                2.0 * g.experts * g.hidden + x.nbytes,
            )
            timed(
                f"add_rmsnorm {g.name} N={tokens}",
                lambda i, x=x, r=residual, w=weight: fuse.add_rmsnorm(x, r, w, 1e-6),
                lambda i, x=x, r=residual, w=weight: fuse.add_rmsnorm_reference(x, r, w, 1e-6),
                4.0 * x.nbytes,
            )
            both = random(tokens, 2 * g.hidden)
            gate, up = both.chunk(2, -1)
            timed(
                f"swiglu {g.name} N={tokens}",
                lambda i, gate=gate, up=up: fuse.swiglu(gate, up),
                lambda i, gate=gate, up=up: fuse.swiglu_reference(gate, up, None),
                3.0 * x.nbytes,
            )
            for fp8 in (False, True):
                case = MlaCase(tokens, g.heads, fp8)
                timed(
                    f"mla{' fp8' if fp8 else ''} {g.name} N={tokens}",
                    lambda i, case=case: case.write(),
                    lambda i, case=case: plain_mla(case),
                    case.moved,
                )
    for tokens in (1, 4096):
        gqa = GqaCase(tokens)
        timed(f"gqa N={tokens}", lambda i, c=gqa: c.write(), lambda i, c=gqa: plain_gqa(c), gqa.moved)


# -------------------------------------------------------------------------------------------- sweeping


def row_plans(width: int) -> list[route.Plan]:
    shapes = [(1, 512, 1), (2, 512, 1), (4, 512, 1), (1, 1024, 1), (2, 1024, 1), (4, 1024, 1), (1, 2048, 1)]
    shapes += [(2, 2048, 2), (1, 2048, 2), (4, 1024, 2), (8, 512, 4), (8, 256, 1), (4, 2048, 4), (1, 8192, 4)]
    return [route.Plan(e, n, n, warps=w) for e, n, w in shapes if n <= max(width, 1024) * 1.2]


def tile_plans(width: int, tokens: int) -> list[route.Plan]:
    spans = (512, 896, 1792) if width > 4096 else (128, 256, 512)
    heights = [
        t for t in (16, 32, 64, 128) if (tokens <= 16 and t == 16) or tokens // 8 <= t <= tokens < 16 * t
    ]
    out = []
    for span in spans:
        for inner in (128, 256):
            for e in (16, 32, 64):
                for t in heights:
                    if span % inner == 0 and inner * (e + t) * 2 <= 70_000:
                        out.append(route.Plan(e, span, inner, t, 8 if e * t >= 4096 else 4))
    return out


Way = tuple[str, Callable[[int], Any]]


def logits_ways(g: Geometry, tokens: int, plans: list[route.Plan]) -> list[Way]:
    x = random(tokens, g.hidden)
    return [
        (
            f"{p.tokens}x{p.experts}x{p.span}/{p.inner}w{p.warps}",
            lambda i, p=p: route.fast(x, g.weights[i], g.bias, g.rule, shape=p, early=True),
        )
        for p in plans
    ]


def write_ways(case: Any) -> list[Way]:
    def call(i: int, tile: int, warps: int) -> None:
        cache_write.TILE, cache_write.WARPS = tile, warps
        case.write()

    return [(f"{t}w{w}", lambda i, t=t, w=w: call(i, t, w)) for t in (512, 1024, 2048) for w in (1, 2, 4)]


def choose_ways(g: Geometry, tokens: int) -> list[Way]:
    """The choice alone, on logits in as many parts as the plan makes."""
    shape = route.plan(tokens, g.experts, g.hidden, True)
    x = random(tokens, g.hidden)
    parts = route._logits(x, g.weights[0], shape, False)

    def call(i: int, warps: int) -> Any:
        route.CHOOSING_WARPS, kept = warps, route._logits
        route._logits = lambda *_: parts
        try:
            return route.fast(x, g.weights[i], g.bias, g.rule)
        finally:
            route._logits = kept

    alone = [("logits alone", lambda i: route._logits(x, g.weights[i], shape, True))]
    late = [("logits alone, late", lambda i: route._logits(x, g.weights[i], shape, False))]
    return alone + late + [(f"w{w}", lambda i, w=w: call(i, w)) for w in (1, 2, 4)]


def sweeps() -> list[tuple[str, list[Way]]]:
    """Families of alternatives: (what, [(how, a call)])."""
    out = []
    for g in geometries():
        for tokens in (1, 2, 4):
            out.append((f"rows {g.name} N={tokens}", logits_ways(g, tokens, row_plans(g.hidden))))
        for tokens in (2, 32, 64, 256, 1024):
            plans = tile_plans(g.hidden, tokens)
            out.append((f"tiles {g.name} N={tokens}", logits_ways(g, tokens, plans)))
        for tokens in (512, 1024):
            x = random(tokens, g.hidden)
            way = lambda i, g=g, x=x: torch.mm(x, g.weights[i].t(), out_dtype=torch.float32)  # noqa: E731
            out.append((f"mm only {g.name} N={tokens}", [("mm", way)]))
        for tokens in (1, 32, 256, 4096):
            out.append((f"choose {g.name} N={tokens}", choose_ways(g, tokens)))
    for tokens in (1, 4096):
        out.append((f"gqa N={tokens}", write_ways(GqaCase(tokens))))
    return out


def sweep() -> None:
    chain(True)
    for what, ways in sweeps():
        found = []
        for how, step in ways:
            restore()
            us = guarded(f"{what} {how}", lambda step=step: replayed(step, 6))
            if us is not None:
                found.append((us, how))
        found.sort()
        print(f"{what:20s} " + "  ".join(f"{how} {us:.2f}" for us, how in found[:7]))
    restore()


# ------------------------------------------------------------------------------------------------ main


def compile_share(worker: int) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    tasks: list[Callable[[], Any]] = [fn for _, fn in checks()]
    if os.environ.get("SWEEP"):
        tasks += [lambda step=step: step(0) for _, ways in sweeps() for _, step in ways]
    for task in tasks[worker::WORKERS]:
        for on in (True, False):
            chain(on)
            restore()
            guarded("", task)


def main() -> None:
    if len(sys.argv) > 1:
        return compile_share(int(sys.argv[1]))
    began = time.time()
    command = [sys.executable, "-m", "benchmarks.kernels.small"]
    workers = [subprocess.Popen([*command, str(i)], stderr=subprocess.DEVNULL) for i in range(WORKERS)]
    for process in workers:
        process.wait()
    print(f"compiled in {time.time() - began:.0f} s on {torch.cuda.get_device_name()}")
    wrong = 0
    for on in (True, False):
        chain(on)
        for name, fn in checks():
            answer = guarded(name, fn)
            if answer != "":
                wrong += 1
                print(f"WRONG {name} chained={on}: {answer}")
    print(f"checks: {wrong} wrong, {time.time() - began:.0f} s")
    times()
    if os.environ.get("SWEEP"):
        sweep()
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()
