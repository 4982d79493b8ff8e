"""Kernels of the mixture-of-experts feed-forward layer for more than a few tokens: sort, two grouped products, sum.

Pairs (token, choice) are numbered `token * K + choice`; a shared expert `s` adds the pairs
`N * K + s * N + token`. `sort_kernel` lists them by expert and cuts each expert's list into tiles of `ROWS`
pairs. Tile numbers need no communication: expert `e`, whose list starts at `b`, owns the numbers from
`b // ROWS + e` to the next expert's first. That leaves holes, marked -1, which programs skip.

Both products take a tile of pairs times a tile of one expert's matrix. With `THIN` the matrix stands on the
rows of the tensor core's tile, which has at least 64 of them, and the few pairs on its columns.
FP8 (DeepSeek-V3 section 3.3): activations have a scale every 128 channels, weights one a 128x128 block, and
each 128 channels' product is added up in fp32.
"""

# mypy: disable-error-code="no-untyped-def"

from rorqual.kernels.gpu import tl, triton

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a machine without Triton
    gdc_launch_dependents = gdc_wait = None

COUNTS = ["pairs", "tokens", "experts", "shared", "tiles", "groups"]
"""Arguments whose values make no variant of a kernel: batches of every size run the same code."""


@triton.jit
def follow():
    """Wait for the kernel before, whose results are read here; let the one after be set up meanwhile."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def to_fp8(x_RC):
    """fp32 `[R, 128]` -> E4M3 codes `[R, 128]` and fp32 scales `[R]`."""
    scale_R = tl.maximum(tl.max(tl.abs(x_RC), 1), 1e-4) / 448.0
    return (x_RC / scale_R[:, None]).to(tl.float8e4nv), scale_R


@triton.jit
def _quantise(x_ptr, codes_ptr, scales_ptr, first, groups, GROUPS: tl.constexpr):
    """x `[groups, 128]` -> codes, scales `[groups]`: `GROUPS` of them from number `first` on."""
    group = first + tl.arange(0, GROUPS)
    place = group.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    there = group < groups
    codes, scale = to_fp8(tl.load(x_ptr + place, there[:, None], other=0.0).to(tl.float32))
    tl.store(codes_ptr + place, codes, there[:, None])
    tl.store(scales_ptr + group, scale, there)


@triton.jit(do_not_specialize=COUNTS)
def sort_kernel(
    ids_ptr, order_ptr, tiles_ptr, x_ptr, codes_ptr, scales_ptr, pairs, tokens, experts, shared, tiles, groups,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program `e` lists expert e's pairs in order and its tiles; those after the experts quantise x.

    ids `[pairs]`; order `[pairs + shared * tokens]` int32: pair numbers by expert; tiles `[3, tiles]` int32:
    expert (-1: none), first and last + 1 place in `order`. x `[groups, 128]` -> codes, scales `[groups]`.
    Every expert's program looks at all ids: for up to some thousands.
    """
    if PDL:
        follow()
    pid = tl.program_id(0)
    offsets = tl.arange(0, CHUNK)
    if pid < experts:
        lower = tl.zeros((CHUNK,), tl.int32)
        equal = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, pairs, CHUNK):
            ids = tl.load(ids_ptr + start + offsets, start + offsets < pairs, other=-1)
            lower += ((ids >= 0) & (ids < pid)).to(tl.int32)
            equal += (ids == pid).to(tl.int32)
        before = tl.sum(lower)
        count = tl.sum(equal)
        place = before
        for start in range(0, pairs, CHUNK):
            ids = tl.load(ids_ptr + start + offsets, start + offsets < pairs, other=-1)
            mine = (ids == pid).to(tl.int32)
            tl.store(order_ptr + place + tl.cumsum(mine) - 1, start + offsets, mine != 0)
            place += tl.sum(mine)
        first = before // ROWS + pid
        after = (before + count) // ROWS + pid + 1
        if pid == experts - 1:
            after = pairs // ROWS + experts
        _list_tiles(tiles_ptr, tiles, first, after, before, before + count, pid, ROWS, CHUNK)
    elif pid < experts + shared:
        begin = pairs + (pid - experts) * tokens
        for start in range(0, tokens, CHUNK):
            tl.store(order_ptr + begin + start + offsets, begin + start + offsets, start + offsets < tokens)
        each = (tokens + ROWS - 1) // ROWS
        first = pairs // ROWS + experts + (pid - experts) * each
        _list_tiles(tiles_ptr, tiles, first, first + each, begin, begin + tokens, pid, ROWS, CHUNK)
    else:
        _quantise(x_ptr, codes_ptr, scales_ptr, (pid - experts - shared) * GROUPS, groups, GROUPS)


