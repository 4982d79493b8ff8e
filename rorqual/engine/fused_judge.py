"""`draws.judge` and the draw after it in two launches, on distributions as `fused.draw` lays them down."""

import torch
from torch import Tensor

from rorqual.engine.draws import ACCEPT, RESIDUAL
from rorqual.engine.fused import Tables
from rorqual.engine.fused_parts import _uniform
from rorqual.kernels.fuse import chained
from rorqual.kernels.gpu import tl, triton


@triton.jit
def _whole(p):  # type: ignore[no-untyped-def]
    """Probabilities as whole numbers of 2^-60."""
    return (p * 1152921504606846976.0).to(tl.int64)


@triton.jit
def _over(p_RV, q_SV, row, slot, drawn_q, o, vocab: tl.constexpr):  # type: ignore[no-untyped-def]
    """p, and what it has over q; all of it where nothing was drawn from q."""
    p = tl.load(p_RV + row * vocab + o, mask=o < vocab, other=0.0)
    q = tl.load(q_SV + slot * vocab + o, mask=o < vocab, other=0.0)
    return p, tl.maximum(p - tl.where(drawn_q, q, 0.0), 0.0)


@triton.jit
def _rests(  # type: ignore[no-untyped-def]
    p_RV, q_SV, slots, tries, knobs, sums,
    vocab: tl.constexpr, KNOBS: tl.constexpr, PART: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """What each part of a row has over q, and its whole weight."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    drawn_q = (tl.load(tries + row) > 0) & (tl.load(knobs + slot * KNOBS) == 0)
    o = part * PART + tl.arange(0, PART)
    p, rest = _over(p_RV, q_SV, row, slot, drawn_q, o, vocab)
    here = (row * tl.num_programs(1) + part) * 2
    tl.store(sums + here, tl.sum(_whole(rest), 0))
    tl.store(sums + here + 1, tl.sum(_whole(p), 0))


@triton.jit(do_not_specialize=["rows"])
def _verdict(  # type: ignore[no-untyped-def]
    p_RV, q_SV, slots, tries, knobs, drafts, sums, key, drawn, newest, line_S, count, out, rows,
    vocab: tl.constexpr, KNOBS: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    ACCEPT: tl.constexpr, RESIDUAL: tl.constexpr, COUNT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """The draft if it stands, else a token of what p has over q (of p, if rounding leaves nothing of that)."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot, tried, draft = tl.load(slots + row), tl.load(tries + row) > 0, tl.load(drafts + row)
    drawn_q = tried & (tl.load(knobs + slot * KNOBS) == 0)
    seed, place = tl.load(key + slot), tl.load(drawn + slot) * 4
    p_draft = tl.load(p_RV + row * vocab + draft).to(tl.float64)
    q_draft = tl.where(drawn_q, tl.load(q_SV + slot * vocab + draft), 0.0).to(tl.float64)
    stands = tried & (_uniform(seed, place + ACCEPT) * q_draft < p_draft)
    parts = tl.arange(0, WIDE)
    at = (row * PARTS + parts) * 2
    rest = tl.load(sums + at, mask=parts < PARTS, other=0)
    left = tl.sum(rest, 0) > 1152921504  # 1e-9
    weights = tl.where(left, rest, tl.load(sums + at + 1, mask=parts < PARTS, other=0))
    mass = tl.sum(weights, 0)
    goal = (_uniform(seed, place + RESIDUAL) * mass.to(tl.float64)).to(tl.int64)
    goal = tl.maximum(tl.minimum(goal, mass - 1), 0)
    part = tl.minimum(tl.sum((tl.cumsum(weights, 0) <= goal).to(tl.int32), 0), PARTS - 1)
    goal -= tl.sum(tl.where(parts < part, weights, 0), 0)
    o = part * PART + tl.arange(0, PART)
    p, over = _over(p_RV, q_SV, row, slot, drawn_q, o, vocab)
    whole = _whole(tl.where(left, over, p))
    token = part * PART + tl.sum((tl.cumsum(whole, 0) <= goal).to(tl.int32), 0)
    token = tl.minimum(token, tl.max(tl.where(whole > 0, o, 0), 0)).to(tl.int64)
    token = tl.where(stands, draft, token)
    tl.store(out + row, token)
    tl.store(out + rows + row, stands.to(tl.int64))
    tl.atomic_add(drawn + slot, place * 0 + 1)
    tl.store(newest + slot, token)
    if COUNT:
        line = tl.load(line_S + slot)
        if line > 0:
            tl.atomic_add(count + line * vocab + token, 1)


def judge(
    p_RV: Tensor,
    q_SV: Tensor,
    slots_R: Tensor,
    drafts_R: Tensor,
    tries_R: Tensor,
    tables: Tables,
    *,
    counts: bool = False,
    part: int = 4096,
) -> Tensor:
    """Each row's token and whether it is its draft, int64 [2, R]; the tables are told of it. `tries_R`: above 0
    where there is a draft, drawn from the slot's line of `q_SV` or, where greedy, the likeliest there.
    `counts`: some rows have penalties."""
    rows, vocab = p_RV.shape
    parts = triton.cdiv(vocab, part)
    sums = torch.empty(rows, parts, 2, dtype=torch.int64, device=p_RV.device)
    out = torch.empty(2, rows, dtype=torch.int64, device=p_RV.device)
    warps = max(1, min(8, part // 256))
    like = {"vocab": vocab, "KNOBS": tables.knobs_SK.shape[1], "PART": part}
    tries_R, drafts_R = tries_R.contiguous(), drafts_R.contiguous()
    _rests[rows, parts](
        p_RV, q_SV, slots_R, tries_R, tables.knobs_SK, sums,
        **like, num_warps=warps, **chained(p_RV, rows * parts),
    )  # fmt: skip
    _verdict[rows,](
        p_RV, q_SV, slots_R, tries_R, tables.knobs_SK, drafts_R, sums, tables.key_S, tables.drawn_S, tables.newest_S,
        tables.line_S, tables.count_LV, out, rows, **like, PARTS=parts, WIDE=triton.next_power_of_2(parts),
        ACCEPT=ACCEPT, RESIDUAL=RESIDUAL, COUNT=counts, num_warps=8, **chained(p_RV, rows),
    )  # fmt: skip
    return out
