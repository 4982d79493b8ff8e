"""The routed feed-forward layer of a mixture of experts: fine-grained SwiGLU experts beside shared ones
(DeepSeekMoE; DeepSeek-V2 section 2.1.3; facts 3.3, 3.9).

    y[n] = sum over k of down_e(w[n, k] * swiglu(gate_e x[n], up_e x[n])),  e = ids[n, k]

The gated product is weighted in fp32 before it is cast and multiplied by `down`; a token's results are summed in
fp32 in the order of its choice, then the shared experts' and what `add_ND` holds, and cast once. An id outside
`0 .. E - 1` names no expert and adds nothing. `reference` is the definition and the CPU's and training's form.

`fast` runs without a device-to-host sync. A few tokens go through `experts_few` (two launches), more through
`experts_triton`: sort pairs by expert on the device, two grouped products, sum; on Hopper `experts_gluon` has the
products of large batches. FP8 matrices are multiplied as codes; except for a few tokens the activations are
quantised 1x128 on the way (where `reference` multiplies the matrices out).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import experts_few, experts_gluon, experts_gluon16, experts_triton
from rorqual.kernels.gpu import triton, usable
from rorqual.kernels.linear import linear
from rorqual.kernels.quant import FP8, dequantize_fp4, dequantize_fp8

BLOCK = (128, 128)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Weights:
    """Matrices `[E, out, in]` of all experts, or `[out, in]` of the shared ones.

    Plain: `codes` is fp32, bf16 or fp16 and `scale` None. Held as codes: float8_e4m3fn with one `scale` (fp32;
    float8_e8m0fnu is converted at every call) a `block` of 128x128, or packed FP4 (int8; `reference` only).
    """

    codes: Tensor
    scale: Tensor | None = None
    block: tuple[int, int] | None = None

    def matrix(self, dtype: torch.dtype, index: int | None = None) -> Tensor:
        """The matrix in `dtype`, multiplied out if held as codes; only number `index` of a stack if given."""
        codes, scale = self.codes, self.scale
        if index is not None:
            codes, scale = codes[index], scale[index] if scale is not None else None
        if scale is None:
            return codes if codes.dtype == dtype else codes.to(dtype)
        if codes.dtype == torch.int8:
            return dequantize_fp4(codes, scale, dtype)
        return dequantize_fp8(codes, scale, self.block or BLOCK, dtype)

    def experts(self, dtype: torch.dtype) -> Callable[[int], Tensor]:
        """The matrix of an expert, by number. With gradients the stack is taken apart once: indexing it for
        every expert would make every expert's backward pass write a gradient as large as the whole stack."""
        if self.scale is not None or not (torch.is_grad_enabled() and self.codes.requires_grad):
            return lambda expert: self.matrix(dtype, expert)
        matrices = self.codes.unbind(0)
        return lambda expert: matrices[expert].to(dtype)


Shared = tuple[Weights, Weights, Weights]
"""Gate, up `[n * W, D]` and down `[D, n * W]` of n shared experts."""


