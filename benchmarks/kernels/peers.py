"""Our kernels beside the peers' libraries in one run: `python -m benchmarks.kernels.peers [PART …]`.

FlashMLA (`flash_mla`), FlashAttention-3 (`fa3_fwd_interface`), DeepGEMM (`deep_gemm`) and torch's grouped product; what
is not installed is left out. Each part runs in a process of its own with a time limit, one after the other. A row of
a Markdown table each: the operation, ours, the peer's, our share of the peer's speed, the largest relative
difference of the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.mla_decode import last_line, make, median_us

RANK = 512
ROW = "| {:52s} | {:>22s} | {:>22s} | {:>5s} | {:>7s} |"


def row(what: str, ours: str, theirs: str, share: float | None, apart: float | None) -> None:
    """One line of the table."""
    cells = f"{share:.0%}" if share else "", f"{apart:.0e}" if apart is not None else ""
    print(ROW.format(what, ours, theirs, *cells), flush=True)


def apart(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def guarded(what: str, work: Callable[[], None]) -> None:
    """A case that fails says why, and the others go on."""
    try:
        work()
    except Exception as error:
        print(f"{what} FAILED {type(error).__name__} {last_line(error)}", flush=True)
    torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------- decode

DECODE = (  # heads, batch, tokens, width: the six of the assignment, then what decides where the peer is used
    (16, 128, 4096, 1), (64, 128, 4096, 1), (128, 128, 4096, 1), (128, 8, 32768, 1), (16, 1, 131072, 1),
    (16, 32, 4096, 1), (64, 1, 4096, 1), (128, 1, 4096, 1), (64, 16, 2048, 1), (128, 16, 2048, 1),
    (128, 64, 1024, 1), (64, 256, 512, 1), (128, 1, 65536, 1), (16, 128, 4096, 2), (64, 32, 4096, 2),
    (128, 32, 4096, 2), (128, 32, 1024, 1), (128, 8, 4096, 1), (64, 64, 1024, 1), (64, 128, 1024, 1), (64, 64, 512, 2),
    (64, 8, 32768, 2),
)  # fmt: skip


def decode() -> None:
    """MLA decode, bf16, pages of 64 in random order; both by replay of a CUDA graph, L2 flushed before each."""
    import flash_mla  # type: ignore[import-not-found]

    from rorqual.kernels.mla_decode import mla_decode

    def theirs(q: Tensor, pages: Tensor, table: Tensor, ends: Tensor, width: int, plan: Any = None) -> Tensor:
        """With a plan made before, as the layers of a pass after its first have it; None: it is made, too."""
        given = {"softmax_scale": 0.04, "causal": True, "use_legacy": True}
        grouped = q.view(ends.shape[0], width, *q.shape[1:])
        plan = plan or flash_mla.get_mla_metadata()[0]
        out, _ = flash_mla.flash_mla_with_kvcache(
            grouped, pages[:, :, None], table, ends, RANK, plan, **given
        )
        return out.flatten(0, 1)

    def empty() -> None:
        q, pages, table, ends = make(64, 6, 512, 1)
        ends[1], ends[4] = 0, 77
        got = theirs(q, pages, table, ends, 1)
        mine = mla_decode(q, pages, table, ends, width=1, rank=RANK, scale=0.04)
        some = [0, 2, 3, 4, 5]
        off = apart(got[some], mine[some])
        print(f"FlashMLA, a sequence of no tokens: {got[1].abs().max():.3g}, the others {off:.0e} apart")

    guarded("empty", empty)

    def one(heads: int, batch: int, tokens: int, width: int) -> None:
        q, pages, table, ends = make(heads, batch, tokens, width)
        ours = partial(mla_decode, q, pages, table, ends, width=width, rank=RANK, scale=0.04)
        peer = partial(theirs, q, pages, table, ends, width)
        difference = apart(ours(), peer())
        ready = flash_mla.get_mla_metadata()[0]
        peer(ready)
        us, other, whole = (median_us(run) for run in (ours, partial(peer, ready), peer))
        byte, flop = batch * tokens * 576 * 2, 2 * batch * tokens * heads * width * 1088
        text = [f"{t:.1f} us {byte / t / 1e6:.2f} TB/s {flop / t / 1e6:.0f} TF" for t in (us, other)]
        what = f"MLA decode, {heads} heads x {width}, batch {batch}, {tokens} tokens"
        row(what, text[0], f"{text[1]}, {whole:.1f} with its plan", other / us, difference)

    for shape in DECODE:
        guarded(f"decode {shape}", partial(one, *shape))


# -------------------------------------------------------------------------------------------- prefill


def prefill() -> None:
    """MLA prefill, 192 channels of query and key, 128 of value; graph replays in turns. FA3's keys must be put together
    first, the rotary part once a head; its time is shown without and with that."""
    import fa3_fwd_interface as fa3  # type: ignore[import-not-found]

    from benchmarks.kernels.mla_prefill import inputs
    from benchmarks.kernels.timing import captured, turns_us
    from rorqual.kernels.mla_prefill import mla_prefill

    def one(lengths: list[tuple[int, int]], heads: int) -> None:
        x = inputs(lengths, heads)

        def join() -> Tensor:
            return torch.cat((x["k_MHn"], x["rope_Mr"][:, None].expand(-1, heads, -1)), -1)

        def attend(k: Tensor) -> Tensor:
            out = fa3.flash_attn_varlen_func(
                x["q_NHd"],
                k,
                v,
                x["starts_q"],
                x["starts_k"],
                x["max_q"],
                x["max_k"],
                softmax_scale=x["scale"],
                causal=True,
            )
            return out[0] if isinstance(out, tuple) else out

        k, v = join(), x["v_MHv"]
        difference = apart(mla_prefill(**x), attend(k))
        runs = partial(mla_prefill, **x), partial(attend, k), lambda: attend(join())
        graphs = {i: captured([run] * 3) for i, run in enumerate(runs)}
        times = [us / 3 for us in turns_us(graphs, 9, 0.003).values()]
        pairs = sum(q * m - q * (q - 1) / 2 for q, m in lengths)
        rates = [2 * heads * pairs * 320 / t / 1e6 for t in times]
        what = f"MLA prefill, {heads} heads, {len(lengths)} x {lengths[0][0]} of {lengths[0][1]}"
        row(
            what,
            f"{rates[0]:.0f} TF",
            f"{rates[1]:.0f} TF, {rates[2]:.0f} joined",
            rates[0] / rates[1],
            difference,
        )

    cases: list[tuple[list[tuple[int, int]], int]] = [
        ([(8192, 8192)] * 2, 16),
        ([(8192, 8192)], 128),
        ([(4096, 4096)] * 8, 16),
    ]
    cases += [
        ([(1024, 1024)] * 8, 16),
        ([(512, 16384)] * 4, 16),
        ([(256, 256)] * 32, 16),
        ([(2048, 2048)] * 4, 128),
    ]
    for lengths, heads in cases:
        guarded(f"prefill {lengths[0]}", partial(one, lengths, heads))


# ------------------------------------------------------------------------------------------------ FP8

DENSE = (
    (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048), (8192, 8192, 8192), (64, 7168, 2048),
    (64, 2112, 7168), (128, 7168, 2048), (32, 7168, 2048), (256, 7168, 2048), (512, 4096, 7168), (1024, 2112, 7168),
    (4096, 576, 2048),
)  # fmt: skip


def dense() -> None:
    """FP8 products in blocks of 128x128, rows quantised beforehand and with quantising; graph replay."""
    import deep_gemm  # type: ignore[import-not-found]

    from benchmarks.kernels.fp8_linear import weight
    from benchmarks.kernels.skinny import graph_us
    from rorqual.kernels import fp8_linear as op

    def one(rows: int, out: int, width: int) -> None:
        copies = [weight(out, width) for _ in range(max(1, min(12, int(4e8) // (out * width))))]
        x = torch.randn(rows, width, device="cuda").bfloat16()
        held = op.quantize_rows(x)
        y = torch.empty(rows, out, device="cuda", dtype=torch.bfloat16)

        def theirs(w: tuple[Tensor, Tensor], quantized: Any = None) -> Tensor:
            deep_gemm.fp8_gemm_nt(quantized or op.quantize_rows(x), w, y, disable_ue8m0_cast=True)
            return y

        def alone(w: tuple[Tensor, Tensor]) -> Tensor:
            if op.in_library(rows, out, width):
                return op.library(x, *w, quantized=held)
            return op.fast(x, *w, quantized=held)

        difference = apart(op.fp8_linear(x, *copies[0]), theirs(copies[0]))
        forms: list[Callable[[Any], Any]] = [
            alone,
            lambda w: theirs(w, held),
            lambda w: op.fp8_linear(x, *w),
            theirs,
        ]
        us = [graph_us([partial(form, w) for w in copies], 3) for form in forms]
        tera = [2e-6 * rows * out * width / t for t in us]
        text = [f"{us[i]:.1f} us {tera[i]:.0f} TF, {us[i + 2]:.1f}" for i in (0, 1)]
        row(f"FP8 {rows} x {out} x {width}; with quantising", *text, us[1] / us[0], difference)

    for shape in DENSE:
        guarded(f"dense {shape}", partial(one, *shape))


def grouped() -> None:
    """FP8 grouped products (the lines of benchmarks.kernels.grouped), then torch's in bf16."""
    from triton.testing import do_bench

    from benchmarks.kernels import grouped as ours

    for shape in ours.SHAPES:
        guarded(f"grouped {shape}", partial(ours.compare, *shape))
    for count, rows, out, width in ours.SHAPES:
        x = torch.randn(count * rows, width, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(count, out, width, device="cuda", dtype=torch.bfloat16)
        ends = torch.arange(1, count + 1, device="cuda", dtype=torch.int32) * rows
        run = partial(torch._grouped_mm, x, w.transpose(1, 2), offs=ends)
        ms = do_bench(run, warmup=5, rep=30, return_mode="median")
        rate = 2 * count * rows * out * width / ms / 1e9
        row(f"grouped bf16 {count} x {rows} x {out} x {width}", "", f"torch {rate:.0f} TF", None, None)


PARTS = {"decode": decode, "prefill": prefill, "dense": dense, "grouped": grouped}


def main() -> None:
    os.environ["RORQUAL_PEERS"] = "0"  # ours are ours
    if len(sys.argv) == 3 and sys.argv[1] == "in":
        torch.manual_seed(int(time.time()))
        try:
            with torch.inference_mode():
                PARTS[sys.argv[2]]()
        except ImportError as error:
            print(f"{sys.argv[2]}: left out, {error}")
        return
    begun = time.time()
    print(ROW.format("operation", "ours", "peer", "share", "apart") + "\n|---|---|---|---|---|", flush=True)
    for part in sys.argv[1:] or PARTS:
        command = [sys.executable, "-m", "benchmarks.kernels.peers", "in", part]
        try:
            subprocess.run(command, timeout=60)
        except subprocess.TimeoutExpired:
            print(f"{part}: out of time")
        print(f"<!-- {part}: {time.time() - begun:.0f} s -->", flush=True)


if __name__ == "__main__":
    main()
