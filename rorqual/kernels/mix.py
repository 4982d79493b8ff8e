"""Manifold-constrained hyper-connections (V4 report section 2.2, facts 3.9): several residual streams, read into
one layer input and written back through a doubly stochastic matrix. All arithmetic in fp32.

Reading takes two launches: slices of the channels give partial products with `fn` (and partial squares, for the
unit RMS), then every row adds its slices in one order, balances its matrix and mixes its streams. The slices
don't depend on the number of rows, so a row's bits don't either. The write before a read rides in its first launch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.gpu import tl, triton, usable
from rorqual.kernels.mode import is_invariant

ROWS, CHANNELS = 16, 64
"""Rows and channels of a slice. Whatever the number of rows: another tile would give other bits."""

STREAMS = 1, 2, 4
"""Numbers of streams that the kernels take: powers of two whose tiles fit a multiprocessor."""

Mixed = tuple[Tensor, Tensor, Tensor]
"""Layer input [N, D], post [N, n] and comb [N, n, n]."""


def sinkhorn(raw: Tensor, iterations: int, eps: float) -> Tensor:
    """`[..., n, n]` -> nearly doubly stochastic: a row softmax (+ eps) and a column division, then rows and
    columns in turn, `iterations` rounds in all."""
    m = raw.softmax(-1) + eps
    m = m / (m.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(-1, keepdim=True) + eps)
        m = m / (m.sum(-2, keepdim=True) + eps)
    return m


def reference_read(
    x_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps_norm: float, eps: float, iterations: int
) -> Mixed:
    """The definition. See `mix_read`."""
    n = x_NnD.shape[1]
    full = x_NnD if x_NnD.dtype == torch.float64 else x_NnD.float()
    u = F.linear(F.rms_norm(full.flatten(1), (full[0].numel(),), None, eps_norm), fn.to(full.dtype))
    pre, post, comb = u.split((n, n, n * n), -1)
    base_pre, base_post, base_comb = base.split((n, n, n * n))
    pre = torch.sigmoid(scale[0] * pre + base_pre) + eps
    post = 2 * torch.sigmoid(scale[1] * post + base_post)
    comb = sinkhorn((scale[2] * comb + base_comb).unflatten(-1, (n, n)), iterations, eps)
    return (pre[..., None] * full).sum(-2).to(x_NnD.dtype), post, comb


def reference_write(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Nnn: Tensor) -> Tensor:
    """The definition. See `mix_write`."""
    full = x_NnD if x_NnD.dtype == torch.float64 else x_NnD.float()
    kept = comb_Nnn.transpose(-1, -2) @ full
    return (post_Nn[..., None] * y_ND[..., None, :].to(full.dtype) + kept).to(x_NnD.dtype)


# ----------------------------------------------------------------------------------------- kernels


@triton.jit
def _old(x, y, rows, d, live, hidden, STREAMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a write reads: y and the streams, a tile each."""
    found = (tl.load(y + rows[:, None] * hidden + d[None, :], mask=live, other=0.0),)
    for j in tl.static_range(STREAMS):
        at = (rows * STREAMS + j)[:, None] * hidden + d[None, :]
        found += (tl.load(x + at, mask=live, other=0.0),)  # type: ignore[assignment]
    return found


@triton.jit
def _written(old, post, comb, rows, STREAMS: tl.constexpr, k):  # type: ignore[no-untyped-def]
    """Stream k after a write, in fp32."""
    new = tl.load(post + rows * STREAMS + k)[:, None] * old[0].to(tl.float32)
    for j in tl.static_range(STREAMS):
        new += tl.load(comb + (rows * STREAMS + j) * STREAMS + k)[:, None] * old[j + 1].to(tl.float32)
    return new


