"""Prefill attention of MLA beside PyTorch's own and, if it is there, FlashAttention-3.

`python -m benchmarks.kernels.mla_prefill`; SWEEP=0 leaves other tiles out. Each part runs in a process of its
own with a time limit, since a kernel that hangs hangs its process.
"""

import functools
import itertools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import mla_prefill as plain
from rorqual.kernels import mla_prefill_gluon as hopper

SHAPES = ((2, 16, 8192), (1, 128, 8192), (8, 16, 4096))  # sequences, heads, length
NOPE, ROPE, WIDTH = 128, 64, 128
PEAK = 790.0
"""TFLOP/s of a large bf16 product there."""
PLAIN = {"128/64/8/3": (128, 64, 8, 3), "128/128/8/2": (128, 128, 8, 2), "128/64/8/2": (128, 64, 8, 2)}
HOPPER: dict[str, dict[str, Any]] = {
    "as is": {},
    "no turns": {"turns": False},
    "group 2": {"group": 2},
    "group 4": {"group": 4},
    "group 16": {"group": 16},
    "not persistent": {"programs": 2**30},
    "as is, again": {},
}
"""Variants of the two kernels by name."""


def inputs(lengths: list[tuple[int, int]], heads: int, seed: int = 0) -> dict[str, Any]:
    """Random arguments for sequences of (queries, keys): keys and values are views of one tensor."""
    g = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", generator=g, dtype=torch.bfloat16)

    def starts(numbers: list[int]) -> Tensor:
        return torch.tensor(list(itertools.accumulate(numbers, initial=0)), device="cuda", dtype=torch.int32)

    N, M = (sum(column) for column in zip(*lengths, strict=True))
    k_MHn, v_MHv = random(M, heads, NOPE + WIDTH).split((NOPE, WIDTH), -1)
    return {
        "q_NHd": random(N, heads, NOPE + ROPE), "k_MHn": k_MHn, "rope_Mr": random(M, ROPE), "v_MHv": v_MHv,
        "starts_q": starts([q for q, _ in lengths]), "starts_k": starts([k for _, k in lengths]),
        "max_q": max(q for q, _ in lengths), "max_k": max(k for _, k in lengths), "scale": (NOPE + ROPE) ** -0.5,
    }  # fmt: skip


def guarded(name: str, work: Callable[[], str]) -> None:
    """Print what `work` says, or how it failed."""
    try:
        print(f"{name:34s} {work()}", flush=True)
    except Exception:
        print(f"{name:34s} FAILED {' | '.join(traceback.format_exc().splitlines()[-3:])[-500:]}", flush=True)


def error(form: Callable[..., Tensor], lengths: list[tuple[int, int]], heads: int) -> str:
    x = inputs(lengths, heads, seed=len(lengths) + heads)
    double = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in x.items()}
    expected = plain.reference(**double)
    torch.empty_like(x["q_NHd"]).fill_(float("nan"))  # what the output's memory may be
    off = (form(**x).double() - expected).norm() / expected.norm()
    return f"{'ok ' if off < 6e-3 else 'WRONG'} {float(off):.1e}"


def invariant(form: Callable[..., Tensor]) -> str:
    """A prompt of 1,000 at once, in chunks, alone by the query, beside another: the same bits."""
    x = inputs([(1000, 1000), (700, 900)], 2, seed=5)
    whole = form(**x, fixed=True)

    def part(first: int, end: int) -> Tensor:
        y = {**x, "q_NHd": x["q_NHd"][first:end], "max_q": end - first, "max_k": end}
        y |= {n: x[n][:end] for n in ("k_MHn", "rope_Mr", "v_MHv")}
        y["starts_q"] = torch.tensor([0, end - first], device="cuda", dtype=torch.int32)
        y["starts_k"] = torch.tensor([0, end], device="cuda", dtype=torch.int32)
        return form(**y, fixed=True)

    cuts = [(0, 1000), (0, 333), (333, 500), (500, 997), (0, 1), (63, 64), (64, 65), (127, 130), (999, 1000)]
    wrong = [cut for cut in cuts if not torch.equal(part(*cut), whole[slice(*cut)])]
    return f"DIFFERS at {wrong}" if wrong else "same bits"


def rate(form: Callable[..., Any], shape: tuple[int, int, int], **options: Any) -> float:
    """TFLOP/s of a causal prefill of (sequences, heads, length)."""
    from triton.testing import do_bench

    B, H, S = shape
    x = inputs([(S, S)] * B, H)
    ms = do_bench(lambda: form(**x, **options), warmup=20, rep=100, return_mode="median")
    return B * H * S * S * (NOPE + ROPE + WIDTH) / ms / 1e9


def ragged(form: Callable[..., Any]) -> str:
    """us of chunks beside whole prompts and single tokens, 16 heads."""
    from triton.testing import do_bench

    found = []
    for lengths in ([(4096, 4096)] + [(32, 500)] * 31, [(512, 16384)] * 4, [(128, 8192)]):
        x = inputs(lengths, 16)
        ms = do_bench(lambda x=x: form(**x), warmup=20, rep=60, return_mode="median")
        found.append(f"{len(lengths)} sequences {ms * 1e3:6.1f} us")
    return "  ".join(found)


