"""How tokens choose experts, in two launches (DeepSeekMoE; V3 report section 2.1.2; facts 3.3, 3.9).

Logits are x times the router's matrix in fp32; a score function makes affinities of them, a balance bias may
be added for choosing only, groups of experts may be dropped whole, and the `top_k` best remain. They come
out best first by ranked score (with bias), and equal scores go to the lower expert index, equal groups to
the lower group: a rule, where torch.topk leaves ties open. Weights are the chosen scores without bias.

The matrix is spread over the whole chip, and its inner axis too, for tens of tokens have too few logits; the
second launch adds up the parts in order and chooses, one warp a token. (One launch, in which the last program
to arrive chooses, measured slower than two that overlap.) A token's logits have the same bits in any batch of
the same form (by rows, by tiles of one size, or PyTorch's product), not across forms.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.affinity import affinities
from rorqual.kernels.fixed import matmul_fixed
from rorqual.kernels.fuse import FLOATS, chained
from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import by_fixed_kernels

SCORES = ("softmax", "sigmoid", "sqrtsoftplus")
GROUP_SCORES = ("max", "top2")
BY_ROWS = 2
"""Tokens up to which logits are sums of products; from there to `BY_TILES` they come off the tensor cores."""
BY_TILES = 256
"""Tokens up to which the matrix's inner axis is shared among programs; beyond, PyTorch's product is used."""
CHOOSING_WARPS = 1


@dataclass(frozen=True)
class Rule:
    """What is fixed about a router: the arguments of `route` by name."""

    top_k: int
    score: str
    groups: int = 1
    keep: int = 1
    group_score: str = "max"
    normalize: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.score not in SCORES or self.group_score not in GROUP_SCORES:
            raise ValueError(f"no score {self.score!r} or no group score {self.group_score!r}")


def choose_reference(
    logits_NE: Tensor, bias_E: Tensor | None, rule: Rule, chosen_NK: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Experts and weights from logits; `chosen_NK` are experts that a table has named."""
    score_NE = affinities(logits_NE, rule.score)
    if chosen_NK is None:
        ranked_NE = score_NE if bias_E is None else score_NE + bias_E
        if rule.groups > 1:
            ranked_NE = _best_groups(ranked_NE, rule)
        chosen_NK = ranked_NE.sort(dim=-1, descending=True, stable=True).indices[:, : rule.top_k]
    weights_NK = score_NE.gather(-1, chosen_NK.long())
    if rule.normalize:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
    return chosen_NK.int(), weights_NK * rule.scale


def _best_groups(ranked_NE: Tensor, rule: Rule) -> Tensor:
    """`ranked_NE` with -inf outside the `keep` best of the contiguous groups."""
    grouped = ranked_NE.unflatten(-1, (rule.groups, -1))
    best = grouped.topk(1 if rule.group_score == "max" else 2, -1).values
    order_NG = best.sum(-1).sort(dim=-1, descending=True, stable=True).indices
    dropped_NG = torch.ones_like(order_NG, dtype=torch.bool).scatter_(-1, order_NG[:, : rule.keep], False)
    return grouped.masked_fill(dropped_NG[..., None], float("-inf")).flatten(-2)


def reference(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, rule: Rule, table_VK: Tensor | None = None,
    token_N: Tensor | None = None, logits_NE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition of `route`."""
    logits = F.linear(x_ND.float(), weight_ED.float())
    if logits_NE is not None:
        logits_NE.copy_(logits)
    chosen = None if table_VK is None or token_N is None else table_VK[token_N]
    return choose_reference(logits, bias_E, rule, chosen)


# ------------------------------------------------------------------------------------------- kernels


@triton.jit
def _ordered(x):  # type: ignore[no-untyped-def]
    """fp32 as integers of the same order: those are compared across a warp in one instruction."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(logit, real, SCORE: tl.constexpr):  # type: ignore[no-untyped-def]
    if SCORE == "softmax":
        grown = tl.where(real, tl.exp(logit - tl.max(tl.where(real, logit, -float("inf")))), 0.0)
        return grown / tl.sum(grown)
    if SCORE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-logit))
    grown = tl.exp(tl.minimum(logit, 20.0))
    small = grown * (1.0 - grown * (0.5 - grown * (1.0 / 3 - grown * (0.25 - grown * 0.2))))
    soft = tl.where(logit > 20.0, logit, tl.where(grown < 0.03, small, tl.log(1.0 + grown)))
    return tl.sqrt_rn(soft)


