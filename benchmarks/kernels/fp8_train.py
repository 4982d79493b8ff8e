"""The products of FP8 training, in turns with DeepGEMM's forward product: `python -m benchmarks.kernels.fp8_train`.

First all forms against references that multiply the codes out; then, for each shape, the forward product, the gradient
of the input, that of the weight in bf16 and added in fp32, and what quantises: in a row (CUDA graphs; the GPU then
draws all the power it may and clocks lower) and one by one (the L2 flushed before each). The share is of DeepGEMM's
forward product of the same shape in the same run. Then, of a training step,
what makes codes, dense layers beside cuBLASLt, and routed experts, forward and backward, beside bf16's. Forms of a
kernel are timed beside each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from benchmarks.kernels.grouped import SHAPES, graph_of, in_turns
from benchmarks.kernels.timing import guarded
from rorqual.kernels import experts_grad
from rorqual.kernels import fp8_train as layers
from rorqual.kernels import fp8_train_dense as dense
from rorqual.kernels import fp8_train_experts as routed
from rorqual.kernels import fp8_train_gluon as hopper
from rorqual.kernels import fp8_train_gluon_tokens as hopper_tokens
from rorqual.kernels import fp8_train_products as products
from rorqual.kernels import fp8_train_quant as quant
from rorqual.kernels import fp8_train_swiglu as gated
from rorqual.kernels.ahead import compiled_ahead
from rorqual.kernels.fp8_train_products import Groups, padded_ends
from rorqual.kernels.fp8_train_quant import GRADIENT_FLOOR, Codes, Matrices

STEP = ((64, 6144, 1536, 1536), (64, 6144, 1536, 768))
"""Experts, rows, out, in of a training step's experts: 16 x 4096 tokens of geometry "3b" (docs/benchmarks.md)."""

DENSE = (
    (65536, 3648, 1536), (65536, 4096, 512), (65536, 1536, 2048), (65536, 3072, 1536), (65536, 1536, 1536)
)  # fmt: skip
"""Rows, out, in of that step's dense layers: attention's, then the shared experts'."""

APART = ((0,), (1000,), (2000,), (4000,))
"""Forms of the products: nanoseconds that the second group begins later."""

ROWS = ((8, 128), (16, 64), (4, None))
"""Forms of the quantisers: warps, registers."""

BACKWARD = ((16, 128), (8, 255))
"""Forms of SwiGLU's backward: warps, registers."""


def as_form(
    call: Callable[[int], Any], module: Any, names: tuple[str, ...], form: Any
) -> Callable[[int], Any]:
    """The call with the kernel of `module` in a form."""

    def one(number: int) -> Any:
        held = [getattr(module, name) for name in names]
        for name, value in zip(names, form, strict=True):
            setattr(module, name, value)
        found = call(number)
        for name, value in zip(names, held, strict=True):
            setattr(module, name, value)
        return found

    return one


def forms(
    call: Callable[[int], Any], module: Any, names: tuple[str, ...], which: Any
) -> list[tuple[str, Any]]:
    return [(" ".join(map(str, form)), as_form(call, module, names, form)) for form in which]


def row_forms(call: Callable[[int], Any]) -> list[tuple[str, Any]]:
    return forms(call, quant, ("WARPS", "REGISTERS"), ROWS)


def backward_forms(wide: Tensor, p: Tensor, slope: Tensor) -> list[tuple[str, Any]]:
    call = lambda _: gated.backward(wide, p, slope, pow2=True, slope_pow2=True)  # noqa: E731
    return forms(call, gated, ("WARPS", "REGISTERS"), BACKWARD)


def apart_forms(case: Case) -> list[tuple[str, list[tuple[str, Any]]]]:
    return [
        ("forward", forms(case.forward, hopper, ("APART",), APART)),
        ("dx", forms(case.input_slope, hopper, ("APART",), APART)),
        ("dw", forms(case.weight_slope, hopper_tokens, ("APART",), APART)),
    ]


