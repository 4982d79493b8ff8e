"""Looking inside over HTTP: what there is to see, what a request asks for, and its tokens as seen from inside.

A streamed chat asks with `inside`: true for everything with five alternatives, or an object of `alternatives` (0 to
20), `experts`, `drafts` and `seen` (true, or layers' numbers: large models pick thousands of positions in each, so that
true means a few layers, spread evenly). Chunks then carry `inside`: `tokens`, each once and in order, with its letters
or after them, and `cache`, what the sequence has taken so far (its newest token's items come with that token's own
pass). A token:

    index, id, text, logprob    its place in the answer, and what it is
    top                         the likeliest tokens: id, text, logprob
    part                        where its letters went: "reasoning", "content", "call" or "markup"
    experts                     chosen for it, best first, by layer of `expert_layers`; null for the answer's last token
    draft                       "accepted" if MTP drafted it, else "none"
    refused                     the draft that was refused in its place, if any
    seen                        by layer the positions it looked at, counted from the prompt's first token, each
                                standing for `every` tokens; weights are not told (null)
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.engine import Facts, Inside, Look
from rorqual.serve.body import between
from rorqual.serve.errors import Refusal
from rorqual.serve.parts import Glimpse, TokenInfo
from rorqual.serve.service import Service
from rorqual.text import CallBegin, CallDelta, Event, Tokenizer
from rorqual.text.tokens import DSML

MOST = 20
"""Alternatives of a token."""

BY_DEFAULT = 5
"""Alternatives where a request asks for everything."""

MOST_SEEN = 8192
"""Positions a token, over all layers, that are told without being asked for by number: writing them takes the server's
time, and sending them everybody's."""


@dataclass(frozen=True)
class Wish:
    """What a request asks for: the likeliest `alternatives` of each token, and what the engine is to tell."""

    alternatives: int
    inside: Inside

    @property
    def looks(self) -> bool:
        """Whether the engine has to tell anything."""
        return self.inside.watches or self.inside.drafts


def facts_of(service: Service) -> Facts | None:
    """What there is to see; None where nothing may be told, or the engine can't."""
    facts: Facts | None = getattr(service.engine, "facts", None)
    return facts if service.settings.inside else None


def wish_of(raw: bool | Mapping[str, Any] | None, stream: bool, service: Service) -> Wish | None:
    """The field `inside` of a request; None if it isn't asked for. Raises Refusal."""
    if raw is None or raw is False:
        return None
    facts = facts_of(service)
    if facts is None:
        raise Refusal(400, "this server does not tell of the model's inside", "inside", "unsupported")
    if not stream:
        raise Refusal(400, "inside needs stream: true", "inside", "invalid_value")
    if raw is True:
        return Wish(BY_DEFAULT, Inside(experts=True, drafts=True, seen=some_layers(facts)))
    fields = dict(raw)
    alternatives = fields.pop("alternatives", None)
    if alternatives is not None and (not isinstance(alternatives, int) or isinstance(alternatives, bool)):
        raise _wrong("inside.alternatives", "integer")
    between("inside.alternatives", alternatives, 0, MOST)
    for name, value in fields.items():
        place = f"inside.{name}"[:200]
        if name not in ("experts", "drafts", "seen"):
            raise Refusal(400, f"unknown field: {place}", place, "unknown_field")
        if name == "seen" and isinstance(value, list):
            if not all(type(layer) is int and 0 <= layer < facts.layers for layer in value):
                told = f"inside.seen holds numbers of layers, from 0 to {facts.layers - 1}"
                raise Refusal(400, told, place, "invalid_value")
        elif value is not None and not isinstance(value, bool):
            raise _wrong(place, "boolean")
    if fields.get("seen") is True:
        fields["seen"] = some_layers(facts)
    return Wish(alternatives or 0, Inside(**{name: value for name, value in fields.items() if value}))


