"""Sparse MLA attention, trained: forward with its sums, and the backward pass, each of its kernels by itself too.

`python -m benchmarks.kernels.mla_sparse_backward [PART ...]`. Parts are processes that compile side by side and then
measure one after the other, each with a time limit, since a kernel that hangs hangs its process. Products are counted
as five a (query, head, row): q K^T, do V^T, dS K, dS^T q and P^T do.
"""

import contextlib
import fcntl
import functools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.kernels.mla_prefill import guarded
from rorqual.kernels import mla_sparse_backward as op
from rorqual.kernels.ahead import compiled_ahead
from rorqual.kernels.mla_sparse import mla_sparse

HEADS, RANK, ROPE, K = 128, 512, 64, 2048
CASES = {
    "4096 of 8192": (4096, 8192, False),
    "8192 of 8192": (8192, 8192, False),
    "4096 causal": (4096, 4096, True),
}
"""Queries, rows, and whether a query has only rows up to its own."""
ANCHOR = 115.0
"""TFLOP/s of TileLang's backward pass on an H200, as published."""
OFF: dict[str, Any] = {"hopper": False}
PLAIN = {"weights": OFF, "queries": OFF, "entries": OFF}
WEIGHTS: dict[str, dict[str, Any]] = {"gluon": {}, "triton": OFF}
QUERIES: dict[str, dict[str, Any]] = {"gluon": {}, "triton": OFF}
ENTRIES: dict[str, dict[str, Any]] = {"gluon": {}, "gluon, no turns": {"turns": False}, "triton": OFF}
WHOLE: dict[str, dict[str, Any]] = {
    "gluon": {},
    "gluon, no turns": {"plan": {"entries": {"turns": False}}},
    "triton": {"plan": PLAIN},
}

VARIANTS = {"whole": WHOLE, "weights": WEIGHTS, "queries": QUERIES, "entries": ENTRIES}


