"""The indexer (V3.2, V4) and V4's own operations on the GPU: checks against fp64, then us a call beside the bytes
and the arithmetic they need. SWEEP=1 tries other tile sizes too.

Timed calls are replayed from one CUDA graph, over several copies of the inputs where these would fit the L2.
"""

import faulthandler
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import compress, index, mix, union

READ, BF16, FP8 = 4.35e12, 735e12, 1.275e15
L2 = 60e6
DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.uint8}
Call = Callable[[], Any]


def micros(calls: list[Call], least: int = 8, budget: float = 0.05) -> float:
    """Median us of one call, all of `calls` in turn in one graph."""
    torch.cuda.synchronize()
    for call in calls:
        call()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    slow = time.perf_counter() - begun > 2e-3
    graph, times = torch.cuda.CUDAGraph(), 1 if slow else max(1, least // len(calls))
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < 4 or (time.perf_counter() - begun < budget and len(taken) < 40):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) * 1e3 / (times * len(calls)))
    return statistics.median(taken[1:])


def line(name: str, us: float, size: float, flops: float = 0.0, peak: float = BF16, note: str = "") -> None:
    floor = max(size / READ, flops / peak) * 1e6
    print(
        f"{name:46s} {us:9.1f} us  {size / us / 1e3:7.0f} GB/s  {flops / us / 1e6:6.0f} TFLOP/s  "
        f"floor {floor:8.1f}  {100 * floor / us:4.0f}% {note}",
        flush=True,
    )


