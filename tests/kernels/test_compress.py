"""V4's compressor kernel against the brick on whole sequences, under any chunking."""

from itertools import pairwise

import pytest
import torch

import rorqual
from rorqual.family.parts import Compress, Index, Rope
from rorqual.kernels import compress, entries
from rorqual.nn.compressor import Compressor
from rorqual.nn.rope import rotation
from rorqual.nn.step import Rows, Step
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    repair(monkeypatch)


ROPE = Rope(8, interleaved=True)
PAGE = 4


class Case:
    """Sequences of projections and gates, the entries they give by the brick, and rings full of garbage."""

    def __init__(self, device, lengths, ratio, overlap, dim=24, dtype=torch.float32, packed=None):
        self.device, self.ratio, self.overlap, self.dim, self.dtype = device, ratio, overlap, dim, dtype
        width = 2 * dim if overlap else dim
        part = Compress(ratio, overlap, Index(heads=1, dim=8, top_k=1) if overlap else None)
        brick = Compressor(width, dim, part, ROPE, 1e-6).requires_grad_(False)
        for parameter in brick.parameters():
            parameter.normal_()
        brick.kv.weight.copy_(torch.eye(width))
        brick.gate.weight.copy_(torch.eye(width) * 2)
        self.ape, self.weight = brick.ape.to(device), brick.norm.weight.to(device)
        self.x = [torch.randn(length, width) for length in lengths]
        self.expected = []
        for x in self.x:
            if len(x) < ratio:
                self.expected.append(torch.zeros(0, dim))
                continue
            step = Step(Rows([0], [len(x)], len(x), x.device))
            self.expected.append(brick(x[None], step, None)[0])
        kept = 2 * ratio if overlap else ratio
        shape = (len(lengths) + 2, kept + compress.ROLLBACK + 1, width)
        self.rings = [torch.full(shape, float("nan"), device=device) for _ in range(2)]
        self.order = torch.randperm(shape[0])[: len(lengths)].tolist()
        pages = sum(-(-length // ratio // PAGE) + 1 for length in lengths) + 1
        self.pages = torch.full((pages, PAGE, dim), float("nan"), dtype=dtype, device=device)
        if packed is not None:
            self.pages = torch.full((pages, PAGE, packed), 255, dtype=torch.uint8, device=device)
        numbers = iter((torch.randperm(pages - 1) + 1).tolist())
        self.table = [[next(numbers) for _ in range(-(-length // ratio // PAGE))] for length in lengths]

    def run(self, form, chunks, padding=0, **kwargs):
        """Rows of `chunks`: (sequence, first, last). `form` may be `compress.fast` or an op."""
        kv, positions, rings, slots = [], [], [], []
        for seq, first, last in chunks:
            kv.append(self.x[seq][first:last])
            positions += range(first, last)
            rings += [self.order[seq]] * (last - first)
            for p in range(first, last):
                entry = p // self.ratio
                complete = (p + 1) % self.ratio == 0
                page = self.table[seq][entry // PAGE] if complete else 0
                slots.append(page * PAGE + entry % PAGE if complete else 0)
        kv.append(torch.full((padding, self.x[0].shape[1]), float("nan")))
        positions += [self.ratio - 1] * padding
        rings += [-1] * padding
        slots += [0] * padding
        kv_NW = torch.cat(kv)
        at = torch.tensor(positions) // self.ratio * self.ratio
        turn = [z.to(self.device) for z in rotation(ROPE, at)]
        ints = [torch.tensor(z, dtype=torch.int32, device=self.device) for z in (rings, positions, slots)]
        form(
            kv_NW.to(self.device), (2 * kv_NW).to(self.device), self.ape, *self.rings, ints[0], ints[1],
            self.weight, 1e-6, *turn, self.pages, ints[2],
            ratio=self.ratio, overlap=self.overlap, dim=self.dim, **kwargs,
        )  # fmt: skip

    def check(self, lengths, tolerance=2e-5):
        for seq, length in enumerate(lengths):
            count = length // self.ratio
            table = self.table[seq]
            got = self.pages[table].flatten(0, 1)[:count] if count else self.pages[:0].flatten(0, 1)
            torch.testing.assert_close(
                got.float().cpu(), self.expected[seq][:count], rtol=tolerance, atol=tolerance
            )
        written = sum(length // self.ratio for length in lengths)
        assert int((~self.pages.isnan().any(-1)).sum()) == written  # nothing else was touched


SHAPES = [(4, True), (8, False), (3, True)]


@pytest.mark.parametrize("form", [compress.fast, compress.reference])
@pytest.mark.parametrize(("ratio", "overlap"), SHAPES)
def test_token_by_token_equals_the_whole_sequence(device, form, ratio, overlap):
    case = Case(device, [27, 9], ratio, overlap)
    for p in range(27):
        case.run(form, [(s, p, p + 1) for s in (1, 0) if p < (27, 9)[s]], padding=p % 2)
    case.check([27, 9])


@pytest.mark.parametrize(("ratio", "overlap"), SHAPES)
def test_several_tokens_a_pass_and_taking_some_back(device, ratio, overlap):
    """Speculation: tokens past the accepted ones have been in the ring, and their places are written again."""
    case = Case(device, [40, 40], ratio, overlap)
    at = 0
    for accepted, width in [(1, 8), (8, 8), (3, 5), (8, 8), (2, 7), (7, 8), (1, 1), (10, 10)]:
        case.run(compress.fast, [(s, at, at + width) for s in (0, 1)], padding=1)
        at += accepted
    case.check([40, 40])


@pytest.mark.parametrize(("ratio", "overlap"), SHAPES)
@pytest.mark.parametrize("cuts", [[1, 2, 6], [5, 40], [33], [4, 8, 12, 50]])
def test_any_chunking_equals_the_whole_sequence(device, ratio, overlap, cuts):
    lengths = [61, 7]
    case = Case(device, lengths, ratio, overlap)
    borders = [0, *cuts, 61]
    for first, last in pairwise(borders):
        chunks = [(s, min(first, n), min(last, n)) for s, n in ((1, 7), (0, 61))]
        case.run(compress.fast, [c for c in chunks if c[1] < c[2]], padding=2, long=True)
    case.check(lengths)


def test_windows_read_in_several_parts(device, monkeypatch):
    """The first part of the first window with overlap holds nothing at all."""
    monkeypatch.setattr(compress, "TILE", 64)
    for ratio, overlap in [(4, True), (8, False)]:
        case = Case(device, [19], ratio, overlap)
        case.run(compress.fast, [(0, 0, 7)])
        case.run(compress.fast, [(0, 7, 19)])
        case.check([19])


def test_decoding_goes_on_after_prefill_through_the_ops(device):
    case = Case(device, [50], 4, True)
    case.run(compress.compress_prefill, [(0, 0, 41)])
    for p in range(41, 50):
        case.run(compress.compress_decode, [(0, p, p + 1)])
    case.check([50])


@pytest.mark.parametrize("form", [compress.fast, compress.reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("kind", ["entries", "keys"])
def test_entries_and_keys_as_bytes(device, form, dtype, long, kind):
    """The bytes hold what packing gives of the entries that pages in the model's type get."""
    dim = 72 if kind == "entries" else 32
    size = entries.entry_bytes(72, 8) if kind == "entries" else entries.key_bytes(32)
    state, found = torch.get_rng_state(), []
    for packed in (None, size):
        torch.set_rng_state(state)
        case = Case(device, [40, 9], 4, True, dim=dim, dtype=dtype, packed=packed)
        case.weight = case.weight.to(dtype)
        for chunk in ([(1, 0, 9), (0, 0, 13)], [(0, 13, 29)], [(0, 29, 40)]):
            case.run(form, chunk, padding=1, **({"long": long} if form is compress.fast else {}))
        found.append(case.pages[case.table[0]].flatten(0, 1)[:10])
    assert int((case.pages != 255).any(-1).sum()) == 12
    plain, packed = found
    if kind == "entries":
        got, want = (
            entries.unpack_entries(z, 72, 8, torch.float32)
            for z in (packed, entries.pack_entries_reference(plain, 8))
        )
    else:
        got, want = (entries.unpack_keys(z, torch.float32) for z in (packed, entries.pack_keys(plain)))
    assert torch.equal(got, want)


def test_wide_windows_of_bf16_entries(device):
    case = Case(device, [128 + 20], 32, False, dim=16, dtype=torch.bfloat16)
    case.run(compress.fast, [(0, 0, 148)], long=True)
    case.check([148], tolerance=4e-2)


@pytest.mark.parametrize(("ratio", "overlap"), SHAPES)
def test_batch_invariant_entries_have_the_same_bits_in_any_chunks(device, monkeypatch, ratio, overlap):
    """Read in several parts, whose borders must not follow what a pass brings."""
    monkeypatch.setattr(compress, "TILE", 64)
    length = 41
    case = Case(device, [length], ratio, overlap)
    forms = []
    for borders in ([0, length], range(length + 1), [0, 7, 9, 30, length], [0, 13, 14, 15, length]):
        for ring in case.rings:
            ring.fill_(float("nan"))
        case.pages.fill_(float("nan"))
        with rorqual.invariant():
            for first, last in pairwise(borders):
                form = compress.compress_decode if last - first <= 2 else compress.compress_prefill
                case.run(run_of(form), [(0, first, last)])
        case.check([length])
        forms.append(case.pages.clone())
    for other in forms[1:]:
        assert torch.equal(other.nan_to_num(), forms[0].nan_to_num())


def run_of(op):
    """The kernels of an op, also where it would take its definition."""
    return lambda *args, **kwargs: compress.fast(*args, long=op is compress.compress_prefill, **kwargs)
