"""Encodings by name, and the one that fits a model's files."""

import re
from dataclasses import replace
from typing import Protocol

from rorqual.text.encoding import Encoding
from rorqual.text.messages import EncodingError
from rorqual.text.plain import CHATML, CODER, R1_ZERO, USER_ASSISTANT
from rorqual.text.roles import R1, R1_0528, ROLES, V31
from rorqual.text.tagged import V4, V32
from rorqual.text.tokens import BOS, DSML, END_THINK, EOT, IM_END, IM_START, THINK, USER

ENCODINGS = {e.name: e for e in (USER_ASSISTANT, CODER, ROLES, R1, R1_0528, R1_ZERO, V31, V32, V4, CHATML)}


class Vocabulary(Protocol):
    """What `detect` looks at; `rorqual.text.Tokenizer` has it."""

    chat_template: str | None
    eos: tuple[int, ...]

    @property
    def vocab_size(self) -> int: ...

    def id_of(self, token: str) -> int | None: ...


def get_encoding(name: str) -> Encoding:
    """The encoding called `name`; EncodingError lists the names."""
    if not isinstance(name, str) or name not in ENCODINGS:
        raise EncodingError(f"encoding {name!r} is not known; use one of {', '.join(ENCODINGS)}")
    return ENCODINGS[name]


def detect(tokenizer: Vocabulary, model_type: str | None = None) -> Encoding | None:
    """The encoding for a model, by `model_type` of its config.json and by its vocabulary and template; None
    when nothing fits: a base model without chat tokens, or with the old vocabulary and no template.

    The template is only searched for the words that tell the generations apart. V3.2-Exp has V3.2's
    model_type but V3.1's template; V3.2 itself has none.
    """
    template = tokenizer.chat_template or ""
    if model_type == "deepseek_v4":
        return V4
    if model_type == "deepseek_v32" and not template:
        return V32
    if "### Instruction" in template:
        return CODER
    if tokenizer.id_of(USER) is not None:
        return _by_template(template) or (V4 if tokenizer.id_of(DSML) is not None else ROLES)
    if tokenizer.id_of(IM_START) is not None:
        return replace(CHATML, default_system=_default_system(template))
    if tokenizer.id_of(EOT) in tokenizer.eos and tokenizer.vocab_size < 40_000:
        return CODER  # Coder V1 instruct ends its turns with EOT; its base model does not
    if tokenizer.id_of(BOS) is not None and "User:" in template:
        return USER_ASSISTANT
    return None


def _by_template(template: str) -> Encoding | None:
    """The generation with role tokens that a template belongs to."""
    text = template.replace("\\n", "\n")  # inside Jinja strings a newline is written as \n
    if THINK + "\n" in text:
        return R1
    if re.search(r"\bthinking\b", text):
        return V31
    if END_THINK in text:
        return R1_0528
    return None


def _default_system(template: str) -> str | None:
    """The fixed system text of a ChatML template, if it has one."""
    plain = r"[^{}'|<>+]+"
    found = re.search(re.escape(IM_START) + r"system(?:\n|\\n)(" + plain + ")" + re.escape(IM_END), template)
    return found[1] if found else None
