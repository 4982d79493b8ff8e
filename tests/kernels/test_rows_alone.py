"""Inside batch-invariant mode every product gives a row the same bits, whatever stands beside it (on the GPU)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rorqual
from rorqual.kernels.experts import Weights, experts
from rorqual.kernels.fp8_linear import fp8_linear
from rorqual.kernels.heads import heads_down, heads_up
from rorqual.kernels.index import index_choose
from rorqual.kernels.linear import linear, linear_in_fp32
from rorqual.kernels.mix import mix_read, mix_write
from rorqual.kernels.mla_decode import mla_decode
from rorqual.kernels.mla_sparse import mla_sparse
from rorqual.kernels.quant import quantize_fp8
from rorqual.kernels.route import route
from rorqual.nn.norm import unit_rms

pytestmark = pytest.mark.gpu
SIZES = (1, 3, 16, 17, 33, 65, 70, 129, 600)
MOST = max(SIZES)
Operation = Callable[[Tensor], tuple[Tensor, ...]]


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def holds(operation: Operation) -> None:
    """`operation` gives rows, by number: those of a few, from any place on, are those of all."""
    with torch.no_grad(), rorqual.invariant():
        every = torch.arange(MOST, device="cuda")
        full = operation(every)
        for size in SIZES:
            for at in (every[:size], every[-size:], torch.randperm(MOST, device="cuda")[:size]):
                for some, whole in zip(operation(at), full, strict=True):
                    assert torch.equal(some, whole[at]), f"{size} rows from {int(at[0])}"


FEW = [(64, 2048), (576, 512), (2112, 1536)]
MANY = [(11264, 512), (70000, 256)]
"""Outputs and widths; with many outputs fp32 has the same tile as with few, and takes long."""


@pytest.mark.parametrize(
    ("out", "width", "dtype"),
    [(*size, torch.bfloat16) for size in FEW + MANY] + [(*size, torch.float32) for size in FEW],
)
def test_linear(out: int, width: int, dtype: torch.dtype) -> None:
    x, w, bias = (
        _random(MOST, width, dtype=dtype),
        _random(out, width, dtype=dtype),
        _random(out, dtype=dtype),
    )
    holds(lambda at: (linear(x[at], w, bias), linear_in_fp32(x[at], w)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [4, 16, 128])
def test_heads(heads: int, dtype: torch.dtype) -> None:
    q, u = _random(MOST, heads, 128, dtype=dtype), _random(MOST, heads, 512, dtype=dtype)
    w = _random(heads, 256, 512, dtype=dtype)
    holds(lambda at: (heads_up(q[at], w[:, :128]), heads_down(u[at], w[:, 128:])))


def test_heads_of_codes() -> None:
    q, u = _random(MOST, 16, 128), _random(MOST, 16, 512)
    codes, scale = quantize_fp8(_random(16 * 256, 512, scale=0.05), (128, 128))
    w = codes.unflatten(0, (16, 256))
    holds(
        lambda at: (heads_up(q[at], w[:, :128], None, scale), heads_down(u[at], w[:, 128:], None, scale, 128))
    )


@pytest.mark.parametrize(("out", "width"), [(576, 512), (2112, 7168), (7168, 2048), (16384, 1536)])
def test_fp8(out: int, width: int) -> None:
    x = _random(MOST, width)
    codes, scale = quantize_fp8(_random(out, width, scale=0.05), (128, 128))
    holds(lambda at: (fp8_linear(x[at], codes, scale),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("count", "width", "score"), [(64, 2048, "sigmoid"), (60, 512, "softmax"), (256, 7168, "sigmoid")]
)
def test_route(count: int, width: int, score: str, dtype: torch.dtype) -> None:
    x, w = _random(MOST, width, dtype=dtype), _random(count, width, dtype=dtype, scale=width**-0.5)
    holds(lambda at: route(x[at], w, None, top_k=6, score=score, normalize=score == "sigmoid"))


@pytest.mark.parametrize(
    ("dtype", "codes"), [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)]
)
def test_experts(dtype: torch.dtype, codes: bool) -> None:
    """Sizes at which each of the tiles is chosen: few pairs an expert, and many."""
    count, hidden, width, chosen = 16, 512, 256, 4

    def stack(*shape: int) -> Weights:
        w = _random(*shape, dtype=dtype, scale=0.05)
        return Weights(*quantize_fp8(w, (128, 128)), (128, 128)) if codes else Weights(w)

    x = _random(MOST, hidden, dtype=dtype)
    ids = torch.rand(MOST, count, device="cuda").argsort(-1)[:, :chosen]
    weights = torch.rand(MOST, chosen, device="cuda")
    matrices = [stack(count, width, hidden), stack(count, width, hidden), stack(count, hidden, width)]
    common = stack(width, hidden), stack(width, hidden), stack(hidden, width)
    holds(lambda at: (experts(x[at], ids[at], weights[at], *matrices, shared=common, fixed=True),))


@pytest.mark.parametrize(
    ("dtype", "heads", "rank"),
    [(torch.bfloat16, 16, 512), (torch.bfloat16, 128, 512), (torch.float32, 4, 512)],
)
def test_mla(dtype: torch.dtype, heads: int, rank: int) -> None:
    pages = _random(40, 64, rank + 64, dtype=dtype)
    q = _random(MOST, heads, rank + 64, dtype=dtype, scale=0.1)
    table = torch.randint(0, 40, (MOST, 40), device="cuda", dtype=torch.int32)
    ends = torch.randint(1, 2560, (MOST,), device="cuda", dtype=torch.int32)
    slots = torch.randint(-1, 2560, (MOST, 512), device="cuda", dtype=torch.int32)

    def both(at: Tensor) -> tuple[Tensor, ...]:
        dense = mla_decode(q[at], pages, table[at], ends[at], width=1, rank=rank, scale=0.1, splits="fixed")
        return dense, mla_sparse(q[at], pages, slots[at], rank=rank, scale=0.1)

    if dtype == torch.float32:  # no tensor cores: close to the definition, and alike
        from rorqual.kernels.mla_decode import reference

        few = slice(0, 3)
        want = reference(q[few], pages, table[few], ends[few], width=1, rank=rank, scale=0.1)
        got = mla_decode(q[few], pages, table[few], ends[few], width=1, rank=rank, scale=0.1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    holds(both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_index(dtype: torch.dtype) -> None:
    q, w = _random(MOST, 64, 128, dtype=dtype), _random(MOST, 64, dtype=torch.float32)
    pages = _random(80, 64, 128, dtype=dtype)
    table = torch.arange(80, device="cuda", dtype=torch.int32).view(2, 40)
    seq = torch.arange(MOST, device="cuda", dtype=torch.int32) % 2
    limits = torch.randint(1, 2560, (MOST,), device="cuda", dtype=torch.int32)
    holds(lambda at: (index_choose(q[at], w[at], pages, table, seq[at], limits[at], k=256, max_keys=2560),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_streams(dtype: torch.dtype) -> None:
    x, y = _random(MOST, 4, 1280, dtype=dtype), _random(MOST, 1280, dtype=dtype)
    fn, base, scale = (
        _random(24, 4 * 1280, dtype=torch.float32, scale=0.02),
        _random(24, dtype=torch.float32),
        _random(3, dtype=torch.float32),
    )

    def both(at: Tensor) -> tuple[Tensor, ...]:
        inner, post, comb = mix_read(x[at], fn, base, scale, 1e-6, 1e-6, 20)
        return inner, post, comb, mix_write(x[at], y[at], post, comb), unit_rms(x[at], 1e-6)

    holds(both)