@triton.jit
def _kept(  # type: ignore[no-untyped-def]
    ranked, s, real,
    GP: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr,
):  # fmt: skip
    """Which of the groups [GP] are among the `KEEP` best."""
    ranked = tl.where(real, ranked, -float("inf"))
    worth = tl.max(ranked, 1)
    if TOP2:
        first = tl.min(tl.where(ranked == worth[:, None], s, 2**30), 1)
        worth += tl.max(tl.where(s == first[:, None], -float("inf"), ranked), 1)
    g = tl.arange(0, GP)
    ahead = (worth[None, :] > worth[:, None]) | (
        (worth[None, :] == worth[:, None]) & (g[None, :] < g[:, None])
    )
    return tl.sum(ahead.to(tl.int32), 1) < KEEP


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, parts_ptr, N, x_stride,
    E: tl.constexpr, D: tl.constexpr, TE: tl.constexpr, TD: tl.constexpr,
    CHAINED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Part `program_id(1)` of the logits of `TE` experts, for every token: `TD` of the `D` summands."""
    if CHAINED and not EARLY:
        tl.extra.cuda.gdc_wait()
    part = tl.program_id(1)
    e = tl.program_id(0) * TE + tl.arange(0, TE)
    at = part * TD + tl.arange(0, TD)
    inside = at < D
    weight = tl.load(weight_ptr + e[:, None] * D + at[None, :], (e < E)[:, None] & inside[None, :], other=0.0)
    if CHAINED:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    full = weight.to(tl.float32)
    n = 0
    while n < N:
        x = tl.load(x_ptr + n * x_stride + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(parts_ptr + (part * N + n) * E + e, tl.sum(full * x[None, :], 1), mask=e < E)
        n += 1


@triton.jit
def _tiles_kernel(  # type: ignore[no-untyped-def]
    x_ptr, weight_ptr, parts_ptr, N, x_stride,
    E: tl.constexpr, D: tl.constexpr, TN: tl.constexpr, TE: tl.constexpr, TD: tl.constexpr,
    SPAN: tl.constexpr, CHAINED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The same for tiles of tokens, on the tensor cores; a part is `SPAN` summands."""
    part = tl.program_id(1)
    e = tl.program_id(0) * TE + tl.arange(0, TE)
    n = tl.program_id(2) * TN + tl.arange(0, TN)
    if CHAINED:
        if EARLY:
            row_ptr = weight_ptr + tl.minimum(e, E - 1)[:, None] * D
            for start in tl.static_range(0, SPAN, TD):
                line = tl.minimum(part * SPAN + start + tl.arange(0, (TD + 63) // 64) * 64, D - 1)
                where = (row_ptr + line[None, :]).to(tl.int64)
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], tl.int32, False, 1
                )
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = tl.zeros([TN, TE], tl.float32)
    for start in range(0, SPAN, TD):
        at = part * SPAN + start + tl.arange(0, TD)
        inside = (at < D)[None, :]
        x = tl.load(
            x_ptr + n[:, None].to(tl.int64) * x_stride + at[None, :], (n < N)[:, None] & inside, other=0.0
        )
        weight = tl.load(weight_ptr + e[:, None] * D + at[None, :], (e < E)[:, None] & inside, other=0.0)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    out = parts_ptr + (part * N + n[:, None]) * E + e[None, :]
    tl.store(out, total, mask=(n < N)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["N"])
