"""The second stage of attention whose keys are cut into splits: their results, put together by their log-sum-exp."""

from torch import Tensor

from rorqual.kernels.gpu import tl, triton


@triton.jit(do_not_specialize=("rows", "heads", "splits", "total"))
def _combine(  # type: ignore[no-untyped-def]
    part_ptr, lse_ptr, ends_ptr, starts_ptr, o_ptr, rows, heads, splits, total,
    SIZE: tl.constexpr, LANES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, TILE: tl.constexpr,
    FIXED: tl.constexpr, PACKED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One output row: the mean of its splits' results, weighted by their sums, in the order of the splits.

    `rows` = places * heads a sequence. PACKED outputs have their sequences one right after another. Splits behind a
    sequence's last are memory nobody wrote: they may be read, not used. AHEAD: launched before the end of the kernel
    that writes them, but not before `ends` was written.
    """
    row = tl.program_id(0)
    s = row // rows
    end = tl.load(ends_ptr + s)
    if AHEAD:
        tl.extra.cuda.gdc_wait()
    to = row.to(tl.int64)
    if PACKED:
        start = tl.load(starts_ptr + s)
        if row % rows >= (tl.load(starts_ptr + s + 1) - start) * heads:
            return
        to = to + (start * heads - s * rows)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    lane = tl.arange(0, LANES)
    at = lane.to(tl.int64) * total + row
    sums = tl.load(lse_ptr + at, mask=lane < splits, other=float("-inf"))
    if LANES == BLOCK_S:  # one round: nothing waits for the number of splits that are used
        known = (lane < splits)[:, None] & (channel < SIZE)[None, :]
        part = tl.load(part_ptr + at[:, None] * SIZE + channel[None, :], mask=known, other=0.0)
    if FIXED > 0:
        used = tl.cdiv(end, FIXED)
    else:
        share = tl.cdiv(tl.cdiv(end, splits), TILE) * TILE
        used = tl.cdiv(end, tl.maximum(share, 1))
    sums = tl.where(lane < used, sums, float("-inf"))
    top = tl.max(sums, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    if LANES == BLOCK_S:
        weight = tl.exp2(sums - top)
        acc = tl.sum(tl.where((lane < used)[:, None], part, 0.0) * weight[:, None], 0)
        mass = tl.sum(weight, 0)
    else:
        acc = tl.zeros([BLOCK_C], tl.float32)
        mass = 0.0
        for i in tl.range(0, used, BLOCK_S):
            split = i + tl.arange(0, BLOCK_S)
            there = split < used
            place = split.to(tl.int64) * total + row
            weight = tl.exp2(tl.load(lse_ptr + place, mask=there, other=float("-inf")) - top)
            part = tl.load(
                part_ptr + place[:, None] * SIZE + channel[None, :],
                mask=there[:, None] & (channel < SIZE)[None, :],
                other=0.0,
            )
            acc += tl.sum(part * weight[:, None], 0)
            mass += tl.sum(weight, 0)
    acc = acc / tl.where(mass > 0, mass, 1.0)
    tl.store(o_ptr + to * SIZE + channel, acc.to(o_ptr.dtype.element_ty), mask=channel < SIZE)


def combine(
    part: Tensor,
    lse: Tensor,
    ends_S: Tensor,
    starts_S1: Tensor | None,
    o: Tensor,
    *,
    rows: int,
    heads: int,
    tile: int,
    fixed: int = 0,
    ahead: bool = False,
) -> None:
    """Stage 2: `part` `[splits, S * rows, size]` fp32 and `lse` `[splits, S * rows]` (base 2) into `o`
    `[..., size]`, whose rows are those of `part`, or with `starts_S1` only those that a sequence has. `ahead`: stage 1,
    right before, lets it begin early (`gdc_launch_dependents`), when all that came before stage 1 has ended."""
    splits, total, size = part.shape
    lanes = triton.next_power_of_2(splits)
    if fixed:  # the order of a sum lies in its tile's shape, which must not depend on the number of splits
        block_s, block_c = 32, 128
    else:
        block_s, block_c = (lanes, 4096 // max(8, lanes)) if lanes <= 32 else (128, 32)
    _combine[(total, -(-size // block_c))](
        part,
        lse,
        ends_S,
        starts_S1,
        o,
        rows,
        heads,
        splits,
        total,
        SIZE=size,
        LANES=lanes if not fixed else 2 * max(32, lanes),
        BLOCK_S=block_s,
        BLOCK_C=min(block_c, triton.next_power_of_2(size)),
        TILE=tile,
        FIXED=fixed,
        PACKED=starts_S1 is not None,
        AHEAD=ahead,
        num_warps=4,
        **({"launch_pdl": True} if ahead else {}),
    )
