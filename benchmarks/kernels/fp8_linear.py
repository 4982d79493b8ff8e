"""FP8 linear layers (`rorqual.kernels.fp8_linear`): right, and as fast as the tensor cores and memory?

`SWEEP=1` also times the other ways to cut each product. Small products are timed by graph replay over copies of
the weight that together exceed the L2 cache several times.
"""
# mypy: disable-error-code="misc"

from __future__ import annotations

import os
import sys
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.skinny import (
    READ,
    ROTATE,
    beside,
    failed,
    graph_us,
    poison,
    short,
)
from benchmarks.kernels.timing import captured, replay_us, turns_us
from rorqual.kernels import fp8_gluon
from rorqual.kernels import fp8_linear as op
from rorqual.kernels.gpu import triton
from rorqual.kernels.quant import E8M0, dequantize_fp8, quantize_fp8

LARGE = (
    (4096, 7168, 16384),
    (4096, 4096, 7168),
    (4096, 7168, 2048),
    (8192, 8192, 8192),
    (4096, 2112, 7168),
    (4096, 24576, 1536),
)
SMALL = ((7168, 2048), (576, 2048), (2112, 7168), (7168, 16384))
ROWS = (1, 2, 16, 32, 64, 128)
SWEEP = os.environ.get("SWEEP") == "1"