def inputs(queries: int, rows: int, causal: bool, gaps: bool = False) -> dict[str, Any]:
    g = torch.Generator("cuda").manual_seed(queries)
    if causal:
        score = torch.rand(queries, rows, device="cuda", generator=g)
        score = score.tril(rows - queries)
        best = score.topk(K, 1)
        slots = best.indices.int().masked_fill(best.values == 0, -1)
    else:
        drawn = [torch.randperm(rows, device="cuda", generator=g)[:K] for _ in range(min(queries, 128))]
        slots = torch.stack(drawn).repeat(-(-queries // len(drawn)), 1)[:queries]
        slots = ((slots + torch.arange(queries, device="cuda")[:, None] * 7) % rows).int()
    latent = torch.randn(rows, RANK + ROPE, device="cuda", generator=g).bfloat16()
    if gaps:
        slots[torch.rand(slots.shape, device="cuda", generator=g) < 0.3] = -1
        slots[0] = -1
        slots[-1, 100:] = -1
    q = torch.randn(queries, HEADS, RANK + ROPE, device="cuda", generator=g).bfloat16()
    do = torch.randn(queries, HEADS, RANK, device="cuda", generator=g).bfloat16()
    scale = (RANK + ROPE) ** -0.5
    o, lse = mla_sparse(q, latent[None], slots, rank=RANK, scale=scale, lse=True)
    return {
        "q_NHC": q, "latent_MC": latent, "slots_NK": slots, "o_NHc": o, "lse_NH": lse, "do_NHc": do, "scale": scale
    }  # fmt: skip


def products(x: dict[str, Any], width: int) -> float:
    """TFLOP of products as wide as `width`, of rows that are there."""
    return 2 * int((x["slots_NK"] >= 0).sum()) * HEADS * width / 1e12


def check(**options: Any) -> str:
    """How far from the definition in fp64, relative, over rows with gaps."""
    x = inputs(150, 3000, False, gaps=True)
    torch.empty(2**28, device="cuda").fill_(float("nan"))  # what the memory of P and dS may be
    wide = {n: x[n].double() for n in ("q_NHC", "latent_MC", "do_NHc")}
    given = wide["q_NHC"], wide["latent_MC"][None], x["slots_NK"]
    o, lse = mla_sparse(*given, rank=RANK, scale=x["scale"], lse=True)
    whole = op.reference(**{**x, **wide, "o_NHc": o, "lse_NH": lse})
    off = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(op.fast(**x, **options), whole, strict=True)
    ]
    return f"{'ok ' if max(off) < 1e-2 else 'WRONG'} dq {off[0]:.1e} dlatent {off[1]:.1e}"


def rate(work: Any, tera: float) -> tuple[float, float]:
    """ms, TFLOP/s."""
    from triton.testing import do_bench

    ms = float(do_bench(work, warmup=10, rep=80, return_mode="median"))
    return ms, tera / ms * 1e3


def stage(name: str, options: dict[str, Any]) -> Any:
    """One kernel of the three, P and dS of 528 queries."""
    x = inputs(528, 8192, False)
    q, latent, slots, do = x["q_NHC"], x["latent_MC"], x["slots_NK"], x["do_NHc"]
    p, ds = torch.randn(2, len(q), HEADS, K, device="cuda").mul_(0.01).bfloat16()
    ends = torch.full((len(q),), K, dtype=torch.int32, device="cuda")
    delta, dq = torch.zeros_like(x["lse_NH"]), torch.empty_like(q)
    dlatent = torch.zeros(latent.shape, device="cuda")
    options = dict(options)
    gluon = options.pop("hopper", True)
    if name == "weights":
        run = op.mla_sparse_backward_gluon.weights if gluon else op._run_weights
        given = (q, latent, slots, ends, x["lse_NH"], do, delta, p, ds)
        return x, lambda: run(*given, scale=x["scale"], **options)
    if name == "queries":
        run = op.mla_sparse_backward_gluon.queries if gluon else op._run_queries
        return x, lambda: run(ds, latent, slots, ends, dq, rank=RANK, **options)
    run = op.mla_sparse_backward_entries.entries if gluon else op._run_entries
    return x, lambda: run(p, ds, q, slots, ends, do, dlatent, **options)


def measure_stage(name: str, options: dict[str, Any]) -> str:
    x, work = stage(name, options)
    us, tera = rate(work, products(x, 576 if name == "queries" else 1088))
    us *= 1e3 / len(x["q_NHC"])
    note = f"  {K * 2304 / us / 1e6:.2f} TB/s added" if name == "entries" else ""
    return f"{us:5.2f} us a query {tera:5.0f} TFLOP/s{note}"


def forward(case: str) -> str:
    x = inputs(*CASES[case])
    given = (x["q_NHC"], x["latent_MC"][None], x["slots_NK"])
    ms, tera = rate(
        lambda: mla_sparse(*given, rank=RANK, scale=x["scale"], lse=True), products(x, 2 * RANK + ROPE)
    )
    return f"{ms:6.2f} ms {tera:5.0f} TFLOP/s"


def backward(case: str, **options: Any) -> str:
    x = inputs(*CASES[case])
    ms, tera = rate(lambda: op.fast(**x, **options), products(x, 3 * (RANK + ROPE) + 2 * RANK))
    return f"{ms:6.2f} ms {tera:5.0f} TFLOP/s ({tera / ANCHOR:.1f} x TileLang's)"


def prepare(name: str) -> None:
    """Every launch of a part, once."""
    for options in VARIANTS[name].values():
        with contextlib.suppress(Exception):  # the launch will say
            if name == "whole":
                op.fast(**inputs(150, 3000, False), **options)
            else:
                stage(name, options)[1]()


def measure(name: str) -> None:
    for variant, options in VARIANTS[name].items():
        show = functools.partial(guarded, f"{name:8s} {variant:20s}")
        if name != "whole":
            show(functools.partial(measure_stage, name, options))
            continue
        show(lambda: f"{check(**options)}  {backward('4096 of 8192', **options)}")  # noqa: B023
    for case in CASES if name == "whole" else ():
        guarded(f"forward  {case:20s}", functools.partial(forward, case))
        guarded(f"backward {case:20s}", functools.partial(backward, case))


def parts(
    module: str,
    arguments: list[str],
    names: list[str],
    prepare: Callable[[str], None],
    measure: Callable[[str], None],
    limit: int,
) -> None:
    """Run a benchmark's parts, those asked for or all, each in a process of its own: compiled while others are,
    measured alone, for `limit` seconds at most."""
    if len(arguments) == 2 and arguments[0].startswith("only:"):
        name = arguments[0][5:]
        with compiled_ahead():
            prepare(name)
        torch.cuda.empty_cache()
        with open(arguments[1], "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            signal.alarm(limit)
            measure(name)
        return
    with tempfile.NamedTemporaryFile() as lock:
        command = [sys.executable, "-m", module]
        started = {n: subprocess.Popen([*command, f"only:{n}", lock.name]) for n in arguments or names}
        for name, process in started.items():
            if code := process.wait():
                why = " (ran out of time)" if code == -signal.SIGALRM else ""
                print(f"{name}: exit {code}{why}", flush=True)


if __name__ == "__main__":
    parts("benchmarks.kernels.mla_sparse_backward", sys.argv[1:], list(VARIANTS), prepare, measure, 25)
