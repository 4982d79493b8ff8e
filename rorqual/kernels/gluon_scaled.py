"""The inner loop of FP8's Gluon products: sums in fp32 of 128 channels' products times their scales.

A group of four warps has 64 rows and twice 128 outputs. Both halves' sums stay in registers, 128 of them a thread;
the products of a step pass through 64 more, one half after the other. While one group adds, the other multiplies.
(One half of 128 outputs alone would leave room for a third group, but asks the cache for more bytes a product than
it delivers.)
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from rorqual.kernels.gluon_rings import gl, gluon, mbarrier, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def first_scales(x_scale_ptrs, one_scale_ptr, two_scale_ptr, there):
    """The scales of an item's first step, if `there`: asked for before the results of the item before are written."""
    return gl.load(x_scale_ptrs, there), gl.load(one_scale_ptr, there), gl.load(two_scale_ptr, there)


@gluon.jit
def multiply(
    room,
    count,
    many,
    pointers,
    scales,
    steps,
    jump,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The products of a group's 64 rows with both halves of `many` tiles from tile number `count` on: fp32 `[64, 128]`
    twice. `pointers` and `scales`: those of `first_scales`; after every `steps` tiles x's go on `jump` further."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    x_tiles, w_tiles, full, free = room
    x_scale_ptrs, one_scale_ptr, two_scale_ptr = pointers
    x_scale, one, two = scales
    first = gl.zeros([64, 128], gl.float32, LAYOUT)
    second = gl.zeros([64, 128], gl.float32, LAYOUT)
    part = gl.zeros([64, 128], gl.float32, LAYOUT)
    at = 1
    left = steps - 1
    for step in range(many):
        stage = (count + step) % STAGES
        mbarrier.wait(full.index(stage), ((count + step) // STAGES) & 1)
        x = x_tiles.index(GROUPS * stage + GROUP)
        part = warpgroup_mma(x, w_tiles.index(2 * stage).permute((1, 0)), part, use_acc=False, is_async=True)
        one_factor = x_scale * one
        two_factor = x_scale * two
        if left == 0:
            at += jump
            left = steps
        more = step + 1 < many  # the next step's arrive while this one's products are under way
        x_scale = gl.load(x_scale_ptrs + at, more)
        one = gl.load(one_scale_ptr + step + 1, more)
        two = gl.load(two_scale_ptr + step + 1, more)
        at += 1
        left -= 1
        part = warpgroup_mma_wait(0, deps=[part])
        first += part * one_factor[:, None]
        # Nothing is waited for here: the compiler is told that all was added before `part` is written again.
        first = warpgroup_mma_wait(0, deps=[first])
        part = warpgroup_mma(
            x, w_tiles.index(2 * stage + 1).permute((1, 0)), part, use_acc=False, is_async=True
        )
        part = warpgroup_mma_wait(0, deps=[part])
        mbarrier.arrive(free.index(stage))
        second += part * two_factor[:, None]
    return first, second
