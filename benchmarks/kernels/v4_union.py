"""V4's attention and compressor: checks and cases of `benchmarks.kernels.v4`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels.timing import DEVICE, L2, line, micros, report
from rorqual.kernels import compress, union
from rorqual.kernels.entries import entry_bytes, key_bytes, pack_entries


class Union:
    """V4's attention of `rows` queries: `kind` "swa", "csa" (512 chosen) or "hca" (all of `count` entries); rows of
    bytes if `packed`."""

    def __init__(self, rows: int, sequences: int, count: int, heads: int, kind: str, packed: str = ""):
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
        self.rope = 64
        if packed:
            self.ring = pack_entries(self.ring.flatten(0, 1), 64).view(sequences, 144, -1)
            self.new = pack_entries(self.new, 64) if self.new is not None else None
            if self.entries is not None:
                shape = self.entries.shape[:2]
                self.entries = pack_entries(self.entries.flatten(0, 1), 64).unflatten(0, shape)
        item = entry_bytes(dim, 64) if packed else 2 * dim
        self.bytes = (keys if share == 1 or kind == "csa" else keys // share) * item + 2 * self.q.numel() * 2
        self.flops = 4.0 * keys * heads * dim

    def run(self, **options: Any) -> Tensor:
        return union.fast(
            self.q, self.new, self.ring, self.rings, self.positions, self.entries, self.table, self.rings,
            self.starts if self.new is not None else None, self.chosen, self.sink, window=128, ratio=self.ratio,
            scale=512**-0.5, rope=self.rope, **options,
        )  # fmt: skip

    def check(self, name: str, **options: Any) -> None:
        got = self.run(**options).double()
        rows = range(0, len(self.q), max(1, len(self.q) // 4))
        worst = 0.0
        for n in rows:
            last = slice(max(0, n - 130), n + 1)
            some = self.q, self.new, self.rings, self.positions, self.chosen
            *args, chosen = (z[last] if z is not None else None for z in some)
            new, ring, entries = (_wide(z) for z in (args[1], self.ring, self.entries))
            want = union.reference(
                args[0].double(), new, ring, args[2], args[3], entries, self.table, self.rings[last], chosen,
                self.sink.double(), window=128, ratio=self.ratio, scale=512**-0.5, rope=self.rope,
            )[-1]  # fmt: skip
            worst = max(worst, float((got[n] - want).abs().max() / want.abs().max()))
        same = torch.equal(self.run(**options).double(), got)
        print(
            f"check union {name}: worst {worst:.4f} {'ok' if worst < 0.01 and same else 'WRONG'}", flush=True
        )


def _wide(z: Tensor | None) -> Any:
    return z if z is None or z.dtype == torch.uint8 else z.double()


def check_plain_union() -> None:
    for case in [(3, 3, 1000, 64, "hca"), (2048, 1, 4096, 64, "csa"), (3, 3, 1000, 64, "csa", "fp8")]:
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
UNION_FP8 = [(*case, "fp8") for case in (*UNION[:6], (1, 1, 100, 64, "swa"), (2048, 1, 4096, 64, "csa"))]
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


def union_options(
    rows: int, sequences: int, count: int, heads: int, kind: str, packed: str = ""
) -> Iterator[dict[str, int]]:
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


class Compress:
    """`rows` new tokens of `sequences` sequences, each ending a window."""

    def __init__(
        self, rows: int, sequences: int, ratio: int, dim: int, ending: bool = True, packed: bool = False
    ):
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
        if packed:
            size = entry_bytes(dim, 64) if dim == 512 else key_bytes(dim)
            self.pages = torch.zeros(rows // 16 + 2, 16, size, device=DEVICE, dtype=torch.uint8)
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
        copies = [Compress(*case, True, True) for _ in range(8)]
        line("    entries as bytes", micros([c.run for c in copies]), copies[0].bytes)
