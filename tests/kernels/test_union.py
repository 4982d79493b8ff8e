"""V4's attention kernel against its definition, and the definition against the brick."""

import pytest
import torch

from rorqual.family import parts
from rorqual.kernels import union
from rorqual.kernels.entries import pack_entries
from rorqual.nn.compressed import CompressedAttention
from rorqual.nn.step import Rows, Step
from tests.interpreter import repair

WINDOW, LENGTH, DIM = 12, 12 + 17, 24


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    repair(monkeypatch)


class Case:
    """Sequences whose newest tokens (`begins[s]` to `ends[s]`) are a pass's queries, between padding rows."""

    def __init__(
        self,
        device,
        begins,
        ends,
        ratio,
        k=None,
        heads=3,
        page=4,
        dtype=torch.float32,
        fresh=False,
        dim=DIM,
        rope=0,
    ):
        sequences = len(ends)
        self.ring = torch.full((sequences + 2, LENGTH, dim), float("nan")).to(dtype)
        order = torch.randperm(sequences + 2)[:sequences].tolist()
        columns = max(ends) // ratio // page + 1
        self.entries = torch.full((sequences * columns + 5, page, dim), float("nan")).to(dtype)
        numbers = torch.randperm(sequences * columns + 4)[: sequences * columns] + 1
        self.table = numbers.int().view(sequences, columns)
        ring, position, seq, new, chosen, starts = [], [], [], [], [], [0]
        for s, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            raw = torch.randn(end, dim).to(dtype)
            for p in range(max(0, (begin if fresh else end) - LENGTH), begin if fresh else end):
                self.ring[order[s], p % LENGTH] = raw[p]
            for e in range(end // ratio):
                self.entries[self.table[s, e // page], e % page] = torch.randn(dim).to(dtype)
            for p in range(begin, end):
                ring.append(order[s]), position.append(p), seq.append(s), new.append(raw[p])
                if k is not None:
                    count = max(0, min(k, (p + 1) // ratio) - p % 3)  # fewer than there are: an odd caller
                    some = torch.randperm((p + 1) // ratio)[:count]
                    chosen.append(torch.cat((some, torch.full((k - count,), -1))))
            starts.append(len(ring))
        if fresh is False:
            ring, position, seq = [-1, *ring], [WINDOW, *position], [0, *seq]
            chosen = [torch.full((k or 1,), 0), *chosen]
        ints = {"dtype": torch.int32, "device": device}
        self.rings, self.positions = torch.tensor(ring, **ints), torch.tensor(position, **ints)
        self.seqs, self.starts = torch.tensor(seq, **ints), torch.tensor(starts, **ints)
        self.q = torch.randn(len(ring), heads, dim).to(dtype).to(device)
        self.new = torch.stack(new).to(device)
        self.chosen = torch.stack(chosen).int().to(device) if k is not None else None
        self.sink = torch.randn(heads).to(device)
        self.ring, self.entries, self.table = (z.to(device) for z in (self.ring, self.entries, self.table))
        self.kwargs = {"window": WINDOW, "ratio": ratio, "scale": dim**-0.5}
        if rope:  # what is not there stays NaN: scales of 255 stand for it
            self.ring, self.entries, self.new = (
                pack_entries(z, rope) for z in (self.ring, self.entries, self.new)
            )
            self.kwargs["rope"] = rope

    def args(self, fresh, entries=True):
        """Arguments of `reference`."""
        far = (self.entries, self.table) if entries else (None, None)
        new = self.new if fresh else None
        chosen = self.chosen if entries else None
        return self.q, new, self.ring, self.rings, self.positions, *far, self.seqs, chosen, self.sink

    def fast(self, fresh, entries=True, **options):
        args = self.args(fresh, entries)
        return union.fast(*args[:8], self.starts if fresh else None, *args[8:], **self.kwargs, **options)

    def expected(self, fresh, entries=True):
        wide = [
            z.double() if z is not None and z.is_floating_point() else z for z in self.args(fresh, entries)
        ]
        return union.reference(*wide, **self.kwargs)


def close(got, want, tolerance=2e-5):
    assert not got.isnan().any()
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("ratio", "k"), [(4, 5), (4, 16), (3, None)])
def test_decoding_equals_fp64(device, splits, ratio, k):
    case = Case(device, [0, 12, 60, 8], [1, 13, 61, 16], ratio, k)
    want = case.expected(False)
    assert (want[0] == 0).all() and not want.isnan().any()
    close(case.fast(False, splits=splits, keys=16), want)


def test_the_window_alone_and_bare_defaults(device):
    case = Case(device, [0, 40, 5], [3, 41, 6], 4)
    close(case.fast(False, entries=False), case.expected(False, entries=False))
    close(case.fast(False), case.expected(False))


@pytest.mark.parametrize(("ratio", "k"), [(4, 5), (3, None)])
def test_more_heads_than_a_block_and_a_strided_query(device, ratio, k):
    case = Case(device, [30, 7], [31, 8], ratio, k, heads=70)
    want = case.expected(False)
    wide = torch.full((case.q.shape[0], 70, DIM + 8), float("nan"), device=device)
    wide[..., :DIM] = case.q
    case.q = wide[..., :DIM]
    close(case.fast(False, splits=2, keys=16), want)


@pytest.mark.parametrize(("ratio", "k"), [(4, 5), (3, None)])
def test_chunks_read_their_own_entries_before_the_ring_has_them(device, ratio, k):
    case = Case(device, [0, 20, 37, 0], [20, 29, 38, 1], ratio, k, fresh=True)
    want = case.expected(True)
    close(case.fast(True, keys=16), want)
    close(case.fast(True, keys=32, splits=2), want)


@pytest.mark.parametrize(("dim", "rope"), [(72, 8), (160, 32)])
@pytest.mark.parametrize(("ratio", "k"), [(4, 5), (3, None)])
def test_rings_and_pages_of_bytes(device, ratio, k, dim, rope):
    case = Case(device, [0, 12, 60, 8], [1, 13, 61, 16], ratio, k, dim=dim, rope=rope)
    want = case.expected(False)
    for splits in (1, 3):
        close(case.fast(False, splits=splits, keys=16), want)
    close(case.fast(False, entries=False), case.expected(False, entries=False))
    case = Case(device, [0, 20, 37, 0], [20, 29, 38, 1], ratio, k, fresh=True, dim=dim, rope=rope)
    close(case.fast(True, keys=16), case.expected(True))


def test_bf16(device):
    case = Case(device, [0, 40], [3, 41], 4, 5, dtype=torch.bfloat16)
    close(case.fast(False, keys=16), case.expected(False), tolerance=2e-2)


@pytest.mark.parametrize("rope", [0, 64])
@pytest.mark.parametrize("heads", [64, 5, 130])
@pytest.mark.parametrize(("ratio", "k"), [(4, 70), (4, None)])
def test_the_form_for_hopper(device, heads, ratio, k, rope):
    some = torch.empty(1, 1, 512, dtype=torch.bfloat16, device=device)
    if not union.union_gluon.supported(some):
        pytest.skip("no Hopper GPU")
    options = {"heads": heads, "dtype": torch.bfloat16, "dim": 512, "rope": rope}
    case = Case(device, [0, 12, 600, 299], [3, 13, 602, 304], ratio, k, **options)
    want = case.expected(False)
    for splits in (1, 3):
        close(case.fast(False, hopper=True, splits=splits), want, tolerance=2e-2)
    case = Case(device, [0, 400, 37, 0], [70, 409, 38, 1], ratio, k, fresh=True, **options)
    close(case.fast(True, hopper=True), case.expected(True), tolerance=2e-2)


def test_ops_take_the_same(device):
    case = Case(device, [9, 40], [12, 41], 4, 5, fresh=True)
    q, new, ring, rings, positions, entries, table, seqs, chosen, sink = case.args(True)
    got = union.union_prefill(
        q, new, ring, rings, positions, entries, table, seqs, case.starts, chosen, sink, **case.kwargs
    )
    close(got, case.expected(True))
    case = Case(device, [9, 40], [12, 41], 4, 5)
    q, _, ring, rings, positions, entries, table, seqs, chosen, sink = case.args(False)
    got = union.union_decode(q, ring, rings, positions, entries, table, seqs, chosen, sink, **case.kwargs)
    close(got, case.expected(False))


@pytest.mark.parametrize("compress", [None, (4, 3), (8, None)])
def test_the_definition_equals_the_brick(compress):
    """The brick's own `_attend` on one sequence of 40 tokens, from position 0."""
    case = Case(
        "cpu", [0], [40], compress[0] if compress else 4, compress[1] if compress else None, fresh=True
    )
    index = parts.Index(1, 8, compress[1]) if compress and compress[1] else None
    part = parts.CompressedAttention(
        3, DIM, 8, 1, 8, WINDOW, parts.Rope(8), parts.Compress(compress[0], index is not None, index) if compress else None
    )  # fmt: skip
    brick = CompressedAttention(16, part, 1e-6).requires_grad_(False)
    brick.sink.copy_(case.sink)
    step = Step(Rows([0], [40], 40, torch.device("cpu")))
    recent = torch.nn.functional.pad(case.new[None], (0, 0, WINDOW, 0))
    count = 40 // case.kwargs["ratio"]
    entries = case.entries[case.table[0].long()].flatten(0, 1)[None, :count] if compress else None
    chosen = case.chosen[None].long() if index else None
    want = brick._attend(case.q[None], recent, entries, chosen, step)[0]
    got = union.reference(*case.args(True, entries=compress is not None), **case.kwargs)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