def _choose_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, bias_ptr, table_ptr, token_ptr, ids_ptr, weights_ptr, logits_ptr, N, scale,
    E: tl.constexpr, PARTS: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, GROUPS: tl.constexpr,
    KEEP: tl.constexpr, TOP2: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr,
    HASHED: tl.constexpr, LOGITS: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr,
    CHAINED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Experts of token `program_id(0)` from its logits, which lie in `PARTS` summands `[PARTS, N, E]`. AHEAD: the
    next kernel may start at once; it asks for weights that need no choice while this one still waits."""
    if CHAINED:
        if AHEAD:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if not AHEAD:
            tl.extra.cuda.gdc_launch_dependents()
    n = tl.program_id(0)
    # A row of the tile is a group of experts.
    g = tl.arange(0, GP)[:, None]
    s = tl.arange(0, SP)[None, :]
    real = (g < GROUPS) & (s < E // GROUPS)
    at = g * (E // GROUPS) + s
    e = tl.where(real, at, 2**30)
    logit = tl.load(parts_ptr + n * E + at, mask=real, other=0.0)
    for part in tl.static_range(1, PARTS):
        logit += tl.load(parts_ptr + (part * N + n) * E + at, mask=real, other=0.0)
    if LOGITS:
        tl.store(logits_ptr + n * E + at, logit, mask=real)
    score = _scores(logit, real, SCORE)
    held = score.to(tl.int32, bitcast=True)
    ranked = score
    if BIASED:
        ranked += tl.load(bias_ptr + at, mask=real, other=0.0)
    allowed = real
    if GROUPS > 1:
        allowed = real & _kept(ranked, s, real, GP, KEEP, TOP2)[:, None]
    key = tl.where(allowed, _ordered(ranked), -0x80000000)
    k = tl.arange(0, KP)
    ids = tl.zeros([KP], tl.int32)
    weights = tl.zeros([KP], tl.float32)
    total = 0.0
    for i in tl.static_range(K):
        if HASHED:
            best = tl.load(table_ptr + tl.load(token_ptr + n).to(tl.int64) * K + i).to(tl.int32)
        else:
            best = tl.min(tl.where(key == tl.max(key), e, 2**30))
            key = tl.where(e == best, -0x80000000, key)
        weight = tl.max(tl.where(e == best, held, -0x80000000)).to(tl.float32, bitcast=True)
        ids = tl.where(k == i, best, ids)
        weights = tl.where(k == i, weight, weights)
        total += weight
    if NORMALIZE:
        weights = weights / (total + 1e-20)
    tl.store(ids_ptr + n * K + k, ids, mask=k < K)
    tl.store(weights_ptr + n * K + k, weights * scale, mask=k < K)


# ------------------------------------------------------------------------------------------ launches


@dataclass(frozen=True)
class Plan:
    """How logits are made: the shapes of a launch, which follow from sizes alone."""

    experts: int
    """Experts a program multiplies."""
    span: int
    """Summands of a part."""
    inner: int
    """Summands of a tile, a power of two; by rows the whole span."""
    tokens: int = 0
    """Tokens of a tile; 0: by rows."""
    warps: int = 4


def plan(tokens: int, experts: int, width: int, halves: bool) -> Plan | None:
    """None: by PyTorch's product. `halves`: both matrices are bf16, or both fp16."""
    if tokens <= BY_ROWS or (tokens <= BY_TILES and not halves):
        wide = 1024 if width > 4096 else 512
        inner = min(wide, triton.next_power_of_2(width))
        return Plan(2 if width > 4096 else 4, inner, inner, warps=1)
    if tokens <= BY_TILES:
        experts_at_once, least = (32, 512) if width > 4096 else (16, 128)
        span = least if tokens <= 64 else triton.cdiv(width, 8 * 128) * 128
        return Plan(experts_at_once, span, 128, 16 if tokens <= 16 else 32 if tokens <= 64 else 64)
    return None


def fixed_plan(tokens: int, width: int) -> Plan:
    """By tiles for any number of tokens: the order of a sum follows from the parts, cut by the width alone."""
    experts_at_once, span = (32, 512) if width > 4096 else (16, 128)
    return Plan(experts_at_once, span, 128, 16 if tokens <= 16 else 32 if tokens <= 64 else 64)


def _logits(x_ND: Tensor, weight_ED: Tensor, shape: Plan | None, early: bool) -> Tensor:
    """Logits in summands `[parts, N, E]` fp32."""
    (tokens, width), experts = x_ND.shape, weight_ED.shape[0]
    if by_fixed_kernels(x_ND):
        if x_ND.dtype != weight_ED.dtype or x_ND.dtype == torch.float32:
            return matmul_fixed(x_ND, weight_ED, out_dtype=torch.float32)[None]
        shape = fixed_plan(tokens, width)
    if shape is None:
        if x_ND.is_cuda and x_ND.dtype == weight_ED.dtype != torch.float32:
            return torch.mm(x_ND, weight_ED.t(), out_dtype=torch.float32)[None]
        return F.linear(x_ND.float(), weight_ED.float())[None]
    grid = (triton.cdiv(experts, shape.experts), triton.cdiv(width, shape.span))
    parts = torch.empty((grid[1], tokens, experts), dtype=torch.float32, device=x_ND.device)
    if shape.tokens:
        tiles = triton.cdiv(tokens, shape.tokens)
        _tiles_kernel[(*grid, tiles)](
            x_ND, weight_ED, parts, tokens, x_ND.stride(0),
            E=experts, D=width, TN=shape.tokens, TE=shape.experts, TD=shape.inner, SPAN=shape.span, EARLY=early,
            num_warps=shape.warps, **chained(x_ND, grid[0] * grid[1] * tiles),
        )  # fmt: skip
    else:
        _rows_kernel[grid](
            x_ND, weight_ED, parts, tokens, x_ND.stride(0),
            E=experts, D=width, TE=shape.experts, TD=shape.span, EARLY=early,
            num_warps=shape.warps, **chained(x_ND, grid[0] * grid[1]),
        )  # fmt: skip
    return parts