def rates(form: Callable[..., Any], **options: Any) -> str:
    found = [rate(form, shape, **options) for shape in SHAPES]
    return "  ".join(f"{r:6.1f} ({r / PEAK:3.0%})" for r in found)


def sdpa(**x: Any) -> Tensor:
    B, S, H = x["starts_q"].numel() - 1, x["max_q"], x["q_NHd"].shape[1]
    k = torch.cat((x["k_MHn"], x["rope_Mr"][:, None].expand(-1, H, -1)), -1)
    q, k, v = (t.view(B, S, H, -1).transpose(1, 2) for t in (x["q_NHd"], k, x["v_MHv"].contiguous()))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=x["scale"])


def peers() -> None:
    def time_alone(form: Callable[[Tensor, Tensor, Tensor], Any], order: tuple[int, int]) -> str:
        from triton.testing import do_bench

        found = []
        for B, H, S in SHAPES:
            x = [torch.randn(B, S, H, d, device="cuda", dtype=torch.bfloat16) for d in (192, 192, 128)]
            q, k, v = (t.transpose(*order) for t in x)
            ms = do_bench(lambda q=q, k=k, v=v: form(q, k, v), warmup=20, rep=100, return_mode="median")
            found.append(f"{B * H * S * S * 320 / ms / 1e9:6.1f}")
        return "  ".join(f"{r}      " for r in found)

    guarded("torch SDPA", lambda: time_alone(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (1, 2)))  # fmt: skip
    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        print("FA3 is not here (682 was seen)")
    else:
        guarded("FA3", lambda: time_alone(lambda q, k, v: fa3.flash_attn_func(q, k, v, causal=True), (1, 1)))


def gather() -> None:
    """Latents out of pages: GB/s, read and written."""
    from triton.testing import do_bench

    for quantized, S in ((False, 1), (True, 1), (False, 8), (True, 8)):
        length, page = 8192, 64
        blocks = S * length // page
        pages = torch.randint(0, 100, (blocks + 1, page, 656), device="cuda", dtype=torch.uint8)
        if not quantized:
            pages = torch.randn(blocks + 1, page, 576, device="cuda", dtype=torch.bfloat16)
        table = (torch.randperm(blocks, device="cuda") + 1).view(S, -1).int()
        table = torch.cat((table[:, :1], table), 1)[:, 1:]  # it may start anywhere
        starts = torch.arange(S + 1, device="cuda", dtype=torch.int32) * length
        x = (pages, table, starts)

        def work(
            x: Any = x, total: int = S * length, row: int = pages.stride(1) * pages.element_size()
        ) -> str:
            same = torch.equal(plain.gather_fast(*x, total=total), plain.gather_reference(*x, total=total))
            ms = do_bench(lambda: plain.gather_fast(*x, total=total), return_mode="median")
            return (
                f"{'ok' if same else 'WRONG'} {ms * 1e3:.0f} us, {total * (row + 1152) / ms / 1e6:.0f} GB/s"
            )

        guarded(f"gather_latents {S} {pages.dtype}", work)


CASES: list[tuple[list[tuple[int, int]], int]] = [
    ([(1, 1)], 1), ([(300, 300)], 2), ([(128, 1000), (1, 77), (0, 0), (129, 129), (64, 200)], 3), ([(513, 2000)], 16)
]  # fmt: skip


SHORT: list[tuple[list[tuple[int, int]], int]] = [
    ([(512, 16384)] * 4, 16), ([(256, 256)] * 32, 16), ([(1024, 1024)] * 8, 16), ([(8192, 8192)] * 2, 16),
    ([(128, 128)] * 64, 16), ([(512, 512)] * 16, 16), ([(128, 16384)] * 8, 16), ([(2048, 8192)] * 2, 16),
    ([(4096, 4096)] * 8, 16), ([(100 + 60 * i, 300 + 100 * i) for i in range(20)], 16),
]  # fmt: skip
SHORT_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "gluon": ("hopper", {}), "no turns": ("hopper", {"turns": False}), "group 1": ("hopper", {"group": 1}),
    "group 16": ("hopper", {"group": 16}), "64 x 3": ("hopper", {"block_n": 64, "stages": 3}),
    "plain 64/64/4/2": ("plain", {"tiles": (64, 64, 4, 2)}), "plain 64/32/4/2": ("plain", {"tiles": (64, 32, 4, 2)}),
}  # fmt: skip


def _form(kind: str, options: dict[str, Any]) -> Callable[..., Tensor]:
    base: Any = hopper.fast if kind == "hopper" else plain.fast
    return lambda **x: base(**x, **options)


def short_check(name: str) -> None:
    """One way, against fp64."""
    for lengths, heads in (CASES[2], ([(256, 256), (100, 256)], 16), ([(512, 1900), (512, 1500)], 2)):
        work = functools.partial(error, _form(*SHORT_WAYS[name]), lengths, heads)
        guarded(f"{name} {heads} heads {str(lengths)[:18]}", work)


