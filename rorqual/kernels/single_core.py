"""Absorbed latent attention of one token in one launch on Hopper, by clusters, in Gluon.

A cluster of 8 programs does a head from its query to its values; nothing passes between clusters. Each program turns
the query into 64 latent channels by W_UK, meets an eighth of the keys, and makes an eighth of the values by W_UV. What
one has made the others get in their shared memory, written there directly: twice, and each time a barrier counts the
bytes that have come. That takes a fraction of what the way from one launch to the next does.

The keys that earlier passes left, and both weights, are read before the kernel in front has ended. The newest key every
cluster makes for itself; the first one writes it to its page.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gluon_rings import AVAILABLE, gl, processors
from rorqual.kernels.quant import E8M0
from rorqual.kernels.single import asking
from rorqual.kernels.single_core_kernel import core_kernel

CLUSTER = 8
"""Programs of a cluster: the most that any Hopper GPU takes."""
WARPS = 8
"""Warps of a program."""
STEP = CLUSTER * WARPS
"""Keys that a launch's warps meet at a time, one each."""
LONGEST = 16
"""Keys of a warp at most."""
HELD = 9
"""Keys of a warp that are read ahead. 74 KB of shared memory, with the room 112: two programs a multiprocessor, so
that the next launch is there before this one has ended. (With less than 48 KB Triton would not ask the driver for
more, and the room's would be missing.)"""
CHUNK = 3
"""Keys of a warp that are met or left out together."""
RANK = 512
"""Latent channels: 64 of a program, 16 of a lane."""


@functools.cache
def layouts() -> tuple[Any, ...]:
    """Who holds what: dimensions are of tensors of the whole cluster."""
    rows, columns, each = [[1, 0], [2, 0], [4, 0]], [[0, 1], [0, 2], [0, 4]], [[0, 0]] * 3
    return (
        # W_UK [NOPE, 512]: 64 columns a program.
        gl.BlockedLayout([1, 4], [2, 16], [8, 1], [1, 0], columns),
        # Keys [64, 512]: a row a warp, 8 channels of each half a lane. W_UV [V, 512]: an eighth of the rows a program.
        gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0], rows),
        # Rotary parts [64, 64], and what is left of a key's product [64, 32].
        gl.BlockedLayout([1, 2], [1, 32], [8, 1], [1, 0], rows),
        gl.BlockedLayout([1, 1], [1, 32], [8, 1], [1, 0], rows),
        # What a program sends, by the programs that get it: its 64 channels of the query, its sums.
        gl.BlockedLayout([4, 1], [16, 2], [1, 8], [0, 1], rows),
        gl.BlockedLayout([2, 8], [32, 1], [8, 1], [0, 1], each),
        # Warps' sums [8, 512] of the query's channels.
        gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0], columns),
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0], rows),
    )


def supported(q_NHd: Tensor, w_HrC: Tensor, pages: Tensor, table_SB: Tensor, nope: int, width: int) -> bool:
    """Whether `launch` takes these (beside what `single_mla.fit` asks)."""
    heads, head_rows, rank = w_HrC.shape
    values, rope, size = head_rows - nope, q_NHd.shape[2] - nope, pages.shape[1]
    return (
        AVAILABLE
        and q_NHd.is_cuda
        and torch.cuda.get_device_capability(q_NHd.device)[0] == 9
        and q_NHd.shape[0] == 1
        and width == 1
        and rank == RANK
        and pages.dtype == q_NHd.dtype == torch.bfloat16
        and nope in (32, 64, 128, 256)
        and values in (64, 128, 256)
        and rope in (16, 32, 64)
        and processors(q_NHd) >= 128 >= heads * CLUSTER
        and table_SB.shape[1] * size <= LONGEST * STEP
        and all(s % 16 == 0 for s in w_HrC.stride()[:2])
        and pages.data_ptr() % 16 == 0
    )


def launch(
    q_NHd: Tensor, kv_NC: Tensor, norm: tuple[Tensor, float], cos_NR: Tensor, sin_NR: Tensor, w_HrC: Tensor,
    scale: Tensor | None, pages: Tensor, slots_N: Tensor, table_SB: Tensor, ends_S: Tensor, *,
    nope: int, interleaved: bool, softmax_scale: float, later: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`single_mla.attention` of one token."""
    heads, head_rows, _ = w_HrC.shape
    values, size = head_rows - nope, pages.shape[1]
    powers = scale is not None and scale.dtype == E8M0
    by = scale.view(torch.uint8) if powers and scale is not None else scale
    y = q_NHd.new_empty(1, heads * values)
    asked, amount, span = asking(later, heads * CLUSTER, WARPS)
    core_kernel[(heads,)](
        q_NHd, kv_NC, norm[0], cos_NR, sin_NR, w_HrC, by, pages, slots_N, table_SB, ends_S, y,
        table_SB.shape[1] * size, softmax_scale * math.log2(math.e), q_NHd.stride(1), w_HrC.stride(0), w_HrC.stride(1),
        by.stride(0) if by is not None else 0, norm[1], asked, amount,
        NOPE=nope, V=values, R=q_NHd.shape[2] - nope, HEAD_ROWS=head_rows, PAGE=size, KEYS=HELD, CHUNK=CHUNK,
        INTERLEAVED=interleaved, CODES=scale is not None, POWERS=powers, SPAN=span, LAYOUTS=layouts(),
        num_warps=WARPS, num_ctas=CLUSTER, launch_pdl=True, maxnreg=128,
    )  # fmt: skip
    return y
