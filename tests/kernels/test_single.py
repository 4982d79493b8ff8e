"""The kernels of one token, against the operations they join."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rorqual.kernels import single, single_boxes, single_experts, single_mla, single_ring
from rorqual.kernels.experts import Weights
from rorqual.kernels.quant import E8M0, FP8, quantize_fp8
from tests.interpreter import repair
from tests.kernels.test_experts import exact


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)


def close(y: Tensor, want: Tensor, rtol: float = 6e-3) -> None:
    assert y.shape == want.shape and y.dtype == want.dtype and y.isfinite().all()
    error = (y.double() - want.double()).abs().max() / want.double().abs().max()
    assert error < rtol, error


def matrix(
    *shape: int, codes: bool, device: torch.device, powers: bool = False
) -> tuple[Tensor, Tensor | None]:
    w = torch.randn(*shape, device=device) * shape[-1] ** -0.5
    if not codes:
        return w.bfloat16(), None
    flat = w.reshape(-1, *shape[-2:])
    pairs = [quantize_fp8(m, (128, 128), powers) for m in flat]
    c = torch.stack([p[0] for p in pairs]).view(*shape)
    s = torch.stack([p[1] for p in pairs])
    s = s.view(*shape[:-2], *s.shape[1:])
    return c, s.to(E8M0) if powers else s


@pytest.mark.parametrize("codes", ["plain", "codes", "powers"])
@pytest.mark.parametrize(
    ("count", "width", "outs", "norm", "residual"),
    [
        (1, 256, (40, 7), True, False),
        (2, 200, (33,), False, True),
        (1, 130, (5,), True, True),
        (2, 384, (9, 130), True, False),
    ],
)
def test_rows(
    device: torch.device,
    codes: str,
    count: int,
    width: int,
    outs: tuple[int, ...],
    norm: bool,
    residual: bool,
) -> None:
    x = torch.randn(count, width + 8, device=device).bfloat16()[:, :width]
    held = codes != "plain"
    weights, scales = zip(
        *(matrix(o, width, codes=held, device=device, powers=codes == "powers") for o in outs), strict=True
    )
    by = (torch.rand(width, device=device).bfloat16() + 0.5, 1e-3) if norm else None
    res = torch.randn(count, outs[0] + 3, device=device).bfloat16()[:, : outs[0]] if residual else None
    normed = torch.empty(count, width, device=device, dtype=x.dtype) if norm else None
    how = {"BO": 4, "num_warps": 4}
    ys = single.rows(x, weights, scales, by, res, normed, how=how)
    for y, want in zip(ys, single.rows_reference(x, weights, scales, by, res), strict=True):
        close(y, want, 2e-2 if held else 6e-3)  # a code may round to the other side
    if by is not None and normed is not None:
        close(normed, torch.nn.functional.rms_norm(x, (width,), *by))


@pytest.mark.gpu
@pytest.mark.parametrize("codes", ["codes", "powers"])
@pytest.mark.parametrize(
    ("count", "width", "outs", "norm", "residual"),
    [
        (1, 2048, (3072, 576), True, False),
        (2, 2048, (2048,), False, True),
        (2, 384, (9, 130), True, False),
        (1, 128, (5,), True, True),
        (2, 2176, (129,), False, True),
        (2, 7168, (300, 3), True, False),
    ],
)
def test_rows_in_boxes(
    codes: str, count: int, width: int, outs: tuple[int, ...], norm: bool, residual: bool
) -> None:
    """The form on tensor cores, by its own plan and by another."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    device = torch.device("cuda")
    x = torch.randn(count, width + 8, device=device).bfloat16()[:, :width]
    weights, scales = zip(
        *(matrix(o, width, codes=True, device=device, powers=codes == "powers") for o in outs), strict=True
    )
    assert single_boxes.supported(x, weights, scales)
    by = (torch.rand(width, device=device).bfloat16() + 0.5, 1e-3) if norm else None
    res = torch.randn(count, outs[0] + 3, device=device).bfloat16()[:, : outs[0]] if residual else None
    want = single.rows_reference(x, weights, scales, by, res)
    for how in (None, {"BOXES": 1, "num_warps": 4}):
        for y, other in zip(single.rows(x, weights, scales, by, res, how=how), want, strict=True):
            close(y, other, 2e-2)  # a code may round to the other side


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "width", "limit"), [(1, 11264, None), (2, 384, 0.5), (2, 2176, None)])
def test_gated_rows_in_boxes(count: int, width: int, limit: float | None) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    device = torch.device("cuda")
    gate, up = (3 * torch.randn(count, width + 8, device=device).bfloat16()[:, :width] for _ in range(2))
    w, s = matrix(40, width, codes=True, device=device)
    assert single_boxes.supported(gate, [w], [s])
    res = torch.randn(count, 40, device=device).bfloat16()
    (y,) = single.rows(gate, [w], [s], None, res, up_ND=up, limit=limit)
    (want,) = single.rows_reference(gate, [w], [s], None, res, up_ND=up, limit=limit)
    close(y, want, 2e-2)


