"""The indexer (V3.2, V4) and V4's own operations on the GPU: checks against fp64, then us a call beside the bytes
and the arithmetic they need. ONLY="union compress" picks some; SWEEP=1 tries other tile sizes too.
"""

import faulthandler
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import DEVICE, guarded, line, micros, report
from benchmarks.kernels.v4_index import (
    DTYPES,
    FP4_CASES,
    FP8_CASES,
    PREFILL,
    SHARED,
    V4,
    V32,
    Index,
    check_index,
    exact_index,
    index_plans,
    sweep_index,
    time_index,
)
from benchmarks.kernels.v4_union import (
    COMPRESS,
    COMPRESS_PREFILL,
    UNION,
    UNION_FP8,
    UNION_PREFILL,
    Compress,
    Union,
    check_compress,
    check_plain_union,
    check_union,
    sweep_union,
    time_compress,
    time_union,
    union_options,
)
from rorqual.kernels import index, mix


def mix_inputs(rows: int, hidden: int) -> list[Tensor]:
    kw = {"device": DEVICE}
    x = torch.randn(rows, 4, hidden, **kw, dtype=torch.bfloat16)
    fn = torch.randn(24, 4 * hidden, **kw) * (4 * hidden) ** -0.5
    return [
        x,
        torch.randn(rows, hidden, **kw, dtype=torch.bfloat16),
        fn,
        torch.randn(24, **kw),
        torch.rand(3, **kw),
    ]


def check_mix(rows: int, hidden: int) -> None:
    x, y, fn, base, scale = mix_inputs(rows, hidden)
    wide = [z.double() for z in (x, fn, base, scale)]
    want = mix.reference_read(*wide, 1e-6, 1e-6, 20)
    got = mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)
    errors = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)]
    new = mix.fast_write(x, y, *got[1:])
    both, read = mix.fast_write_read(x, y, *got[1:], fn, base, scale, 1e-6, 1e-6, 20)
    gap = float((mix.reference_write(x, y, *got[1:]).float() - new.float()).abs().max())
    alone = mix.fast_write_read(x[-1:], y[-1:], *(z[-1:] for z in got[1:]), fn, base, scale, 1e-6, 1e-6, 20)
    same = torch.equal(alone[0][0], both[-1]) and all(
        torch.equal(a[0], b[-1]) for a, b in zip(alone[1], read, strict=True)
    )
    ok = errors[0] < 5e-3 and max(errors[1:]) < 1e-5 and gap < 0.07
    ok = ok and float((both.float() - new.float()).abs().max()) < 0.07
    text = " ".join(f"{e:.1e}" for e in errors)
    verdict = f"{'ok' if ok else 'WRONG'}, bits {'same' if same else 'DIFFER'}"
    print(f"check mix {rows} {hidden}: {text} gap {gap:.3f} {verdict}")


def time_mix(rows: int, hidden: int) -> None:
    copies = [mix_inputs(rows, hidden) for _ in range(16 if rows < 1024 else 4)]
    mixed = [mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)[1:] for x, _, fn, base, scale in copies]
    weight, stream = 24 * 4 * hidden * 4, rows * 4 * hidden * 2
    both = list(zip(copies, mixed, strict=True))
    us = micros([lambda c=c: mix.fast_read(c[0], *c[2:], 1e-6, 1e-6, 20) for c in copies])
    line(f"mix read {rows} {hidden}", us, weight + stream * 1.25)
    us = micros([lambda c=c, m=m: mix.fast_write(c[0], c[1], *m) for c, m in both])
    line(f"mix write {rows} {hidden}", us, stream * 2.25)
    us = micros(
        [lambda c=c, m=m: mix.fast_write_read(c[0], c[1], *m, *c[2:], 1e-6, 1e-6, 20) for c, m in both]
    )
    line(f"mix write+read {rows} {hidden}", us, weight + stream * 2.5)


MIX_TILES = [(rows, channels) for rows in (16, 32, 64) for channels in (32, 64)]


def sweep_mix(rows: int, hidden: int) -> None:
    copies = [mix_inputs(rows, hidden) for _ in range(16 if rows < 1024 else 4)]
    mixed = [mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)[1:] for x, _, fn, base, scale in copies]
    both, found, kept = list(zip(copies, mixed, strict=True)), [], (mix.ROWS, mix.CHANNELS)
    for mix.ROWS, mix.CHANNELS in MIX_TILES:
        one = micros([lambda c=c: mix.fast_read(c[0], *c[2:], 1e-6, 1e-6, 20) for c in copies], budget=0.02)
        two = micros(
            [lambda c=c, m=m: mix.fast_write_read(c[0], c[1], *m, *c[2:], 1e-6, 1e-6, 20) for c, m in both],
            budget=0.02,
        )
        found.append((two, (mix.ROWS, mix.CHANNELS, f"read {one:.1f}")))
    mix.ROWS, mix.CHANNELS = kept
    report("mix", (rows, hidden), found)


# -------------------------------------------------------------------------------------------- all