@triton.jit(do_not_specialize=["rows"])
def _slice(  # type: ignore[no-untyped-def]
    x,
    y,
    post,
    comb,
    new,
    fn,
    partial,
    squares,
    rows,
    hidden,
    STREAMS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WRITE: tl.constexpr,
):
    """Partial fn x and x^2 of ROWS rows over CHANNELS channels of every stream; with WRITE the streams are
    written first (`new`)."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(row, rows - 1).to(tl.int64)
    d = part * CHANNELS + tl.arange(0, CHANNELS)
    out = tl.arange(0, OUT)
    live = (row < rows)[:, None] & (d < hidden)[None, :]
    if WRITE:
        old = _old(x, y, safe, d, live, hidden, STREAMS)
        for k in tl.static_range(STREAMS):
            fresh = _written(old, post, comb, safe, STREAMS, k).to(new.dtype.element_ty)
            tl.store(new + (safe * STREAMS + k)[:, None] * hidden + d[None, :], fresh, mask=live)
        tl.debug_barrier()  # read back below: products want another layout, in which every warp would redo all this
        x = new
    weights, streams = (), ()
    for k in tl.static_range(STREAMS):  # all loads first: none of them waits for arithmetic
        at = (out * STREAMS + k)[None, :] * hidden + d[:, None]
        mask = (out < OUTPUTS)[None, :] & (d < hidden)[:, None]
        weights += (tl.load(fn + at, mask=mask, other=0.0),)  # type: ignore[assignment]
        at = (safe * STREAMS + k)[:, None] * hidden + d[None, :]
        streams += (tl.load(x + at, mask=live, other=0.0),)  # type: ignore[assignment]
    total = tl.zeros([ROWS, OUT], tl.float32)
    square = tl.zeros([ROWS, CHANNELS], tl.float32)
    for k in tl.static_range(STREAMS):
        stream, weight = streams[k], weights[k]  # type: ignore[var-annotated]
        wide = stream.to(tl.float32)  # type: ignore[var-annotated]
        square += wide * wide
        if stream.dtype == tl.bfloat16:  # three bf16 parts hold fp32's 24 bits, so every product is exact
            high = weight.to(tl.bfloat16)
            rest = weight - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(stream, low, total)
            total = tl.dot(stream, middle, total)
            total = tl.dot(stream, high, total)
        else:
            total = tl.dot(wide, weight, total, input_precision="ieee")
    to = (row.to(tl.int64) * parts + part)[:, None] * OUT + out[None, :]
    tl.store(partial + to, total, mask=(row < rows)[:, None])
    tl.store(squares + row.to(tl.int64) * parts + part, tl.sum(square, axis=1), mask=row < rows)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    x,
    partial,
    squares,
    base,
    scale,
    inner,
    post,
    comb,
    parts,
    hidden,
    eps_norm,
    eps,
    ITERATIONS: tl.constexpr,
    STREAMS: tl.constexpr,
    OUT: tl.constexpr,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Row n: block `program_id(1)` of its input's channels, or by the first program post and comb."""
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1) - 1
    part, out, j = tl.arange(0, PARTS), tl.arange(0, OUT), tl.arange(0, STREAMS)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    at = (n * parts + part)[:, None] * OUT + out[None, :]
    sums = tl.load(partial + at, mask=(part < parts)[:, None], other=0.0)
    square = tl.sum(tl.load(squares + n * parts + part, mask=part < parts, other=0.0))
    u = tl.sum(sums, axis=0) * tl.rsqrt(square / (STREAMS * hidden) + eps_norm)
    if block >= 0:
        rows = (n * STREAMS + j)[:, None] * hidden
        streams = tl.load(x + rows + d[None, :], mask=(d < hidden)[None, :], other=0.0).to(tl.float32)
        pre = tl.sum(tl.where(out[None, :] == j[:, None], u[None, :], 0.0), axis=1)
        pre = tl.sigmoid(tl.load(scale) * pre + tl.load(base + j)) + eps
        read = tl.sum(pre[:, None] * streams, axis=0)
        tl.store(inner + n * hidden + d, read.to(inner.dtype.element_ty), mask=d < hidden)
        return
    raw = tl.sum(tl.where(out[None, :] == (STREAMS + j)[:, None], u[None, :], 0.0), axis=1)
    raw = tl.load(scale + 1) * raw + tl.load(base + STREAMS + j)
    tl.store(post + n * STREAMS + j, 2 * tl.sigmoid(raw))
    place = 2 * STREAMS + j[:, None] * STREAMS + j[None, :]
    m = tl.sum(tl.where(out[None, None, :] == place[:, :, None], u[None, None, :], 0.0), axis=2)
    m = tl.load(scale + 2) * m + tl.load(base + place)
    m = tl.exp(m - tl.max(m, axis=1)[:, None])
    m = m / tl.sum(m, axis=1)[:, None] + eps
    m = m * (1 / (tl.sum(m, axis=0) + eps))[None, :]
    for _ in range(ITERATIONS - 1):
        m = m * (1 / (tl.sum(m, axis=1) + eps))[:, None]
        m = m * (1 / (tl.sum(m, axis=0) + eps))[None, :]
    tl.store(comb + n * STREAMS * STREAMS + j[:, None] * STREAMS + j[None, :], m)


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    x, y, post, comb, new, hidden, STREAMS: tl.constexpr, CHANNELS: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = (d < hidden)[None, :]
    k = tl.arange(0, STREAMS)
    own = tl.load(post + rows[:, None] * STREAMS + k[None, :])
    wide = tl.load(y + rows[:, None] * hidden + d[None, :], mask=live, other=0.0).to(tl.float32)
    streams = own[:, :, None] * wide[:, None, :]
    for j in tl.static_range(STREAMS):
        old = tl.load(x + (rows * STREAMS + j)[:, None] * hidden + d[None, :], mask=live, other=0.0)
        share = tl.load(comb + ((rows * STREAMS + j) * STREAMS)[:, None] + k[None, :])
        streams += share[:, :, None] * old.to(tl.float32)[:, None, :]
    at = (rows[:, None] * STREAMS + k[None, :])[:, :, None] * hidden + d[None, None, :]
    tl.store(new + at, streams.to(new.dtype.element_ty), mask=live[:, None, :])


