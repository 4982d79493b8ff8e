"""Sparse MLA attention: prefill and decode shapes, each against a reference in higher precision first.

`python -m benchmarks.kernels.mla_sparse`; SWEEP=0 leaves other tiles out. Each part runs in a process of its own
with a time limit, since a kernel that hangs hangs its process.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.mla_prefill import guarded
from rorqual.kernels import mla_sparse as plain
from rorqual.kernels.quant import FP8

RANK, ROPE, PAGE = 512, 64, 64
PREFILL = ((128, 4096, 32768), (64, 4096, 32768), (16, 4096, 32768))
"""Heads, queries, tokens to choose from."""
DECODE = ((128, 1), (128, 16), (128, 64), (16, 1), (16, 64))
"""Heads, queries."""
K = 2048
ANCHOR = 564.0
"""TFLOP/s of FlashMLA's sparse prefill, 128 heads."""
PLAIN: dict[str, dict[str, Any]] = {
    f"{'/'.join(map(str, t))}": {"tiles": t} for t in ((16, 32, 4, 3), (16, 64, 8, 2))
}
HOPPER: dict[str, dict[str, Any]] = {
    "184/240": {},
    "208/216": {"registers": (208, 216)},
    "not persistent": {"programs": 2**30},
    "264 programs": {"programs": 264},
}
"""Variants of the two kernels by name."""


def packed(latent: Tensor) -> Tensor:
    """Latents `[..., 576]` bf16 as FP8 pages, 656 bytes each."""
    groups = latent[..., :RANK].float().unflatten(-1, (-1, 128))
    scales = groups.abs().amax(-1).clamp(min=1e-4) / 448
    codes = (groups / scales[..., None]).flatten(-2).to(FP8)
    parts = (codes, scales, latent[..., RANK:].contiguous())
    return torch.cat([t.view(torch.uint8) for t in parts], -1)


