"""The published integers (facts, sections 2.1 to 2.4) from the registry's configs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rorqual.family import ConfigError, account, config, memory, models, pieces

TOTALS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2.5": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,
    "deepseek-r1": 671_026_419_200,
    "deepseek-v3.2": 671_877_944_064,
    "deepseek-v4-flash": 284_332_240_471,
    "deepseek-v4-pro": 1_572_997_201_763,
}
BILLIONS = {  # total, as published or computed to three places
    "deepseek-llm-7b": "6.910",
    "deepseek-llm-67b": "67.425",
    "deepseek-coder-1.3b": "1.346",
    "deepseek-coder-5.7bmqa": "5.700",
    "deepseek-coder-6.7b": "6.741",
    "deepseek-coder-33b": "33.343",
    "deepseek-moe-16b": "16.376",
    "r1-distill-qwen-1.5b": "1.777",
    "r1-distill-qwen-7b": "7.616",
    "r1-distill-qwen-14b": "14.770",
    "r1-distill-qwen-32b": "32.764",
    "r1-distill-llama-8b": "8.030",
    "r1-distill-llama-70b": "70.554",
    "deepseek-r1-0528-qwen3-8b": "8.191",
}
ACTIVE = {  # billions without and with the embedding table
    "deepseek-moe-16b": ("2.619", "2.829"),
    "deepseek-v2-lite": ("2.451", "2.661"),
    "deepseek-v2": ("20.852", "21.376"),
    "deepseek-v3": ("36.626", "37.552"),
    "deepseek-v3.2": ("37.477", "38.404"),
    "deepseek-v4-flash": ("13.270", "13.800"),
    "deepseek-v4-pro": ("48.852", "49.779"),
}
ELEMENTS = {
    "deepseek-llm-7b": 245_760,
    "deepseek-llm-67b": 194_560,
    "deepseek-coder-1.3b": 98_304,
    "deepseek-coder-5.7bmqa": 8_192,
    "deepseek-coder-6.7b": 262_144,
    "deepseek-coder-33b": 126_976,
    "deepseek-moe-16b": 114_688,
    "deepseek-v2-lite": 15_552,
    "deepseek-v2": 34_560,
    "deepseek-v3": 35_136,
    "r1-distill-qwen-1.5b": 14_336,
    "r1-distill-qwen-7b": 28_672,
    "r1-distill-qwen-14b": 98_304,
    "r1-distill-qwen-32b": 131_072,
    "r1-distill-llama-8b": 65_536,
    "r1-distill-llama-70b": 163_840,
    "deepseek-r1-0528-qwen3-8b": 73_728,
}


def billions(number: int) -> str:
    return f"{number / 1e9:.3f}"


@pytest.mark.parametrize("name", TOTALS)
def test_totals(name: str) -> None:
    assert account.parameters(config(name)).total == TOTALS[name]


@pytest.mark.parametrize("name", BILLIONS)
def test_totals_rounded(name: str) -> None:
    assert billions(account.parameters(config(name)).total) == BILLIONS[name]


@pytest.mark.parametrize("name", ACTIVE)
def test_active(name: str) -> None:
    p = account.parameters(config(name))
    assert (billions(p.active_without_embedding), billions(p.active)) == ACTIVE[name]


def test_mtp() -> None:
    v3 = account.parameters(config("deepseek-v3"))
    assert v3.mtp_unique == 11_610_068_224
    assert v3.mtp_copies == 1_853_358_080
    assert v3.checkpoint == 684_489_845_504
    assert billions(v3.mtp_active) == "2.541"
    assert billions(account.parameters(config("deepseek-v3.2")).checkpoint) == "685.355"
    assert account.parameters(config("deepseek-v4-flash")).with_mtp == 290_942_289_362
    assert account.parameters(config("deepseek-v4-pro")).with_mtp == 1_598_837_347_742
    assert account.parameters(config("deepseek-v4-pro")).mtp_copies == 0


def test_v3_split() -> None:
    p = account.parameters(config("deepseek-v3"))
    assert p.routed == 653_908_770_816
    assert p.total - p.routed == 17_117_648_384
    assert p.routed_active == 20_434_649_088
    assert p.routed_active * 32 == p.routed


@pytest.mark.parametrize(
    ("name", "count"),
    [("deepseek-v3", 187_107_328), ("deepseek-v2", 149_227_520), ("deepseek-v2-lite", 13_763_072)],
)
def test_attention_of_a_layer(name: str, count: int) -> None:
    model = config(name)
    parts = pieces.attention_pieces(model.layers[0].attention, model.hidden)
    assert sum(piece.total for piece in parts) == count


def test_indexer_of_a_layer() -> None:
    model = config("deepseek-v3.2")
    assert account.parameters(model).part("index") == 61 * 13_959_424


@pytest.mark.parametrize("name", ELEMENTS)
def test_cache_elements(name: str) -> None:
    kept = account.cache(config(name))
    assert kept.elements == ELEMENTS[name]
    assert kept.growing == 2 * ELEMENTS[name]
    assert kept.fixed == kept.pooling == 0


def test_serving_caches() -> None:
    assert account.cache(config("deepseek-v3.2"), "serving").growing == 48_068
    flash = account.cache(config("deepseek-v4-flash"), "serving")
    pro = account.cache(config("deepseek-v4-pro"), "serving")
    assert (int(flash.growing), flash.fixed) == (3_514, 3_214_336)
    assert (int(pro.growing), pro.fixed) == (5_031, 4_559_872)
    assert flash.growing == 21 * Fraction(584 + 68, 4) + 20 * Fraction(584, 128)
    assert f"{float(flash.growing) * 2**20 / 2**30:.2f}" == "3.43"
    assert f"{float(pro.growing) * 2**20 / 2**30:.2f}" == "4.91"
    assert f"{float(flash.growing) / 48_068:.4f}" == "0.0731"
    assert f"{float(flash.growing) / (2 * account.gqa_elements(config('deepseek-v4-flash'))):.3f}" == "0.020"
    with pytest.raises(ConfigError, match="layout 'int3'"):
        account.cache(config("deepseek-v3"), "int3")


def test_v4_pooling_state_is_the_unfinished_windows() -> None:
    """Decoding keeps fp32 values and gates: 8 x 1024 for CSA, 8 x 256 for its indexer, 128 x 512 for HCA."""
    kept = account.cache(config("deepseek-v4-flash"))
    assert kept.pooling == 21 * (8 * 1024 + 8 * 256) * 2 * 4 + 20 * 128 * 512 * 2 * 4


def test_cache_claims() -> None:
    v2, old = config("deepseek-v2"), config("deepseek-llm-67b")
    ours, theirs = account.cache(v2).elements, account.cache(old).elements
    assert (
        f"{float(1 - ours * 6 / 8 / (2 * theirs)):.4f}" == "0.9334"
    )  # the abstract's 93.3%, 6 bits against bf16
    assert f"{float(1 - ours / theirs):.4f}" == "0.8224"
    assert f"{float(account.mha_elements(v2) / ours):.2f}" == "56.89"
    v3 = config("deepseek-v3")
    assert 2 * account.mha_elements(v3) * 100_000 == 399_769_600_000
    assert account.cache(v3).at(100_000) == 7_027_200_000


def test_v4_flash_file_size() -> None:
    """The released V4-Flash files hold 159,617,149,040 bytes, 0.005% of them headers."""
    assert memory.weight_bytes(config("deepseek-v4-flash"), mtp=True) == 159_609_485_896


def test_flops() -> None:
    v3 = config("deepseek-v3")
    short, long = account.flops(v3, 1), account.flops(v3, 4096)
    assert short.matmul == long.matmul
    assert long.attention == 4096 * short.attention == 61 * 2 * 128 * (576 + 512) * 4096
    expanded = account.flops(v3, 4096, absorbed=False)
    assert expanded.attention == 61 * 2 * 128 * (192 + 128) * 4096
    norms = account.parameters(v3).part("norm")
    assert abs(long.matmul / 2 - account.parameters(v3).active_without_embedding + norms) < 1e6
    sparse = account.flops(config("deepseek-v3.2"), 100_000)
    assert sparse.attention == 61 * 2 * 128 * (576 + 512) * 2048
    assert sparse.index == 61 * 2 * 64 * 128 * 100_000
    v4 = account.flops(config("deepseek-v4-flash"), 131_072)
    entries = 43 * 128 + 21 * 512 + 20 * 1024
    assert v4.attention == 4 * 64 * 512 * entries
    assert v4.index == 21 * 2 * 64 * 128 * 32_768
    with pytest.raises(ConfigError, match="context"):
        account.flops(v3, 0)


def test_a_tied_model_counts_its_table_once() -> None:
    apart = config("r1-distill-qwen-1.5b")
    tied = apart.replace(tied=True)
    p, q = account.parameters(apart), account.parameters(tied)
    assert p.total - q.total == apart.vocab * apart.hidden
    assert q.active_without_embedding == q.active == q.total
    assert account.flops(apart, 9).matmul == account.flops(tied, 9).matmul


def test_every_part_adds_up() -> None:
    for card in models():
        p = account.parameters(card.config)
        assert sum(total for total, _ in p.parts.values()) == p.total
        assert sum(active for _, active in p.parts.values()) == p.active
        layers = sum(account.layer_parameters(card.config, layer).total for layer in card.config.layers)
        assert p.total - layers == sum(x.total for x in pieces.outer_pieces(card.config))


def test_runs_cover_every_layer() -> None:
    for card in models():
        layers = card.config.layers
        again = [layer for run in pieces.runs(layers) for layer in run.period * run.count]
        assert tuple(again) == layers
    assert [(r.span, len(r.period), r.count) for r in pieces.runs(config("deepseek-v4-pro").layers)] == [
        ("0-1", 1, 2),
        ("2", 1, 1),
        ("3-60", 2, 29),
    ]


def test_serving() -> None:
    v3 = config("deepseek-v3")
    s = memory.serving(v3, context=131_072, batch=1)
    assert s.precision == "fp8"
    assert s.total == s.weights + s.cache + s.activations
    counts = {fit.device.name: fit.count for fit in s.fits}
    assert counts["H200 141 GB"] == 8  # one node, as DeepSeek's README has it
    assert counts["H100 80 GB"] == 16
    assert counts["Mac 64 GB"] is None
    lite = memory.serving(config("deepseek-v2-lite"), context=4096)
    assert lite.precision == "bf16"
    assert {fit.device.name: fit.count for fit in lite.fits}["A100 80 GB"] == 1
    more = memory.serving(v3, context=131_072, batch=64)
    assert more.cache == 64 * s.cache
    assert memory.weight_bytes(v3, "bf16") == pytest.approx(2 * 671_026_419_200, rel=1e-3)
    for bad in ({"context": 0}, {"context": 8, "batch": 0}, {"context": 8, "precision": "int4"}):
        with pytest.raises(ConfigError):
            memory.serving(v3, **bad)  # type: ignore[arg-type]
