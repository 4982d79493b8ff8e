"""A card: what is known about one released checkpoint. `page` makes one, `Card.sibling` a variant of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rorqual.family.parts import ModelConfig

MODEL_LICENCE = "DeepSeek Model License"
"""Licence of the weights up to V3 of December 2024 and of Prover-V2; the code beside them is MIT."""

K = 1024


@dataclass(frozen=True)
class Card:
    """One released checkpoint.

    `released` is an ISO date, or year and month where the day is unknown. `context` is the advertised
    context in tokens (`config.max_positions` may be larger). `encoding` names the chat encoding, None for
    models that only complete text. `unverified` names the fields (of this card, or of the hub's config.json)
    that were recalled rather than read in a primary or faithful copy; `source` is the paper or repository.
    `note` says what else a user should know, such as a limitation.
    """

    name: str
    hub_id: str
    config: ModelConfig
    released: str
    context: int
    licence: str
    source: str
    encoding: str | None = None
    aliases: tuple[str, ...] = ()
    unverified: tuple[str, ...] = ()
    note: str = ""

    def sibling(
        self,
        repo: str,
        *,
        eos: int | None = None,
        config: ModelConfig | None = None,
        aliases: tuple[str, ...] = (),
        **changes: Any,
    ) -> Card:
        """The card of another checkpoint of this shape.

        Args:
            repo: its repository on the hub, without the organisation.
            eos: its end-of-sequence id where that differs.
            config: its config where that differs.
            aliases: its own short names; those of this card are not inherited.
            changes: other fields of the card to replace.
        """
        base = config or self.config
        base = base if eos is None else base.replace(eos=(eos,))
        name = repo.lower()
        return dataclasses.replace(
            self,
            name=name,
            hub_id=f"deepseek-ai/{repo}",
            config=base.replace(name=name),
            aliases=aliases,
            **changes,
        )


def page(repo: str, config: ModelConfig, *, released: str, context: int, source: str, **rest: Any) -> Card:
    """The card of `deepseek-ai/<repo>`; its name is the repository's in lower case."""
    name = repo.lower()
    fields: dict[str, Any] = {"licence": MODEL_LICENCE, **rest}
    return Card(
        name=name,
        hub_id=f"deepseek-ai/{repo}",
        config=config.replace(name=name),
        released=released,
        context=context,
        source=source,
        **fields,
    )