def _choose(
    parts: Tensor, bias_E: Tensor | None, rule: Rule, ids_NK: Tensor, weights_NK: Tensor, table_VK: Tensor | None,
    token_N: Tensor | None, logits_NE: Tensor | None, ahead: bool = False,
) -> None:  # fmt: skip
    """The second launch: ids and weights from logits in summands `[parts, N, E]`."""
    _, tokens, experts = parts.shape
    _choose_kernel[(tokens,)](
        parts,
        bias_E if bias_E is not None else parts,
        table_VK if table_VK is not None else ids_NK,
        token_N.contiguous() if token_N is not None else ids_NK,  # a column of ids has a stride
        ids_NK,
        weights_NK,
        logits_NE if logits_NE is not None else parts,
        tokens,
        rule.scale,
        E=experts,
        PARTS=parts.shape[0],
        K=rule.top_k,
        SCORE=rule.score,
        GROUPS=rule.groups,
        KEEP=rule.keep,
        TOP2=rule.group_score == "top2",
        NORMALIZE=rule.normalize,
        BIASED=bias_E is not None,
        HASHED=table_VK is not None,
        LOGITS=logits_NE is not None,
        GP=triton.next_power_of_2(rule.groups),
        SP=triton.next_power_of_2(experts // rule.groups),
        KP=triton.next_power_of_2(rule.top_k),
        num_warps=CHOOSING_WARPS,
        AHEAD=ahead,
        **chained(parts, tokens),
    )


def chosen(
    logits_NE: Tensor, bias_E: Tensor | None, rule: Rule, table_VK: Tensor | None = None,
    token_N: Tensor | None = None, ahead: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`route` from logits that are at hand, fp32 without gaps, on a GPU. `ahead`: the next kernel may start before
    the logits are there; it must wait itself before it reads the choice."""
    shape = (logits_NE.shape[0], rule.top_k)
    ids_NK = torch.empty(shape, dtype=torch.int32, device=logits_NE.device)
    weights_NK = torch.empty(shape, dtype=torch.float32, device=logits_NE.device)
    _choose(logits_NE[None], bias_E, rule, ids_NK, weights_NK, table_VK, token_N, None, ahead)
    return ids_NK, weights_NK


def fast(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, rule: Rule, table_VK: Tensor | None = None,
    token_N: Tensor | None = None, logits_NE: Tensor | None = None, early: bool = False,
    shape: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference` in two launches."""
    (tokens, width), experts = x_ND.shape, weight_ED.shape[0]
    ids_NK = torch.empty((tokens, rule.top_k), dtype=torch.int32, device=x_ND.device)
    weights_NK = torch.empty((tokens, rule.top_k), dtype=torch.float32, device=x_ND.device)
    if not tokens:
        return ids_NK, weights_NK
    halves = x_ND.dtype == weight_ED.dtype and x_ND.dtype != torch.float32
    parts = _logits(x_ND, weight_ED, shape or plan(tokens, experts, width, halves), early)
    _choose(parts, bias_E, rule, ids_NK, weights_NK, table_VK, token_N, logits_NE)
    return ids_NK, weights_NK


def route(
    x_ND: Tensor, weight_ED: Tensor, bias_E: Tensor | None, *, top_k: int, score: str, groups: int = 1,
    keep: int = 1, group_score: str = "max", normalize: bool = False, scale: float = 1.0,
    table_VK: Tensor | None = None, token_N: Tensor | None = None, logits_NE: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Experts `[N, K]` int32, best first, and their weights `[N, K]` fp32, for tokens x `[N, D]`.

    weight `[E, D]`; bias `[E]` fp32, for choosing only. A hashed router reads the experts off `table_VK` at
    `token_N`. `logits_NE` fp32 is filled if given. `early` says that the launch right before this one does not
    write `weight`: few tokens then read it while that launch still runs. Raises ValueError for an unknown
    score.
    """
    rule = Rule(top_k, score, groups, keep, group_score, normalize, scale)
    if (
        usable(x_ND, weight_ED)
        and x_ND.dtype in FLOATS
        and x_ND.stride(1) == 1
        and weight_ED.is_contiguous()
        and (bias_E is None or (bias_E.is_contiguous() and bias_E.dtype == torch.float32))
        and (table_VK is None or (table_VK.is_contiguous() and token_N is not None))
        and (logits_NE is None or logits_NE.is_contiguous())
    ):
        return fast(x_ND, weight_ED, bias_E, rule, table_VK, token_N, logits_NE, early)
    return reference(x_ND, weight_ED, bias_E, rule, table_VK, token_N, logits_NE)
