"""The kernel of `single_core`."""
# mypy: disable-error-code="no-untyped-def,assignment"
# ruff: noqa: RUF005 (in kernels tuples grow by addition)

from __future__ import annotations

from rorqual.kernels.gluon_rings import async_copy, gl, gluon
from rorqual.kernels.gpu import tl
from rorqual.kernels.single_core_room import (
    ALL_HERE,
    ASK,
    IN_AT,
    Q_AT,
    QUERY_HERE,
    ROOM,
    SUMS_AT,
    SUMS_HERE,
    SYNC,
    TOPS_AT,
    TOPS_IN_AT,
    U_AT,
    get,
    get_pair,
    place,
    put,
    put_pair,
    put_top,
    scalar,
    send_query,
    send_sums,
    together,
)

CODES4 = gl.constexpr("""
{
.reg .b32 a, b;
.reg .b16 l, h;
shl.b32 a, $4, 8;
shr.b32 b, a, 1;
and.b32 a, a, 0x80008000;
and.b32 b, b, 0x3f803f80;
or.b32 a, a, b;
mov.b32 {l, h}, a;
cvt.f32.f16 $0, l;
cvt.f32.f16 $2, h;
shr.b32 b, $4, 1;
and.b32 a, $4, 0x80008000;
and.b32 b, b, 0x3f803f80;
or.b32 a, a, b;
mov.b32 {l, h}, a;
cvt.f32.f16 $1, l;
cvt.f32.f16 $3, h;
}
""")
"""Four codes of E4M3 times 2^-8, through fp16: Hopper's own conversion takes longer than all the rest. NaN becomes 480
(no weight should hold it)."""


@gluon.jit
def _floats(tile):
    """Weights as fp32; codes times 2^-8."""
    if tile.dtype == gl.float8e4nv:
        return gl.inline_asm_elementwise(CODES4, "=f,=f,=f,=f,r", [tile], gl.float32, is_pure=True, pack=4)
    else:
        return tile.to(gl.float32)


@gluon.jit
def _factor(at, POWERS: gl.constexpr):
    """Scales of codes times 2^-8."""
    by = gl.load(at)
    if POWERS:
        bits = gl.where(by == 0, 0x00400000, by.to(gl.int32) << 23)
        by = gl.where(by == 255, float("nan"), bits.to(gl.float32, bitcast=True))
    return by * 256.0