def some_layers(facts: Facts) -> bool | tuple[int, ...]:
    """Layers whose picks are told where all are asked for: True for all, or as many as `MOST_SEEN` allows."""
    picking = [layer for layer, picked in enumerate(facts.picked) if picked]
    for count in range(len(picking), 0, -1):
        some = tuple(picking[(2 * i + 1) * len(picking) // (2 * count)] for i in range(count))
        if count == 1 or sum(facts.picked[layer] for layer in some) <= MOST_SEEN:
            return count == len(picking) or some
    return True


def _wrong(place: str, kind: str) -> Refusal:
    return Refusal(422, f"{place}: Input should be a valid {kind}", place, "invalid_type")


def describe(service: Service) -> dict[str, Any]:
    """What there is to see. Raises Refusal where nothing is told."""
    facts = facts_of(service)
    if facts is None:
        raise Refusal(404, "this server does not tell of the model's inside", code="not_enabled")
    told = {
        "name": service.settings.name,
        "layers": facts.layers,
        "expert_layers": facts.expert_layers,
        "experts": facts.experts,
        "chosen": facts.chosen,
        "shared": facts.shared,
        "drafts": facts.drafts,
        "attention": facts.attention,
        "every": facts.every,
        "window": facts.window,
        "cache_bytes_per_token": float(facts.cache.growing),
        "cache_bytes_per_sequence": facts.cache.fixed + facts.cache.pooling,
        "mha_bytes_per_token": facts.mha_bytes,
        "vocab": service.model.config.vocab,
        "context": service.context,
    }
    return {"enabled": True, "model": told}


class Watcher:
    """Puts together what is told of an answer's tokens, in their order: a token goes out once it is known where its
    letters went and, if `looks` are to come from the engine, what that says of it."""

    def __init__(self, looks: bool) -> None:
        self._looks_come = looks
        self._infos: deque[TokenInfo] = deque()
        self._parts: dict[int, str] = {}
        self._looks: dict[int, Look] = {}

    def came(self, info: TokenInfo, looks: Sequence[Look]) -> None:
        """A token, and what the engine now knows of any."""
        self._infos.append(info)
        self._looks.update((look.index, look) for look in looks)

    def settled(self, tokens: Sequence[TokenInfo], part: str) -> None:
        """Where these tokens' letters went."""
        self._parts.update((info.place, part) for info in tokens)

    def known(self, *, last: bool) -> tuple[tuple[TokenInfo, str, Look], ...]:
        """The next tokens of which all is known, or at the end all that are left."""
        out: list[tuple[TokenInfo, str, Look]] = []
        while self._infos:
            at = self._infos[0].place
            waits = at not in self._parts or (self._looks_come and at not in self._looks)
            if waits and not last:
                break
            look = self._looks.pop(at, None) or Look(at)
            out.append((self._infos.popleft(), self._parts.pop(at, "markup"), look))
        return tuple(out)

    @staticmethod
    def letters(event: Event, text: str) -> str:
        """What a call's event may have brought over from the model's text: a name, or arguments as they were written.
        In DSML the layout of the JSON is not the model's, and strings have no escapes."""
        if isinstance(event, CallBegin):
            return event.name
        if not isinstance(event, CallDelta) or (DSML in text and not event.text.strip('{}":, ')):
            return ""
        if event.text in text:
            return event.text
        try:
            return str(json.loads(f'"{event.text}"'))
        except ValueError:
            return ""


class Pane:
    """The field `inside` of a stream's chunks, for answers to a prompt of so many tokens."""

    def __init__(self, wish: Wish, facts: Facts, prompt: int, tokenizer: Tokenizer, n: int) -> None:
        self.wish, self.facts, self.prompt, self.tokenizer, self.n = wish, facts, prompt, tokenizer, n

    def told(self, index: int, glimpses: Sequence[Glimpse]) -> dict[str, Any]:
        """What is told of one choice with a chunk."""
        # The newest token's items come with its own pass.
        held = self.prompt + glimpses[-1].count - 1
        cache = {
            "tokens": held,
            "bytes": self.facts.cache.at(held),
            "mha_bytes": self.facts.mha_bytes * held,
        }
        tokens = [self._token(*token) for glimpse in glimpses for token in glimpse.tokens]
        told = {"tokens": tokens, "cache": cache}
        return told if self.n == 1 else {"choice": index} | told

    def _token(self, info: TokenInfo, part: str, look: Look) -> dict[str, Any]:
        top = [self._spelled(token, logprob) for token, logprob in info.top[: self.wish.alternatives]]
        return {
            "index": look.index,
            **self._spelled(info.id, info.logprob),
            "top": top,
            "part": part,
            "experts": look.experts,
            "draft": "accepted" if look.drafted else "none",
            "refused": [self._named(token) for token in look.refused],
            "seen": look.seen
            and [
                {"layer": s.layer, "positions": list(s.positions), "every": s.every, "weights": None}
                for s in look.seen
            ],
        }

    def _named(self, token: int) -> dict[str, Any]:
        return {"id": token, "text": self.tokenizer.bytes_of(token).decode("utf-8", "replace")}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        return self._named(token) | {"logprob": max(logprob, -9999.0)}