def guarded(what: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return what(*args, **kwargs)
    except Exception:
        print(f"FAILED {what.__name__} {args} {kwargs}"[:200])
        print("\n".join(traceback.format_exc().strip().splitlines()[-4:])[:1500], flush=True)
        return None


# ------------------------------------------------------------------------------------------- index


class Index:
    """A pass of the indexer: `rows` queries of `sequences` sequences at `limit` keys each."""

    def __init__(
        self, rows: int, sequences: int, limit: int, k: int, page: int, kind: str, ragged: bool = False
    ):
        self.k, self.limit, heads, dim = k, limit, 64, 128
        columns = -(-limit // page)
        pages = sequences * columns + 1
        self.q = torch.randn(rows, heads, dim, device=DEVICE, dtype=torch.bfloat16)
        self.w = torch.randn(rows, heads, device=DEVICE) * heads**-0.5 * dim**-0.5
        if kind == "fp8":
            self.pages = torch.randint(0, 120, (pages, page, 132), dtype=torch.uint8, device=DEVICE)
            self.pages[..., 128:] = torch.tensor([1.0], device=DEVICE).view(torch.uint8)
            self.pages[..., :128] |= (
                torch.randint(0, 2, (pages, page, 128), dtype=torch.uint8, device=DEVICE) << 7
            )
            self.q = self.q.to(torch.float8_e4m3fn)
        else:
            self.pages = torch.randn(pages, page, dim, device=DEVICE, dtype=torch.bfloat16)
        self.table = (torch.randperm(pages - 1, device=DEVICE) + 1).int().view(sequences, columns)
        share = rows // sequences
        self.seq = torch.arange(sequences, device=DEVICE).repeat_interleave(share).int()
        self.limits = (limit - share + 1 + torch.arange(share, device=DEVICE)).repeat(sequences).int()
        if ragged:
            self.limits = torch.randint(0, limit + 1, (rows,), device=DEVICE).int()
        self.item = 132 if kind == "fp8" else 256
        self.bytes = sequences * limit * self.item
        self.flops = 2.0 * float(self.limits.sum()) * heads * dim

    def run(self, tiles: index.Plan | None = None) -> Tensor:
        return index.fast(
            self.q,
            self.w,
            self.pages,
            self.table,
            self.seq,
            self.limits,
            k=self.k,
            max_keys=self.limit,
            tiles=tiles,
        )

    def check(self, name: str, tiles: index.Plan | None = None) -> None:
        got = self.run(tiles).long()
        bad, gap = 0, 0.0
        for n in range(0, len(self.q), max(1, len(self.q) // 8)):
            limit, row = int(self.limits[n]), got[n]
            keys = index._values(self.pages[self.table[self.seq[n]].long()].flatten(0, 1)[:limit]).double()
            scores = self.w[n].double() @ (self.q[n].double() @ keys.T).relu()
            count = min(limit, self.k)
            real = row[:count]
            ok = bool((row[count:] == -1).all()) and bool((real[1:] > real[:-1]).all())
            if ok and count:
                ok = int(real[0]) >= 0 and int(real[-1]) < limit
            if ok and count < limit:
                slack = 5e-3 if self.item == 132 else 1e-5  # FP8 products are added with 14 bits or so
                worst, fair = float(scores[real].min()), float(scores.topk(count).values[-1])
                ok = worst >= fair - slack * max(1.0, abs(fair))
                gap = max(gap, (fair - worst) / max(1.0, abs(fair)))
            bad += not ok
        again = torch.equal(self.run(tiles).long(), got)
        print(
            f"check index {name}: {'ok' if not bad else f'{bad} ROWS WRONG'}{'' if again else ' NOT REPEATABLE'}"
        )


def check_index(*case: Any) -> None:
    Index(*case).check(" ".join(map(str, case)))


def exact_index(tiles: index.Plan | None) -> None:
    """Small whole numbers, where scores are exact and equal ones many: the very set must come."""
    for rows, sequences, limit, k, dtype in [
        (5, 3, 20000, 512, torch.bfloat16),
        (64, 2, 30000, 2048, torch.float32),
    ]:
        page = 16
        columns = -(-limit // page)
        q = torch.randint(-1, 2, (rows, 8, 64), device=DEVICE).to(dtype)
        w = torch.randint(-1, 2, (rows, 8), device=DEVICE).float()
        pages = torch.randint(-2, 3, (sequences * columns + 1, page, 64), device=DEVICE).to(dtype)
        table = (torch.randperm(sequences * columns, device=DEVICE) + 1).int().view(sequences, columns)
        seq = torch.arange(rows, device=DEVICE) * sequences // rows
        limits = torch.randint(0, limit + 1, (rows,), device=DEVICE).int()
        args = q, w, pages, table, seq.int(), limits
        same = torch.equal(
            index.fast(*args, k=k, max_keys=limit, tiles=tiles), index.reference(*args, k=k, max_keys=limit)
        )
        print(f"check index exact {rows} {dtype}: {'ok' if same else 'WRONG'}", flush=True)


V32 = [(n, n, limit, 2048, 64, "bf16") for limit in (4096, 32768, 131072) for n in (1, 8, 64)]
V4 = [(n, n, 262144, 512, 16, "bf16") for n in (1, 8, 64)] + [(1, 1, 32768, 512, 16, "bf16")]
SHARED = [(16, 4, 131072, 2048, 64, "bf16")]
FP8_CASES = [(n, n, 131072, 2048, 64, "fp8") for n in (1, 64)]
PREFILL = [(2048, 1, 8192, 2048, 64, "bf16"), (2048, 1, 131072, 2048, 64, "bf16")]


class _Nothing:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def stages_of(calls: list[Call]) -> str:
    """us of the whole without its last kernels: what each one takes."""
    real = index._gather, index._choose
    try:
        index._gather = index._choose = _Nothing()
        score = micros(calls)
        index._gather = real[0]
        gather = micros(calls)
    finally:
        index._gather, index._choose = real
    return f"[score {score:.1f} +gather {gather - score:.1f}]"


def time_index(*case: Any) -> None:
    one = Index(*case)
    copies = [one] + [Index(*case) for _ in range(min(4, int(2 * L2 // one.bytes)))]
    calls = [c.run for c in copies]
    us = micros(calls)
    note = stages_of(calls)
    line(
        "index " + " ".join(map(str, case)), us, one.bytes, one.flops, FP8 if case[5] == "fp8" else BF16, note
    )


def sweep_index(*case: Any) -> None:
    one = Index(*case)
    copies = [one] + [Index(*case) for _ in range(min(4, int(2 * L2 // one.bytes)))]
    found = []
    for tiles in index_plans(*case):
        try:
            found.append((micros([lambda c=c, t=tiles: c.run(t) for c in copies], budget=0.02), tuple(tiles)))
        except Exception as error:
            print("   ", tuple(tiles), str(error).strip().splitlines()[-1][:100])
    report("index", case, found)


def report(kind: str, case: Any, found: list[tuple[float, Any]]) -> None:
    best = "; ".join(f"{us:.1f} {what}" for us, what in sorted(found)[:5])
    print(f"sweep {kind} {case}: {best}; worst {max(found)[0]:.1f}", flush=True)


def index_plans(rows: int, sequences: int, limit: int, k: int, page: int, kind: str) -> list[index.Plan]:
    base = index.plan(rows, sequences, limit, k, page, DTYPES[kind])
    plans, groups = [base], base.parts * base.keys
    if rows >= 4 * sequences:
        tiles = [(1, 64, 4, 3), (2, 128, 4, 4), (2, 128, 4, 5), (2, 64, 4, 2), (2, 64, 4, 3), (2, 64, 4, 4)]
        tiles += [(4, 64, 4, 2), (4, 64, 4, 3), (4, 64, 8, 2), (4, 64, 8, 3)]
    elif page >= 64:
        tiles = [(1, 64, 4, s) for s in (2, 3, 4, 5, 6, 8)]
        tiles += [(1, 128, 4, 3), (1, 128, 8, 3), (1, 64, 8, 4), (1, 32, 4, 4), (1, 32, 4, 8)]
    else:
        tiles = [(1, 64, 4, s) for s in (3, 5, 6, 7, 9)] + [(1, 128, 4, 3), (1, 128, 8, 3), (1, 32, 4, 7)]
    for queries, keys, warps, stages in tiles:
        plans.append(
            base._replace(queries=queries, keys=keys, parts=groups // keys, warps=warps, stages=stages)
        )
    plans.append(base._replace(parts=base.parts * 2))
    for chunk, gather_warps, choose_warps in [
        (4096, 8, 8), (4096, 16, 8), (8192, 8, 32), (8192, 32, 16), (16384, 32, 16), (2048, 8, 16),
    ]:  # fmt: skip
        plans.append(base._replace(chunk=chunk, gather_warps=gather_warps, choose_warps=choose_warps))
    return plans


# ------------------------------------------------------------------------------------------- union


class Union:
    """V4's attention of `rows` queries: `kind` "swa", "csa" (512 chosen) or "hca" (all of `count` entries)."""

    def __init__(self, rows: int, sequences: int, count: int, heads: int, kind: str):
        window, dim, page = 128, 512, 16 if kind == "csa" else 2
        self.ratio = 4 if kind == "csa" else 128
        share, end = rows // sequences, count * self.ratio + self.ratio - 1
        kw = {"device": DEVICE, "dtype": torch.bfloat16}
        self.q = torch.randn(rows, heads, dim, **kw)
        self.ring = torch.randn(sequences, 144, dim, **kw)
        self.rings = torch.arange(sequences, device=DEVICE).repeat_interleave(share).int()
        self.positions = (end - share + torch.arange(share, device=DEVICE)).repeat(sequences).int()
        self.new = torch.randn(rows, dim, **kw) if share > 16 else None
        self.starts = (torch.arange(sequences + 1, device=DEVICE) * share).int()
        self.entries, self.table, self.chosen = None, None, None
        keys = window * rows
        if kind != "swa":
            columns = -(-count // page)
            self.entries = torch.randn(sequences * columns + 1, page, dim, **kw)
            self.table = (
                (torch.randperm(sequences * columns, device=DEVICE) + 1).int().view(sequences, columns)
            )
            if kind == "csa":
                some = torch.rand(rows, count - share, device=DEVICE).topk(512).indices
                self.chosen = some.sort().values.int()
            keys += rows * (512 if kind == "csa" else count)
        self.sink = torch.randn(heads, device=DEVICE)
        self.bytes = (
            keys if share == 1 or kind == "csa" else keys // share
        ) * dim * 2 + 2 * self.q.numel() * 2
        self.flops = 4.0 * keys * heads * dim

    def run(self, **options: Any) -> Tensor:
        return union.fast(
            self.q, self.new, self.ring, self.rings, self.positions, self.entries, self.table, self.rings,
            self.starts if self.new is not None else None, self.chosen, self.sink, window=128, ratio=self.ratio,
            scale=512**-0.5, **options,
        )  # fmt: skip

    def check(self, name: str, **options: Any) -> None:
        got = self.run(**options).double()
        rows = range(0, len(self.q), max(1, len(self.q) // 4))
        worst = 0.0
        for n in rows:
            last = slice(max(0, n - 130), n + 1)
            some = self.q, self.new, self.rings, self.positions, self.chosen
            *args, chosen = (z[last] if z is not None else None for z in some)
            want = union.reference(
                args[0].double(), args[1].double() if args[1] is not None else None, self.ring.double(), args[2],
                args[3], self.entries.double() if self.entries is not None else None, self.table, self.rings[last],
                chosen, self.sink.double(), window=128, ratio=self.ratio, scale=512**-0.5,
            )[-1]  # fmt: skip
            worst = max(worst, float((got[n] - want).abs().max() / want.abs().max()))
        same = torch.equal(self.run(**options).double(), got)
        print(
            f"check union {name}: worst {worst:.4f} {'ok' if worst < 0.01 and same else 'WRONG'}", flush=True
        )


def check_plain_union() -> None:
    for case in [(3, 3, 1000, 64, "hca"), (2048, 1, 4096, 64, "csa")]:
        Union(*case).check(f"plain {case}", hopper=False)


def check_union(*case: Any) -> None:
    Union(*case).check(str(case))


UNION = [(n, n, 65536, 64, "csa") for n in (1, 8, 64)] + [(n, n, 8192, 64, "hca") for n in (1, 8, 64)]
UNION += [
    (1, 1, 1024, 64, "hca"),
    (1, 1, 100, 64, "swa"),
    (64, 64, 100, 64, "swa"),
    (32, 32, 65536, 128, "csa"),
]
UNION_PREFILL = [(2048, 1, 4096, 64, "csa"), (2048, 1, 1024, 64, "hca"), (2048, 1, 100, 64, "swa")]


def time_union(*case: Any) -> None:
    one = Union(*case)
    copies = [one] + [Union(*case) for _ in range(min(7, int(2 * L2 // one.bytes)))]
    us = micros([c.run for c in copies])
    line("union " + " ".join(map(str, case)), us, one.bytes, one.flops)


def sweep_union(*case: Any) -> None:
    one = Union(*case)
    copies = [one] + [Union(*case) for _ in range(min(7, int(2 * L2 // one.bytes)))]
    found = []
    for options in union_options(*case):
        try:
            us = micros([lambda c=c, o=options: c.run(**o) for c in copies], budget=0.02)
            found.append((us, tuple(options.values())))
        except Exception as error:
            print("   ", options, str(error).strip().splitlines()[-1][:100])
    report("union", case, found)


def union_options(rows: int, sequences: int, count: int, heads: int, kind: str) -> Iterator[dict[str, int]]:
    keys = 128 + {"swa": 0, "csa": 512, "hca": count}[kind]

    def plain(splits: float, most_heads: int, tile: int, warps: int, stages: int) -> dict[str, Any]:
        cut = max(1, min(int(splits), -(-keys // tile), 128))
        options = {"splits": cut, "most_heads": most_heads, "keys": tile, "warps": warps, "stages": stages}
        return {"hopper": False, **options}

    if rows >= 1024:
        yield plain(1, 64, 64, 8, 1)
        yield {"hopper": True, "splits": 1}
        return
    for waves in (0.5, 1, 2):
        cut = max(1, min(int(waves * 132 * 64 / (rows * heads)), -(-keys // 64)))
        yield {"hopper": True, "splits": cut}
    for waves in (1, 2):
        for most_heads, tile, warps, stages in [
            (64, 64, 8, 2),
            (16, 64, 4, 2),
            (16, 32, 4, 3),
            (32, 64, 4, 2),
        ]:
            yield plain(waves * 132 * most_heads / (rows * heads), most_heads, tile, warps, stages)


# ---------------------------------------------------------------------------------- compress and mix


class Compress:
    """`rows` new tokens of `sequences` sequences, each ending a window."""

    def __init__(self, rows: int, sequences: int, ratio: int, dim: int, ending: bool = True):
        self.overlap = ratio == 4
        self.ratio, self.dim, width = ratio, dim, 2 * dim if self.overlap else dim
        kept, share = width // dim * ratio, rows // sequences
        kw = {"device": DEVICE}
        self.kv, self.gate = torch.randn(rows, width, **kw), torch.randn(rows, width, **kw)
        self.ape = torch.randn(ratio, width, **kw)
        self.rings = [torch.randn(sequences, kept + 16, width, **kw) for _ in range(2)]
        self.ring = torch.arange(sequences, **kw).repeat_interleave(share).int()
        end = 64 * max(ratio, share) + (0 if ending else -1)
        self.positions = (end - share + torch.arange(share, **kw)).repeat(sequences).int()
        self.weight = torch.randn(dim, **kw, dtype=torch.bfloat16)
        self.turn = torch.rand(rows, 32, **kw), torch.rand(rows, 32, **kw)
        self.pages = torch.full((rows // 16 + 2, 16, dim), float("nan"), **kw, dtype=torch.bfloat16)
        self.slots = 16 + torch.randperm(rows, **kw).int()
        count = int(((self.positions + 1) % ratio == 0).sum())
        self.bytes = (
            rows * width * 2 * 2 + count * min(kept, 10**9) * width // (2 if self.overlap else 1) * 2
        ) * 4

    def run(self, form: Callable[..., None] = compress.fast, **options: Any) -> Tensor:
        form(
            self.kv, self.gate, self.ape, *self.rings, self.ring, self.positions, self.weight, 1e-6, *self.turn,
            self.pages, self.slots, ratio=self.ratio, overlap=self.overlap, dim=self.dim, **options,
        )  # fmt: skip
        return self.pages

    def check(self, name: str, long: bool) -> None:
        before = [z.clone() for z in self.rings]
        got = self.run(long=long).clone()
        rings = [z.clone() for z in self.rings]
        self.rings = [z.double() for z in before]
        self.pages = torch.full_like(got, float("nan"))
        self.run(compress.reference)
        same = torch.equal(got.isnan(), self.pages.isnan())
        worst = float((got.nan_to_num().float() - self.pages.nan_to_num().float()).abs().max())
        kept = all(torch.allclose(a, b.float(), atol=1e-6) for a, b in zip(rings, self.rings, strict=True))
        self.rings = before
        print(
            f"check compress {name}: worst {worst:.4f} {'ok' if same and kept and worst < 0.07 else 'WRONG'}"
        )


def check_compress(*case: Any) -> None:
    Compress(*case).check(str(case), case[0] >= 300)


COMPRESS = [(1, 1, 4, 512), (64, 64, 4, 512), (64, 64, 4, 128), (1, 1, 128, 512), (64, 64, 128, 512)]
COMPRESS_PREFILL = [(2048, 1, 4, 512), (2048, 1, 128, 512)]


def time_compress(*case: Any) -> None:
    long = case[0] >= 1024
    copies = [Compress(*case) for _ in range(8)]
    us = micros([lambda c=c: c.run(long=long) for c in copies])
    line("compress " + " ".join(map(str, case)), us, copies[0].bytes)
    if not long:
        copies = [Compress(*case, False) for _ in range(8)]
        line("    no window ends", micros([c.run for c in copies]), copies[0].bytes)


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
            one.run(tiles or index.plan(*case[:2], limit, k, page, DTYPES[form]))
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
        ]:  # fmt: skip
            for ragged in (False, True):
                guarded(check_index, rows, sequences, limit, k, page, form, ragged)
    elif kind == "union":
        for case in [*UNION, (4, 2, 600, 128, "csa"), (3, 3, 1000, 64, "hca"), *UNION_PREFILL]:
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
    faulthandler.dump_traceback_later(75, exit=True)

    def at(what: str) -> None:
        print(f"{what} after {time.perf_counter() - begun:.0f} s", flush=True)

    kinds = os.environ.get("ONLY", "index mix compress union").split()
    print(torch.cuda.get_device_name(), kinds, flush=True)
    cases: dict[str, list[tuple[Any, ...]]] = {
        "index": [*V32, *V4, *SHARED, *FP8_CASES, *PREFILL],
        "union": [*UNION, *UNION_PREFILL],
        "compress": [*COMPRESS, *COMPRESS_PREFILL],
        "mix": [(n, d) for d in (4096, 7168) for n in (1, 8, 64, 2048)],
    }
    timers = {"index": time_index, "union": time_union, "mix": time_mix, "compress": time_compress}
    options: dict[str, Any] = {"index": index_plans, "union": union_options, "mix": lambda *_: MIX_TILES}
    sweepers = {"index": sweep_index, "union": sweep_union, "mix": sweep_mix}
    pool = ProcessPoolExecutor(15, mp_context=torch.multiprocessing.get_context("spawn"))
    for kind in kinds:
        try:
            list(pool.map(warm, [(kind, case, None) for case in cases[kind]], timeout=30))
        except TimeoutError:
            print(f"{kind} HANGS")
            continue
        at(f"{kind} compiled")
        checks(kind)
        for case in cases[kind]:
            guarded(timers[kind], *case)
        at("timed")
        sweeps = [case for name, case in SWEEPS if name == kind]
        if not sweeps or os.environ.get("SWEEP", "1") != "1" or time.perf_counter() - begun > 55:
            continue
        tasks = [(kind, case, tiles) for case in sweeps for tiles in options[kind](*case)]
        list(pool.map(warm, tasks, timeout=60))
        for case in sweeps:
            if time.perf_counter() - begun > 66:
                print(f"out of time before {kind} {case}")
                continue
            guarded(sweepers[kind], *case)
        at("swept")
    pool.shutdown(wait=False, cancel_futures=True)
    at("done")


if __name__ == "__main__":
    main()