def apart(found: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm."""
    found, want = found.detach().float(), want.detach().float()
    return float((found - want).norm() / want.norm())


class Case:
    """Rows of experts, their gradient and matrices, as codes both ways."""

    def __init__(self, counts: list[int], out: int, depth: int, spare: int = 0) -> None:
        self.out, self.depth, self.count = out, depth, len(counts)
        ends = padded_ends(torch.tensor(counts)).cuda()
        rows = int(ends[-1]) + spare
        self.groups = Groups.of(ends, rows)
        self.x = torch.randn(rows, depth, device="cuda", dtype=torch.bfloat16)
        self.slope = torch.randn(rows, out, device="cuda", dtype=torch.bfloat16) * 1e-6
        self.matrices = quant.empty_matrices(len(counts), out, depth, torch.device("cuda"))
        self.w = torch.empty(len(counts), out, depth, device="cuda", dtype=torch.bfloat16)
        self.w.normal_(std=depth**-0.5)
        quant.quantize_matrices(self.w, self.matrices)
        self.along, self.turned = quant.quantize_both(self.x)
        self.dy, self.dy_turned = quant.quantize_both(self.slope, floor=GRADIENT_FLOOR)
        self.work = 2.0 * sum(counts) * out * depth

    def forward(self, _: int = 0) -> Tensor:
        return products.rows_product(self.along, self.matrices[0], self.groups, self.out)

    def input_slope(self, _: int = 0) -> Tensor:
        return products.rows_product(self.dy, self.matrices[1], self.groups, self.depth)

    def weight_slope(self, _: int = 0) -> Tensor:
        return products.matrix_product(self.dy_turned, self.turned, self.groups, self.out, self.depth)


def check(counts: list[int], out: int, depth: int, spare: int) -> None:
    """Largest distances from the references: the forms that are used, and the portable ones."""
    case = Case(counts, out, depth, spare)
    found = []
    for rows, matrices, width in (
        (case.along, case.matrices[0], out), (case.dy, case.matrices[1], depth)
    ):  # fmt: skip
        want = products.rows_reference(rows, matrices, case.groups, width, torch.float32)
        y = products.rows_product(rows, matrices, case.groups, width)
        assert not y[int(case.groups.end) :].any()
        again = products.rows_product(rows, matrices, case.groups, width, add=y.clone())
        portable = torch.empty_like(y)
        products.rows_fast(rows, matrices, case.groups, portable)
        found += [apart(y, want), apart(again, 2 * want), apart(portable, want)]
    want = products.matrix_reference(case.dy_turned, case.turned, case.groups, out, depth)
    for kind in (torch.bfloat16, torch.float32):
        args = case.dy_turned, case.turned, case.groups
        dw = products.matrix_product(*args, out, depth, kind)
        assert not dw[[e for e, rows in enumerate(counts) if not rows]].any()
        again = products.matrix_product(*args, out, depth, add=dw.clone())
        portable = torch.empty_like(dw)
        products.matrix_fast(*args, portable)
        found += [apart(dw, want), apart(again, 2 * want), apart(portable, want)]
    print(f"check {counts} x {out} x {depth}: " + " ".join(f"{f:.1e}" for f in found), flush=True)
    assert max(found) < 5e-3


def check_gradients() -> None:
    """Dense layers' results and gradients against fp32's."""
    x, w = (torch.randn(size, 512, device="cuda", dtype=torch.bfloat16) for size in (1000, 768))
    up = (torch.randn_like(w) * 0.04).requires_grad_()
    down = (torch.randn(512, 768, device="cuda", dtype=torch.bfloat16) * 0.04).requires_grad_()
    x, w = x.requires_grad_(), (w * 0.04).requires_grad_()
    slope = torch.randn_like(x) * 1e-6
    wide = x.float()
    h = torch.nn.functional.silu(wide @ w.float().T) * (wide @ up.float().T)
    found = []
    for y, want, g, of in (
        (layers.linear(x, w), wide @ w.float().T, torch.randn(1000, 768, device="cuda").bfloat16(), (x, w)),
        (layers.swiglu_trained(x, w, up, down, None), h @ down.float().T, slope, (x, w, up, down)),
    ):
        pairs = zip(
            (y, *torch.autograd.grad(y, of, g)),
            (want, *torch.autograd.grad(want, of, g.float(), retain_graph=True)),
            strict=True,
        )
        found.append(" ".join(f"{apart(a, b):.3f}" for a, b in pairs))
    print(f"gradients against fp32: linear {found[0]}; SwiGLU {found[1]}", flush=True)


def rates(
    name: str, work: float, calls: list[tuple[str, Callable[[int], Any]]], unit: str = "TFLOP/s"
) -> None:
    """A line: every call in a row and one by one, and the share of the last one, DeepGEMM's."""
    scale = 1e12 if unit == "TFLOP/s" else 1e9
    row = [work / s / scale for s in in_turns([graph_of(call, lambda: None) for _, call in calls], 0.15)]
    alone = []
    for _, call in calls:
        ms = do_bench(lambda: call(0), warmup=5, rep=30, return_mode="median")  # noqa: B023
        alone.append(work / ms * 1e3 / scale)
    parts = []
    for (what, _), a, b in zip(calls, row, alone, strict=True):
        share = f" ({a / row[-1]:.0%}, {b / alone[-1]:.0%})" if calls[-1][0] == "DeepGEMM" else ""
        parts.append(f"{what} {a:.0f}, {b:.0f}{share}")
    print(f"{name}, {unit} in a row, one by one: " + "; ".join(parts), flush=True)


def time_shape(count: int, rows: int, out: int, depth: int) -> None:
    case = Case([rows] * count, out, depth)
    buffer = torch.zeros(count, out, depth, device="cuda")
    calls: list[tuple[str, Callable[[int], Any]]] = [
        ("forward", case.forward),
        ("dx", case.input_slope),
        ("dw", case.weight_slope),
        (
            "dw added in fp32",
            lambda _: products.matrix_product(
                case.dy_turned, case.turned, case.groups, out, depth, add=buffer
            ),
        ),
    ]
    try:
        import deep_gemm
    except ImportError:
        pass
    else:
        y = torch.empty(count * rows, out, device="cuda", dtype=torch.bfloat16)
        ids = torch.arange(count, device="cuda", dtype=torch.int32).repeat_interleave(rows)
        w = case.matrices[0].codes, case.matrices[0].scale

        def theirs(_: int) -> None:
            deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
                (case.along.codes, case.along.scale), w, y, ids, disable_ue8m0_cast=True
            )

        theirs(0)
        print(f"from DeepGEMM's: {apart(case.forward(), y):.1e}")
        calls.append(("DeepGEMM", theirs))
    rates(f"FP8 {count} x {rows} x {out} x {depth}", case.work, calls)
    if (count, rows, out, depth) in STEP:
        for name, calls in apart_forms(case):
            rates(f"{name} {count} x {rows} x {out} x {depth}, ns apart", case.work, calls)


