"""Absorbed latent attention over pages: against fp64, in both forms, and to the bit in the fixed one."""

import pytest
import torch
from torch import Tensor

from rorqual.kernels import mla_decode as op
from rorqual.kernels.mla_decode import Config, fast, mla_decode, pack_latents, reference, unpack_latents
from tests.interpreter import repair


@pytest.fixture(autouse=True)
def repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


FEW = Config(16, 32, 4, 2, 2)
MANY = Config(64, 64, 4, 2, 1)


def make(
    ends: list[int],
    width: int,
    heads: int,
    rank: int,
    rope: int,
    device: torch.device,
    *,
    page_size: int = 16,
    columns: int | None = None,
    dtype: torch.dtype = torch.float32,
    fp8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, pages, table and ends of sequences whose pages lie anywhere; all that is not content is NaN."""
    count = [-(-end // page_size) for end in ends]
    total = sum(count) + 2
    order = iter((torch.randperm(total - 1) + 1).tolist())
    table = torch.zeros(len(ends), columns or max(*count, 1) + 1, dtype=torch.int32)
    content = torch.randn(total, page_size, rank + rope).to(dtype)
    there = torch.zeros(total, page_size, dtype=torch.bool)
    for s, end in enumerate(ends):
        for block in range(count[s]):
            table[s, block] = page = next(order)
            there[page, : end - block * page_size] = True
    if fp8:
        pages = pack_latents(content, rank)
        pages[~there] = 255  # an E4M3 NaN, and a NaN in fp32 and bf16
    else:
        pages = content.masked_fill(~there[..., None], float("nan"))
    q = torch.randn(len(ends) * width, heads, rank + rope).to(dtype)
    return (
        q.to(device),
        pages.to(device),
        table.to(device),
        torch.tensor(ends, dtype=torch.int32, device=device),
    )


def exact(
    q: Tensor, pages: Tensor, table: Tensor, ends: Tensor, width: int, rank: int, scale: float
) -> Tensor:
    """The same function in fp64, a query at a time."""
    out = torch.zeros(*q.shape[:2], rank, dtype=torch.float64)
    q, pages, size = q.double().cpu(), pages.cpu(), pages.shape[1]
    for s, end in enumerate(ends.tolist()):
        for j in range(width):
            seen = [pages[table[s, p // size], p % size] for p in range(end - width + j + 1)]
            if not seen:
                continue
            keys = torch.stack(seen)
            if keys.dtype == torch.uint8:
                keys = unpack_latents(keys, rank, q.shape[-1] - rank, torch.float32)
            keys = keys.double()
            out[s * width + j] = (q[s * width + j] @ keys.T * scale).softmax(-1) @ keys[:, :rank]
    return out


def close(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double().cpu(), exact, rtol=tolerance, atol=tolerance)


CASES = [  # ends, width, heads, rank, rope
    ([1], 1, 1, 16, 16),
    ([70, 0, 16], 1, 5, 32, 16),
    ([33, 129], 3, 4, 48, 24),
    ([2, 65, 0, 64], 2, 20, 64, 16),
]


@pytest.mark.parametrize("form", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("splits", [None, 1, 3, "fixed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case: tuple, splits: int | str | None, form: Config, device: torch.device) -> None:
    ends, width, heads, rank, rope = case
    given = make(ends, width, heads, rank, rope, device)
    right = exact(*given, width, rank, 0.2)
    close(reference(*given, width=width, rank=rank, scale=0.2), right, 1e-5)
    ours = fast(*given, width=width, rank=rank, scale=0.2, splits=splits, config=form)
    close(ours, right, 1e-5)
    for s, end in enumerate(ends):
        assert end or not ours[s * width : (s + 1) * width].any()


@pytest.mark.parametrize("page_size", [4, 16, 32, 128])
def test_any_page_size(page_size: int, device: torch.device) -> None:
    given = make([130, 17], 2, 3, 32, 16, device, page_size=page_size)
    right = exact(*given, 2, 32, 0.3)
    for form in (FEW, MANY):
        close(fast(*given, width=2, rank=32, scale=0.3, splits=2, config=form), right, 1e-5)


def test_half_precision_by_default_choices(device: torch.device) -> None:
    for width, heads in ((1, 16), (2, 16), (1, 40)):
        given = make([100, 0, 31], width, heads, 64, 16, device, dtype=torch.bfloat16)
        ours = fast(*given, width=width, rank=64, scale=0.1)
        close(ours, exact(*given, width, 64, 0.1), 2e-2)


@pytest.mark.parametrize("rank", [64, 256])
@pytest.mark.parametrize("form", [FEW, MANY], ids=["few", "many"])
def test_fp8_pages(rank: int, form: Config, device: torch.device) -> None:
    given = make([70, 0, 33], 2, 3, rank, 16, device, dtype=torch.bfloat16, fp8=True)
    right = exact(*given, 2, rank, 0.1)
    close(reference(*given, width=2, rank=rank, scale=0.1), right, 2e-2)
    close(fast(*given, width=2, rank=rank, scale=0.1, splits=2, config=form), right, 2e-2)


def test_packing_round_trips() -> None:
    latent = torch.randn(7, 512 + 64).to(torch.bfloat16)
    packed = pack_latents(latent, 512)
    assert packed.shape == (7, 656) and packed.dtype == torch.uint8
    back = unpack_latents(packed, 512, 64)
    assert torch.equal(back[:, 512:], latent[:, 512:])
    torch.testing.assert_close(back[:, :512], latent[:, :512], rtol=0.07, atol=0.02)
    assert torch.equal(unpack_latents(pack_latents(back, 512), 512, 64), back)
    scales = packed[:, 512:528].clone().view(torch.float32)
    torch.testing.assert_close(scales, latent[:, :512].float().unflatten(1, (4, 128)).abs().amax(-1) / 448)
    assert pack_latents(torch.zeros(1, 80), 64).shape == (1, 64 + 4 + 32)
    with pytest.raises(ValueError, match="multiple of 4"):
        pack_latents(torch.zeros(1, 10), 6)


@pytest.mark.parametrize("heads", [4, 34])
def test_fixed_form_is_the_same_to_the_bit(
    heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query's result is the same alone, in a batch, inside a group of 4 and with a longer table."""
    monkeypatch.setattr(op, "FIXED_KEYS", 64)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ends, rank, rope = [100, 9, 0], 32, 16
    q, pages, table, lengths = make(ends, 4, heads, rank, rope, device, dtype=dtype)
    run = {"rank": rank, "scale": 0.2, "splits": "fixed"}
    group = fast(q, pages, table, lengths, width=4, **run)
    longer = torch.cat((table, torch.zeros(3, 9, dtype=torch.int32, device=device)), 1)
    assert torch.equal(fast(q, pages, longer, lengths, width=4, **run), group)
    for s, end in enumerate(ends):
        alone = fast(q[4 * s : 4 * s + 4], pages, table[s : s + 1], lengths[s : s + 1], width=4, **run)
        assert torch.equal(alone, group[4 * s : 4 * s + 4])
        for j in (range(4) if heads < 16 else (1,)) if end else ():
            one = fast(q[4 * s + j, None], pages, table[s, None], lengths[s, None] - 3 + j, width=1, **run)
            assert torch.equal(one[0], group[4 * s + j])


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [64, 128])
@pytest.mark.parametrize("splits", [None, 1, 3, "fixed"])
@pytest.mark.parametrize(
    ("width", "heads", "fp8"), [(1, 16, False), (2, 16, False), (1, 64, False), (3, 40, False), (3, 40, True)]
)
def test_hopper_form(width: int, heads: int, fp8: bool, splits: int | str | None, page_size: int) -> None:
    """Latents of the released size, which `mla_decode_gluon` takes on a Hopper GPU."""
    device, ends = torch.device("cuda"), [300, 0, 5, 64, 1029]
    given = make(ends, width, heads, 512, 64, device, page_size=page_size, dtype=torch.bfloat16, fp8=fp8)
    assert op.mla_decode_gluon.supported(*given[:2], 512) == (torch.cuda.get_device_capability()[0] == 9)
    right = reference(*given, width=width, rank=512, scale=0.04).double().cpu()
    ours = mla_decode(*given, width=width, rank=512, scale=0.04, splits=splits)
    close(ours, right, 2e-2)
    assert not ours[width : 2 * width].any()
    if splits == "fixed":
        q, pages, table, ends = given
        for s in (0, 4):
            rows = slice(s * width, s * width + width)
            for j in range(width):
                one = q[rows][j, None], pages, table[s, None], ends[s, None] - width + 1 + j
                alone = mla_decode(*one, width=1, rank=512, scale=0.04, splits="fixed")
                assert torch.equal(alone[0], ours[rows][j])


def test_the_choice_of_splits() -> None:
    assert op.choose_splits(128, 4096, 132, 64) == 1
    assert op.choose_splits(1, 131072, 132, 64) == 128
    assert op.choose_splits(32, 4096, 132, 64) == 4
    assert op.choose_splits(1000, 64, 132, 64) == 1


def test_refuses_shapes_that_do_not_belong_together() -> None:
    q, pages, table, ends = make([5], 1, 2, 16, 16, torch.device("cpu"))
    close(
        mla_decode(q, pages, table, ends, width=1, rank=16, scale=1.0),
        exact(q, pages, table, ends, 1, 16, 1.0),
        1e-5,
    )
    with pytest.raises(ValueError, match="queries are not 2"):
        mla_decode(q, pages, table, ends, width=2, rank=16, scale=1.0)
    with pytest.raises(ValueError, match="pages hold 32"):
        mla_decode(q[..., :24], pages, table, ends, width=1, rank=16, scale=1.0)