def inputs(heads: int, queries: int, tokens: int, seed: int = 0, gaps: bool = False) -> dict[str, Any]:
    g = torch.Generator("cuda").manual_seed(seed)
    pages = torch.randn(tokens // PAGE + 1, PAGE, RANK + ROPE, device="cuda", generator=g).bfloat16()
    rows = [torch.randperm(tokens, device="cuda", generator=g)[:K] for _ in range(min(queries, 64))]
    slots = torch.stack(rows).repeat(-(-queries // len(rows)), 1)[:queries].int() + PAGE
    if gaps:
        slots[torch.rand(slots.shape, device="cuda", generator=g) < 0.3] = -1
        slots[0] = -1
        slots[-1, 100:] = -1
        pages[0] = float("nan")
    q = torch.randn(queries, heads, RANK + ROPE, device="cuda", generator=g).bfloat16()
    return {"q_NHC": q, "pages_PTC": pages, "slots_NK": slots, "rank": RANK, "scale": (RANK + ROPE) ** -0.5}


def error(form: Callable[..., Any], heads: int, queries: int, quantized: bool, **options: Any) -> str:
    x = inputs(heads, queries, 8192, seed=heads + queries, gaps=True)
    if quantized:
        x["pages_PTC"] = packed(x["pages_PTC"])
    y = {**x, "pages_PTC": plain.decode_pages(x["pages_PTC"], RANK, ROPE)} if quantized else dict(x)
    y |= {n: y[n].double() for n in ("q_NHC", "pages_PTC")}
    o, sums = plain.reference(**y, lse=True)
    torch.empty_like(x["q_NHC"]).fill_(float("nan"))  # what the output's memory may be
    got, got_sums = form(**x, lse=True, **options)
    assert sums is not None
    off = (got.double() - o).norm() / o.norm()
    real = sums.isfinite()
    off_sums = (got_sums.double() - sums)[real].abs().max()
    same = torch.equal(real, got_sums.isfinite()) and not got[~real.any(1)].any()
    return f"{'ok ' if off < 6e-3 and off_sums < 1e-3 and same else 'WRONG'} {off:.1e} lse {off_sums:.1e}"


def time_of(form: Callable[..., Any], heads: int, queries: int, tokens: int, **options: Any) -> float:
    """ms, by replay of a graph for the small ones."""
    from triton.testing import do_bench, do_bench_cudagraph

    quantized = options.pop("quantized", False)
    x = inputs(heads, queries, tokens)
    if quantized:
        x["pages_PTC"] = packed(x["pages_PTC"])
    if queries > 512:
        return float(do_bench(lambda: form(**x, **options), warmup=20, rep=80, return_mode="median"))
    return float(do_bench_cudagraph(lambda: form(**x, **options), rep=20, return_mode="median"))


def prefill_rate(form: Callable[..., Any], heads: int, queries: int, tokens: int, **options: Any) -> float:
    """TFLOP/s."""
    return (
        2 * queries * heads * K * (2 * RANK + ROPE) / time_of(form, heads, queries, tokens, **options) / 1e9
    )


def prefill(form: Callable[..., Any], **options: Any) -> str:
    found = []
    for heads, queries, tokens in PREFILL:
        try:
            rate = prefill_rate(form, heads, queries, tokens, **options)
            found.append(f"h{heads}: {rate:5.1f} ({rate / ANCHOR:3.0%})")
        except Exception as failure:
            found.append(f"h{heads}: {str(failure)[:60]}")
    return "  ".join(found)


def decode(form: Callable[..., Any], **options: Any) -> str:
    """us and the GB/s at which the gathered rows come in."""
    found = []
    for heads, queries in DECODE:
        try:
            ms = time_of(form, heads, queries, 2**18, **options)
            found.append(f"h{heads} N{queries}: {ms * 1e3:5.1f} us {queries * K * 1152 / ms / 1e6:4.0f}")
        except Exception as failure:
            found.append(f"h{heads} N{queries}: {str(failure)[:60]}")
    return "  ".join(found)


def part(name: str) -> None:
    """One part, in this process."""
    forms: dict[str, Any] = {
        "plain": (functools.partial(plain.fast, hopper=False), PLAIN),
        "hopper": (functools.partial(plain.fast, hopper=True), HOPPER),
    }
    kind, _, variant = name.partition(":")
    form, variants = forms[kind]
    if not variant:
        for heads, queries, quantized in (
            (128, 70, False), (16, 3, False), (64, 300, False), (16, 40, True), (128, 9, True)
        ):  # fmt: skip
            guarded(f"{kind} h{heads} N{queries}{' FP8' * quantized}",
                    lambda: error(form, heads, queries, quantized))  # noqa: B023  # fmt: skip
        guarded(f"{kind} prefill", lambda: prefill(form))
        if kind == "hopper":
            for splits in (None, 2, 4, 8):
                guarded(f"hopper decode, {splits} splits", lambda: decode(form, splits=splits))  # noqa: B023
            guarded("hopper decode FP8", lambda: decode(form, quantized=True))
            guarded("2,048 of 2,048", lambda: f"{prefill_rate(form, 128, 4096, 2048):.1f}")
            guarded("hopper prefill FP8", lambda: prefill(form, quantized=True))
            return
        guarded(f"{kind} decode", lambda: decode(form))
        return
    for v in variants if variant == "all" else [variant]:
        if os.environ.get("WARM"):
            time_of(form, 64, 600, 4096, **variants[v])
        else:
            guarded(f"{kind} {v} prefill", lambda: prefill(form, **variants[v]))  # noqa: B023
            if heads_of(v) <= 16:
                for splits in (4, 16):
                    guarded(f"{kind} {v} decode, {splits} splits",
                            lambda: decode(form, splits=splits, **variants[v]))  # noqa: B023  # fmt: skip


def heads_of(variant: str) -> int:
    return PLAIN.get(variant, {"tiles": (64,)})["tiles"][0]


def run(name: str, limit: float, warm: bool = False) -> subprocess.Popen[str]:
    env = {**os.environ, "WARM": "1"} if warm else dict(os.environ)
    command = ["timeout", "-k", "1", str(limit), sys.executable, "-m", "benchmarks.kernels.mla_sparse", name]
    pipe = subprocess.PIPE if warm else None
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=subprocess.STDOUT if warm else None, text=True
    )


def main() -> None:
    if len(sys.argv) > 1:
        part(sys.argv[1])
        return
    names = ["hopper", "plain"]
    if os.environ.get("SWEEP", "1") != "0":
        names += ["hopper:all", "plain:all"]
        swept = [f"plain:{name}" for name in PLAIN] + [f"hopper:{name}" for name in HOPPER]
        for process in [run(name, 25, warm=True) for name in swept]:  # compile them all at once
            process.communicate()
    for name in names:
        code = run(name, 30).wait()
        if code:
            print(f"{name}: exit {code}{' (ran out of time)' if code in (124, 137) else ''}", flush=True)


if __name__ == "__main__":
    main()