@pytest.mark.parametrize("codes", ["plain", "codes", "powers"])
@pytest.mark.parametrize(("count", "width", "limit"), [(1, 384, None), (2, 200, None), (1, 256, 0.5)])
def test_gated_rows(device: torch.device, codes: str, count: int, width: int, limit: float | None) -> None:
    """The second half of a dense layer."""
    gate, up = (3 * torch.randn(count, width + 8, device=device).bfloat16()[:, :width] for _ in range(2))
    w, s = matrix(33, width, codes=codes != "plain", device=device, powers=codes == "powers")
    res = torch.randn(count, 33, device=device).bfloat16()
    (y,) = single.rows(gate, [w], [s], None, res, how={"BO": 4, "num_warps": 4}, up_ND=up, limit=limit)
    (want,) = single.rows_reference(gate, [w], [s], None, res, up_ND=up, limit=limit)
    close(y, want, 2e-2 if codes != "plain" else 6e-3)


def test_rows_in_fp32(device: torch.device) -> None:
    """A router's logits."""
    x, (w, _) = torch.randn(1, 96, device=device).bfloat16(), matrix(11, 96, codes=False, device=device)
    by = (torch.rand(96, device=device).bfloat16(), 1e-6)
    (y,) = single.rows(x, [w], [None], by, out_dtype=torch.float32, how={"BO": 1, "num_warps": 4})
    (want,) = single.rows_reference(x, [w], [None], by, out_dtype=torch.float32)
    close(y, want, 4e-3)  # a normed number may round to the other side


def mixture(
    codes: str, count: int, shared: int, width: int, hidden: int, device: torch.device
) -> tuple[Weights, Weights, Weights, tuple[Weights, Weights, Weights] | None]:
    """Gate, up and down of `count` experts, and of the shared ones if there are any."""

    def three(*lead: int, inner: int = width) -> tuple[Weights, Weights, Weights]:
        made = []
        for shape in ((inner, hidden), (inner, hidden), (hidden, inner)):
            w, s = matrix(*lead, *shape, codes=codes != "plain", device=device, powers=codes == "powers")
            made.append(Weights(w, s, None if s is None else (128, 128)))
        return made[0], made[1], made[2]

    return *three(count), three(inner=shared * width) if shared else None