@triton.jit(do_not_specialize=[*COUNTS, "chunks"])
def count_kernel(
    ids_ptr, counts_ptr, x_ptr, codes_ptr, scales_ptr, pairs, experts, chunks, groups, CHUNK: tl.constexpr,
    BINS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts `[chunks, BINS]` int32: how many of a chunk's ids are each expert; bin `experts` takes the others.
    Programs after the chunks quantise x, as in `sort_kernel`."""
    if PDL:
        follow()
    pid = tl.program_id(0)
    if pid < chunks:
        place = pid * CHUNK + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + place, place < pairs, other=-1).to(tl.int32)
        ids = tl.where((ids >= 0) & (ids < experts), ids, experts)
        counts = tl.histogram(ids, BINS)
        tl.store(counts_ptr + pid * BINS + tl.arange(0, BINS), counts)
    else:
        _quantise(x_ptr, codes_ptr, scales_ptr, (pid - chunks) * GROUPS, groups, GROUPS)


@triton.jit(do_not_specialize=["chunks"])
def scan_kernel(
    counts_ptr, taken_ptr, chunks, BINS: tl.constexpr, WIDE: tl.constexpr, HIGH: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """counts `[chunks + 1, BINS]`, `WIDE` bins a program: how many there were before each chunk, and in all. taken
    `[2]` int32 is zeroed for the products."""
    if PDL:
        follow()
    if tl.program_id(0) == 0:
        tl.store(taken_ptr + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    bins = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((WIDE,), tl.int32)
    for start in range(0, chunks, HIGH):
        chunk = start + tl.arange(0, HIGH)
        at = counts_ptr + chunk[:, None] * BINS + bins[None, :]
        counts = tl.load(at, (chunk < chunks)[:, None], other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, 0) - counts, (chunk < chunks)[:, None])
        total += tl.sum(counts, 0)
    tl.store(counts_ptr + chunks * BINS + bins, total)


@triton.jit(do_not_specialize=[*COUNTS, "chunks"])
def place_kernel(
    ids_ptr, counts_ptr, order_ptr, places_ptr, tiles_ptr, pairs, tokens, experts, shared, tiles, chunks,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`sort_kernel`'s order and tiles (no holes among them here), a chunk of the ids a program, after `scan_kernel`;
    places `[pairs]` int32: where in `order` each pair is (-1: nowhere)."""
    if PDL:
        follow()
    pid = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.where(bins < experts, tl.load(counts_ptr + chunks * BINS + bins), 0)
    before = tl.cumsum(total) - total
    if pid < chunks:
        pair = pid * CHUNK + tl.arange(0, CHUNK)
        ids = tl.load(ids_ptr + pair, pair < pairs, other=-1).to(tl.int32)
        mine = bins[:, None] == ids[None, :]
        rank = tl.cumsum(mine.to(tl.int32), 1) - 1
        first = before + tl.load(counts_ptr + pid * BINS + bins)
        place = tl.sum(tl.where(mine, first[:, None] + rank, 0), 0)
        real = (ids >= 0) & (ids < experts)
        tl.store(order_ptr + place, pair, real)
        tl.store(places_ptr + pair, tl.where(real, place, -1), pair < pairs)
    for start in range(pid * CHUNK, shared * tokens, tl.num_programs(0) * CHUNK):
        extra = start + tl.arange(0, CHUNK)
        tl.store(order_ptr + pairs + extra, pairs + extra, extra < shared * tokens)
    tile = pid * TILES + tl.arange(0, TILES)
    many = (total + ROWS - 1) // ROWS
    after = tl.cumsum(many)
    routed = tl.sum(many)
    done = (tile[:, None] >= after[None, :]) & (bins < experts)[None, :]
    expert = tl.sum(done.to(tl.int32), 1)
    chosen = expert[:, None] == bins[None, :]
    begin = tl.sum(tl.where(chosen, (before - (after - many) * ROWS)[None, :], 0), 1) + tile * ROWS
    end = tl.sum(tl.where(chosen, (before + total)[None, :], 0), 1)
    each = (tokens + ROWS - 1) // ROWS
    late = tile - routed
    extra = late // each
    expert = tl.where(late < 0, expert, tl.where(extra < shared, experts + extra, -1))
    begin = tl.where(late < 0, begin, pairs + extra * tokens + late % each * ROWS)
    end = tl.where(late < 0, end, pairs + (extra + 1) * tokens)
    tl.store(tiles_ptr + tile, expert, tile < tiles)
    tl.store(tiles_ptr + tiles + tile, begin, tile < tiles)
    tl.store(tiles_ptr + 2 * tiles + tile, tl.minimum(begin + ROWS, end), tile < tiles)


@triton.jit(do_not_specialize=COUNTS)
def spread_kernel(
    x_ptr, places_ptr, spread_ptr, scales_ptr, pairs, hidden, K: tl.constexpr, GROUPS: tl.constexpr,
    FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of x `[N, D]` by place: `[pairs, D]`; with `FP8` codes and scales `[.., D / 128]`, which come by token once
    more from row `pairs` on. A program has a token and `GROUPS` * 128 channels."""
    if PDL:
        follow()
    token = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    blocks = hidden // 128
    inside = (group < blocks)[:, None]
    channel = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64) * hidden + channel, inside, other=0.0)
    if FP8:
        x, scale = to_fp8(x.to(tl.float32))
        last = (pairs + token).to(tl.int64)
        tl.store(spread_ptr + last * hidden + channel, x, inside)
        tl.store(scales_ptr + last * blocks + group, scale, group < blocks)
    for k in tl.static_range(K):
        place = tl.load(places_ptr + token * K + k).to(tl.int64)
        tl.store(spread_ptr + place * hidden + channel, x, inside & (place >= 0))
        if FP8:
            tl.store(scales_ptr + place * blocks + group, scale, (group < blocks) & (place >= 0))


@triton.jit
def _list_tiles(
    tiles_ptr, tiles, first, after, begin, end, expert, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Write tiles `first` to `after` of `expert`, whose pairs lie from `begin` to `end`."""
    for start in range(first, after, CHUNK):
        tile = start + tl.arange(0, CHUNK)
        begins = begin + (tile - first) * ROWS
        tl.store(tiles_ptr + tile, tl.where(begins < end, expert, -1), tile < after)
        tl.store(tiles_ptr + tiles + tile, begins, tile < after)
        tl.store(tiles_ptr + 2 * tiles + tile, tl.minimum(begins + ROWS, end), tile < after)


@triton.jit
def _gate_up(
    x_ptr, x_scale_ptr, token_R, there_R, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr, column, width, hidden,
    scales, limit, ROWS: tl.constexpr, OUT: tl.constexpr, DEPTH: tl.constexpr, THIN: tl.constexpr,
    FP8: tl.constexpr, EVEN: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """swiglu of rows `token_R` of x in the `OUT` channels from `column`: fp32 `[ROWS, OUT]`.

    One tile holds `OUT` rows of gate and the same of up, so that one product gives both.
    """
    both = tl.arange(0, 2 * OUT)
    depth = tl.arange(0, DEPTH)
    row = tl.minimum(column + both % OUT, width - 1)
    w_ptrs = tl.where((both < OUT)[:, None], gate_ptr, up_ptr) + (row[:, None] * hidden + depth[None, :])
    x_ptrs = x_ptr + (token_R.to(tl.int64) * hidden)[:, None] + depth[None, :]
    if THIN:
        acc = tl.zeros((2 * OUT, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, 2 * OUT), tl.float32)
    if FP8:
        x_scale_ptrs = x_scale_ptr + token_R.to(tl.int64) * scales
        gate_scale_ptr += column // 128 * scales
        up_scale_ptr += column // 128 * scales
        if THIN:
            acc = tl.reshape(acc, (2, OUT, ROWS))
        else:
            acc = tl.reshape(acc, (ROWS, 2, OUT))
        half = tl.arange(0, 2)
        x_scale = tl.load(x_scale_ptrs)
        w_scale = tl.where(half == 0, tl.load(gate_scale_ptr), tl.load(up_scale_ptr))
    for start in range(0, hidden, DEPTH):
        if EVEN:
            w = tl.load(w_ptrs + start)
            if THIN:  # most rows may be empty
                x = tl.load(x_ptrs + start, there_R[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs + start)
        else:
            inside = (start + depth < hidden)[None, :]
            w = tl.load(w_ptrs + start, inside, other=0.0)
            x = tl.load(x_ptrs + start, inside & there_R[:, None], other=0.0)
        if FP8:
            # The next block's scales arrive while this one's product is under way.
            ahead = tl.minimum(start // 128 + 1, scales - 1)
            if THIN:
                part = tl.reshape(tl.dot(w, x.T), (2, OUT, ROWS))
                scale = (w_scale[:, None] * x_scale[None, :])[:, None, :]
            else:
                part = tl.reshape(tl.dot(x, w.T), (ROWS, 2, OUT))
                scale = (x_scale[:, None] * w_scale[None, :])[:, :, None]
            x_scale = tl.load(x_scale_ptrs + ahead)
            w_scale = tl.where(half == 0, tl.load(gate_scale_ptr + ahead), tl.load(up_scale_ptr + ahead))
            acc += part * scale
        elif THIN:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    if THIN:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, OUT, ROWS)), (2, 1, 0)))
    else:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, OUT)), (0, 2, 1)))
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    return gate * tl.sigmoid(gate) * up


