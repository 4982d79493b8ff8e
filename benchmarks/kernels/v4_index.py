"""The indexer (V3.2, V4): checks and cases of `benchmarks.kernels.v4`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import BF16, DEVICE, FP8, L2, Call, line, micros, report
from rorqual.kernels import index
from rorqual.kernels.entries import key_bytes, turn_queries

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.uint8, "fp4": torch.uint8}


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
        elif kind == "fp4":
            self.pages = torch.randint(
                0, 256, (pages, page, key_bytes(dim)), dtype=torch.uint8, device=DEVICE
            )
            self.pages[..., dim // 2 :] = torch.randint(
                124, 128, (dim // 32,), dtype=torch.uint8, device=DEVICE
            )
            self.q = turn_queries(self.q)
        else:
            self.pages = torch.randn(pages, page, dim, device=DEVICE, dtype=torch.bfloat16)
        self.table = (torch.randperm(pages - 1, device=DEVICE) + 1).int().view(sequences, columns)
        share = rows // sequences
        self.seq = torch.arange(sequences, device=DEVICE).repeat_interleave(share).int()
        self.limits = (limit - share + 1 + torch.arange(share, device=DEVICE)).repeat(sequences).int()
        if ragged:
            self.limits = torch.randint(0, limit + 1, (rows,), device=DEVICE).int()
        self.item = {"fp8": 132, "fp4": 68}.get(kind, 256)
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
FP4_CASES = [(n, n, 262144, 512, 32, "fp4") for n in (1, 8, 64)] + [(2048, 1, 32768, 512, 32, "fp4")]
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


def index_plans(rows: int, sequences: int, limit: int, k: int, page: int, kind: str) -> list[index.Plan]:
    base = index.plan(rows, sequences, limit, k, page, DTYPES[kind], kind == "fp4")
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