@gluon.jit
def _where(table, key, room, WIDTH: gl.constexpr, PAGE: gl.constexpr):
    """Where keys begin, by their number; the table has room for `room`."""
    page = gl.load(table + key // PAGE, mask=key < room, other=0).to(gl.int64)
    return (page * PAGE + (key & (PAGE - 1))) * WIDTH


@gluon.jit
def _score(key, turned, query, rope, row):
    """key `[rows, 512]` times query, and the rotary part `[rows, 64]`: one sum over the lanes for both."""
    ROWS: gl.constexpr = key.shape[0]
    PART: gl.constexpr = row.type.layout.parent
    part = gl.convert_layout(gl.sum(gl.sum(gl.reshape(key * query, [ROWS, 2, 32, 8]), 3), 1), PART)
    part += gl.convert_layout(gl.sum(gl.reshape(turned * rope, [ROWS, 32, 2]), 2), PART)
    return gl.sum(part, 1)


@gluon.jit
def _meet(keys, turned, first, query, rope, row, line, old, exponent, state, CHUNK: gl.constexpr):
    """Take some of this warp's keys along: (largest score, sum of weights, sum of weighted keys)."""
    top, mass, total = state
    higher = top
    scores = ()
    for i in gl.static_range(CHUNK):
        score = _score(keys[i].to(gl.float32), turned[i].to(gl.float32), query, rope, row) * exponent
        scores = scores + (gl.where((first + i) * 64 + row < old, score, float("-inf")),)
        higher = gl.maximum(higher, scores[i])
    base = gl.where(higher == float("-inf"), 0.0, higher)
    fade = gl.exp2(top - base)
    mass *= fade
    total *= gl.convert_layout(fade, line.type.layout)[:, None]
    for i in gl.static_range(CHUNK):
        share = gl.exp2(scores[i] - base)
        mass += share
        total += keys[i].to(gl.float32) * gl.convert_layout(share, line.type.layout)[:, None]
    return higher, mass, total


@gluon.jit
def _turned(at, across, partner, reach, c_cos, c_sin):
    """A rotary part `[64]` turned."""
    x = gl.load(at + across, mask=reach, other=0.0).to(gl.float32)
    return (x * c_cos + gl.load(at + partner, mask=reach, other=0.0).to(gl.float32) * c_sin).to(gl.bfloat16)


@gluon.jit
def core_kernel(
    q, kv, norm, cos, sin, w, scale, pages, slots, table, ends, y, room, exponent, q_head, w_head, w_row, s_row, eps,
    asked, asked_size,
    NOPE: gl.constexpr, V: gl.constexpr, R: gl.constexpr, HEAD_ROWS: gl.constexpr, PAGE: gl.constexpr,
    KEYS: gl.constexpr, CHUNK: gl.constexpr, INTERLEAVED: gl.constexpr, CODES: gl.constexpr, POWERS: gl.constexpr,
    SPAN: gl.constexpr, LAYOUTS: gl.constexpr,
):  # fmt: skip
    """y `[H * V]`, and the newest key `[512 + R]` to its page. KEYS: keys of a warp that are read ahead."""
    RANK: gl.constexpr = 512
    UK: gl.constexpr = LAYOUTS[0]
    UV: gl.constexpr = LAYOUTS[1]
    KEY: gl.constexpr = LAYOUTS[1]
    TURNED: gl.constexpr = LAYOUTS[2]
    PART: gl.constexpr = LAYOUTS[3]
    EACH: gl.constexpr = LAYOUTS[4]
    PAIRS: gl.constexpr = LAYOUTS[5]
    SHARE: gl.constexpr = LAYOUTS[6]
    ROW: gl.constexpr = gl.SliceLayout(1, PART)
    LINE: gl.constexpr = gl.SliceLayout(1, KEY)

    held = gl.allocate_shared_memory(pages.dtype.element_ty, [KEYS, 64, RANK], LAYOUTS[7])
    tl.extra.cuda.gdc_launch_dependents()
    rank = scalar(ROOM)
    head = gl.program_id(0)
    end = gl.load(ends)
    old = end - 1

    # What can be read early: weights and keys.
    row = gl.arange(0, 64, ROW)
    line = gl.arange(0, 64, LINE)
    channel = gl.arange(0, RANK, gl.SliceLayout(0, KEY))
    turn = gl.arange(0, 64, gl.SliceLayout(0, TURNED))
    if INTERLEAVED:
        partner = turn ^ 1
        angle = turn // 2
        second = turn % 2 == 1
    else:
        partner = (turn + R // 2) % R
        angle = turn % (R // 2)
        second = turn >= R // 2
    reach = turn < R
    k = gl.arange(0, NOPE, gl.SliceLayout(1, UK))
    m = gl.arange(0, RANK, gl.SliceLayout(0, UK))
    w += head.to(gl.int64) * w_head
    up = gl.load(w + k[:, None] * w_row + m[None, :])
    v = gl.arange(0, V, gl.SliceLayout(1, UV))
    c = gl.arange(0, RANK, gl.SliceLayout(0, UV))
    down = gl.load(w + (NOPE + v)[:, None] * w_row + c[None, :])
    if CODES:
        by_up = _factor(scale + (head * HEAD_ROWS + k) // 128 * s_row + rank // 2, POWERS)
        block = (head * HEAD_ROWS + NOPE + rank * (V // 8)) // 128
        lane = gl.arange(0, RANK, gl.SliceLayout(1, PAIRS))
        by_down = _factor(scale + block * s_row + lane // 256 * 2 + lane % 128 // 64, POWERS)
    weight = gl.load(norm + channel).to(gl.bfloat16).to(gl.float32)
    places = ()
    for j in gl.static_range(KEYS):
        places = places + (_where(table, j * 64 + line, room, RANK + R, PAGE),)
    turned = ()
    for j in gl.static_range(KEYS):
        rotary = gl.convert_layout(places[j], gl.SliceLayout(1, TURNED)) + RANK
        there = gl.convert_layout(j * 64 + line < old, gl.SliceLayout(1, TURNED))[:, None] & reach[None, :]
        turned = turned + (gl.load(pages + rotary[:, None] + turn[None, :], mask=there, other=0.0),)
    for j in gl.static_range(KEYS):
        async_copy.async_copy_global_to_shared(
            held.index(j), pages + places[j][:, None] + channel[None, :], mask=(j * 64 + line < old)[:, None]
        )
    async_copy.commit_group()
    if SPAN:
        gl.inline_asm_elementwise(
            ASK, "=r,l,r,r,r", [asked.to(gl.int64), (head * 8 + rank) * 8, asked_size, SPAN], gl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
    scalar(ALL_HERE)
    tl.extra.cuda.gdc_wait()

    # The query in latent space.
    q += head * q_head
    first = gl.load(q + k).to(gl.float32)
    new = gl.load(kv + channel).to(gl.float32)
    c_cos = gl.load(cos + angle, mask=reach, other=0.0)
    c_sin = gl.load(sin + angle, mask=reach, other=0.0)
    c_sin = gl.where(second, c_sin, -c_sin)
    rope = _turned(q + NOPE, turn, partner, reach, c_cos, c_sin)
    new_turned = _turned(kv + RANK, turn, partner, reach, c_cos, c_sin)
    slot = gl.load(slots).to(gl.int64)
    if CODES:
        first *= by_up
    # Summed over a warp, then through the room: the compiler's own way takes shared memory for the whole cluster.
    parts = gl.reshape(_floats(up) * first[:, None], [NOPE // 16, 8, 2, RANK])
    parts = gl.convert_layout(gl.sum(gl.sum(parts, 0), 1), SHARE)
    warp = gl.arange(0, 8, gl.SliceLayout(1, SHARE))
    column = gl.arange(0, RANK, gl.SliceLayout(0, SHARE)) % 64
    put(parts, SUMS_AT + warp[:, None] * 256 + column[None, :] * 4)
    scalar(SYNC)
    to = gl.arange(0, RANK, gl.SliceLayout(1, EACH))
    latent = get(SUMS_AT + to % 64 * 4)
    for i in gl.static_range(1, 8):
        latent += get(SUMS_AT + i * 256 + to % 64 * 4)
    latent = latent.to(gl.bfloat16).to(gl.float32)
    to = place(to)
    program = gl.arange(0, 8, gl.SliceLayout(0, EACH))
    to, program = gl.broadcast((Q_AT + to)[:, None], program[None, :])
    latent, program = gl.broadcast(latent[:, None], program)
    send_query(latent, to, program)

    # Meanwhile the newest key.
    rms = gl.rsqrt(gl.sum(new * new, 0) / RANK + eps)
    new = (new * rms * weight).to(gl.bfloat16)
    if (head == 0) & (slot >= 0):
        mine = pages + slot * (RANK + R)
        gl.store(mine + channel, new)
        gl.store(mine + RANK + turn, new_turned, mask=reach)
    new = new.to(gl.float32)[None, :]
    rope = rope.to(gl.float32)[None, :]
    new_turned = new_turned.to(gl.float32)[None, :]
    scalar(QUERY_HERE)

    # Scores of this warp's keys.
    query = get(Q_AT + place(channel))[None, :]
    ones = gl.full([64, 1], 1.0, gl.float32, KEY)
    own = _score(new * ones, new_turned * gl.full([64, 1], 1.0, gl.float32, TURNED), query, rope, row)
    top = gl.where((row == 0) & (end > 0), own * exponent, float("-inf"))
    mass = gl.where(top == float("-inf"), 0.0, 1.0)
    total = new * gl.convert_layout(mass, LINE)[:, None]
    async_copy.wait_group(0)
    for group in gl.static_range(KEYS // CHUNK):
        if group * CHUNK * 64 < old:
            keys = ()
            some_turned = ()
            for i in gl.static_range(CHUNK):
                keys = keys + (held.index(group * CHUNK + i).load(KEY),)
                some_turned = some_turned + (turned[group * CHUNK + i],)
            top, mass, total = _meet(
                keys,
                some_turned,
                group * CHUNK,
                query,
                rope,
                row,
                line,
                old,
                exponent,
                (top, mass, total),
                CHUNK,
            )
    for group in range(KEYS // CHUNK, (old + 64 * CHUNK - 1) // (64 * CHUNK)):
        late = ()
        late_turned = ()
        for i in gl.static_range(CHUNK):
            number = (group * CHUNK + i) * 64 + line
            at = _where(table, number, room, RANK + R, PAGE)
            seen = (number < old)[:, None]
            late = late + (gl.load(pages + at[:, None] + channel[None, :], mask=seen, other=0.0),)
            rotary = gl.convert_layout(at, gl.SliceLayout(1, TURNED)) + RANK
            near = gl.convert_layout(number < old, gl.SliceLayout(1, TURNED))[:, None] & reach[None, :]
            late_turned = late_turned + (
                gl.load(pages + rotary[:, None] + turn[None, :], mask=near, other=0.0),
            )
        top, mass, total = _meet(
            late, late_turned, group * CHUNK, query, rope, row, line, old, exponent, (top, mass, total), CHUNK
        )  # fmt: skip
    to = (SUMS_AT + (line & 7) * 2048)[:, None] + place(channel)[None, :]
    put(total, to)
    put_top(top, mass, TOPS_AT + (row & 7) * 8)
    scalar(SYNC)

    # The program's sums, sent to all.
    pair = gl.arange(0, RANK, gl.SliceLayout(1, PAIRS)) * 4
    top, mass, shares = together(TOPS_AT)
    total = get_pair(SUMS_AT + pair) * shares[0]
    for i in gl.static_range(1, 8):
        total += get_pair(SUMS_AT + i * 2048 + pair) * shares[i]
    program = gl.arange(0, 8, gl.SliceLayout(0, PAIRS))
    to, program = gl.broadcast((IN_AT + rank * 2048 + pair)[:, None], program[None, :])
    total, program = gl.broadcast(total[:, None], program)
    send_sums(total, to, program, top, mass, TOPS_IN_AT + rank * 8)
    scalar(SUMS_HERE)

    # All sums together, and through W_UV.
    top, mass, shares = together(TOPS_IN_AT)
    total = get_pair(IN_AT + pair) * shares[0]
    for i in gl.static_range(1, 8):
        total += get_pair(IN_AT + i * 2048 + pair) * shares[i]
    total = (total / gl.where(mass > 0, mass, 1.0)).to(gl.bfloat16).to(gl.float32)
    if CODES:
        total *= by_down
    put_pair(total, U_AT + pair)
    scalar(SYNC)
    total = get(U_AT + place(c))
    value = gl.sum(_floats(down) * total[None, :], 1)
    gl.store(y + head * V + v, value.to(y.dtype.element_ty))