def experts(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    limit: float | None = None,
    shared: Shared | None = None,
    add_ND: Tensor | None = None,
    fixed: bool = False,
    of: int | None = None,
) -> Tensor:
    """Each token through its experts: `[N, D]` in x's type.

    ids `[N, K]` int64 or int32, weights `[N, K]` fp32; gate, up `[E, W, D]`, down `[E, D, W]`; with `limit` gate
    is clamped from above, up on both sides. `shared` experts serve every token with weight 1; `add_ND` is added
    before the cast. With `fixed` a token's result has the same bits whatever else is in the batch (on the GPU).
    Where the matrices are those of a few experts among more, `of` says among how many: a hint for the plan.
    """
    tensors = [x_ND, ids_NK, weights_NK, gate.codes, up.codes, down.codes]
    tensors += [w.codes for w in shared or ()] + ([add_ND] if add_ND is not None else [])
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if usable(*tensors) and not learning and supported(x_ND, gate, up, down):
        if shared is not None and not (alike(gate, shared) and supported(x_ND, *shared)):
            common = _through(x_ND, shared, limit)
            add_ND, shared = _wide(common) if add_ND is None else _wide(common) + add_ND, None
        return fast(
            x_ND, ids_NK, weights_NK, gate, up, down, limit=limit, shared=shared, add_ND=add_ND, fixed=fixed, of=of
        )  # fmt: skip
    return reference(x_ND, ids_NK, weights_NK, gate, up, down, limit=limit, shared=shared, add_ND=add_ND)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _swiglu(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    gate, up = _wide(gate), _wide(up)
    if limit is None:
        return F.silu(gate) * up
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def _through(x_ND: Tensor, shared: Shared, limit: float | None) -> Tensor:
    """The shared experts, by plain products."""
    gate, up, down = (weight.matrix(x_ND.dtype) for weight in shared)
    return linear(_swiglu(linear(x_ND, gate), linear(x_ND, up), limit).to(x_ND.dtype), down)


def reference(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    limit: float | None = None,
    shared: Shared | None = None,
    add_ND: Tensor | None = None,
) -> Tensor:
    """`experts` as a loop over the experts that have any tokens."""
    (tokens, chosen), count, dtype = ids_NK.shape, gate.codes.shape[0], x_ND.dtype
    matrices = [stack.experts(dtype) for stack in (gate, up, down)]
    ids_P = ids_NK.flatten().long()
    ids_P = torch.where((ids_P >= 0) & (ids_P < count), ids_P, count)
    order = ids_P.argsort(stable=True)
    x_PD = x_ND[order // max(chosen, 1)]
    weight_P1 = weights_NK.flatten()[order][:, None]
    parts_PD = []
    start = 0
    for expert, pairs in enumerate(ids_P.bincount(minlength=count + 1)[:count].tolist()):
        if pairs:
            mine = slice(start, start + pairs)
            gate_WD, up_WD, down_DW = (matrix(expert) for matrix in matrices)
            inner = _swiglu(linear(x_PD[mine], gate_WD), linear(x_PD[mine], up_WD), limit)
            parts_PD.append(linear((inner * weight_P1[mine]).to(dtype), down_DW))
            start += pairs
    if start < ids_P.numel() or not parts_PD:
        parts_PD.append(x_ND.new_zeros(ids_P.numel() - start, x_ND.shape[1]))
    back = torch.empty_like(order)
    back[order] = torch.arange(order.numel(), device=order.device)
    y_NKD = torch.cat(parts_PD)[back].unflatten(0, (tokens, chosen))
    y_ND = _wide(y_NKD).sum(1)
    if shared is not None:
        y_ND = y_ND + _through(x_ND, shared, limit)
    if add_ND is not None:
        y_ND = y_ND + add_ND
    return y_ND.to(dtype)


# ----------------------------------------------------------------------------------------------- fast


@dataclass(frozen=True)
class Tiles:
    """A product's tile: pairs by channels (`out`), `depth` channels of its inner axis a step; `thin`: the matrix
    on the rows of the tensor core's tile."""

    rows: int
    out: int
    depth: int
    warps: int
    stages: int
    thin: bool


@dataclass(frozen=True)
class Plan:
    """How `fast` runs: tiles of the products (same `rows`); `few`: by `experts_few`, whose `split` is `rows`;
    `codes`: the first product writes FP8 codes, else the second quantises what it reads; `gluon`: both by
    `experts_gluon`, or without FP8 `experts_gluon16`."""

    up: Tiles
    down: Tiles
    few: bool = False
    codes: bool = False
    gluon: bool = False


PDL = True
"""Whether kernels are set up while the one before ends (programmatic dependent launch)."""

EXACT = Plan(Tiles(16, 32, 32, 4, 2, True), Tiles(16, 32, 32, 4, 2, True))
"""For fp32 matrices, which are multiplied without tensor cores."""

ONE_CHUNK = 4096
"""Up to so many pairs every expert's program of the sort looks at all of them itself."""

FEW, FEW_FP8 = 4, 2
"""Batches up to these sizes go through `experts_few`."""


def plan(tokens: int, chosen: int, count: int, fp8: bool, fixed: bool, gluon: bool = False) -> Plan:
    """The tiles for a batch, by its shape alone. Measured on an H200 (64 experts, D 2048, W 1408)."""
    if fixed:
        depth, stages = (128, 3) if fp8 else (64, 4)
        return Plan(Tiles(64, 64, depth, 4, stages, True), Tiles(64, 128, depth, 4, stages, True), codes=fp8)
    if fp8 and tokens <= FEW_FP8:
        return Plan(Tiles(2, 32, 128, 4, 4, True), Tiles(4, 32, 128, 4, 3, True), few=True)
    if not fp8 and tokens <= FEW:
        return Plan(Tiles(2, 16, 128, 2, 4, True), Tiles(4, 16, 128, 4, 6, True), few=True)
    mean = tokens * chosen / count
    full = mean + 1.5 * mean**0.5  # few experts have more pairs than that
    if fp8 and tokens * chosen < count:
        return Plan(Tiles(16, 64, 128, 8, 3, True), Tiles(16, 64, 128, 4, 4, True), codes=True)
    if fp8 and full <= 16:
        return Plan(Tiles(16, 64, 128, 4, 4, True), Tiles(16, 128, 128, 8, 4, True), codes=True)
    if fp8 and full <= 64:
        rows = 32 if full <= 32 else 64
        return Plan(Tiles(rows, 64, 128, 4, 4, True), Tiles(rows, 128, 128, 4, 3, True), codes=True)
    if full <= 16:
        return Plan(Tiles(16, 64, 128, 4, 3, True), Tiles(16, 128, 128, 4, 3, True))
    if full <= 32:
        return Plan(Tiles(32, 32, 128, 4, 4, True), Tiles(32, 64, 128, 4, 4, True))
    if full <= 64:
        return Plan(Tiles(64, 64, 64, 4, 4, True), Tiles(64, 128, 64, 4, 4, True))
    if fp8 and gluon:
        tile = Tiles(128, 128, 128, 4, 4, False)
        return Plan(tile, tile, codes=True, gluon=True)
    if fp8:
        return Plan(Tiles(64, 64, 128, 4, 4, False), Tiles(64, 128, 128, 4, 4, False), codes=True)
    return Plan(Tiles(128, 128, 64, 8, 4, False), Tiles(128, 256, 64, 8, 4, False))


def supported(x_ND: Tensor, gate: Weights, up: Weights, down: Weights) -> bool:
    """Whether `fast` takes these matrices and rows."""
    width, hidden = gate.codes.shape[-2:]
    weights = (gate, up, down)
    if x_ND.shape[0] == 0 or not all(w.codes.is_contiguous() for w in weights):
        return False
    if gate.scale is None:
        return x_ND.dtype in FLOATS and all(w.scale is None and w.codes.dtype == x_ND.dtype for w in weights)
    if width % 128 or hidden % 128:
        return False
    return x_ND.dtype in FLOATS and all(
        w.scale is not None
        and w.codes.dtype == FP8
        and tuple(w.block or ()) == BLOCK
        and w.scale.is_contiguous()
        for w in weights
    )


def alike(gate: Weights, shared: Shared) -> bool:
    """Whether shared experts can run as experts more: matrices held as the routed ones, of a multiple of their
    width."""
    same = all(
        w.codes.dtype == gate.codes.dtype and (w.scale is None) == (gate.scale is None) for w in shared
    )
    return same and shared[0].codes.shape[0] % gate.codes.shape[1] == 0


def _scale(weight: Weights) -> Tensor:
    """The scales in fp32; where there are none, something to point at."""
    return weight.codes if weight.scale is None else weight.scale.float()


def fast(
    x_ND: Tensor,
    ids_NK: Tensor,
    weights_NK: Tensor,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    limit: float | None = None,
    shared: Shared | None = None,
    add_ND: Tensor | None = None,
    fixed: bool = False,
    of: int | None = None,
    how: Plan | None = None,
) -> Tensor:
    """`experts` by Triton kernels; `how` overrides the plan."""
    fp8 = gate.scale is not None
    batch = Batch(
        x_ND.contiguous(),
        ids_NK.contiguous(),
        weights_NK.contiguous(),
        (gate, up, down),
        shared or (gate, up, down),
        shared[0].codes.shape[0] if shared is not None else 0,
        limit,
        add_ND.contiguous() if add_ND is not None else None,
    )
    if how is None:
        exact = gate.codes.dtype == torch.float32
        count, width, hidden = gate.codes.shape
        gluon = experts_gluon.supported(x_ND, width, hidden)
        how = EXACT if exact else plan(x_ND.shape[0], ids_NK.shape[1], of or count, fp8, fixed, gluon)
    return _few(batch, how) if how.few else _sorted(batch, how)


@dataclass(frozen=True)
class Batch:
    """`fast`'s arguments and their sizes. Without shared experts `shared` holds the routed ones: something to
    point at."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    routed: Shared
    shared: Shared
    shared_width: int
    limit: float | None
    add: Tensor | None

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def hidden(self) -> int:
        return self.x.shape[1]

    @property
    def chosen(self) -> int:
        return self.ids.shape[1]

    @property
    def pairs(self) -> int:
        return self.ids.numel()

    @property
    def count(self) -> int:
        return self.routed[0].codes.shape[0]

    @property
    def width(self) -> int:
        return self.routed[0].codes.shape[1]

    @property
    def extra(self) -> int:
        """How many experts the shared ones are."""
        return self.shared_width // self.width

    @property
    def launch(self) -> dict[str, bool]:
        """Options of every launch: on Hopper a kernel is set up while the one before it ends."""
        if not self.x.is_cuda or torch.cuda.get_device_capability(self.x.device)[0] < 9:
            return {"PDL": False}
        return {"PDL": PDL, "launch_pdl": PDL}

    @property
    def fp8(self) -> bool:
        return self.routed[0].scale is not None


def _few(b: Batch, how: Plan) -> Tensor:
    gate, up, down = b.routed
    shared_gate, shared_up, shared_down = b.shared
    slots = min(b.pairs, b.count) + b.extra
    inner = b.x.new_empty(slots, b.tokens, b.width)
    y_ND = torch.empty_like(b.x)
    common = {
        "PAIRS": max(2, triton.next_power_of_2(b.pairs)),
        "ROWS": max(8, triton.next_power_of_2(b.tokens)),
        "FP8": b.fp8,
        # With FP8 it was slower: 41 us against 35 for one token.
        **(b.launch if not b.fp8 else {"PDL": False}),
    }
    tile = how.up
    experts_few.few_up_kernel[(slots * triton.cdiv(b.width, tile.out),)](
        b.x, b.ids, b.weights, gate.codes, up.codes, _scale(gate), _scale(up), shared_gate.codes, shared_up.codes,
        _scale(shared_gate), _scale(shared_up), inner, b.limit or 0.0, b.pairs, b.tokens, b.count, b.extra, b.width,
        b.hidden, K=b.chosen, OUT=tile.out, SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages,
        LIMIT=b.limit is not None, num_warps=tile.warps, **common,
    )  # fmt: skip
    tile = how.down
    experts_few.few_down_kernel[(triton.cdiv(b.hidden, tile.out),)](
        inner, b.ids, down.codes, _scale(down), shared_down.codes, _scale(shared_down),
        y_ND if b.add is None else b.add, y_ND, b.pairs, b.tokens, b.count, b.extra, b.width, b.shared_width, b.hidden,
        OUT=tile.out, SPLIT=tile.rows, DEPTH=tile.depth, STAGES=tile.stages, ADD=b.add is not None,
        num_warps=tile.warps, **common,
    )  # fmt: skip
    return y_ND


def _sorted(b: Batch, how: Plan) -> Tensor:
    rows = how.up.rows
    places = b.pairs + b.extra * b.tokens
    tiles = b.pairs // rows + b.count + b.extra * triton.cdiv(b.tokens, rows)
    order = b.ids.new_empty(places, dtype=torch.int32)
    table = b.ids.new_empty(3, tiles, dtype=torch.int32)
    groups = b.x.numel() // 128 if b.fp8 and not how.gluon else 0
    codes = b.x.new_empty(b.x.shape, dtype=FP8) if groups else b.x
    scales = b.x.new_empty(groups, dtype=torch.float32)
    chunk = min(ONE_CHUNK, max(16, triton.next_power_of_2(b.pairs)))
    counts, bins, parts_of = order, 0, 1
    if b.pairs > ONE_CHUNK:
        chunk, bins, parts_of = 1024, triton.next_power_of_2(b.count + 1), 8
        counts = b.ids.new_empty(triton.cdiv(b.pairs, chunk), bins, dtype=torch.int32)
        experts_triton.count_kernel[(counts.shape[0],)](
            b.ids, counts, b.pairs, b.count, CHUNK=chunk, BINS=bins, num_warps=4, **b.launch
        )
    experts_triton.sort_kernel[(b.count + b.extra + triton.cdiv(groups, 64), parts_of)](
        b.ids, counts, order, table, b.x, codes, scales, b.pairs, b.tokens, b.count, b.extra, tiles, groups,
        ROWS=rows, CHUNK=chunk, BINS=bins, GROUPS=64, num_warps=8, **b.launch,
    )  # fmt: skip
    inner = b.x.new_empty(places, b.width, dtype=FP8 if how.codes else b.x.dtype)
    inner_scales = b.x.new_empty((places, b.width // 128) if how.codes else (1,), dtype=torch.float32)
    parts = b.x.new_empty(places, b.hidden)
    if how.gluon:
        _gluon_products(b, how, order, table, inner, inner_scales, parts)
    else:
        _products(b, how, order, table, codes, scales, inner, inner_scales, parts)
    y_ND = torch.empty_like(b.x)
    block = min(2048, triton.next_power_of_2(b.hidden))
    experts_triton.sum_kernel[(b.tokens, triton.cdiv(b.hidden, block))](
        parts, b.ids, y_ND if b.add is None else b.add, y_ND, b.tokens, b.count, b.hidden, K=b.chosen,
        SHARED=b.extra, ADD=b.add is not None, BLOCK=block, num_warps=4, **b.launch,
    )  # fmt: skip
    return y_ND


def _products(
    b: Batch,
    how: Plan,
    order: Tensor,
    table: Tensor,
    x: Tensor,
    scales: Tensor,
    inner: Tensor,
    inner_scales: Tensor,
    parts: Tensor,
) -> None:
    """x's rows, or their codes and scales, to inner by place to parts by pair."""
    gate, up, down = b.routed
    shared_gate, shared_up, shared_down = b.shared
    tiles, rows, tile = table.shape[1], how.up.rows, how.up
    experts_triton.gate_up_kernel[(tiles * triton.cdiv(b.width, tile.out * (1 + how.codes)),)](
        x, scales, b.weights, order, table, gate.codes, up.codes, _scale(gate), _scale(up), shared_gate.codes,
        shared_up.codes, _scale(shared_gate), _scale(shared_up), inner, inner_scales, b.limit or 0.0, b.pairs,
        b.tokens, b.count, tiles, b.width, b.hidden, K=b.chosen, ROWS=rows, OUT=tile.out, DEPTH=tile.depth,
        THIN=tile.thin, FP8=b.fp8, CODES=how.codes, EVEN=b.hidden % tile.depth == 0, LIMIT=b.limit is not None,
        num_warps=tile.warps, num_stages=tile.stages, **b.launch,
    )  # fmt: skip
    tile = how.down
    experts_triton.down_kernel[(tiles * triton.cdiv(b.hidden, tile.out),)](
        inner, inner_scales, order, table, down.codes, _scale(down), shared_down.codes, _scale(shared_down), parts,
        b.count, tiles, b.width, b.shared_width, b.hidden, ROWS=rows, OUT=tile.out, DEPTH=tile.depth,
        THIN=tile.thin, FP8=b.fp8, CODES=how.codes, EVEN=b.width % tile.depth == 0, num_warps=tile.warps,
        num_stages=tile.stages, **b.launch,
    )  # fmt: skip


def _gluon_products(
    b: Batch, how: Plan, order: Tensor, table: Tensor, inner: Tensor, inner_scales: Tensor, parts: Tensor
) -> None:
    """The same in Gluon, whose copies read rows that lie side by side: x is spread into the experts' order. The
    shared experts all read the last N rows."""
    read = b.pairs + (b.tokens if b.extra else 0)
    x = b.x.new_empty(read, b.hidden, dtype=inner.dtype)
    scales = b.x.new_empty((read, b.hidden // 128) if b.fp8 else (1,), dtype=torch.float32)
    experts_triton.spread_kernel[(triton.cdiv(read, 4), triton.cdiv(b.hidden, 2048))](
        b.x, order, x, scales, b.pairs, b.tokens, read, b.hidden, K=b.chosen, PLACES=4, GROUPS=16, FP8=b.fp8,
        num_warps=4, **b.launch,
    )  # fmt: skip
    routed = [(w.codes, _scale(w)) for w in b.routed]
    shared = [(w.codes.flatten(0, -2), _scale(w)) for w in b.shared]
    first, second = how.up.stages, how.down.stages
    if b.fp8:
        experts_gluon.gate_up(
            x, scales, b.weights, order, table, (routed[0], routed[1]), (shared[0], shared[1]), inner, inner_scales,
            b.limit, b.tokens, first,
        )  # fmt: skip
        experts_gluon.down(inner, inner_scales, order, table, routed[2], shared[2], parts, second)
    else:
        experts_gluon16.gate_up(
            x,
            b.weights,
            order,
            table,
            (routed[0], routed[1]),
            (shared[0], shared[1]),
            inner,
            b.limit,
            b.tokens,
            first,
        )
        experts_gluon16.down(inner, order, table, routed[2], shared[2], parts, second)