# ------------------------------------------------------------------------------------------ launch


def _launch_read(
    x_NnD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps_norm: float,
    eps: float,
    iterations: int,
    write: tuple[Tensor, Tensor, Tensor] | None,
) -> tuple[Tensor, Mixed]:
    """The streams (written first, if `write` gives y, post and comb) and what reading them gives."""
    rows, n, hidden = x_NnD.shape
    new_NnD = torch.empty_like(x_NnD) if write else x_NnD
    inner_ND = x_NnD.new_empty(rows, hidden)
    post_Nn, comb_Nnn = fn.new_empty(rows, n), fn.new_empty(rows, n, n)
    if not rows:
        return new_NnD, (inner_ND, post_Nn, comb_Nnn)
    assert x_NnD.is_contiguous() and fn.is_contiguous() and fn.dtype == torch.float32
    assert n in STREAMS, f"kernels take {STREAMS} streams, got {n}"
    outputs = n * (2 + n)
    out = max(16, triton.next_power_of_2(outputs))
    parts = -(-hidden // CHANNELS)
    partial, squares = fn.new_empty(rows, parts, out), fn.new_empty(rows, parts)
    y_ND, post, comb = write or (x_NnD, fn, fn)
    assert y_ND.is_contiguous() and post.is_contiguous() and comb.is_contiguous()
    _slice[(parts, -(-rows // ROWS))](
        x_NnD, y_ND, post, comb, new_NnD, fn, partial, squares, rows, hidden, STREAMS=n, OUTPUTS=outputs,
        OUT=out, ROWS=ROWS, CHANNELS=CHANNELS, WRITE=write is not None, num_warps=4,
    )  # fmt: skip
    block = 1024 if rows < 64 or is_invariant() else 4096
    _finish[(rows, 1 + -(-hidden // block))](
        new_NnD, partial, squares, base, scale, inner_ND, post_Nn, comb_Nnn, parts, hidden, eps_norm, eps,
        ITERATIONS=iterations, STREAMS=n, OUT=out,
        PARTS=triton.next_power_of_2(parts), CHANNELS=block, num_warps=4,
    )  # fmt: skip
    return new_NnD, (inner_ND, post_Nn, comb_Nnn)


def fast_read(
    x_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps_norm: float, eps: float, iterations: int
) -> Mixed:
    """The kernels; see `mix_read`."""
    return _launch_read(x_NnD, fn, base, scale, eps_norm, eps, iterations, None)[1]


def fast_write(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Nnn: Tensor) -> Tensor:
    """The kernel; see `mix_write`."""
    rows, n, hidden = x_NnD.shape
    assert (
        x_NnD.is_contiguous()
        and y_ND.is_contiguous()
        and post_Nn.is_contiguous()
        and comb_Nnn.is_contiguous()
    )
    new_NnD = torch.empty_like(x_NnD)
    if rows:
        _write[(rows, -(-hidden // 1024))](
            x_NnD, y_ND, post_Nn, comb_Nnn, new_NnD, hidden, STREAMS=n, CHANNELS=1024, num_warps=4
        )
    return new_NnD


def fast_write_read(
    x_NnD: Tensor,
    y_ND: Tensor,
    post_Nn: Tensor,
    comb_Nnn: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps_norm: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Mixed]:
    """The kernels; see `mix_write_read`."""
    write = (y_ND, post_Nn, comb_Nnn)
    return _launch_read(x_NnD, fn, base, scale, eps_norm, eps, iterations, write)


def _single(*tensors: Tensor) -> bool:
    n = tensors[0].shape[1]
    return usable(*tensors) and n in STREAMS and all(t.dtype != torch.float64 for t in tensors)


def mix_read(
    x_NnD: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps_norm: float, eps: float, iterations: int
) -> Mixed:
    """Layer input `[N, D]` (x's type), fp32 post `[N, n]` and comb `[N, n, n]` from streams `[N, n, D]`.

    u = fn x / rms(x) over all n * D channels, fn fp32 `[n * (2 + n), n * D]`; base `[n * (2 + n)]` and scale `[3]`
    turn its parts into pre = sigmoid + eps, post = 2 sigmoid and, by `sinkhorn`, comb.
    """
    if _single(x_NnD, fn, base, scale):
        return fast_read(x_NnD, fn, base, scale, eps_norm, eps, iterations)
    return reference_read(x_NnD, fn, base, scale, eps_norm, eps, iterations)


def mix_write(x_NnD: Tensor, y_ND: Tensor, post_Nn: Tensor, comb_Nnn: Tensor) -> Tensor:
    """New streams X_k = post_k y + sum_j comb[j, k] X_j, in x's type."""
    if _single(x_NnD, y_ND, post_Nn, comb_Nnn):
        return fast_write(x_NnD, y_ND, post_Nn, comb_Nnn)
    return reference_write(x_NnD, y_ND, post_Nn, comb_Nnn)


def mix_write_read(
    x_NnD: Tensor,
    y_ND: Tensor,
    post_Nn: Tensor,
    comb_Nnn: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    eps_norm: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Mixed]:
    """`mix_write` and the `mix_read` of what it wrote: the new streams, and what reading gives."""
    if _single(x_NnD, y_ND, post_Nn, comb_Nnn, fn, base, scale):
        return fast_write_read(x_NnD, y_ND, post_Nn, comb_Nnn, fn, base, scale, eps_norm, eps, iterations)
    new_NnD = reference_write(x_NnD, y_ND, post_Nn, comb_Nnn)
    return new_NnD, reference_read(new_NnD, fn, base, scale, eps_norm, eps, iterations)