@pytest.mark.parametrize("codes", ["plain", "codes", "powers"])
@pytest.mark.parametrize(
    ("shared", "limit", "residual"), [(2, None, True), (0, 0.5, False), (1, None, False)]
)
def test_experts(device: torch.device, codes: str, shared: int, limit: float | None, residual: bool) -> None:
    count, width, hidden, chosen = 5, 128, 256, 3
    if codes == "plain":
        width, hidden = 72, 136

    gate, up, down, common = mixture(codes, count, shared, width, hidden, device)
    x = torch.randn(1, hidden, device=device).bfloat16()
    for ids in ([4, 0, 2], [1, 3, 99]):
        ids_NK = torch.tensor([ids], device=device, dtype=torch.int32)
        by = torch.rand(1, chosen, device=device)
        res = torch.randn(1, hidden, device=device).bfloat16() if residual else None
        how = {"BO": 4, "num_warps": 4}, {"BO": 2, "num_warps": 4}
        y = single_experts.through_experts(
            x, (ids_NK, by), gate, up, down, limit=limit, shared=common, residual_1D=res, how=how
        )
        # The residual is added to the rounded sum.
        want = exact(x, ids_NK, by, gate, up, down, common, limit).bfloat16()
        close(y, want if res is None else want + res, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("codes", ["plain", "codes", "powers"])
@pytest.mark.parametrize(
    ("shared", "limit", "residual", "width", "hidden"),
    [(2, None, True, 256, 512), (0, 0.5, False, 384, 512), (1, None, False, 384, 3072)],
)
def test_experts_in_a_ring(
    codes: str,
    shared: int,
    limit: float | None,
    residual: bool,
    width: int,
    hidden: int,
) -> None:
    """The form in one launch: launches follow one another on one state, each with other experts."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    count, chosen, device = 5, 6, torch.device("cuda")
    assert single_ring.supported(torch.empty(0, device=device), chosen + shared, width, hidden)

    gate, up, down, common = mixture(codes, count, shared, width, hidden, device)
    state = single_ring.new_state(chosen + shared, width, device)
    for ids in ([4, 0, 2, 1, 3, 0], [1, 3, 99, -1, 4, 2], [0, 1, 2, 3, 4, 0]):
        x = torch.randn(1, hidden, device=device).bfloat16()
        ids_NK = torch.tensor([ids], device=device, dtype=torch.int32)
        by = torch.rand(1, chosen, device=device)
        res = torch.randn(1, hidden, device=device).bfloat16() if residual else None
        y, again = (
            single_experts.through_experts(
                x, (ids_NK, by), gate, up, down, limit=limit, shared=common, residual_1D=res, state=state
            )
            for _ in range(2)
        )
        want = exact(x, ids_NK, by, gate, up, down, common, limit).bfloat16()
        close(y, want if res is None else want + res, 1e-2)
        assert torch.equal(y, again)


@pytest.mark.parametrize(
    ("ends", "width", "packed", "codes", "interleaved"),
    [
        ([1], 1, False, "plain", True),
        ([70], 1, True, "codes", False),
        ([129, 40], 1, False, "codes", True),
        ([67], 2, True, "plain", True),
        ([2], 2, False, "codes", False),
        ([97], 2, False, "plain", False),
    ],
)
def test_attention(
    device: torch.device, ends: list[int], width: int, packed: bool, codes: str, interleaved: bool
) -> None:
    heads, nope, rope, v, rank, size = 3, 128, 32, 128, 128, 32
    if codes == "plain":
        nope, v = 48, 20
    if packed and codes == "plain":
        rank = 256
    count, blocks = len(ends) * width, 6
    pages_count = len(ends) * blocks + 1
    latent = torch.randn(pages_count * size, rank + rope, device=device).bfloat16()
    from rorqual.kernels.mla_decode import pack_latents, unpack_latents

    pages = (pack_latents(latent, rank) if packed else latent).view(pages_count, size, -1)
    table = (
        (torch.randperm(pages_count - 1, device=device)[: len(ends) * blocks] + 1)
        .view(len(ends), blocks)
        .int()
    )
    q = torch.randn(count, heads, nope + rope, device=device).bfloat16()
    kv = torch.randn(count, rank + rope, device=device).bfloat16()
    norm = torch.rand(rank, device=device).bfloat16() + 0.5, 1e-6
    angle = torch.rand(count, rope // 2, device=device) * 6
    w, scale = matrix(heads * (nope + v), rank, codes=codes != "plain", device=device)
    position = [end - width + j for end in ends for j in range(width)]
    slots = [int(table[n // width, p // size]) * size + p % size for n, p in enumerate(position)]
    shared = (q, kv, norm, angle.cos(), angle.sin(), w.view(heads, nope + v, rank), scale)
    rest = {"width": width, "nope": nope, "interleaved": interleaved, "softmax_scale": 0.1}
    ends_S = torch.tensor(ends, device=device, dtype=torch.int32)
    slots_N = torch.tensor(slots, device=device)
    other = pages.clone()
    y = single_mla.attention(*shared, pages, slots_N, table, ends_S, **rest)
    want = single_mla.reference(*shared, other, slots_N, table, ends_S, **rest)
    close(y, want, 2e-2)
    if packed:
        pages, other = (unpack_latents(p, rank, rope).float() for p in (pages, other))
    close(pages[1:].float(), other[1:].float(), 8e-3 if not packed else 7e-2)


def test_what_fits() -> None:
    w = torch.zeros(4, 8, dtype=torch.bfloat16)
    assert single.fits(w, None, None) and not single.fits(w.float(), None, None)
    assert not single.fits(w.t(), None, None)
    codes, scale = torch.zeros(128, 128).to(FP8), torch.ones(1, 1)
    assert single.fits(codes, scale, (128, 128)) and not single.fits(codes, scale, (1, 128))
