"""The released language models by name."""

from __future__ import annotations

import difflib
import re

from rorqual.family import coder, distill, moe, v1, v2, v3, v4, v32
from rorqual.family.cards import Card
from rorqual.family.parts import ConfigError, ModelConfig

_CARDS: tuple[Card, ...] = tuple(
    sorted(
        (card for module in (coder, v1, moe, v2, v3, distill, v32, v4) for card in module.CARDS),
        key=lambda card: card.released,
    )
)
_BY_NAME: dict[str, Card] = {}
for _card in _CARDS:
    for _name in (_card.name, *_card.aliases):
        assert _name not in _BY_NAME, f"two cards are called {_name}"
        _BY_NAME[_name] = _card


def models() -> tuple[Card, ...]:
    """Every released language checkpoint, oldest first."""
    return _CARDS


def card(name: str) -> Card:
    """The card called `name`: a hub name or alias in any case, with or without `deepseek-ai/`.

    A size without `-base`, `-chat` or `-instruct` means the base checkpoint.

    Raises:
        ConfigError: no model has that name; the message lists the closest ones.
    """
    key = name.strip().lower().removeprefix("deepseek-ai/")
    found = _BY_NAME.get(key) or _BY_NAME.get(f"deepseek-{key}")
    if found is not None:
        return found
    if re.match(r"(deepseek-)?(vl|vl2|janus\w*|ocr)(-|$)", key):
        raise ConfigError(
            f"no model is called {name!r}: the multimodal members of the family (VL, VL2, Janus, OCR) are not "
            "supported yet, only the language models are: rorqual.models() lists them all"
        )
    close = difflib.get_close_matches(key, _BY_NAME, n=4, cutoff=0.5)
    close += difflib.get_close_matches(f"deepseek-{key}", _BY_NAME, n=4, cutoff=0.8)
    hint = f"did you mean {', '.join(dict.fromkeys(close))}?" if close else "rorqual.models() lists them all"
    raise ConfigError(f"no model is called {name!r}: {hint}")


def config(name: str) -> ModelConfig:
    """The config of the model called `name` (see `card`)."""
    return card(name).config
