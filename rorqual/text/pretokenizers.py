"""How each byte-level BPE vocabulary of the family cuts text into words before merging.

A GGUF file names its cutter in `tokenizer.ggml.pre`; `build(name)` gives the `tokenizers` object. The
expressions are part of the published tokenizer.json files (facts 4.6 for V3/V4): a different cut gives
different ids, so they are constants, not a matter of taste.
"""

from collections.abc import Callable

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

# Letters as deepseek-llm's tokenizer.json lists them: "first-last" or a single code point, hexadecimal. It is
# nearly "cased letters", yet leaves out small Armenian and all plain Georgian letters.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A "
    "38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF "
    "1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D "
    "1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 "
    "1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F "
    "2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B A722-A76F "
    "A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"

_V3_DIGITS = r"\p{N}{1,3}"
_V3_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_V3_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _cased_letters() -> str:
    """The character class of `_CASED`."""
    ranges = (item.split("-") for item in _CASED.split())
    return "[" + "".join("-".join(chr(int(end, 16)) for end in item) for item in ranges) + "]"


def _words(digits: str) -> str:
    """The word expression of Qwen2 and Llama 3, which differ only in how long a run of digits may be."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _splits(*expressions: str, digits: bool = False) -> PreTokenizer:
    """Cut by each expression in turn (then into single digits), then spell the pieces in byte letters."""
    steps: list[PreTokenizer] = [Split(Regex(expression), "isolated") for expression in expressions]
    if digits:
        steps.append(Digits(individual_digits=True))
    return Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> PreTokenizer:
    return ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), _gpt2()])


def _qwen2() -> PreTokenizer:
    return _splits(_words(r"\p{N}"))


def _llama() -> PreTokenizer:
    return _splits(_words(r"\p{N}{1,3}"))


def _deepseek_llm() -> PreTokenizer:
    punctuation = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
    return _splits("[\r\n]", r"\s?" + _cased_letters() + "+", punctuation, r"\s+$", _CJK, digits=True)


def _deepseek_coder() -> PreTokenizer:
    return _splits("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, digits=True)


def _deepseek_v3() -> PreTokenizer:
    return _splits(_V3_DIGITS, _V3_CJK, _V3_WORDS)


BUILDERS: dict[str, Callable[[], PreTokenizer]] = {
    "gpt-2": _gpt2,
    "default": _gpt2,
    "smollm": _smollm,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "llama-bpe": _llama,
    "deepseek-llm": _deepseek_llm,
    "deepseek-coder": _deepseek_coder,
    "deepseek-v3": _deepseek_v3,
}


def build(name: str) -> PreTokenizer:
    """The pre-tokenizer a GGUF file calls `name`; ValueError lists the known names."""
    if name not in BUILDERS:
        raise ValueError(
            f"GGUF pre-tokenizer {name!r} is not known; known are {', '.join(sorted(BUILDERS))}. "
            "Another one would give wrong ids silently: use Tokenizer.from_dir with a tokenizer.json instead."
        )
    return BUILDERS[name]()
