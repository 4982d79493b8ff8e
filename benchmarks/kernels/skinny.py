"""A few rows times a weight (`rorqual.kernels.skinny`, `fixed`): right, and as fast as memory?

`SWEEP=1` also times the other ways to cut each product and prints the best. Every timing is the replay of a
CUDA graph over copies of the weight that together exceed the L2 cache several times.
"""
# mypy: disable-error-code="misc"

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import captured, replay_us
from rorqual.kernels import fixed, skinny
from rorqual.kernels.heads import heads_fast
from rorqual.kernels.quant import dequantize_fp8, quantize_fp8

READ = 4.35e12
"""Bytes a second that a plain read reaches."""

ROTATE = 220 << 20
SHAPES = ((64, 2048), (576, 2048), (2048, 2048), (3072, 2048), (10240, 2048), (2112, 7168), (102400, 2048))
ROWS = (1, 2, 4, 16, 32)
HEADS = ((16, 1), (16, 16), (16, 64), (16, 256), (128, 1), (128, 16), (128, 64), (128, 256))
SWEEP = os.environ.get("SWEEP") == "1"

# ------------------------------------------------------------------------------------- common helpers


def graph_us(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Microseconds a call, of a graph that holds all calls: the best of a few replays."""
    graph = captured(calls)
    return min(replay_us(graph) for _ in range(repeats)) / len(calls)


def poison(size: int = 1 << 28) -> None:
    """Leave NaN in the memory that the next allocations get."""
    for bytes_ in (1 << 12, 1 << 16, 1 << 19, 1 << 20, 1 << 22, size):
        for _ in range(4):
            torch.full((bytes_ // 4,), float("nan"), device="cuda")


def failed(what: str) -> None:
    """One line of the error in flight."""
    print(f"FAILED {what}: {' | '.join(traceback.format_exc().strip().splitlines()[-2:])[:300]}", flush=True)


def _work(module: str, name: str, job: Any) -> None:
    import importlib

    try:
        with torch.inference_mode():
            torch.manual_seed(time.time_ns() % 2**31)
            getattr(importlib.import_module(module), name)(*job)
    except Exception:
        if name != "warm":  # what doesn't compile fails again where it is timed
            failed(f"{name} {job}")


def beside(module: str, jobs: Sequence[tuple[str, Any]], seconds: float = 40.0, many: int = 15) -> None:
    """Run functions of a module in processes of their own: checks, and compiling into the disk cache."""
    start = time.time()
    pool = ProcessPoolExecutor(many, mp_context=multiprocessing.get_context("spawn"))
    done, _ = wait([pool.submit(_work, module, name, job) for name, job in jobs], timeout=seconds)
    if len(done) < len(jobs):
        for process in list((pool._processes or {}).values()):
            process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"checked and compiled {len(done)} of {len(jobs)} in {time.time() - start:.0f} s", flush=True)


def error(y: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value; infinite if y is not finite."""
    if not y.isfinite().all():
        return float("inf")
    return float((y.double() - want.double()).abs().max() / want.double().abs().max())


# ------------------------------------------------------------------------------------------- a few rows


def ways(rows: int, out: int, width: int) -> list[dict[str, Any]]:
    """Cuts worth timing for a shape."""
    found: list[dict[str, Any]] = []
    if rows <= 2 or (rows == 4 and out <= 3072 and width == 2048):
        for bo, warps in ((2, 1), (1, 2), (2, 2), (4, 2)) if rows <= 2 else ((1, 1), (1, 2)):
            found.append({"kind": "fma", "BO": bo, "num_warps": warps})
        if rows <= 2:
            return found
    small = ((16, 256, 2, 6), (16, 256, 4, 6), (16, 512, 2, 4), (32, 256, 4, 5))
    large = ((64, 128, 4, 4), (64, 128, 4, 6), (128, 64, 4, 6))
    for bo, bd, warps, stages in (small if out < 7168 else ()) + (large if out > 3072 else ()):
        for fetch in (0, 2048 if width == 2048 else 1024):
            for split in (1, 4) if width > 4096 else (1,):
                if fetch * split <= width:
                    how = {
                        "BO": bo,
                        "BD": bd,
                        "SPLIT": split,
                        "STAGES": stages,
                        "num_warps": warps,
                        "FETCH": fetch,
                    }
                    found.append({"kind": "dot", **how})
    return found


def warm(rows: int, out: int, width: int, how: Any, dtype: Any) -> None:
    """Compile one cut."""
    if dtype is None:  # by head: up or down
        w = torch.empty(width, 256, 512, device="cuda", dtype=torch.bfloat16)
        x = w.new_zeros(rows, width, 192 if out else 576)[..., : 128 if out else 512]
        y = w.new_zeros(rows, width, 576 if out else 128)[..., : 512 if out else 128]
        part = w[:, :128] if out else w[:, 128:]
        if how is not None:
            heads_fast(x, part, bool(out), y, ahead=True, how=how)
            return
        scale = torch.ones(2 * width, 4, device="cuda")
        for ahead in (False, True):
            heads_fast(x, part, bool(out), y, ahead=ahead)
            heads_fast(x, part.to(torch.float8_e4m3fn), bool(out), y, scale, 0, ahead)
        return
    w = torch.empty(out, width, device="cuda", dtype=torch.bfloat16)
    x = w.new_zeros(rows, width)
    if how is not None:
        skinny.fast(x, w, out_dtype=dtype, ahead=True, how=how)
        return
    norm, residual = w.new_zeros(width), w.new_zeros(rows, out)
    for ahead in (False, True):
        skinny.fast(x, w, out_dtype=dtype, ahead=ahead)
        skinny.fast(x, w, None, residual, out_dtype=dtype, ahead=ahead)
        skinny.fast(x, w, None, None, norm, out_dtype=dtype, ahead=ahead)
    for more in (rows, 33, 512, 2048, 8192) if rows == 1 else (rows,):
        fixed.fast(x.expand(more, width).contiguous(), w)


def logits(out: int) -> torch.dtype:
    return torch.float32 if out == 64 else torch.bfloat16


def check_rows(out: int, width: int) -> None:
    worst: dict[str, float] = {}
    w = torch.randn(out, width, device="cuda").bfloat16()
    for rows in (1, 2, 3, 16, 32):
        for dtype in (torch.bfloat16, torch.float32):
            name = f"{dtype}".removeprefix("torch.") + (" norm" if out < 3000 else "")
            try:
                x = torch.randn(rows, width, device="cuda").to(dtype)
                bias = torch.randn(out, device="cuda").to(dtype)
                residual = torch.randn(rows, out, device="cuda").to(dtype)
                norm = torch.rand(width, device="cuda").bfloat16() if out < 3000 else None
                poison()
                y = skinny.skinny(x, w, bias, residual, norm, out_dtype=torch.float32)
                want = x.double()
                if norm is not None:
                    want = want * (want.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.double()
                off = error(y, want @ w.double().T + bias.double() + residual.double())
                worst[name] = max(worst.get(name, 0.0), off)
                if off > (4e-3 if norm is not None and dtype == torch.bfloat16 else 5e-5):
                    print(f"WRONG skinny {rows}x{out}x{width} {name}: {off:.2e}")
            except Exception:
                failed(f"skinny check {rows}x{out}x{width} {dtype}")
    print(f"skinny {out}x{width} worst error:", {k: f"{v:.1e}" for k, v in worst.items()}, flush=True)


def check_ahead(rows: int) -> None:
    """A chain in which every product needs the one before, replayed: the same bits with kernels that run ahead."""
    try:
        ws = [torch.randn(2048, 2048, device="cuda").bfloat16() / 45 for _ in range(24)]
        norm = torch.ones(2048, device="cuda").bfloat16()
        first = torch.randn(rows, 2048, device="cuda").bfloat16()
        held = torch.empty_like(first)

        def chain(ahead: bool, held: Tensor = held, ws: list[Tensor] = ws, norm: Tensor = norm) -> Tensor:
            x = held
            for i, w in enumerate(ws):
                x = skinny.fast(x, w, None, x, norm if i % 3 else None, ahead=ahead)
            return x

        held.copy_(first)
        want = chain(False)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        eager = torch.equal(chain(True), want)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            y = chain(True)
            graph.capture_end()
        same = 0
        for i in range(50):
            held.fill_(i)
            graph.replay()
            held.copy_(first)
            graph.replay()
            same += torch.equal(y, want)
        print(f"ahead chain {rows} rows: same bits {same} of 50, eager {eager}", flush=True)
    except Exception:
        failed(f"chain {rows}")


def time_rows() -> None:
    print("skinny: us (share of read ceiling): plan, running ahead | cuBLAS | best cuts, ahead")
    for out, width in SHAPES:
        dtype = logits(out)
        size = out * width * 2
        copies = min(200, max(2, -(-ROTATE // size)))
        ws = [torch.randn(out, width, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        for rows in ROWS:
            x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)

            def call(
                w: Tensor, ahead: bool, how: Any = None, x: Tensor = x, dtype: torch.dtype = dtype
            ) -> Any:
                return lambda: skinny.fast(x, w, out_dtype=dtype, ahead=ahead, how=how)

            def library(w: Tensor, x: Tensor = x, out: int = out) -> Any:
                if out == 64:
                    return lambda: torch.mm(x, w.t(), out_dtype=torch.float32)
                return lambda: F.linear(x, w)

            line = f"{rows:3d} x [{out}, {width}]"
            try:
                alone, us = (graph_us([call(w, ahead) for w in ws]) for ahead in (False, True))
                base = graph_us([library(w) for w in ws])
                line += f": {alone:7.2f}, ahead {us:7.2f} ({size / us / READ * 1e8:3.0f}%) | {base:7.2f}"
            except Exception:
                failed(line)
            timed = []
            for how in ways(rows, out, width) if SWEEP else []:
                try:
                    timed.append((graph_us([call(w, True, how) for w in ws], 3), short(how)))
                except Exception:
                    failed(f"{line} {how}")
            for us, name in sorted(timed)[:4]:
                line += f" | {us:.2f} ({size / us / READ * 1e8:.0f}%) {name}"
            print(line, flush=True)
        del ws


def short(how: dict[str, Any]) -> str:
    return " ".join(str(v) for v in how.values())


def time_extras() -> None:
    """Whether taking the norm and the residual along wins over separate launches."""
    for rows in (1, 2, 8, 32):
        for out in (2048, 10240):
            ws = [torch.randn(out, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(20)]
            x = torch.randn(rows, 2048, device="cuda").bfloat16()
            norm = torch.rand(2048, device="cuda").bfloat16()
            r = torch.randn(rows, out, device="cuda").bfloat16()
            line = f"extras {rows} x {out}:"
            for a in (False, True):
                try:
                    us = [
                        graph_us([lambda w=w, f=f: f(w) for w in ws])
                        for f in (
                            lambda w, a=a, x=x: skinny.fast(x, w, ahead=a),
                            lambda w, a=a, x=x, n=norm: skinny.fast(x, w, None, None, n, ahead=a),
                            lambda w, a=a, x=x, n=norm: skinny.fast(
                                F.rms_norm(x, (2048,), n, 1e-6), w, ahead=a
                            ),
                            lambda w, a=a, x=x, r=r: skinny.fast(x, w, None, r, ahead=a),
                            lambda w, a=a, x=x, r=r: skinny.fast(x, w, ahead=a) + r,
                        )
                    ]
                    form = " ahead {} {:.2f}; norm inside {:.2f} apart {:.2f}; residual inside {:.2f} apart {:.2f};"
                    line += form.format(a, *us)
                except Exception:
                    failed(line)
            print(line, flush=True)


# ------------------------------------------------------------------------------------- products by head


def check_heads(heads: int, rows: int) -> None:
    for codes in (False, True):
        try:
            dense = torch.randn(heads * 256, 512, device="cuda")
            c, scale = quantize_fp8(dense)
            kv_b = dequantize_fp8(c, scale, (128, 128), torch.bfloat16) if codes else dense.bfloat16()
            held = (c if codes else kv_b).view(heads, 256, 512)
            by = scale if codes else None
            kv_b = kv_b.view(heads, 256, 512).double()
            q = torch.randn(rows, heads, 192, device="cuda").bfloat16()[..., :128]
            wide = torch.full((rows, heads, 576), float("nan"), device="cuda", dtype=torch.bfloat16)
            poison()
            up = heads_fast(q, held[:, :128], True, wide[..., :512], by)
            down = heads_fast(up, held[:, 128:], False, None, by, 128)
            a = error(up, torch.einsum("nhd,hdc->nhc", q.double(), kv_b[:, :128]))
            b = error(down, torch.einsum("nhc,hvc->nhv", up.double(), kv_b[:, 128:]))
            if max(a, b) > 6e-3:
                print(f"WRONG heads {heads} rows {rows} codes {codes}: errors {a:.1e} {b:.1e}")
        except Exception:
            failed(f"heads check {heads} {rows} {codes}")


def head_ways(rows: int, heads: int) -> list[dict[str, int]]:
    cuts: tuple[tuple[int, ...], ...]
    if rows <= 32:
        cuts = ((16, 32, 512, 1), (16, 32, 512, 2), (16, 64, 512, 4), (16, 64, 128, 4))
    else:
        cuts = ((64, 64, 128, 4), (64, 128, 128, 4), (128, 128, 128, 8))
    return [{"BN": n, "BM": m, "BK": k, "STAGES": 3, "num_warps": w} for n, m, k, w in cuts]


def time_heads() -> None:
    print("by head: us plan, ahead | torch.bmm | best cuts, ahead; codes: the same")
    for heads, rows in HEADS:
        size = heads * 128 * 512 * 2
        copies = -(-ROTATE // (2 * size))
        held = [torch.randn(heads, 256, 512, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        codes = [torch.randn(heads, 256, 512, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
        scale = torch.rand(heads * 2, 4, device="cuda")
        wide = torch.randn(rows, heads, 576, device="cuda", dtype=torch.bfloat16)
        narrow = torch.randn(rows, heads, 192, device="cuda", dtype=torch.bfloat16)
        for up in (True, False):
            x, out = (
                (narrow[..., :128], wide[..., :512])
                if up
                else (wide[..., :512], narrow[..., :128].contiguous())
            )
            part = slice(0, 128) if up else slice(128, 256)
            line = f"{'up  ' if up else 'down'} H {heads:3d} N {rows:3d}"
            for ws, by in ((held, None), (codes, scale)):

                def call(
                    w: Tensor,
                    a: bool,
                    how: Any = None,
                    x: Any = x,
                    part: Any = part,
                    up: Any = up,
                    out: Any = out,
                    by: Any = by,
                ) -> Any:
                    return lambda: heads_fast(x, w[:, part], up, out, by, 0 if up else 128, a, how)

                def library(w: Tensor, x: Any = x, part: Any = part, up: Any = up, out: Any = out) -> Any:
                    m = w[:, part] if up else w[:, part].transpose(1, 2)
                    return lambda: torch.bmm(x.transpose(0, 1), m, out=out.transpose(0, 1))

                try:
                    line += f"{'; codes' if by is not None else ''}"
                    line += f" {graph_us([call(w, False) for w in ws]):.2f} {graph_us([call(w, True) for w in ws]):.2f}"
                    if by is None:
                        line += f" | {graph_us([library(w) for w in ws]):.2f}"
                    timed = []
                    for how in head_ways(rows, heads) if SWEEP else []:
                        if by is not None and how["BM" if up else "BK"] > 128:
                            continue
                        try:
                            timed.append((graph_us([call(w, True, how) for w in ws], 3), short(how)))
                        except Exception:
                            failed(f"{line} {how}")
                    for us, name in sorted(timed)[:3]:
                        line += f" | {us:.2f} {name}"
                except Exception:
                    failed(line)
            print(line, flush=True)


# ---------------------------------------------------------------------------------------------- fixed


def check_fixed(out: int, width: int) -> None:
    w = torch.randn(out, width, device="cuda").bfloat16()
    x = torch.randn(4096, width, device="cuda").bfloat16()
    poison()
    full = fixed.matmul_fixed(x, w, out_dtype=torch.float32)
    parts = (
        (0, 1),
        (7, 9),
        (100, 116),
        (1, 33),
        (5, 69),
        (3, 131),
        (9, 265),
        (20, 532),
        (4000, 4096),
        (0, 2048),
    )
    same = [torch.equal(fixed.matmul_fixed(x[a:b], w, out_dtype=torch.float32), full[a:b]) for a, b in parts]
    cuts = [torch.equal(fixed.fast(x, w, out_dtype=torch.float32, how=cut), full) for cut in fixed.CUTS]
    few = [
        {"kind": "dot", "BO": o, "BD": d, "SPLIT": 1, "STAGES": 3, "num_warps": n, "FETCH": 0}
        for o, d, n in ((16, 256, 2), (32, 256, 4), (64, 128, 4), (128, 64, 4))
    ]
    tall = [torch.equal(skinny.fast(x[:16], w, out_dtype=torch.float32, how=how), full[:16]) for how in few]
    off = error(full, x.double() @ w.double().T)
    print(
        f"fixed {out}x{width}: error {off:.1e}; rows independent {same}; same bits by cut {cuts} and few rows {tall}",
        flush=True,
    )


def time_fixed() -> None:
    for out, width in ((3072, 2048), (2048, 2048), (102400, 2048), (7168, 2048)):
        copies = max(2, -(-ROTATE // (out * width * 2)))
        ws = [torch.randn(out, width, device="cuda").bfloat16() for _ in range(copies)]
        line = f"fixed [{out}, {width}] us (skinny or cuBLAS):"
        for rows in (1, 32, 33, 64, 128, 512):
            x = torch.randn(rows, width, device="cuda").bfloat16()
            other = skinny.fast if rows <= 32 else F.linear
            a = graph_us([lambda w=w, x=x: fixed.fast(x, w) for w in ws], 3)
            b = graph_us([lambda w=w, x=x, f=other: f(x, w) for w in ws], 3)
            line += f" N {rows}: {a:.1f} ({b:.1f})"
        print(line, flush=True)
    for rows, out, width in ((2048, 3072, 2048), (8192, 3072, 2048), (8192, 7168, 2048), (8192, 4096, 7168)):
        x = torch.randn(rows, width, device="cuda").bfloat16()
        w = torch.randn(out, width, device="cuda").bfloat16()
        flop = 2e-6 * rows * out * width
        us = graph_us([lambda x=x, w=w: fixed.fast(x, w)] * 10)
        base = graph_us([lambda x=x, w=w: F.linear(x, w)] * 10)
        print(f"fixed {rows}x{out}x{width} TFLOP/s: {flop / us:.0f}, cuBLAS {flop / base:.0f}", flush=True)


def jobs() -> list[tuple[str, Any]]:
    """Checks, and one job for each kernel to compile that differs."""
    found: list[tuple[str, Any]] = [("check_ahead", (rows,)) for rows in (1, 2, 8, 32)]
    found += [("check_rows", s) for s in ((64, 2048), (576, 2048), (333, 1000), (2112, 7168), (10240, 2048))]
    found += [("check_heads", s) for s in ((16, 1), (16, 37), (128, 5), (128, 200))]
    found += [("check_fixed", s) for s in ((2112, 7168), (10240, 2048), (576, 1000))]
    kernels: dict[Any, Any] = {}
    for out, width in SHAPES:
        for rows in ROWS:
            for how in (None, *(ways(rows, out, width) if SWEEP else ())):
                form = max(16, rows) if how and how["kind"] == "dot" else rows
                kernels[form, rows == 16, width, str(how), logits(out)] = (rows, out, width, how, logits(out))
    for heads, rows in HEADS:
        for how in (None, *(head_ways(rows, heads) if SWEEP else ())):
            for up in (1, 0):
                kernels[up, str(how), min(rows, 16), heads if how is None else 0] = (
                    rows,
                    up,
                    heads,
                    how,
                    None,
                )
    return found + [("warm", job) for job in kernels.values()]


def main() -> None:
    torch.manual_seed(int(time.time()))
    start = time.time()
    beside("benchmarks.kernels.skinny", jobs())
    with torch.inference_mode():
        for step in (time_rows, time_heads, time_extras, time_fixed):
            try:
                step()
            except Exception:
                failed(step.__name__)
            print(f"[{step.__name__} done at {time.time() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