@triton.jit(do_not_specialize=COUNTS)
def gate_up_kernel(
    x_ptr, x_scale_ptr, weights_ptr, order_ptr, tiles_ptr, gate_ptr, up_ptr, gate_scale_ptr, up_scale_ptr,
    shared_gate_ptr, shared_up_ptr, shared_gate_scale_ptr, shared_up_scale_ptr, inner_ptr, inner_scale_ptr,
    limit, pairs, tokens, experts, tiles, width, hidden, K: tl.constexpr, ROWS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr, THIN: tl.constexpr, FP8: tl.constexpr, CODES: tl.constexpr,
    EVEN: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """inner `[P, W]`, by place in `order`: routing weight * swiglu(gate x, up x).

    With `CODES` two tiles of 64 channels stand one after the other in a program, which then writes E4M3 codes
    and their scales `[P, W / 128]`.
    """
    if PDL:
        follow()
    SPAN: tl.constexpr = 128 if CODES else OUT
    across = tl.cdiv(width, SPAN)
    tile = tl.program_id(0) // across
    column = tl.program_id(0) % across * SPAN
    expert = tl.load(tiles_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    place_R = begin + tl.arange(0, ROWS)
    there_R = place_R < end
    pair_R = tl.load(order_ptr + place_R, there_R, other=0)
    token_R = tl.where(pair_R < pairs, pair_R // K, (pair_R - pairs) % tokens)
    weight_R = tl.load(weights_ptr + pair_R, pair_R < pairs, other=1.0).to(tl.float32)
    scales = tl.cdiv(hidden, 128)
    if expert < experts:
        at = expert.to(tl.int64) * width * hidden
        gate = gate_ptr + at
        up = up_ptr + at
        scale_at = expert * tl.cdiv(width, 128) * scales
        gate_scale = gate_scale_ptr + scale_at
        up_scale = up_scale_ptr + scale_at
    else:
        at = (expert - experts).to(tl.int64) * width * hidden
        gate = shared_gate_ptr + at
        up = shared_up_ptr + at
        scale_at = (expert - experts) * tl.cdiv(width, 128) * scales
        gate_scale = shared_gate_scale_ptr + scale_at
        up_scale = shared_up_scale_ptr + scale_at
    inner = _gate_up(
        x_ptr, x_scale_ptr, token_R, there_R, gate, up, gate_scale, up_scale, column, width, hidden, scales, limit,
        ROWS, OUT, DEPTH, THIN, FP8, EVEN, LIMIT,
    )  # fmt: skip
    inner = inner * weight_R[:, None]
    place = place_R.to(tl.int64)[:, None] * width
    channel = column + tl.arange(0, OUT)[None, :]
    if CODES and OUT == 128:
        scale_R = tl.maximum(tl.max(tl.abs(inner), 1), 1e-4) / 448.0
        inner = inner / scale_R[:, None]
        tl.store(inner_ptr + place + channel, inner.to(inner_ptr.dtype.element_ty), there_R[:, None])
        tl.store(inner_scale_ptr + place_R * tl.cdiv(width, 128) + column // 128, scale_R, there_R)
    elif CODES:
        second = _gate_up(
            x_ptr, x_scale_ptr, token_R, there_R, gate, up, gate_scale, up_scale, column + OUT, width, hidden,
            scales, limit, ROWS, OUT, DEPTH, THIN, FP8, EVEN, LIMIT,
        )  # fmt: skip
        second = second * weight_R[:, None]
        top_R = tl.maximum(tl.max(tl.abs(inner), 1), tl.max(tl.abs(second), 1))
        scale_R = tl.maximum(top_R, 1e-4) / 448.0
        inner = inner / scale_R[:, None]
        second = second / scale_R[:, None]
        kind = inner_ptr.dtype.element_ty
        tl.store(inner_ptr + place + channel, inner.to(kind), there_R[:, None])
        tl.store(inner_ptr + place + OUT + channel, second.to(kind), there_R[:, None])
        tl.store(inner_scale_ptr + place_R * tl.cdiv(width, 128) + column // 128, scale_R, there_R)
    else:
        kind = inner_ptr.dtype.element_ty
        tl.store(inner_ptr + place + channel, inner.to(kind), there_R[:, None] & (channel < width))


@triton.jit(do_not_specialize=COUNTS)
def down_kernel(
    inner_ptr, inner_scale_ptr, order_ptr, tiles_ptr, down_ptr, down_scale_ptr, shared_ptr,
    shared_scale_ptr, y_ptr, experts, tiles, width, shared_width, hidden, ROWS: tl.constexpr,
    OUT: tl.constexpr, DEPTH: tl.constexpr, THIN: tl.constexpr, FP8: tl.constexpr, CODES: tl.constexpr,
    EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y `[pairs, D]`, by pair number: inner `[P, W]` (codes with `CODES`) times the expert's down matrix."""
    if PDL:
        follow()
    across = tl.cdiv(hidden, OUT)
    tile = tl.program_id(0) // across
    column = tl.program_id(0) % across * OUT
    expert = tl.load(tiles_ptr + tile)
    if expert < 0:
        return
    begin = tl.load(tiles_ptr + tiles + tile)
    end = tl.load(tiles_ptr + 2 * tiles + tile)
    place_R = begin + tl.arange(0, ROWS)
    there_R = place_R < end
    if expert < experts:
        down = down_ptr + expert.to(tl.int64) * hidden * width
        stride = width
        scales = tl.cdiv(width, 128)
        down_scale = down_scale_ptr + expert * tl.cdiv(hidden, 128) * scales
    else:
        down = shared_ptr + (expert - experts) * width
        stride = shared_width
        scales = tl.cdiv(shared_width, 128)
        down_scale = shared_scale_ptr + (expert - experts) * (width // 128)
    depth = tl.arange(0, DEPTH)
    row = tl.minimum(column + tl.arange(0, OUT), hidden - 1)
    w_ptrs = down + (row[:, None] * stride + depth[None, :])
    # Places past the tile's end repeat its last: always memory that was written.
    read_R = tl.minimum(place_R, end - 1)
    x_ptrs = inner_ptr + (read_R.to(tl.int64) * width)[:, None] + depth[None, :]
    if THIN:
        acc = tl.zeros((OUT, ROWS), tl.float32)
    else:
        acc = tl.zeros((ROWS, OUT), tl.float32)
    if FP8:
        x_scale_ptrs = inner_scale_ptr + read_R * tl.cdiv(width, 128)
        down_scale += column // 128 * scales
        w_scale = tl.load(down_scale)
        if CODES:
            x_scale = tl.load(x_scale_ptrs)
    for start in range(0, width, DEPTH):
        if EVEN:
            w = tl.load(w_ptrs + start)
            if THIN:  # most rows may be empty
                x = tl.load(x_ptrs + start, there_R[:, None], other=0.0)
            else:
                x = tl.load(x_ptrs + start)
        else:
            inside = (start + depth < width)[None, :]
            w = tl.load(w_ptrs + start, inside, other=0.0)
            x = tl.load(x_ptrs + start, inside & there_R[:, None], other=0.0)
        if FP8:
            if not CODES:
                x, x_scale = to_fp8(x.to(tl.float32))
            scale = x_scale * w_scale
            if THIN:
                part = tl.dot(w, x.T)
            else:
                part = tl.dot(x, w.T)
            ahead = tl.minimum(start // 128 + 1, tl.cdiv(width, 128) - 1)
            w_scale = tl.load(down_scale + ahead)
            if CODES:
                x_scale = tl.load(x_scale_ptrs + ahead)
            if THIN:
                acc += part * scale[None, :]
            else:
                acc += part * scale[:, None]
        elif THIN:
            acc = tl.dot(w, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")
    if THIN:
        acc = acc.T
    pair_R = tl.load(order_ptr + place_R, there_R, other=0)
    channel = column + tl.arange(0, OUT)[None, :]
    y_ptrs = y_ptr + (pair_R.to(tl.int64) * hidden)[:, None] + channel
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), there_R[:, None] & (channel < hidden))


@triton.jit(do_not_specialize=COUNTS)
def sum_kernel(
    parts_ptr, ids_ptr, add_ptr, y_ptr, tokens, experts, hidden, K: tl.constexpr, SHARED: tl.constexpr,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y `[N, D]`: each token's pairs in the order of its choice, its shared experts, then `add`, in fp32."""
    if PDL:
        follow()
    token = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = channel < hidden
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        expert = tl.load(ids_ptr + pair)
        real = (expert >= 0) & (expert < experts)
        acc += tl.load(parts_ptr + pair.to(tl.int64) * hidden + channel, there & real, other=0.0).to(
            tl.float32
        )
    for s in tl.static_range(SHARED):
        pair = tokens * (K + s) + token
        acc += tl.load(parts_ptr + pair.to(tl.int64) * hidden + channel, there, other=0.0).to(tl.float32)
    place = token.to(tl.int64) * hidden + channel
    if ADD:
        acc += tl.load(add_ptr + place, there, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), there)
