"""Names, aliases and the facts on the cards."""

from __future__ import annotations

import pytest

from rorqual.family import ConfigError, card, config, models
from rorqual.family.parts import GQA, MLA, CompressedAttention, LinearScaling, MoE, Yarn

ENCODINGS = {None, "user-assistant", "coder", "roles", "r1", "r1-0528", "r1-zero", "v31", "v32", "v4"}
CHECKPOINTS = """
    deepseek-llm-7b-base deepseek-llm-7b-chat deepseek-llm-67b-base deepseek-llm-67b-chat
    deepseek-coder-1.3b-base deepseek-coder-1.3b-instruct deepseek-coder-5.7bmqa-base deepseek-coder-6.7b-base
    deepseek-coder-6.7b-instruct deepseek-coder-33b-base deepseek-coder-33b-instruct
    deepseek-coder-7b-base-v1.5
    deepseek-coder-7b-instruct-v1.5 deepseek-math-7b-base deepseek-math-7b-instruct deepseek-math-7b-rl
    deepseek-moe-16b-base deepseek-moe-16b-chat deepseek-v2 deepseek-v2-chat deepseek-v2-chat-0628
    deepseek-v2-lite deepseek-v2-lite-chat deepseek-v2.5 deepseek-v2.5-1210 deepseek-coder-v2-base
    deepseek-coder-v2-instruct deepseek-coder-v2-lite-base deepseek-coder-v2-lite-instruct deepseek-prover-v1
    deepseek-prover-v1.5-base deepseek-prover-v1.5-sft deepseek-prover-v1.5-rl deepseek-prover-v2-7b
    deepseek-prover-v2-671b deepseek-v3-base deepseek-v3 deepseek-v3-0324 deepseek-r1-zero deepseek-r1
    deepseek-r1-0528 deepseek-v3.1-base deepseek-v3.1 deepseek-v3.1-terminus deepseek-v3.2-exp-base
    deepseek-v3.2-exp deepseek-v3.2 deepseek-v3.2-speciale deepseek-math-v2 deepseek-v4-flash-base
    deepseek-v4-flash deepseek-v4-pro-base deepseek-v4-pro deepseek-r1-distill-qwen-1.5b
    deepseek-r1-distill-qwen-7b deepseek-r1-distill-qwen-14b deepseek-r1-distill-qwen-32b
    deepseek-r1-distill-llama-8b deepseek-r1-distill-llama-70b deepseek-r1-0528-qwen3-8b
""".split()  # noqa: SIM905
ALIASES = {
    "deepseek-coder-33b": "deepseek-coder-33b-base",
    "r1-distill-qwen-1.5b": "deepseek-r1-distill-qwen-1.5b",
    "deepseek-ai/DeepSeek-V3.1-Terminus": "deepseek-v3.1-terminus",
    "DeepSeek-V2-Lite": "deepseek-v2-lite",
    "deepseek-v2-0628": "deepseek-v2-chat-0628",
    "v3": "deepseek-v3",
    " r1 ": "deepseek-r1",
    "deepseek-coder-7b-v1.5": "deepseek-coder-7b-base-v1.5",
}


def test_every_released_language_checkpoint_is_there() -> None:
    names = [c.name for c in models()]
    assert len(names) == len(set(names))
    assert not set(CHECKPOINTS) - set(names)


def test_cards_are_whole() -> None:
    for c in models():
        assert c.name == c.hub_id.split("/")[1].lower() == c.config.name
        assert card(c.name) is c
        assert card(c.hub_id) is c
        assert config(c.name) is c.config
        assert c.encoding in ENCODINGS
        assert c.encoding is None or "base" not in c.name
        assert c.context <= c.config.max_positions
        assert c.released[:4] in ("2023", "2024", "2025", "2026")
        assert c.licence
        assert c.source
    dates = [c.released for c in models()]
    assert dates == sorted(dates)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases(alias: str) -> None:
    assert card(alias).name == ALIASES[alias]


@pytest.mark.parametrize(
    ("wrong", "close"),
    [("deepseek-v33", "deepseek-v3"), ("deepsek-r1", "deepseek-r1"), ("v4-flesh", "deepseek-v4-flash")],
)
def test_an_unknown_name_offers_close_ones(wrong: str, close: str) -> None:
    with pytest.raises(ConfigError, match=f"{wrong}.*did you mean.*{close}"):
        card(wrong)


def test_a_hopeless_name_says_where_to_look() -> None:
    with pytest.raises(ConfigError, match=r"'zzzz'.*rorqual.models\(\)"):
        card("zzzz")


