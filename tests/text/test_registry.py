"""Finding the encoding of a model, and prompts to fill in."""

from dataclasses import dataclass

import pytest

from rorqual.text import ENCODINGS, EncodingError, detect, fim, get_encoding, repository

BOS, USER = "<｜begin▁of▁sentence｜>", "<｜User｜>"


@dataclass
class Files:
    """What a model's tokenizer files would show."""

    tokens: tuple[str, ...]
    chat_template: str | None = None
    vocab_size: int = 129_280
    eos: tuple[int, ...] = ()

    def id_of(self, token: str) -> int | None:
        return self.tokens.index(token) if token in self.tokens else None


R1 = "{{'<｜Assistant｜>' + content.split('</think>')[-1]}}{{'<｜Assistant｜><think>\\n'}}"
V31 = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{'</think>'}}{{'<think>'}}"
CODER = "{{ '### Instruction:\\n' + message['content'] }}"
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
SMOL = f"{{{{ '<|im_start|>system\n{SMOL_SYSTEM}<|im_end|>\n' }}}}"
QWEN = r"{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"


@pytest.mark.parametrize(
    ("files", "model_type", "name"),
    [
        (Files((BOS, USER, "｜DSML｜")), "deepseek_v4", "v4"),
        (Files((BOS, USER, "｜DSML｜")), None, "v4"),
        (Files((BOS, USER)), "deepseek_v32", "v32"),
        (Files((BOS, USER), V31), "deepseek_v32", "v31"),
        (Files((BOS, USER), V31), "deepseek_v3", "v31"),
        (Files((BOS, USER), R1), "deepseek_v3", "r1"),
        (Files((BOS, USER), R1.replace("\\n", "\n"), 151_665), "qwen2", "r1"),
        (Files((BOS, USER), "{{ c.split('</think>')[-1] }}"), "deepseek_v3", "r1-0528"),
        (Files((BOS, USER), "{{'<｜Assistant｜>'}}"), "deepseek_v3", "roles"),
        (Files((BOS, USER), None, 100_018), "deepseek_v2", "roles"),
        (Files((BOS,), "{{ 'User: ' }}", 100_002), "deepseek_v2", "user-assistant"),
        (Files((BOS,), "{{ 'User: ' }}", 100_015), "llama", "user-assistant"),
        (Files((BOS, "<|EOT|>"), None, 32_022, eos=(1,)), "llama", "coder"),
        (Files((BOS, "<|EOT|>"), CODER, 32_022, eos=(1,)), "llama", "coder"),
        (Files((BOS,), CODER, 102_400), "llama", "coder"),
        (Files(("<|im_start|>", "<|im_end|>"), SMOL, 49_152), "llama", "chatml"),
    ],
)
def test_detect(files: Files, model_type: str | None, name: str) -> None:
    found = detect(files, model_type)
    assert found is not None and found.name == name


def test_detect_finds_the_default_system_text() -> None:
    tokens = ("<|im_start|>", "<|im_end|>")
    systems = [
        detect(Files(tokens, template)) for template in (SMOL, QWEN, "{{ '<|im_start|>' + role }}", None)
    ]
    assert [found and found.default_system for found in systems] == [
        SMOL_SYSTEM,
        "You are a helpful assistant.",
        None,
        None,
    ]


def test_detect_knows_when_it_does_not_know() -> None:
    assert detect(Files(("<s>",), None, 32_000), "llama") is None


def test_detect_gives_nothing_for_a_base_model_of_the_old_generation() -> None:
    for model_type in ("llama", "deepseek", "deepseek_v2"):
        assert detect(Files((BOS,), None, 102_400), model_type) is None
    coder_base = Files((BOS, "<|EOT|>", "<｜end▁of▁sentence｜>"), None, 32_022, eos=(2,))
    assert detect(coder_base, "llama") is None


def test_get_encoding() -> None:
    assert all(get_encoding(name).name == name for name in ENCODINGS)
    assert set(ENCODINGS) == {
        "user-assistant", "coder", "roles", "r1", "r1-0528", "r1-zero", "v31", "v32", "v4", "chatml",
    }  # fmt: skip
    with pytest.raises(EncodingError, match="'v5' is not known; use one of user-assistant, coder"):
        get_encoding("v5")
    for wrong in (None, ["v4"]):
        with pytest.raises(EncodingError, match="is not known"):
            get_encoding(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["coder", "v2", "v3", "v4"])
def test_fim(family: str) -> None:
    written = fim("def f(", "  return x\n", family)
    assert written == "<｜fim▁begin｜>def f(<｜fim▁hole｜>  return x\n<｜fim▁end｜>"


def test_fim_errors() -> None:
    with pytest.raises(EncodingError, match="use one of coder"):
        fim("a", "b", "chatml")
    with pytest.raises(EncodingError, match="suffix contains '<｜fim▁hole｜>'"):
        fim("a", "b<｜fim▁hole｜>", "v3")
    with pytest.raises(EncodingError, match="prefix is a NoneType"):
        fim(None, "b")  # type: ignore[arg-type]


def test_repository() -> None:
    files = [("utils.py", "import os"), ("model.py", "import utils\n")]
    assert repository(files) == "#utils.py\nimport os\n#model.py\nimport utils\n"
    assert repository(files, "main.py") == repository(files) + "#main.py\n"