def weight(out: int, width: int) -> tuple[Tensor, Tensor]:
    codes = torch.randn(out, width, device="cuda", dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    return codes, torch.rand(-(-out // 128), -(-width // 128), device="cuda") + 0.5


def exact(x: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales by the definition on the CPU: PyTorch multiplies by 1 / 448 on a GPU."""
    codes, scale = op.quantize_reference(x.cpu(), pow2)
    return codes.cuda(), scale.cuda()


def check_quantize() -> None:
    for rows, width in ((1, 7168), (5, 200), (333, 2048)):
        for dtype in (torch.bfloat16, torch.float32):
            for pow2 in (False, True):
                try:
                    x = (
                        torch.randn(rows, width + 8, device="cuda")
                        * torch.logspace(-4, 3, rows, device="cuda")[:, None]
                    )
                    x = x.to(dtype)[:, :width]
                    poison()
                    ours, theirs = op.quantize_rows(x, pow2), exact(x, pow2)
                    same = [torch.equal(a.float(), b.float()) for a, b in zip(ours, theirs, strict=True)]
                    if not all(same):
                        print(
                            f"WRONG quantize {rows}x{width} {dtype} pow2 {pow2}: codes, scales same: {same}"
                        )
                except Exception:
                    failed("quantize check")


def check(out: int, width: int) -> None:
    worst = 0.0
    for powers in (False, True):
        dense = torch.randn(out, width, device="cuda") * torch.logspace(-1, 1, out, device="cuda")[:, None]
        codes, scale = quantize_fp8(dense, ue8m0=powers, scale_dtype=E8M0 if powers else torch.float32)
        w = dequantize_fp8(codes, scale, (128, 128), torch.float64)
        for rows in (1, 32, 64, 129, 1001):
            try:
                x, bias = torch.randn(rows, width, device="cuda"), torch.randn(out, device="cuda")
                poison()
                bf16 = op.fp8_linear(
                    x.bfloat16(), codes, scale, bias=bias.bfloat16(), pow2=powers, ahead=True
                )
                y = op.fp8_linear(x, codes, scale, bias=bias if powers else None, pow2=powers)
                z = dequantize_fp8(*exact(x, powers), (1, 128), torch.float64)
                want, size = z @ w.T + (bias if powers else 0), z.abs() @ w.abs().T
                off = float(((y - want).abs() / size).max()) if y.isfinite().all() else float("inf")
                z = dequantize_fp8(*exact(x.bfloat16(), powers), (1, 128), torch.float64)
                want, size = z @ w.T + bias.bfloat16(), z.abs() @ w.abs().T + bias.abs()
                off16 = float(((bf16 - want).abs() / size).max()) if bf16.isfinite().all() else float("inf")
                worst = max(worst, off)
                if off > 2**-12 or off16 > 2**-8 or bf16.dtype != torch.bfloat16:
                    print(f"WRONG {rows}x{out}x{width} powers {powers}: {off:.1e} {off16:.1e}")
            except Exception:
                failed(f"check {rows}x{out}x{width}")
    print(f"fp8 {out}x{width}: worst error over the sum of magnitudes {worst:.1e}", flush=True)


def library(x: tuple[Tensor, Tensor], codes: Tensor, scale: Tensor) -> Tensor:
    return torch._scaled_mm(x[0], codes.t(), x[1], scale.t(), out_dtype=torch.bfloat16)


def check_library(rows: int, out: int, width: int) -> None:
    """How exact cuBLASLt's sums are, beside ours."""
    codes, scale = weight(out, width)
    x = torch.randn(rows, width, device="cuda").bfloat16()
    z = dequantize_fp8(*exact(x), (1, 128), torch.float64)
    w = dequantize_fp8(codes, scale, (128, 128), torch.float64)
    size = z.abs() @ w.abs().T
    ys = (op.library(x, codes, scale), op.fast(x, codes, scale))
    offs = [float(((y - z @ w.T).abs() / size).max()) for y in ys]
    print(
        f"library {rows}x{out}x{width}: error over magnitudes {offs[0]:.1e}, ours {offs[1]:.1e}", flush=True
    )


def large_ways() -> list[dict[str, Any]]:
    cuts = ((64, 128, 4, 4), (128, 64, 4, 4))
    return [
        {"BN": n, "BO": o, "SPLIT": 1, "STAGES": s, "TALL": False, "num_warps": w, "FETCH": 0, "UNROLL": 1}
        for n, o, w, s in cuts
    ]


def small_ways(rows: int, out: int, width: int) -> list[dict[str, Any]]:
    base = {"SPLIT": 1, "num_warps": 4, "FETCH": 0}
    best: list[dict[str, Any]] = []
    if rows <= 2:
        for bo, warps in ((2, 2), (4, 2), (4, 4), (8, 4)):
            if bo * triton.next_power_of_2(width) // warps <= 16384:
                best.append({"FEW": True, "BO": bo, "num_warps": warps})
    cuts: tuple[tuple[int, ...], ...]
    if rows <= 32:
        tall = max(16, rows)
        cuts = ((tall, 64, 6, 1, 4), (tall, 64, 4, 2, 4), (tall, 128, 6, 1, 8), (tall, 128, 4, 2, 8))
    elif rows == 64:
        cuts = ((64, 64, 8, 1, 4), (64, 64, 4, 2, 4), (64, 64, 3, 4, 4), (64, 128, 3, 2, 4))
    else:
        cuts = ((64, 64, 3, 2, 4), (128, 64, 4, 1, 4), (128, 64, 3, 2, 4))
    for n, o, stages, unroll, warps in cuts if rows > 1 else ():
        programs = -(-out // o) * -(-rows // n)
        for split in (1, 2, 4, 8):
            if (100 <= programs * split <= 300 and split * 4 <= width // 128) or (
                split == 4 and programs < 25
            ):
                how = base | {
                    "BN": n,
                    "BO": o,
                    "STAGES": stages,
                    "TALL": rows <= 32,
                    "num_warps": warps,
                    "UNROLL": unroll,
                }
                best.append(how | {"SPLIT": split})
    return best


def ring_ways(rows: int, out: int, width: int) -> list[dict[str, Any]]:
    """Cuts of the Gluon form worth timing: the one chosen first; then others by rows, outputs, warps, runs of 128
    channels in a piece, and pieces at a time."""
    chosen = fp8_gluon.plan(rows, out, width)
    found = [] if chosen is None else [chosen]
    steps = width // 128
    while steps > 16:
        steps //= 2
    cuts: dict[int, tuple[tuple[int, ...], ...]] = {
        16: ((64, 4, 4, 4), (64, 4, 2, 8), (64, 4, 1, 10)),
        32: ((64, 4, 2, 8), (64, 4, 1, 12), (64, 4, 1, 9), (64, 4, 2, 6)),
        64: ((64, 4, 1, 8), (64, 4, 1, 10), (64, 4, 1, 13), (64, 4, 2, 4), (64, 4, 2, 5), (64, 4, 4, 3)),
        128: ((64, 8, 1, 6), (64, 8, 1, 9), (64, 8, 2, 3), (64, 8, 4, 2)),
    }  # fmt: skip
    BN = max(16, triton.next_power_of_2(rows))
    for bo, warps, wide, stages in cuts[BN]:
        how = {
            "BN": BN, "BO": bo, "STEPS": steps, "WIDE": wide, "STAGES": stages, "TALL": rows <= 32,
            "num_warps": warps,
        }  # fmt: skip
        if how not in found:
            found.append(how)
    return found if (rows, out, width) in RING[:3] else found[:1]


QUANTIZE: tuple[dict[str, Any], ...] = ({"BN": 4, "num_warps": 1},)


RING = (
    (64, 7168, 2048), (128, 7168, 2048), (32, 7168, 2048), (64, 2112, 7168), (16, 7168, 2048), (48, 7168, 2048),
    (64, 576, 2048), (64, 8192, 1536), (8, 4096, 1024), (100, 3072, 1536),
)  # fmt: skip


def check_ring(rows: int, out: int, width: int, how: dict[str, Any]) -> None:
    """Against fp64, by given codes, in a chain and ahead; the same bits by all."""
    codes, scale = weight(out, width)
    x = torch.randn(rows, width, device="cuda").bfloat16()
    held = op.quantize_fast(x)
    z = dequantize_fp8(held[0], held[1], (1, 128), torch.float64)
    w = dequantize_fp8(codes, scale, (128, 128), torch.float64)
    want, size = z @ w.T, z.abs() @ w.abs().T
    poison()
    ys = [
        op.fast(x, codes, scale, how=how, quantized=held),
        op.fast(x, codes, scale, how=how),
        op.fast(x, codes, scale, how=how, ahead=True),
    ]
    if "STEPS" in how:
        ys += [
            ring_call(x, (codes, scale), how, ahead, None, by) for ahead in (False, True) for by in QUANTIZE
        ]
    off = float(((ys[0] - want).abs() / size).max()) if ys[0].isfinite().all() else float("inf")
    same = all(torch.equal(y, ys[0]) for y in ys)
    if off > 2**-8 or not same:
        print(f"WRONG ring {rows}x{out}x{width} {short(how)}: {off:.1e}, same bits {same}", flush=True)


def ring_call(x: Tensor, w: Any, how: Any, ahead: bool, codes: Any = None, by: Any = None) -> Tensor:
    """A product; `by` is another way to quantise before it."""
    if by:
        codes = op.quantize_fast(x, False, ahead, by, followed=True)
        return op.fast(x, *w, ahead=True, how=how, quantized=codes)
    return op.fast(x, *w, ahead=ahead, how=how, quantized=codes)


def time_ring() -> None:
    """Few rows, by DeepGEMM where it is, Triton and Gluon: us of the product alone (behind what is before, or its
    weight asked for ahead), and with quantising."""
    try:
        import deep_gemm  # type: ignore[import-not-found]
    except ImportError:
        deep_gemm = None
    print(
        "ring: us, replays in turns (best in a row) alone; alone, ahead; with quantising; with quantising, ahead"
    )
    for rows, out, width in RING:
        held = [weight(out, width) for _ in range(max(2, min(12, int(4e8) // (out * width))))]
        x = torch.randn(rows, width, device="cuda").bfloat16()
        given = op.quantize_fast(x)
        y = torch.empty(rows, out, device="cuda", dtype=torch.bfloat16)

        def peer(w: Any, codes: Any = None, x: Any = x, y: Any = y) -> Any:
            deep_gemm.fp8_gemm_nt(codes or op.quantize_rows(x), w, y, disable_ue8m0_cast=True)
            return y

        gluon = ring_ways(rows, out, width)
        ways: list[tuple[str, Any, Any]] = [("Triton", op.plan(rows, out, width, gluon=False), None)]
        ways += [(short(how), how, None) for how in gluon]
        some = QUANTIZE, gluon[:1]
        ways += [(f"{short(how)}, quantize {short(by)}", how, by) for by in some[0] for how in some[1]]
        calls: dict[Any, Any] = {}
        if deep_gemm:
            calls["DeepGEMM", 0] = [lambda w=w, p=peer, g=given: p(w, g) for w in held]
            calls["DeepGEMM", 2] = [lambda w=w, p=peer: p(w) for w in held]
        for name, how, by in ways:
            for column in range(4):
                if by is None or column > 1:
                    codes = given if column < 2 else None
                    call = partial(ring_call, how=how, ahead=column % 2 == 1, codes=codes, by=by)
                    calls[name, column] = [partial(call, x, w) for w in held]
        graphs = {}
        for key, each in calls.items():
            try:
                graphs[key] = captured(each)
            except Exception:
                failed(str(key))
        us = turns_us(graphs)
        best = {key: min(replay_us(graph) for _ in range(4)) for key, graph in graphs.items()}
        print(f"{rows}x{out}x{width}", flush=True)
        for name in dict.fromkeys(name for name, _ in us):
            cells = [
                f"{us[name, c] / len(held):5.2f} ({best[name, c] / len(held):5.2f})"
                if (name, c) in us
                else " " * 13
                for c in range(4)
            ]
            print(f"    {'  '.join(cells)}  {name}", flush=True)


def ring() -> None:
    """`python -m benchmarks.kernels.fp8_linear ring [check]`"""
    jobs = [
        ("check_ring", (rows, out, width, how))
        for rows, out, width in RING
        for how in ring_ways(rows, out, width)
    ]
    jobs += [("check_ring", (13, 200, 2048, ring_ways(64, 7168, 2048)[0]))]
    jobs += [
        ("check_ring", (rows, out, width, op.plan(rows, out, width, gluon=False)))
        for rows, out, width in RING
    ]
    if "check" in sys.argv:
        beside("benchmarks.kernels.fp8_linear", jobs, 60.0, 4)
        return
    with torch.inference_mode():
        time_ring()


def warm(rows: int, out: int, width: int, how: Any) -> None:
    """Compile one cut."""
    codes, scale = weight(out, width)
    x = torch.randn(rows, width, device="cuda").bfloat16()
    if how is None:
        op.fast(x, codes, scale)
    op.fast(x, codes, scale, ahead=rows <= 256, how=how)


def time_quantize() -> None:
    line = "quantize us (share of read):"
    for rows, width in ((1, 7168), (64, 2048), (4096, 7168), (4096, 2048)):
        xs = [
            torch.randn(rows, width, device="cuda").bfloat16()
            for _ in range(max(2, min(50, ROTATE // (rows * width * 2))))
        ]
        line += f" {rows}x{width}:"
        for how in (None, {"BN": 8, "num_warps": 1}, {"BN": 16, "num_warps": 2}, {"BN": 32, "num_warps": 4}):
            if how is None or (rows > 1 and SWEEP):
                us = graph_us([lambda x=x, how=how: op.quantize_fast(x, how=how) for x in xs])
                line += f" {us:.2f} ({rows * width * 3 / us / READ * 1e8:.0f}%)" + (
                    f" {short(how)}" if how else " plan,"
                )
    print(line, flush=True)


def time_large() -> None:
    print("large: TFLOP/s with quantising | cuBLASLt alone | our product alone by cut")
    for rows, out, width in (*LARGE, (512, 4096, 7168), (512, 7168, 2048), (1024, 2112, 7168)):
        x = torch.randn(rows, width, device="cuda").bfloat16()
        codes, scale = weight(out, width)
        held = op.quantize_fast(x)
        line = f"{rows}x{out}x{width}:"

        def rate(call: Any, flop: float = 2e-6 * rows * out * width) -> str:
            try:
                return f"{flop / graph_us([call] * 8, 3):.0f}"
            except Exception:
                failed("large")
                return "-"

        line += f" {rate(lambda x=x, c=codes, s=scale: op.fp8_linear(x, c, s))}"
        line += f" | {rate(lambda h=held, c=codes, s=scale: library(h, c, s))} |"
        for how in large_ways() if SWEEP else []:
            one = rate(lambda x=x, h=held, c=codes, s=scale, how=how: op.fast(x, c, s, quantized=h, how=how))
            line += f" {one} ({how['BN']} {how['BO']} {how['num_warps']} {how['STAGES']})"
        print(line, flush=True)


def time_small() -> None:
    print(
        "small: us with quantising: plan, ahead (share of read); product alone, ahead | cuBLASLt alone | best, ahead"
    )
    for out, width in SMALL:
        size = out * width
        held = [weight(out, width) for _ in range(max(2, min(100, ROTATE // size)))]
        for rows in ROWS:
            x = torch.randn(rows, width, device="cuda").bfloat16()
            given = op.quantize_fast(x)
            line = f"{rows:3d}x{out}x{width}"

            def call(w: Any, ahead: bool, how: Any = None, quantized: Any = None, x: Any = x) -> Any:
                return lambda: op.fast(x, *w, ahead=ahead, how=how, quantized=quantized)

            try:
                us = [
                    graph_us([call(w, *form) for w in held])
                    for form in ((False,), (True,), (True, None, given))
                ]
                share = [size / one / READ * 1e8 for one in us]
                line += f": {us[0]:.2f} {us[1]:.2f} ({share[1]:.0f}%), {us[2]:.2f} ({share[2]:.0f}%)"
                if rows % 4 == 0:
                    line += f" | {graph_us([lambda w=w, g=given: library(g, *w) for w in held]):.2f}"
            except Exception:
                failed(line)
            timed = []
            for how in small_ways(rows, out, width) if SWEEP else []:
                try:
                    timed.append((graph_us([call(w, True, how) for w in held], 3), short(how)))
                except Exception:
                    failed(f"{line} {how}")
            for one, name in sorted(timed)[:4]:
                line += f" | {one:.2f} ({size / one / READ * 1e8:.0f}%) {name}"
            print(line, flush=True)
        del held


def jobs() -> list[tuple[str, Any]]:
    """Checks, and one job for each kernel to compile that differs."""
    found: list[tuple[str, Any]] = [("check_quantize", ())]
    found += [("check", shape) for shape in ((2112, 7168), (576, 2048), (300, 1000))]
    found += [("check_library", shape) for shape in ((257, 2112, 7168), (1000, 576, 2048), (300, 48, 512))]
    kernels: dict[Any, Any] = {}
    for out, width in SMALL:
        for rows in ROWS:
            for how in (None, *(small_ways(rows, out, width) if SWEEP else ())):
                kernels[str(how), width, rows if how is None or "FEW" in how else 0] = (rows, out, width, how)
    for _, out, width in LARGE:
        for how in large_ways() if SWEEP else ():
            kernels[str(how), width, 0] = (512, out, width, how)
    return found + [("warm", job) for job in kernels.values()]


def main() -> None:
    torch.manual_seed(int(time.time()))
    start = time.time()
    if "ring" in sys.argv:
        ring()
        return
    beside("benchmarks.kernels.fp8_linear", jobs())
    with torch.inference_mode():
        for step in (time_small, time_large, time_quantize):
            try:
                step()
            except Exception:
                failed(step.__name__)
            print(f"[{step.__name__} done at {time.time() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
