"""Cut a model into the shares of a layout's ranks, from outside: bricks stay what they are and know no ranks.

A brick whose part says half the heads is a brick of half the heads; what it lacks is added up where its last
matrix gives its result, by a hook. A layer of experts that knows some of them ignores choices of others; hooks
bring in the tokens of other data ranks, and send the sums back.

    attention   queries, W_UK and W_UV by head (GQA keys and values too), o by input column; one sum
    dense       gate and up by width, down by input column; one sum
    experts     whole experts; shared ones by width; one sum over all ranks that hold some
    the rest    whole on every rank: embedding, head, norms, routers, latents, indexers, compressors, streams
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.family import ModelConfig
from rorqual.nn.block import Block
from rorqual.nn.compressed import CompressedAttention
from rorqual.nn.errors import InputError
from rorqual.nn.gqa import GQA
from rorqual.nn.init import init_weights
from rorqual.nn.layout import Axis, Layout
from rorqual.nn.linear import Linear, Matrix
from rorqual.nn.mla import MLA
from rorqual.nn.mlp import SwiGLU
from rorqual.nn.moe import MoE
from rorqual.nn.transformer import Transformer


def spread(model: Transformer, layout: Layout) -> Transformer:
    """Make `model` this rank's share of itself, in place, on the layout's device. What other ranks hold is freed
    before anything moves, so a model loaded on the CPU need not fit the GPU whole.

    The model then gives its results only together with the other ranks', each calling it at the same time; for
    inference alone. Raises one `InputError` with all that does not divide, the model untouched.
    """
    if layout_of(model) is not None:
        raise InputError("the model is spread already: load it anew for another layout")
    work = _Work(layout)
    modules: Any = [*model.layers, *(module.block for module in model.mtp)]
    for block in modules:
        work.block(block)
    if work.problems:
        raise InputError(
            f"this model can't be spread over {layout.data} data x {layout.tensor} tensor ranks with experts on "
            f"{layout.expert}: {'; '.join(work.problems)}"
        )
    with torch.inference_mode(False), torch.no_grad():
        for job in work.jobs:
            job()
        model.layout = layout  # type: ignore[assignment]
        if model.device.type != "meta":
            model.to(layout.device)
    return model


def layout_of(model: Transformer) -> Layout | None:
    """The layout that a model is spread by; None if it is whole."""
    return getattr(model, "layout", None)


def fresh(
    config: ModelConfig, layout: Layout, dtype: torch.dtype | None = None, seed: int = 0
) -> Transformer:
    """A share with fresh weights, the whole model never standing anywhere. Shares are alike in size, and each is
    drawn from the same seed: what all ranks hold is the same, and experts repeat from rank to rank."""
    model = spread(Transformer(config, dtype=dtype, device="meta"), layout)
    model.to_empty(device=layout.device)
    init_weights(model, config.init_std, layout.device, seed)
    return model


@dataclass(frozen=True)
class _Span:
    """From `begin` to `end` of an axis."""

    begin: int
    end: int

    def of(self, each: int) -> _Span:
        """The same where every item is `each` wide."""
        return _Span(self.begin * each, self.end * each)


class _Work:
    """What is to be done to cut a model, and what stands in the way. Nothing changes until the jobs run."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.jobs: list[Callable[[], object]] = []
        self.problems: list[str] = []

    def block(self, block: Block) -> None:
        tensor = self.layout.tensor_axis
        if self.layout.world > 1:
            self.jobs.append(lambda: setattr(block, "whole", False))
        if tensor is not None:
            match block.attention:
                case MLA():
                    self._mla(block.attention, tensor)
                case GQA():
                    self._gqa(block.attention, tensor)
                case CompressedAttention():
                    self._compressed(block.attention, tensor)
        if isinstance(block.ff, MoE):
            self._moe(block.ff)
        elif tensor is not None:
            self._swiglu(block.ff, tensor.rank, tensor.size)
            self._sum(block.ff.down, tensor)

    # ------------------------------------------------------------------------------------- bricks

    def _mla(self, brick: MLA, axis: Axis) -> None:
        p = brick.part
        heads = self._share(p.heads, axis.rank, axis.size, "attention heads")
        if heads is None:
            return
        self._rows(brick.q if p.q_rank is None else brick.q_b, heads.of(p.qk_dim), "attention queries")
        self._rows(brick.kv_b, heads.of(p.nope_dim + p.v_dim), "attention keys and values")
        self._columns(brick.o, heads.of(p.v_dim), "attention outputs", keep_bias=axis.rank == 0)
        self._sum(brick.o, axis)
        self.jobs.append(lambda: setattr(brick, "part", replace(p, heads=p.heads // axis.size)))

    def _gqa(self, brick: GQA, axis: Axis) -> None:
        p = brick.part
        groups = self._share(p.kv_heads, axis.rank, axis.size, "key/value heads")
        if groups is None:
            return
        heads = groups.of(p.heads // p.kv_heads)
        self._rows(brick.q, heads.of(p.head_dim), "attention queries")
        for matrix in (brick.k, brick.v):
            self._rows(matrix, groups.of(p.head_dim), "attention keys and values")
        self._columns(brick.o, heads.of(p.head_dim), "attention outputs", keep_bias=axis.rank == 0)
        self._sum(brick.o, axis)
        local = replace(p, heads=p.heads // axis.size, kv_heads=p.kv_heads // axis.size)
        self.jobs.append(lambda: setattr(brick, "part", local))

    def _compressed(self, brick: CompressedAttention, axis: Axis) -> None:
        p = brick.part
        groups = self._share(p.o_groups, axis.rank, axis.size, "groups of output heads")
        if groups is None:
            return
        heads = groups.of(p.heads // p.o_groups)
        self._rows(brick.q_b, heads.of(p.head_dim), "attention queries")
        self._rows(brick.o_a, groups.of(p.o_rank), "attention outputs")
        self._columns(brick.o_b, groups.of(p.o_rank), "attention outputs", keep_bias=axis.rank == 0)
        self._sum(brick.o_b, axis)
        self.jobs.append(lambda: _cut(brick, "sink", 0, heads))
        local = replace(p, heads=p.heads // axis.size, o_groups=p.o_groups // axis.size)
        self.jobs.append(lambda: setattr(brick, "part", local))

    def _swiglu(self, ff: SwiGLU, rank: int, size: int, what: str = "feed-forward channels") -> None:
        width = self._share(ff.down.weight.shape[1] * (2 if ff.down.fp4 else 1), rank, size, what)
        if width is None:
            return
        for matrix in (ff.gate, ff.up):
            self._rows(matrix, width, what)
        self._columns(ff.down, width, what, keep_bias=rank == 0)

    def _moe(self, moe: MoE) -> None:
        layout, experts = self.layout, moe.experts
        rank, size = layout.expert_rank, layout.expert
        if size > 1:
            total = experts.gate.weight.shape[0]
            mine = self._share(total, rank, size, "routed experts")
            if mine is None:
                return
            for stack in (experts.gate, experts.up, experts.down):
                self.jobs.append(lambda stack=stack: _cut_matrix(stack, 0, mine))  # type: ignore[misc]
            self.jobs.append(lambda: experts.hold(mine.begin, total))
            if moe.shared is not None:
                self._swiglu(moe.shared, rank, size, "channels of shared experts")
        if layout.gathers:
            hooks = _Everyone(layout)
            self.jobs.append(lambda: moe.register_forward_pre_hook(hooks.before))
            self.jobs.append(lambda: moe.register_forward_hook(hooks.after))
        elif layout.tensor_axis is not None:
            self._sum(moe, layout.tensor_axis)

    # ------------------------------------------------------------------------------------- pieces

    def _share(self, count: int, rank: int, size: int, what: str) -> _Span | None:
        if count % size:
            self._problem(f"{count} {what} don't divide by {size}")
            return None
        each = count // size
        return _Span(rank * each, (rank + 1) * each)

    def _rows(self, matrix: Linear, span: _Span, what: str) -> None:
        self._check_block(matrix, 0, span, what)
        self.jobs.append(lambda: _cut_matrix(matrix, 0, span))

    def _columns(self, matrix: Linear, span: _Span, what: str, keep_bias: bool) -> None:
        self._check_block(matrix, 1, span, what)
        self.jobs.append(lambda: _cut_matrix(matrix, 1, span, keep_bias))

    def _check_block(self, matrix: Matrix, dim: int, span: _Span, what: str) -> None:
        block = 1 if matrix.block is None else matrix.block[dim]
        each = span.end - span.begin
        if each % block:
            self._problem(f"shares of {each} {what} cut through the {block} that a quantised block has")

    def _sum(self, module: nn.Module, axis: Axis) -> None:
        self.jobs.append(lambda: module.register_forward_hook(lambda _module, _args, y: axis.sum(y)))

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)


def _cut(module: nn.Module, name: str, dim: int, span: _Span) -> None:
    """Keep a parameter's `span` of an axis, in memory of its own."""
    whole = getattr(module, name)
    part = whole.detach().narrow(dim, span.begin, span.end - span.begin)
    part = part.clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _cut_matrix(matrix: Matrix, dim: int, span: _Span, keep_bias: bool = True) -> None:
    """Keep rows (0) or columns (1) of a matrix, or some of a stack (0): codes, scales, and bias."""
    stacked, block = matrix.weight.dim() == 3, matrix.block
    packed = 2 if matrix.fp4 and dim == 1 else 1
    _cut(matrix, "weight", dim, _Span(span.begin // packed, span.end // packed))
    if matrix.scale is not None and block is not None:
        each = 1 if stacked else block[dim]
        _cut(matrix, "scale", dim, _Span(span.begin // each, span.end // each))
    if isinstance(matrix, Linear) and matrix.bias is not None:
        if dim == 0:
            _cut(matrix, "bias", 0, span)
        elif not keep_bias:
            matrix.bias = None  # it is added once, by the first rank


class _Everyone:
    """A layer of experts' tokens of all data ranks on the way in, and the sums of this rank's on the way out."""

    def __init__(self, layout: Layout) -> None:
        assert layout.data_axis is not None
        self.layout, self.data = layout, layout.data_axis
        self._shape: torch.Size | None = None

    def before(self, moe: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_BTD, ids_BT, step = args
        if step.trace is not None:
            raise InputError("a model spread over data ranks takes no trace")
        self._shape = x_BTD.shape
        x_MD = self.data.gather(self._padded(x_BTD.flatten(0, 1)))
        if moe.router.table is not None:  # type: ignore[union-attr]
            ids_BT = self.data.gather(self._padded(ids_BT.flatten()))[None]
        return x_MD[None], ids_BT, step

    def after(self, moe: nn.Module, args: tuple[Any, ...], y_1MD: Tensor) -> Tensor:
        shape = self._shape
        assert shape is not None
        y_ND = self.data.scatter_sum(y_1MD[0])[: shape[0] * shape[1]]
        if self.layout.tensor_axis is not None:
            y_ND = self.layout.tensor_axis.sum(y_ND)
        return y_ND.view(shape)

    def _padded(self, x_N: Tensor) -> Tensor:
        """As many rows as every rank brings; what fills up is zero."""
        missing = (self.layout.tokens or x_N.shape[0]) - x_N.shape[0]
        assert missing >= 0
        return F.pad(x_N, (*[0, 0] * (x_N.dim() - 1), 0, missing)) if missing else x_N
