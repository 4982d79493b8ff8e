"""Grouped attention over pages: against fp64 in every form, and to the bit in the fixed one."""

import itertools

import pytest
import torch
from torch import Tensor

from rorqual.kernels import gqa_paged_gluon
from rorqual.kernels.gqa_paged import Config, fast, gqa_paged, reference
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def make(
    ends: list[int],
    counts: list[int],
    heads: int,
    groups: int,
    size: int,
    device: torch.device,
    *,
    page_size: int = 16,
    padding: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:
    """Queries, key and value pages, table, ends and starts; everything in pages that is not content is NaN."""
    blocks = [-(-end // page_size) for end in ends]
    total = sum(blocks) + 2
    order = iter((torch.randperm(total - 1) + 1).tolist())
    table = torch.zeros(len(ends), max(*blocks, 1) + 1, dtype=torch.int32)
    pages = torch.randn(2, total, page_size, groups, size).to(dtype)
    there = torch.zeros(total, page_size, dtype=torch.bool)
    for s, end in enumerate(ends):
        for block in range(blocks[s]):
            table[s, block] = page = next(order)
            there[page, : end - block * page_size] = True
    pages = pages.masked_fill(~there[:, :, None, None], float("nan"))
    q = torch.randn(sum(counts) + padding, heads, size).to(dtype)
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor(ends, dtype=torch.int32)
    return tuple(t.to(device) for t in (q, pages[0], pages[1], table, lengths, starts))


def exact(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, ends: Tensor, starts: Tensor, scale: float
) -> Tensor:
    """The same function in fp64, a query and a head at a time."""
    q, k, v = (t.double().cpu() for t in (q, k, v))
    out, size, group = torch.zeros_like(q), k.shape[1], q.shape[1] // k.shape[2]
    for s, end in enumerate(ends.tolist()):
        here = [(int(table[s, p // size]), p % size) for p in range(end)]
        for n in range(int(starts[s]), int(starts[s + 1])):
            seen = here[: end - int(starts[s + 1]) + n + 1]
            for head in range(q.shape[1] if seen else 0):
                keys = torch.stack([k[page, slot, head // group] for page, slot in seen])
                values = torch.stack([v[page, slot, head // group] for page, slot in seen])
                out[n, head] = (keys @ q[n, head] * scale).softmax(-1) @ values
    return out


def close(ours: Tensor, exact: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=tolerance, atol=tolerance)


CASES = [  # ends, counts, heads, groups, size
    ([1], [1], 1, 1, 16),
    ([40, 0, 17], [1, 1, 1], 6, 2, 24),  # decode, with a padding sequence
    ([70, 5, 33], [3, 0, 8], 4, 1, 32),  # drafts of different counts; one that is absent
    ([50, 20, 0, 64], [50, 9, 0, 1], 6, 2, 16),  # whole, the last chunk, nothing, decode
    ([45], [12], 5, 5, 32),
]
FORMS = [None, Config(16, 16, 4, 2), Config(32, 64, 4, 2)]


@pytest.mark.parametrize("fixed", [False, True], ids=["split", "fixed"])
@pytest.mark.parametrize("form", FORMS, ids=["chosen", "small", "large"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: tuple, form: Config | None, fixed: bool, device: torch.device) -> None:
    ends, counts, heads, groups, size = case
    given = make(ends, counts, heads, groups, size, device, padding=3)
    right = exact(*given, 0.3)
    limits = {"max_count": max(counts), "scale": 0.3, "fixed": fixed}
    close(reference(*given, **limits), right)
    ours = fast(*given, **limits, config=form)
    close(ours, right)
    assert not ours[sum(counts) :].any()


@pytest.mark.parametrize("splits", [2, 5])
@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_splits(splits: int, page_size: int, device: torch.device) -> None:
    given = make([90, 0, 16, 31], [2, 1, 3, 0], 6, 2, 16, device, page_size=page_size, padding=1)
    cut = Config(16, 16, 4, 2)
    close(fast(*given, max_count=4, scale=0.3, config=cut, splits=splits), exact(*given, 0.3))


def test_rows_of_one_group_may_fill_several_tiles(device: torch.device) -> None:
    given = make([40, 3], [5, 2], 12, 1, 16, device)
    for splits in (1, 3):
        ours = fast(*given, max_count=5, scale=0.3, config=Config(16, 16, 4, 2), splits=splits)
        close(ours, exact(*given, 0.3))


def test_half_precision(device: torch.device) -> None:
    for ends, counts in (([40, 20], [1, 1]), ([40, 20], [20, 20])):
        given = make(ends, counts, 4, 2, 32, device, dtype=torch.bfloat16)
        close(fast(*given, max_count=max(counts), scale=0.2), exact(*given, 0.2), 2e-2)


def test_fixed_form_is_the_same_to_the_bit(device: torch.device) -> None:
    """One pass, chunks of any size, one at a time, alone or in a batch: a query gets the same bits."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = [45, 20]
    q, k, v, table, ends, starts = make(counts, counts, 6, 2, 32, device, dtype=dtype)
    whole = fast(q, k, v, table, ends, starts, max_count=45, scale=0.2, fixed=True)

    def alone(s: int, begin: int, end: int) -> Tensor:
        own = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        stop = torch.tensor([end], dtype=torch.int32, device=device)
        rows = q[int(starts[s]) + begin : int(starts[s]) + end]
        return fast(rows, k, v, table[s, None], stop, own, max_count=end - begin, scale=0.2, fixed=True)

    for s, count in enumerate(counts):
        mine = whole[int(starts[s]) : int(starts[s + 1])]
        for cuts in ([0, 7, 24, count], [0, 16, 17, count]):
            edges = sorted({min(cut, count) for cut in cuts})
            pieces = [alone(s, begin, end) for begin, end in itertools.pairwise(edges)]
            assert torch.equal(torch.cat(pieces), mine)
        for j in (0, 1, count // 2, count - 1):
            assert torch.equal(alone(s, j, j + 1)[0], mine[j])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 128), (3, 3, 64), (7, 1, 128)])
def test_hopper_form(heads: int, groups: int, size: int, page_size: int) -> None:
    """bf16 prefill, as `gqa_paged_gluon` does it on a Hopper GPU."""
    cases = [([300, 70, 0, 64], [300, 9, 0, 1]), ([1], [1]), ([129, 500], [128, 65])]
    for ends, counts in cases:
        given = make(
            ends,
            counts,
            heads,
            groups,
            size,
            torch.device("cuda"),
            page_size=page_size,
            padding=3,
            dtype=torch.bfloat16,
        )
        right = reference(*given, max_count=300, scale=0.1)
        assert gqa_paged_gluon.supported(*given[:3]) == (torch.cuda.get_device_capability()[0] == 9)
        ours = fast(*given, max_count=300, scale=0.1, config=Config(128, 128, 8, 2, gluon=True))
        close(ours, right.double().cpu(), 2e-2)
        assert not ours[sum(counts) :].any()


def test_refuses_shapes_that_do_not_belong_together() -> None:
    given = make([5], [2], 4, 2, 16, torch.device("cpu"))
    limits = {"max_count": 2, "scale": 0.3}
    close(gqa_paged(*given, **limits), exact(*given, 0.3))
    with pytest.raises(ValueError, match="do not fit keys"):
        gqa_paged(given[0][..., :8], *given[1:], **limits)
    with pytest.raises(ValueError, match="3 query heads"):
        gqa_paged(given[0][:, :3], *given[1:], **limits)
