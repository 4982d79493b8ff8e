"""Quantisation against formulas written number by number, in Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rorqual.kernels import quant

FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = [(1, 1), (128, 128), (129, 127), (576, 256), (64, 300), (3, 5)]


def e4m3(code: int) -> float:
    """What an E4M3 code means: 4 exponent bits (bias 7), 3 of mantissa, no infinities."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def every_code() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def random_codes(*shape: int) -> torch.Tensor:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    return torch.where(codes & 127 == 127, codes - 1, codes).view(torch.float8_e4m3fn)


def elementwise(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Dequantisation of one matrix in fp64, a number at a time."""
    values = [e4m3(c) for c in codes.view(torch.uint8).flatten().tolist()]
    out = torch.tensor(values, dtype=torch.float64).view(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] *= float(scale[i // block[0], j // block[1]])
    return out


def test_all_256_codes_mean_what_the_format_says():
    expected = torch.tensor([e4m3(c) for c in range(256)])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(
            quant.decode_fp8(every_code(), dtype).nan_to_num(7.0).float(), expected.nan_to_num(7.0)
        )


@pytest.mark.parametrize("shape", [(1, 1), (129, 127), (64, 300), (3, 5)])
@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 128), (7, 3)])
def test_fp8_equals_the_elementwise_product(shape, block):
    codes = random_codes(*shape)
    scale = torch.rand(quant.blocks(shape[0], block[0]), quant.blocks(shape[1], block[1])) + 0.01
    expected = elementwise(codes, scale, block)
    assert torch.equal(quant.dequantize_fp8(codes, scale, block, torch.float64), expected)
    single = quant.dequantize_fp8(codes, scale, block, torch.float32)
    assert torch.equal(single, expected.float())
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(quant.dequantize_fp8(codes, scale, block, dtype), single.to(dtype))


def test_power_of_two_scales_may_be_kept_in_a_byte():
    codes, scale = random_codes(130, 140), torch.tensor([[0.5, 4.0], [2.0**-9, 1.0]])
    byte = scale.to(torch.float8_e8m0fnu)
    plain = quant.dequantize_fp8(codes, scale, (128, 128), torch.float32)
    assert torch.equal(quant.dequantize_fp8(codes, byte, (128, 128), torch.float32), plain)


def test_stacked_experts_equal_each_alone():
    w = torch.randn(3, 192, 200)
    codes, scale = quant.quantize_fp8(w)
    assert codes.shape == w.shape and scale.shape == (3, 2, 2)
    packed, scale4 = quant.quantize_fp4(w[..., :192])
    for e in range(3):
        one, one_scale = quant.quantize_fp8(w[e])
        assert torch.equal(one.view(torch.uint8), codes[e].view(torch.uint8)) and torch.equal(
            one_scale, scale[e]
        )
        alone = quant.dequantize_fp8(one, one_scale, (128, 128), torch.float32)
        assert torch.equal(quant.dequantize_fp8(codes, scale, (128, 128), torch.float32)[e], alone)
        alone = quant.dequantize_fp4(packed[e], scale4[e], torch.float32)
        assert torch.equal(quant.dequantize_fp4(packed, scale4, torch.float32)[e], alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ue8m0", [False, True])
def test_fp8_scale_is_the_blocks_amax_over_448(shape, ue8m0):
    w = torch.randn(shape) * torch.rand(shape).exp()
    codes, scale = quant.quantize_fp8(w, (128, 128), ue8m0)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            amax = float(w[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128].abs().max())
            s = float(scale[i, j])
            if ue8m0:
                assert math.frexp(s)[0] == 0.5 and s / 2 * 448 < amax <= s * 448 * (1 + 1e-6)
            else:
                assert s == pytest.approx(amax / 448, rel=1e-6)
    back = quant.dequantize_fp8(codes, scale, (128, 128), torch.float32)
    spacing = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    assert ((back - w).abs() <= (w.abs() / 16).maximum(spacing * 2**-10) * 1.0001).all()


def test_tiny_and_zero_blocks_take_the_floor():
    for value in (0.0, 1e-9):
        codes, scale = quant.quantize_fp8(torch.full((4, 4), value))
        assert float(scale) == pytest.approx(1e-4 / 448, rel=1e-6)
        assert quant.dequantize_fp8(codes, scale, (128, 128), torch.float32).abs().max() <= 1e-8


def test_fp8_rounds_to_the_nearest_code_and_even_at_halves():
    values = torch.tensor([e4m3(c) for c in range(127)])
    x = torch.cat((torch.rand(2000) * 448, torch.rand(500) * 0.02, (values[1:] + values[:-1]) / 2, values))
    codes = quant.encode_fp8(x[None], torch.ones(1, 1), (1, x.numel()))[0].view(torch.uint8).long()
    distance = (x[:, None] - values).abs()
    best = distance.amin(1)
    assert torch.equal(distance.gather(1, codes[:, None])[:, 0], best)
    tied = (distance == best[:, None]).sum(1) > 1
    assert tied.sum() >= 126 and (codes[tied] % 2 == 0).all()


def test_fp8_saturates_instead_of_overflowing():
    codes = quant.encode_fp8(torch.tensor([[1e9, -1e9, 449.0]]), torch.ones(1, 1), (1, 128))
    assert codes.float().tolist() == [[448.0, -448.0, 448.0]]


@given(st.floats(min_value=1e-30, max_value=1e30, allow_nan=False), st.integers(-2, 2))
def test_power_of_two_ceiling_is_exact(x, steps):
    single = torch.tensor(2.0 ** round(math.log2(x)), dtype=torch.float32)
    for _ in range(abs(steps)):
        single = torch.nextafter(single, torch.tensor(math.inf if steps > 0 else 0.0))
    for value in (single, torch.tensor(x, dtype=torch.float32)):
        power = float(quant.ceil_power_of_two(value))
        assert math.frexp(power)[0] == 0.5 and power / 2 < float(value) <= power


# ------------------------------------------------------------------------------------------------ FP4


def test_fp4_packs_the_low_nibble_first():
    codes = torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)
    packed = quant.pack_fp4(codes)
    assert packed.dtype == torch.int8 and packed.view(torch.uint8).tolist() == [[0x21, 0x0F]]
    assert quant.unpack_fp4(packed).tolist() == [[0.5, 1.0, -6.0, 0.0]]


def test_every_fp4_byte_unpacks_to_its_two_values():
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8)[None]
    values = quant.unpack_fp4(packed, torch.bfloat16)[0].tolist()
    for byte in range(256):
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            assert values[2 * byte + half] == (-FP4[nibble - 8] if nibble & 8 else FP4[nibble])


def test_fp4_rounds_to_the_nearest_value_and_even_at_halves():
    table = torch.tensor(FP4)
    x = torch.cat(
        (torch.rand(1000) * 6, (table[1:] + table[:-1]) / 2, table, torch.tensor([6.5, 100.0, 0.0]))
    )
    x = torch.cat((x, -x))
    x = torch.cat((x, torch.zeros(-x.numel() % 32)))
    packed = quant.encode_fp4(x[None], torch.ones(1, x.numel() // 32))
    got = quant.unpack_fp4(packed)[0]
    distance = (x.abs().clamp(max=6)[:, None] - table).abs()
    nearest = distance.amin(1)
    assert torch.equal((x.clamp(-6, 6) - got).abs(), nearest)
    assert torch.equal(got.signbit(), x.signbit())
    tied = (distance == nearest[:, None]).sum(1) > 1
    code = torch.bucketize(got.abs(), table)
    assert tied.sum() >= 14 and (code[tied] % 2 == 0).all()


def test_fp4_scale_is_the_least_power_of_two_that_reaches_the_amax():
    w = torch.randn(6, 96) * torch.rand(6, 1).mul(20).exp()
    packed, scale = quant.quantize_fp4(w)
    assert packed.shape == (6, 48) and scale.shape == (6, 3) and scale.dtype == torch.float8_e8m0fnu
    amax = w.abs().unflatten(1, (3, 32)).amax(-1)
    assert (scale.float() * 6 >= amax).all() and (scale.float() * 3 < amax).all()
    back = quant.dequantize_fp4(packed, scale, torch.float32)
    assert (((back - w).abs().unflatten(1, (3, 32)) / scale.float()[..., None]) <= 1.0).all()


def test_fp4_is_exact_in_bfloat16():
    packed = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-20, 20, (8, 4)).float()).to(torch.float8_e8m0fnu)
    wide = quant.dequantize_fp4(packed, scale, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quant.dequantize_fp4(packed, scale, dtype).double(), wide)
    spread = scale.double().repeat_interleave(32, 1)
    assert torch.equal(wide, quant.unpack_fp4(packed, torch.float64) * spread)


# --------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("power", [False, True])
def test_fp8_codes_survive_being_multiplied_out(held, power):
    scale = torch.rand(40, 1) * 1e-3 + 1e-7
    scale = quant.ceil_power_of_two(scale) if power else scale
    codes = every_code()[None].view(torch.uint8).repeat(40, 1)
    codes[:, [127, 255]] = 0
    codes = codes.view(torch.float8_e4m3fn)
    values = quant.dequantize_fp8(codes, scale, (1, 256), held)
    again = quant.encode_fp8(values, scale, (1, 256))
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float64])
def test_fp4_codes_survive_being_multiplied_out(held):
    packed = torch.arange(256, dtype=torch.uint8).view(torch.int8)[None].repeat(9, 1)
    scale = torch.exp2(torch.arange(-60, 66, 14).float())[:, None].expand(9, 16).to(torch.float8_e8m0fnu)
    values = quant.dequantize_fp4(packed, scale, held)
    assert torch.equal(quant.encode_fp4(values, scale), packed)


def test_fp4_recasts_to_fp8_exactly_when_scales_are_close():
    packed = torch.randint(-128, 128, (2, 200, 96), dtype=torch.int8)
    scale = torch.exp2(torch.randint(-9, -2, (2, 200, 6)).float()).to(torch.float8_e8m0fnu)
    codes, wide = quant.recast_fp4(packed, scale)
    assert codes.shape == (2, 200, 192) and wide.shape == (2, 2, 2)
    same = quant.dequantize_fp8(codes, wide, (128, 128), torch.float32)
    assert torch.equal(same, quant.dequantize_fp4(packed, scale, torch.float32))


def test_fp4_recast_refuses_to_lose_values():
    scale = torch.ones(4, 2)
    scale[0, 0] = 2.0**-20
    with pytest.raises(quant.QuantError, match="not exact"):
        quant.recast_fp4(torch.full((4, 32), 0x11, dtype=torch.int8), scale)


def test_what_does_not_fit_together_is_refused():
    codes = random_codes(130, 128)
    with pytest.raises(quant.QuantError, match=r"need scales \(2, 1\), got \(1, 1\)"):
        quant.dequantize_fp8(codes, torch.ones(1, 1), (128, 128), torch.float32)
    with pytest.raises(quant.QuantError, match="ue8m0"):
        quant.quantize_fp8(torch.randn(4, 4), scale_dtype=torch.float8_e8m0fnu)
    with pytest.raises(quant.QuantError, match="need scales"):
        quant.dequantize_fp4(torch.zeros(4, 32, dtype=torch.int8), torch.ones(4, 1), torch.float32)
    with pytest.raises(quant.QuantError, match="multiple"):
        quant.quantize_fp4(torch.randn(4, 40))
    with pytest.raises(quant.QuantError, match="packed"):
        quant.pack_fp4(torch.zeros(1, 3, dtype=torch.uint8))
    with pytest.raises(quant.QuantError, match="cut through"):
        quant.recast_fp4(torch.zeros(4, 16, dtype=torch.int8), torch.ones(4, 1), (128, 48))
