"""Fill-in-the-middle prompts, and prompts that show a base model a whole repository (facts 4.1).

No BOS is written: encode the text with `Tokenizer.encode(text, bos=True)`.
"""

from collections.abc import Iterable

from rorqual.text.messages import EncodingError
from rorqual.text.tokens import FIM_BEGIN, FIM_END, FIM_HOLE

FAMILIES = ("coder", "v2", "v3", "v4")  # the spelling is the same in all four vocabularies


def fim(prefix: str, suffix: str, family: str = "v4") -> str:
    """The prompt after which a model writes what belongs between `prefix` and `suffix`.

    Raises EncodingError for a family without these tokens, what is not text, and text that contains one of them.
    """
    if family not in FAMILIES:
        raise EncodingError(
            f"fill-in-the-middle is not known for {family!r}; use one of {', '.join(FAMILIES)}"
        )
    for name, text in (("prefix", prefix), ("suffix", suffix)):
        if not isinstance(text, str):
            raise EncodingError(f"{name} is a {type(text).__name__}; it must be text")
        for token in (FIM_BEGIN, FIM_HOLE, FIM_END):
            if token in text:
                raise EncodingError(
                    f"{name} contains {token!r}, which marks the parts of the prompt; take it out"
                )
    return FIM_BEGIN + prefix + FIM_HOLE + suffix + FIM_END


def repository(files: Iterable[tuple[str, str]], path: str | None = None) -> str:
    """Files, each after a line "#path", in the given order (a file after those it depends on).

    files: (path, text) pairs. path: the file to be written next; its line ends the prompt.
    """
    shown = "".join(f"#{name}\n{text}{'' if text.endswith(chr(10)) else chr(10)}" for name, text in files)
    return shown + (f"#{path}\n" if path is not None else "")