@pytest.mark.parametrize(
    "name", ["janus", "Janus-Pro-7B", "deepseek-ocr", "deepseek-ocr-2", "vl", "deepseek-vl2-tiny"]
)
def test_multimodal_members_are_not_supported_yet(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*multimodal members.*not supported yet"):
        card(name)


def test_siblings_differ_only_where_they_should() -> None:
    base, instruct = card("deepseek-coder-33b-base"), card("deepseek-coder-33b-instruct")
    assert (base.config.eos, instruct.config.eos) == ((32014,), (32021,))
    assert base.config.replace(name="", eos=()) == instruct.config.replace(name="", eos=())
    v3, r1, v31 = config("deepseek-v3"), config("deepseek-r1"), config("deepseek-v3.1")
    assert v3.replace(name="") == r1.replace(name="")
    assert v3.quantization is not None and not v3.quantization.ue8m0
    assert v31.quantization is not None and v31.quantization.ue8m0
    assert v31.layers == v3.layers
    v4, raw = config("deepseek-v4-flash"), config("deepseek-v4-flash-base")
    assert v4.quantization is not None and v4.quantization.experts == "fp4"
    assert raw.quantization is not None and raw.quantization.experts == "fp8"


def test_shapes_that_tell_the_generations_apart() -> None:
    mqa = config("deepseek-coder-5.7bmqa").layers[0].attention
    assert isinstance(mqa, GQA) and mqa.kv_heads == 1 and mqa.rope.scaling == LinearScaling(4.0)
    lite, big = config("deepseek-v2-lite").layers[1], config("deepseek-v2").layers[1]
    assert isinstance(lite.attention, MLA) and lite.attention.q_rank is None
    assert isinstance(big.ff, MLA | MoE) and isinstance(big.ff, MoE)
    assert (big.ff.router.groups, big.ff.router.keep, big.ff.router.group_score) == (8, 3, "max")
    assert big.ff.router.scale == 16.0
    yarn = big.attention.rope.scaling
    assert isinstance(yarn, Yarn) and yarn.mscale == 0.707
    assert f"{yarn.softmax_factor():.5f}" == "1.58963"
    v3 = config("deepseek-v3").layers[-1]
    assert isinstance(v3.attention, MLA) and isinstance(v3.attention.rope.scaling, Yarn)
    assert f"{v3.attention.rope.scaling.softmax_factor():.5f}" == "1.87385"
    assert v3.attention.rope.scaling.rotation_amplitude() == 1.0
    v25 = config("deepseek-v2.5").layers[0].attention.rope.scaling
    assert isinstance(v25, Yarn) and v25.mscale == 1.0


@pytest.mark.parametrize(("name", "kinds"), [("flash", (2, 21, 20)), ("pro", (0, 30, 31))])
def test_v4_layers(name: str, kinds: tuple[int, int, int]) -> None:
    model = config(f"deepseek-v4-{name}")
    parts = [layer.attention for layer in model.layers]
    found = [p.kind for p in parts if isinstance(p, CompressedAttention)]
    assert tuple(found.count(kind) for kind in ("SWA", "CSA", "HCA")) == kinds
    hashed = [isinstance(layer.ff, MoE) and layer.ff.router.hashed for layer in model.layers]
    assert hashed == [True] * 3 + [False] * (len(hashed) - 3)
    (mtp,) = model.mtp
    assert isinstance(mtp.attention, CompressedAttention) and mtp.attention.kind == "SWA"
    assert isinstance(mtp.ff, MoE) and not mtp.ff.router.hashed
    for part in parts:
        assert isinstance(part, CompressedAttention)
        far = part.compress is not None
        assert part.rope.theta == (160000.0 if far else 10000.0)
        scaling = part.rope.scaling
        assert (isinstance(scaling, Yarn) and scaling.rotation_amplitude() == 1.0) if far else scaling is None


def test_what_was_recalled_is_marked() -> None:
    assert "rope_theta" in card("deepseek-llm-7b").unverified
    assert "rope_scaling.mscale" in card("deepseek-coder-v2").unverified
    assert card("deepseek-coder-1.3b").unverified == ()
    assert card("deepseek-v3").unverified == ()
    assert card("deepseek-v4-pro").unverified == ()
    everything = {"num_hidden_layers", "vocab_size", "rope_theta", "rope_scaling", "rms_norm_eps"}
    assert everything <= set(card("deepseek-coder-7b-v1.5").unverified)
    assert "eos_token_id" not in card("deepseek-coder-7b-v1.5").unverified
    for name in ("deepseek-math-7b", "deepseek-prover-v1", "deepseek-prover-v1.5", "deepseek-prover-v2-7b"):
        assert everything | {"eos_token_id"} <= set(card(name).unverified)
    assert "max_position_embeddings" not in card("deepseek-prover-v2-7b").unverified
    assert "rms_norm_eps" in card("deepseek-llm-67b").unverified
    assert "encoding" in card("deepseek-math-v2").unverified
    assert "no tools" in card("deepseek-v3.2-speciale").note