def time_codes(tokens: int, chosen: int, count: int, width: int, depth: int) -> None:
    """What makes codes, on the rows of a step."""
    x = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16)
    calls = row_forms(lambda _: quant.quantize_both(x))
    calls.append(("copied", lambda _: x.clone()))
    rates(f"quantise {tuple(x.shape)}, warps, registers", 4.0 * x.numel(), calls, "GB/s")
    places = routed.by_expert(torch.rand(tokens, count, device="cuda").topk(chosen).indices, count)
    pairs = places.pair_P
    calls = row_forms(lambda _: quant.spread_both(x, pairs, chosen, True, end=places.ends_E[-1:]))
    name = f"spread {tuple(x.shape)} to {len(pairs)}, warps, registers"
    rates(name, 4.0 * tokens * chosen * depth, calls, "GB/s")
    w = torch.randn(count, width, depth, device="cuda", dtype=torch.bfloat16)
    matrices = quant.empty_matrices(count, width, depth, w.device)
    calls = [("both ways", lambda _: quant.quantize_matrices(w, matrices))]
    rates(f"quantise weights {tuple(w.shape)}", 4.0 * w.numel(), calls, "GB/s")
    wide = torch.randn(tokens * chosen, 2 * width, device="cuda", dtype=torch.bfloat16)
    slope = torch.randn(tokens * chosen, width, device="cuda", dtype=torch.bfloat16)
    p = torch.rand(tokens * chosen, device="cuda")
    # Forward: 4 bytes in, 1 out; backward: 6 in, 1 of the product and 4 of the gradients out.
    each = float(slope.numel())
    calls = [("forward", lambda _: gated.forward(wide, p, pow2=True))]
    rates(f"SwiGLU {tuple(wide.shape)} to codes", 5 * each, calls, "GB/s")
    calls = backward_forms(wide, p, slope)
    rates(f"SwiGLU {tuple(wide.shape)} backward, warps, registers", 11 * each, calls, "GB/s")


def time_dense(rows: int, out: int, depth: int) -> None:
    """One matrix: ours, cuBLASLt's, and what layers use."""
    case = Case([rows], out, depth)
    full = quant.room(out)

    def scaled(a: Codes, b: Tensor, b_scale: Tensor) -> Callable[[int], Tensor]:
        return lambda _: torch._scaled_mm(a.codes, b.t(), a.scale, b_scale.t(), out_dtype=torch.bfloat16)

    def used(x: Codes, m: Matrices, width: int) -> Callable[[int], Tensor]:
        return lambda _: dense.dense_rows(x, m, width, torch.bfloat16)

    one, other = case.matrices
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "forward": (
            case.forward, scaled(case.along, one.codes[0, :out], one.scale[0]), used(case.along, one, out)
        ),
        "dx": (
            case.input_slope, scaled(case.dy, other.codes[0], other.scale[0]), used(case.dy, other, depth)
        ),
        "dw": (
            case.weight_slope, scaled(case.dy_turned, case.turned.codes, case.turned.scale),
            lambda _: dense.dense_matrix(case.dy_turned, case.turned, out, depth, torch.bfloat16),
        ),
    }  # fmt: skip
    for name, (ours, theirs, chosen) in kinds.items():
        want = ours(0).squeeze(0)
        calls: list[tuple[str, Callable[[int], Any]]] = [("ours", ours)]
        if name == "dx" and full // 128 % 4:
            print("cuBLASLt, dx: reads blocks' scales in rows of four")
        else:
            try:
                calls.append((f"cuBLASLt ({apart(theirs(0)[: len(want)], want):.0e} apart)", theirs))
            except (RuntimeError, ValueError) as error:
                print(f"cuBLASLt, {name}: {str(error).splitlines()[0][:200]}")
        calls.append((f"used ({apart(chosen(0), want):.0e} apart)", chosen))
        rates(f"dense {name} {rows} x {out} x {depth}", case.work, calls)


