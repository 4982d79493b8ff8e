"""The indexer's kernels against its definition, and the definition against the bricks."""

import pytest
import torch

from rorqual.kernels import entries, index
from rorqual.kernels.index import Plan
from rorqual.nn import indexer
from tests.interpreter import repair

SMALL = Plan(queries=1, keys=16, parts=4, warps=4, stages=2, cap=64, chunk=64, gather_warps=4, choose_warps=4)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    repair(monkeypatch)


def make(device, limits, seqs, max_keys, *, heads=4, dim=16, page=16, exact=True, kind=torch.float32):
    """Arguments of an op. Whole numbers if `exact`: any order of summing gives one score, and many are equal.
    What no query may see is NaN."""
    rows, sequences = len(limits), max(seqs) + 1
    columns = -(-max_keys // page)
    table = (
        (torch.randperm(sequences * columns + 2) + 1)[: sequences * columns].int().view(sequences, columns)
    )
    content = torch.randint(-2, 3, (sequences * columns + 3, page, dim)).float()
    q, w = torch.randint(-1, 2, (rows, heads, dim)).float(), torch.randint(-1, 2, (rows, heads)).float()
    if not exact:
        content, q, w = torch.randn_like(content), torch.randn_like(q), torch.randn_like(w)
    hidden = torch.ones(content.shape[:2], dtype=torch.bool)
    for seq in range(sequences):
        end = max(limit for limit, s in zip(limits, seqs, strict=True) if s == seq)
        position = torch.arange(min(end, max_keys))
        hidden[table[seq, position // page].long(), position % page] = False
    if kind == torch.uint8:
        codes = content.to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.exp2(torch.randint(-1, 2, (*content.shape[:2], 1)).float())
        pages = torch.cat((codes, scale.view(torch.uint8)), -1)
        pages[hidden] = 255
    else:
        content[hidden] = float("nan")
        pages = content.to(kind)
        q = q.to(kind)
    ints = {"dtype": torch.int32, "device": device}
    return (
        q.to(device), w.to(device), pages.to(device), table.to(device),
        torch.tensor(seqs, **ints), torch.tensor(limits, **ints),
    )  # fmt: skip


def compare(args, k, max_keys, tiles=SMALL):
    got = index.fast(*args, k=k, max_keys=max_keys, tiles=tiles)
    want = index.reference(*args, k=k, max_keys=max_keys)
    assert got.dtype == want.dtype == torch.int32 and torch.equal(got, want)
    return got


@pytest.mark.parametrize("k", [1, 8, 33])
@pytest.mark.parametrize("queries", [1, 2, 4])
def test_whole_numbers_give_the_very_choice(device, k, queries):
    limits, seqs = [200, 0, 64, 65, 7, 33, 199], [0, 0, 0, 1, 1, 2, 2]
    compare(make(device, limits, seqs, 200), k, 200, SMALL._replace(queries=queries))


def test_a_tile_of_keys_may_span_pages_or_be_part_of_one(device):
    args = make(device, [200, 77, 33], [0, 1, 1], 200)
    compare(args, 8, 200, SMALL._replace(keys=32, parts=2))
    compare(make(device, [200, 77, 33], [0, 1, 1], 200, page=64), 8, 200)


def test_short_contexts_gather_nothing(device):
    compare(make(device, [60, 5, 0, 64], [0, 1, 1, 2], 64), 8, 64)
    compare(make(device, [5, 3], [0, 1], 5), 8, 5)


@pytest.mark.parametrize("value", [0.0, -1.0, 1.0])
def test_equal_scores_go_to_the_lowest_positions(device, value):
    """More equal scores than are gathered: the row is passed over again and again."""
    q, w, pages, table, seqs, limits = make(device, [300, 150, 20], [0, 1, 2], 320)
    pages.fill_(1.0), q.fill_(1.0), w.fill_(value)
    got = compare((q, w, pages, table, seqs, limits), 40, 320)
    assert got[0].tolist() == list(range(40)) and got[2].tolist() == [*range(20), *[-1] * 20]


def test_ties_at_the_last_place_beside_better_scores(device):
    q, w, pages, table, seqs, limits = make(device, [300], [0], 320, heads=1, dim=16)
    q.fill_(1.0), w.fill_(1.0), pages.fill_(0.0)
    for position in (290, 7, 170):
        pages[table[0, position // 16].long(), position % 16, 0] = 1.0
    got = compare((q, w, pages, table, seqs, limits), 6, 320)
    assert got[0].tolist() == [0, 1, 2, 7, 170, 290]


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8])
def test_any_numbers_and_odd_widths(device, kind):
    dim = 128 if kind == torch.uint8 else 40
    args = make(device, [200, 130], [1, 0], 208, heads=3, dim=dim, exact=False, kind=kind)
    compare(args, 9, 208)


def test_bf16(device):
    compare(make(device, [200, 70], [0, 1], 208, kind=torch.bfloat16), 9, 208)


def test_fp8_queries_and_pages(device):
    q, w, *rest = make(device, [200, 70], [0, 1], 208, dim=128, kind=torch.uint8)
    compare((q.to(torch.float8_e4m3fn), w, *rest), 9, 208)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 2])
def test_keys_of_fp4(device, kind, queries):
    """Whole and half numbers: any order of summing gives one score."""
    q, w, pages, *rest = make(device, [200, 70, 33], [0, 1, 1], 208, dim=64)
    shape = pages.shape[:2]
    codes = torch.randint(0, 256, (*shape, 32), dtype=torch.uint8)
    scales = torch.randint(126, 129, (*shape, 2), dtype=torch.uint8)
    packed = torch.cat((codes, scales), -1).to(device)
    assert packed.shape[2] == entries.key_bytes(64)
    compare((q.to(kind), w, packed, *rest), 9, 208, SMALL._replace(queries=queries))


def test_queries_are_worked_in_blocks(device, monkeypatch):
    monkeypatch.setattr(index, "SCORE_BYTES", 4 * 128 * 3)
    limits, seqs = [100, 20, 0, 64, 77, 33, 12], [0, 0, 0, 1, 1, 2, 2]
    for queries in (1, 2):
        compare(make(device, limits, seqs, 112), 8, 112, SMALL._replace(queries=queries))


def test_queries_may_be_strided_and_pages_big(device):
    q, w, pages, table, seqs, limits = make(device, [90, 17], [0, 1], 96)
    wide = torch.full((2, 9, 32), float("nan"), device=device)
    wide[:, :4, :16] = q
    compare((wide[:, :4, :16], w, pages, table, seqs, limits), 8, 96)


def test_the_op_and_no_rows(device):
    args = make(device, [200, 30], [0, 1], 208)
    assert torch.equal(
        index.index_choose(*args, k=5, max_keys=208), index.reference(*args, k=5, max_keys=208)
    )
    none = [z[:0] if i in (0, 1, 4, 5) else z for i, z in enumerate(args)]
    assert index.fast(*none, k=5, max_keys=208).shape == (0, 5)


@pytest.mark.parametrize("exact", [True, False])
def test_the_definition_equals_the_brick(exact):
    q, w, pages, table, _, _ = make("cpu", [96], [0], 96, exact=exact)
    keys, rows = pages[table[0].long()].flatten(0, 1)[:70], torch.tensor([1, 9, 40, 70])
    q, w = torch.randn(1, 4, 4, 16).round(), torch.randn(1, 4, 4).round()
    want = indexer.choose_in_blocks(q, keys[None], w, rows[None], 12)[0]
    seqs = torch.zeros(4, dtype=torch.int32)
    got = index.reference(q[0], w[0], pages, table, seqs, rows.int(), k=12, max_keys=96)
    for a, b in zip(got.tolist(), want.tolist(), strict=True):
        assert a == sorted(x for x in b if x >= 0) + [-1] * b.count(-1)
