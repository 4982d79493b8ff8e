"""The routed feed-forward layer of a mixture of experts: fine-grained SwiGLU experts beside shared ones
(DeepSeekMoE; DeepSeek-V2 section 2.1.3; facts 3.3, 3.9).

    y[n] = sum over k of down_e(w[n, k] * swiglu(gate_e x[n], up_e x[n])),  e = ids[n, k]

The gated product is weighted in fp32 before it is cast and multiplied by `down`; a token's results are summed in
fp32 in the order of its choice, then the shared experts' and what `add_ND` holds, and cast once. An id outside
`0 .. E - 1` names no expert and adds nothing. `reference` is the definition and the CPU's and training's form.

`fast` runs without a device-to-host sync. A few tokens go through `experts_few` (two launches), more through
`experts_triton`: sort pairs by expert on the device, two grouped products, sum; on Hopper `experts_gluon` (FP8) and
`experts_gluon16` have the products of large batches. FP8 matrices are multiplied as codes; except for a few tokens
the activations are quantised 1x128 on the way (where `reference` multiplies the matrices out). FP4
matrices, and FP8 in odd blocks, are multiplied out in registers (`experts_packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels import experts_packed, gluon_rings
from rorqual.kernels.experts_run import Batch, run_few, run_sorted
from rorqual.kernels.fp8_linear import fp8_linear
from rorqual.kernels.gpu import usable
from rorqual.kernels.held import held_scale
from rorqual.kernels.linear import linear
from rorqual.kernels.mode import by_fixed_kernels
from rorqual.kernels.quant import FP8, dequantize_fp4, dequantize_fp8

BLOCK = (128, 128)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Weights:
    """Matrices `[E, out, in]` of all experts, or `[out, in]` of the shared ones.

    Plain: `codes` is fp32, bf16 or fp16 and `scale` None. Held as codes: float8_e4m3fn with one `scale` (fp32 or
    float8_e8m0fnu) a `block`, or packed FP4 (int8) with a float8_e8m0fnu scale every 32 inputs.
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
    if usable(*tensors) and not learning and not fixed and experts_packed.supported(x_ND, gate, up, down):
        if shared is not None:
            common = _through(x_ND, shared, limit)
            add_ND = _wide(common) if add_ND is None else _wide(common) + add_ND
        stacks = gate, up, down
        fp4 = gate.codes.dtype == torch.int8
        scales = [
            w.scale.view(torch.uint8) if fp4 else held_scale(w.scale) for w in stacks if w.scale is not None
        ]
        add_ND = add_ND.contiguous() if add_ND is not None else None
        rows = x_ND.contiguous(), ids_NK.contiguous(), weights_NK.contiguous()
        return experts_packed.fast(Batch(*rows, stacks, stacks, 0, limit, add_ND), scales)
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

    def times(x: Tensor, w: Weights) -> Tensor:
        whole = all(size % 128 == 0 for size in w.codes.shape)
        if w.scale is not None and w.codes.dtype == FP8 and w.block == BLOCK and whole and usable(x, w.codes):
            return fp8_linear(x, w.codes, w.scale, BLOCK)
        return linear(x, w.matrix(x.dtype))

    gate, up, down = shared
    return times(_swiglu(times(x_ND, gate), times(x_ND, up), limit).to(x_ND.dtype), down)


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
    if by_fixed_kernels(x_ND):  # `sum` takes an order that depends on how many tokens there are
        y_ND = _wide(y_NKD[:, 0])
        for k in range(1, chosen):
            y_ND = y_ND + y_NKD[:, k]
    else:
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


EXACT = Plan(Tiles(16, 32, 32, 4, 2, True), Tiles(16, 32, 32, 4, 2, True))
"""For fp32 matrices, which are multiplied without tensor cores."""

LARGE = 512
"""Pairs of an expert, on average, from which on the tiles of Gluon's products are the larger ones."""

FEW, FEW_FP8 = 4, 2
"""Batches up to these sizes go through `experts_few`."""


def plan(tokens: int, chosen: int, count: int, fp8: bool, fixed: bool, gluon: bool = False) -> Plan:
    """The tiles for a batch, by its shape alone. Measured on an H200 (64 experts, D 2048, W 1408). `fixed` leaves out
    those that add up in another order: where a sum stands in a tile of the tensor cores changes nothing."""
    if fp8 and not fixed and tokens <= FEW_FP8:
        return Plan(Tiles(2, 32, 128, 4, 4, True), Tiles(4, 32, 128, 4, 3, True), few=True)
    if not fp8 and not fixed and tokens <= FEW:
        return Plan(Tiles(2, 16, 128, 2, 4, True), Tiles(4, 16, 128, 4, 6, True), few=True)
    mean = tokens * chosen / count
    full = mean + 1.5 * mean**0.5  # few experts have more pairs than that
    if fp8 and tokens * chosen < count:
        return Plan(Tiles(16, 64, 128, 8, 3, True), Tiles(16, 64, 128, 4, 4, True), codes=True)
    if fp8 and gluon and not fixed and full > 32:  # as below, Gluon's add shared experts up before they round
        tile = Tiles(128, 256, 128, 4, 4, False)
        return Plan(tile, tile, codes=True, gluon=True)
    if fp8 and full <= 16:
        return Plan(Tiles(16, 64, 128, 4, 4, True), Tiles(16, 128, 128, 8, 4, True), codes=True)
    if fp8 and full <= 32:
        return Plan(Tiles(32, 64, 128, 4, 5, True), Tiles(32, 128, 128, 4, 3, True), codes=True)
    if fp8 and full <= 64:
        return Plan(Tiles(64, 128, 128, 8, 4, True), Tiles(64, 128, 128, 4, 3, True), codes=True)
    if full <= 16:
        return Plan(Tiles(16, 64, 128, 4, 3, True), Tiles(16, 128, 128, 4, 3, True))
    if full <= 32:
        return Plan(Tiles(32, 32, 128, 4, 4, True), Tiles(32, 64, 128, 4, 4, True))
    if full <= 64:
        return Plan(Tiles(64, 64, 64, 4, 4, True), Tiles(64, 128, 64, 4, 4, True))
    if fp8 and fixed:
        return Plan(Tiles(64, 64, 128, 4, 3, True), Tiles(64, 128, 128, 4, 3, True), codes=True)
    if gluon and not fixed:  # these add shared experts up before they round
        # Tiles of 192 pairs ask the cache for less, but more of an expert's last one is empty.
        rows, stages = (192, 3) if mean >= LARGE else (128, 4)
        tile = Tiles(rows, 256, 64, 4, stages, False)
        return Plan(tile, tile, gluon=True)
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
        gluon = gluon_rings.supported(x_ND, width, hidden)
        how = EXACT if exact else plan(x_ND.shape[0], ids_NK.shape[1], of or count, fp8, fixed, gluon)
    return run_few(batch, how) if how.few else run_sorted(batch, how)