def warm(task: tuple[str, tuple[Any, ...], Any]) -> None:
    """Compile what one case needs with one choice of tiles, on small inputs of the same kernels, into the
    compiler's cache."""
    kind, case, tiles = task
    try:
        if kind == "index":
            rows, sequences, limit, k, page, form = case
            few = min(sequences, 2)
            one = Index(min(rows, 16 * few) // few * few, few, limit, k, page, form)
            one.run(tiles or index.plan(*case[:2], limit, k, page, DTYPES[form], form == "fp4"))
        elif kind == "union":
            Union(*case).run(**(tiles or {}))
        elif kind == "compress":
            Compress(*case).run(long=case[0] >= 1024)
        else:
            mix.ROWS, mix.CHANNELS = tiles or (mix.ROWS, mix.CHANNELS)
            x, y, fn, base, scale = mix_inputs(*case)
            mixed = mix.fast_read(x, fn, base, scale, 1e-6, 1e-6, 20)[1:]
            mix.fast_write(x, y, *mixed)
            mix.fast_write_read(x, y, *mixed, fn, base, scale, 1e-6, 1e-6, 20)
        torch.cuda.synchronize()
    except Exception:
        pass


SWEEPS: list[tuple[str, tuple[Any, ...]]] = [
    *(("index", case) for case in (V32[6], V32[8], V4[0], SHARED[0], PREFILL[1], FP8_CASES[1])),
    *(("union", case) for case in (UNION[0], UNION[2], UNION[3], UNION[5], *UNION_PREFILL[:2])),
    *(("mix", (n, 4096)) for n in (1, 64, 2048)),
]


def checks(kind: str) -> None:
    if kind == "index":
        guarded(exact_index, None)
        for rows, sequences, limit, k, page, form in [
            (3, 3, 5000, 2048, 64, "bf16"), (16, 4, 40000, 2048, 64, "bf16"), (4, 4, 131072, 2048, 64, "fp8"),
            (600, 2, 70000, 512, 16, "bf16"), (4, 4, 4000, 2048, 64, "bf16"),
            (4, 4, 131072, 512, 32, "fp4"), (600, 2, 70000, 512, 32, "fp4"),
        ]:  # fmt: skip
            for ragged in (False, True):
                guarded(check_index, rows, sequences, limit, k, page, form, ragged)
    elif kind == "union":
        few = [(4, 2, 600, 128, "csa"), (3, 3, 1000, 64, "hca")]
        for case in [*UNION, *UNION_FP8, *few, *UNION_PREFILL]:
            guarded(check_union, *case)
        guarded(check_plain_union)
    elif kind == "compress":
        for case in [*COMPRESS, (24, 3, 4, 512), (300, 2, 4, 128), (512, 2, 128, 512)]:
            guarded(check_compress, *case)
    else:
        for case in [(1, 4096), (17, 7168), (64, 4096)]:
            guarded(check_mix, *case)


def main() -> None:
    begun = time.perf_counter()
    faulthandler.dump_traceback_later(60, exit=True)

    def at(what: str) -> None:
        print(f"{what} after {time.perf_counter() - begun:.0f} s", flush=True)

    kinds = os.environ.get("ONLY", "index mix compress union").split()
    print(torch.cuda.get_device_name(), kinds, flush=True)
    cases: dict[str, list[tuple[Any, ...]]] = {
        "index": [*V32, *V4, *SHARED, *FP8_CASES, *FP4_CASES, *PREFILL],
        "union": [*UNION, *UNION_FP8, *UNION_PREFILL],
        "compress": [*COMPRESS, *COMPRESS_PREFILL],
        "mix": [(n, d) for d in (4096, 7168) for n in (1, 8, 64, 2048)],
    }
    timers = {"index": time_index, "union": time_union, "mix": time_mix, "compress": time_compress}
    options: dict[str, Any] = {"index": index_plans, "union": union_options, "mix": lambda *_: MIX_TILES}
    sweepers = {"index": sweep_index, "union": sweep_union, "mix": sweep_mix}
    pool = ProcessPoolExecutor(12, mp_context=torch.multiprocessing.get_context("spawn"))
    for kind in kinds:
        try:
            list(pool.map(warm, [(kind, case, None) for case in cases[kind]], timeout=30))
        except TimeoutError:
            print(f"{kind} HANGS")
            continue
        at(f"{kind} compiled")
        checks(kind)
        for case in cases[kind]:
            if time.perf_counter() - begun > 54:
                print(f"out of time before {kind} {case}")
                break
            guarded(timers[kind], *case)
        at("timed")
        sweeps = [case for name, case in SWEEPS if name == kind]
        if not sweeps or os.environ.get("SWEEP") != "1" or time.perf_counter() - begun > 40:
            continue
        tasks = [(kind, case, tiles) for case in sweeps for tiles in options[kind](*case)]
        list(pool.map(warm, tasks, timeout=60))
        for case in sweeps:
            if time.perf_counter() - begun > 52:
                print(f"out of time before {kind} {case}")
                continue
            guarded(sweepers[kind], *case)
        at("swept")
    pool.shutdown(wait=False, cancel_futures=True)
    at("done")


if __name__ == "__main__":
    main()