def time_experts(tokens: int, chosen: int, count: int, width: int, depth: int) -> None:
    """A brick of routed experts, forward and backward: in bf16 and FP8, and the largest distance of the results."""
    x = torch.randn(tokens, depth, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ids = torch.rand(tokens, count, device="cuda").topk(chosen).indices
    p = torch.rand(tokens, chosen, device="cuda", requires_grad=True)
    shapes = (count, width, depth), (count, width, depth), (count, depth, width)
    ws = [torch.randn(s, device="cuda", dtype=torch.bfloat16) * s[-1] ** -0.5 for s in shapes]
    leaves = [x, p, *(w.requires_grad_() for w in ws)]
    slope = torch.randn_like(x) * 1e-6

    def one(form: Any) -> Callable[[int], list[Tensor]]:
        def run(_: int) -> list[Tensor]:
            y = form.routed_trained(x, ids, p, *ws)
            return [y.detach(), *torch.autograd.grad(y, leaves, slope)]

        return run

    calls = [("bf16", one(experts_grad)), ("FP8", one(routed))]
    found = [call(0) for _, call in calls]
    off = " ".join(f"{apart(a, b):.3f}" for a, b in zip(*found, strict=True))
    print(f"experts: FP8 from bf16 {off}", flush=True)
    del found
    times = []
    for name, call in calls:
        ms = do_bench(lambda: call(0), warmup=20, rep=200, return_mode="median")  # noqa: B023
        rate = 18.0 * tokens * chosen * width * depth / ms / 1e9
        torch.cuda.reset_peak_memory_stats()
        begin = torch.cuda.memory_allocated()
        call(0)
        peak = (torch.cuda.max_memory_allocated() - begin) / 2**30
        times.append(f"{name} {ms:.2f} ms, {rate:.0f} TFLOP/s, {peak:.1f} GiB")
    print(
        f"experts {tokens} x {chosen} of {count} x {width} x {depth}, both ways: " + "; ".join(times),
        flush=True,
    )


def compile_all() -> None:
    """Pass through all kernels, in all forms."""
    for case in (Case([128, 128], 256, 256), Case([128], 128, 128), Case([128, 128], 512, 640)):
        y = case.forward()
        products.rows_product(case.along, case.matrices[0], case.groups, case.out, add=y)
        products.rows_fast(case.along, case.matrices[0], case.groups, y)
        case.input_slope()
        wide = torch.randn(128, 512, device="cuda", dtype=torch.bfloat16)
        p = torch.rand(128, device="cuda")
        pairs = torch.arange(128, device="cuda")
        end = torch.full((1,), 128, dtype=torch.int32, device="cuda")
        others = [
            *row_forms(lambda _: quant.quantize_both(case.x)),  # noqa: B023
            *row_forms(lambda _: quant.spread_both(case.x, pairs, 6, True, end=end)),  # noqa: B023
            *backward_forms(wide, p, wide[:, :256].contiguous()),
            *(form for _, calls in apart_forms(case) for form in calls),
        ]
        for _, call in others:
            call(0)
        gated.forward(wide, p, pow2=True)
        for kind in (torch.bfloat16, torch.float32):
            args = case.dy_turned, case.turned, case.groups, case.out, case.depth
            products.matrix_fast(*args[:3], products.matrix_product(*args, kind))
            products.matrix_product(*args, add=torch.zeros(case.w.shape, device="cuda", dtype=kind))


def main() -> None:
    torch.manual_seed(int(time.time()))
    begun = time.time()
    with compiled_ahead():
        compile_all()
    print(f"compiled in {time.time() - begun:.0f} s", flush=True)
    guarded(check, [1024, 0, 2048, 128], 512, 768, 384)
    guarded(check, [100, 300, 0, 1000], 640, 1408, 0)
    guarded(check, [77], 208, 336, 0)
    guarded(check_gradients)
    for shape in (*SHAPES, *STEP):
        guarded(time_shape, *shape)
        torch.cuda.empty_cache()
    guarded(time_codes, 65536, 6, 64, 768, 1536)
    torch.cuda.empty_cache()
    for matrix in DENSE:
        guarded(time_dense, *matrix)
        torch.cuda.empty_cache()
    guarded(time_experts, 65536, 6, 64, 768, 1536)
    print(f"{time.time() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