def host_us(call: Callable[[], Any]) -> float:
    """Microseconds that a call takes the host."""
    import time

    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(30):
        call()
    return (time.perf_counter() - start) / 30 * 1e6


def short() -> None:
    """Short prompts and long prefixes: TFLOP/s of graph replays, of eager calls, and us a call of the host's."""
    from triton.testing import do_bench

    from benchmarks.kernels.timing import captured, turns_us

    try:
        import fa3_fwd_interface as fa3
    except ImportError:
        fa3 = None
    for lengths, heads in SHORT:
        x = inputs(lengths, heads)
        flop = 2e-6 * heads * sum(q * m - q * (q - 1) / 2 for q, m in lengths) * 320

        def fa3_alone(x: Any = x, k: Any = None) -> Any:
            return fa3.flash_attn_varlen_func(
                x["q_NHd"], k, x["v_MHv"], x["starts_q"], x["starts_k"], x["max_q"], x["max_k"],
                softmax_scale=x["scale"], causal=True,
            )  # fmt: skip

        print(f"{len(lengths)} x {lengths[0]}, {heads} heads", flush=True)
        ways: dict[str, Any] = {}
        if fa3 is not None:
            k = torch.cat((x["k_MHn"], x["rope_Mr"][:, None].expand(-1, heads, -1)), -1)
            ways["FA3"] = lambda k=k, x=x: fa3_alone(x, k)
        for name, (kind, options) in SHORT_WAYS.items():
            if kind == "plain" and lengths[0][0] > 1024:
                continue
            ways[name] = functools.partial(_form(kind, options), **x)
        graphs: dict[str, Any] = {}
        for name, call in ways.items():
            try:
                graphs[name] = captured([call] * 3)
            except Exception:
                print(f"    {name} FAILED {traceback.format_exc().splitlines()[-1][:200]}", flush=True)
        for name, us in turns_us(graphs, 7, 0.003).items():
            text = f"    {name:22s} {flop / us * 3:6.1f} TF {us / 3:7.1f} us"
            if name in ("FA3", "gluon"):
                ms = do_bench(ways[name], warmup=5, rep=25, return_mode="median")
                text += f" | eager {flop / ms / 1e3:6.1f}, host {host_us(ways[name]):4.0f} us"
            print(text, flush=True)


def part(name: str) -> None:
    """One part, in this process."""
    forms: dict[str, Any] = {"plain": (plain.fast, PLAIN), "hopper": (hopper.fast, HOPPER)}
    kind, _, variant = name.partition(":")
    if kind == "peers":
        peers()
        gather()
    elif not variant:
        form = forms[kind][0]
        for lengths, heads in CASES:
            guarded(f"{kind} {heads} heads {str(lengths)[:18]}", lambda: error(form, lengths, heads))  # noqa: B023
        guarded(f"{kind} fixed", lambda: invariant(form))
        guarded(kind, lambda: rates(form))
        guarded(f"{kind} ragged", lambda: ragged(form))
    else:
        form, variants = forms[kind]
        for v in variants if variant == "all" else [variant]:
            options = {"tiles": variants[v]} if kind == "plain" else variants[v]
            if os.environ.get("WARM"):
                rate(form, (1, 1, 512), **options)
            else:
                guarded(f"{kind} {v}", lambda: rates(form, **options))  # noqa: B023


def run(name: str, limit: float, warm: bool = False) -> subprocess.Popen[str]:
    env = {**os.environ, "WARM": "1"} if warm else dict(os.environ)
    command = ["timeout", "-k", "1", str(limit), sys.executable, "-m", "benchmarks.kernels.mla_prefill", name]
    pipe = subprocess.PIPE if warm else None
    return subprocess.Popen(
        command, env=env, stdout=pipe, stderr=subprocess.STDOUT if warm else None, text=True
    )


def main() -> None:
    if sys.argv[1:2] == ["short"]:
        with torch.inference_mode():
            if len(sys.argv) > 2:
                short_check(sys.argv[2])
            else:
                short()
        return
    if sys.argv[1:] == ["short-check"]:
        from benchmarks.kernels.skinny import beside

        beside("benchmarks.kernels.mla_prefill", [("short_check", (name,)) for name in SHORT_WAYS], 62.0, 4)
        return
    if len(sys.argv) > 1:
        part(sys.argv[1])
        return
    print(f"{'TFLOP/s on (sequences, heads, length)':34s} {SHAPES}", flush=True)
    names = ["hopper", "plain", "peers"]
    swept = [f"hopper:{n}" for n in HOPPER] + [f"plain:{n}" for n in PLAIN]
    if os.environ.get("SWEEP", "1") != "0":
        names[1:1] = ["hopper:all", "plain:all"]
    for process in [run(name, 25, warm=True) for name in swept]:  # compile them all at once
        process.communicate()
    for name in names:
        code = run(name, 25).wait()
        if code:
            print(f"{name}: exit {code}{' (ran out of time)' if code in (124, 137) else ''}", flush=True)


if __name__ == "__main__":
    main()
