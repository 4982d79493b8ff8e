"""How the programs of a cluster send each other numbers, for `single_core`.

Straight into each other's shared memory, where a barrier counts the bytes (`st.async`). Gluon has no words for it:
inline assembly, on a room of its own.
"""
# mypy: disable-error-code="no-untyped-def,assignment,misc"
# ruff: noqa: RUF005 (in kernels tuples grow by addition)

from __future__ import annotations

from rorqual.kernels.gluon_rings import gl, gluon

# The room: the query's latent channels; the warps' sums and what all programs sent; both for (largest score, sum of
# weights); the values' latent channels; the barriers of the query (2,048 bytes) and of the sums (16,448).
Q_AT = gl.constexpr(0)
SUMS_AT = gl.constexpr(2048)
IN_AT = gl.constexpr(2048 + 16384)
TOPS_AT = gl.constexpr(2048 + 32768)
TOPS_IN_AT = gl.constexpr(2048 + 32768 + 64)
U_AT = gl.constexpr(2048 + 32768 + 128)
ROOM = gl.constexpr("""
.shared .align 16 .b8 core_room[37008];
{
.reg .pred p;
.reg .b32 a;
.reg .b64 s;
mov.u32 a, %tid.x;
setp.eq.u32 p, a, 0;
mov.u32 a, core_room;
@p mbarrier.init.shared.b64 [a+36992], 1;
@p mbarrier.init.shared.b64 [a+37000], 1;
@p mbarrier.arrive.expect_tx.shared.b64 s, [a+36992], 2048;
@p mbarrier.arrive.expect_tx.shared.b64 s, [a+37000], 16448;
fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.relaxed.aligned;
mov.u32 $0, %cluster_ctarank;
}
""")
"""Makes the room, and the two barriers that count the bytes that come; gives the program's number in its cluster."""
ALL_HERE = gl.constexpr("barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;")
QUERY_HERE = gl.constexpr("""
{
.reg .pred p;
.reg .b32 a;
mov.u32 a, core_room;
AGAIN:
mbarrier.try_wait.parity.shared.b64 p, [a+36992], 0;
@!p bra AGAIN;
mov.u32 $0, 0;
}
""")
SUMS_HERE = gl.constexpr("""
{
.reg .pred p;
.reg .b32 a;
mov.u32 a, core_room;
AGAIN:
mbarrier.try_wait.parity.shared.b64 p, [a+37000], 0;
@!p bra AGAIN;
mov.u32 $0, 0;
}
""")
SYNC = gl.constexpr("bar.sync 0; mov.u32 $0, 0;")
SEND4 = gl.constexpr("""
{
.reg .pred p;
.reg .b32 a, b;
mov.u32 b, %tid.x;
setp.lt.u32 p, b, 128;
mov.u32 b, core_room;
add.u32 a, b, $8;
add.u32 b, b, 36992;
mapa.shared::cluster.u32 a, a, $12;
mapa.shared::cluster.u32 b, b, $12;
@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [a], {$4, $5, $6, $7}, [b];
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
}
""")
"""Four words that follow one another to a program of the cluster. (The upper warps hold the same as the lower ones.)"""
SEND2 = gl.constexpr("""
{
.reg .b32 a, b;
mov.u32 b, core_room;
add.u32 a, b, $4;
add.u32 b, b, 37000;
mapa.shared::cluster.u32 a, a, $6;
mapa.shared::cluster.u32 b, b, $6;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [a], {$2, $3}, [b];
mov.b32 $0, 0;
mov.b32 $1, 0;
}
""")
PUT4 = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $8;
st.shared.v4.b32 [a], {$4, $5, $6, $7};
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
}
""")
PUT_TOP = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $1;
st.shared.v2.b32 [a], {$2, $3};
mov.b32 $0, 0;
}
""")
SEND_TOP = gl.constexpr("""
{
.reg .b32 a, b, t;
.reg .pred p;
mov.u32 t, %tid.x;
setp.lt.u32 p, t, 8;
mov.u32 b, core_room;
add.u32 a, b, $3;
add.u32 b, b, 37000;
and.b32 t, t, 7;
mapa.shared::cluster.u32 a, a, t;
mapa.shared::cluster.u32 b, b, t;
@p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [a], {$1, $2}, [b];
mov.b32 $0, 0;
}
""")
GET_TOPS = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $4;
ld.shared.v4.b32 {$0, $1, $2, $3}, [a];
}
""")
PUT2 = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $4;
st.shared.v2.b32 [a], {$2, $3};
mov.b32 $0, 0;
mov.b32 $1, 0;
}
""")
GET4 = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $4;
ld.shared.v4.b32 {$0, $1, $2, $3}, [a];
}
""")
GET2 = gl.constexpr("""
{
.reg .b32 a;
mov.u32 a, core_room;
add.u32 a, a, $2;
ld.shared.v2.b32 {$0, $1}, [a];
}
""")
ASK = gl.constexpr("""
{
.reg .b32 t, o;
.reg .pred p, r;
.reg .b64 a;
mov.u32 t, %tid.x;
and.b32 o, t, 31;
setp.eq.u32 p, o, 0;
shr.u32 t, t, 5;
add.u32 t, t, $2;
mul.lo.u32 o, t, $4;
cvt.u64.u32 a, o;
add.u64 a, a, $1;
sub.s32 o, $3, o;
min.s32 o, o, $4;
setp.gt.and.s32 r, o, 0, p;
@r cp.async.bulk.prefetch.L2.global [a], o;
mov.u32 $0, 0;
}
""")


@gluon.jit
def scalar(text: gl.constexpr):
    return gl.inline_asm_elementwise(text, "=r", [], gl.int32, is_pure=False, pack=1)


@gluon.jit
def send_query(value, at, program):
    """Four numbers at a time to a program's room, from byte `at` on."""
    gl.inline_asm_elementwise(
        SEND4, "=r,=r,=r,=r,f,f,f,f,r,r,r,r,r,r,r,r", [value, at, program], gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def send_sums(value, at, program, top, mass, top_at):
    """Two numbers at a time, and (largest score, sum of weights) to all."""
    gl.inline_asm_elementwise(
        SEND2, "=r,=r,f,f,r,r,r,r", [value, at, program], gl.int32, is_pure=False, pack=2
    )
    gl.inline_asm_elementwise(SEND_TOP, "=r,f,f,r", [top, mass, top_at], gl.int32, is_pure=False, pack=1)


@gluon.jit
def put(value, at):
    """Four numbers at a time into this program's room."""
    gl.inline_asm_elementwise(
        PUT4, "=r,=r,=r,=r,f,f,f,f,r,r,r,r", [value, at], gl.int32, is_pure=False, pack=4
    )


@gluon.jit
def put_pair(value, at):
    """Two numbers at a time."""
    gl.inline_asm_elementwise(PUT2, "=r,=r,f,f,r,r", [value, at], gl.int32, is_pure=False, pack=2)


@gluon.jit
def put_top(top, mass, at):
    """A warp's (largest score, sum of weights)."""
    gl.inline_asm_elementwise(PUT_TOP, "=r,r,f,f", [at, top, mass], gl.int32, is_pure=False, pack=1)


@gluon.jit
def get(at):
    """Four numbers at a time from the room, from byte `at` on."""
    return gl.inline_asm_elementwise(GET4, "=f,=f,=f,=f,r,r,r,r", [at], gl.float32, is_pure=False, pack=4)


@gluon.jit
def place(channel):
    """Bytes from a row's start in the room to a channel: what 8 lanes read at a time lies in all banks."""
    return ((channel // 256 * 2 + channel % 8 // 4) * 128 + channel % 256 // 8 * 4 + channel % 4) * 4


@gluon.jit
def get_pair(at):
    """Two numbers at a time."""
    return gl.inline_asm_elementwise(GET2, "=f,=f,r,r", [at], gl.float32, is_pure=False, pack=2)


@gluon.jit
def together(at: gl.constexpr):
    """Of eight (largest score, sum of weights) the largest, the sum, and what each part counts."""
    tops = ()
    masses = ()
    for i in gl.static_range(4):
        a, b, c, d = gl.inline_asm_elementwise(
            GET_TOPS, "=f,=f,=f,=f,r", [at + 16 * i], (gl.float32, gl.float32, gl.float32, gl.float32),
            is_pure=False, pack=1,
        )  # fmt: skip
        tops = tops + (a, c)
        masses = masses + (b, d)
    top = tops[0]
    for i in gl.static_range(1, 8):
        top = gl.maximum(top, tops[i])
    base = gl.where(top == float("-inf"), 0.0, top)
    shares = ()
    mass = 0.0
    for i in gl.static_range(8):
        share = gl.exp2(tops[i] - base)
        mass += masses[i] * share
        shares = shares + (share,)
    return top, mass, shares
