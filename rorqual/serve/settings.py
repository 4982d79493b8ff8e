"""What whoever runs a server may set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

MOST = 10**9
"""Of any of them: thirty years of seconds, which timers can still count, or a gigabyte."""


@dataclass(frozen=True)
class Settings:
    """The server's own settings; the engine has others (`rorqual.Engine`).

    name: the model's name in requests and answers; `aliases` are names taken for it too. `keys`: bearer keys, none
    for an open server. `max_body` bytes of a request, and `max_bodies` times as many of
    all that are being read at once; `max_queue` answers at once, running and waiting, beyond
    which requests get 429; `max_choices` answers a request (`n`). `timeout` seconds for a whole answer,
    `first_timeout` until its first token; None for no limit. `head_timeout` seconds for a request's line and headers to
    arrive, `body_timeout` for its body,
    `stall` seconds that a client may leave unread what it is sent, after which its answer is given up.
    `keep_alive`: seconds of silence after which something is sent to keep the connection open. `max_tokens`: of an
    answer that names no limit; None for what the context leaves. `strict` refuses unknown fields, which are ignored
    otherwise. `cors`: origins that browsers may call from. `hosts`: names by which an open server may be called
    (`browsers.Guard`). `retry_after`: seconds that a client turned away is
    asked to wait. `drain`: seconds that a shutdown leaves to answers under way. `remembered`: tokens of past
    answers kept, so that they go back into a context exactly as they were written. `inside`: requests may ask
    for what goes on inside the model. `page`: whether `/` is a page to talk on.
    """

    name: str = "rorqual"
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = field(default=(), repr=False)
    max_body: int = 16 * 2**20
    max_bodies: int = 16
    max_queue: int = 1024
    max_choices: int = 16
    timeout: float | None = None
    first_timeout: float | None = 600.0
    head_timeout: float = 30.0
    body_timeout: float = 60.0
    stall: float = 120.0
    keep_alive: float = 10.0
    max_tokens: int | None = None
    strict: bool = False
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    retry_after: int = 1
    drain: float = 60.0
    remembered: int = 8_000_000
    page: bool = True
    inside: bool = True

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key or not key.isascii() or any(letter.isspace() for letter in key):
                raise ValueError("an API key must be one word of ASCII letters, digits and signs")
        limits = ("max_body", "max_queue", "max_choices", "max_bodies", "remembered", "max_tokens")
        seconds = (
            "timeout",
            "first_timeout",
            "head_timeout",
            "body_timeout",
            "stall",
            "keep_alive",
            "retry_after",
        )
        for name in (*limits, *seconds):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise ValueError(f"{name} is {value}; it must be above 0 and at most {MOST:,}")
        if not 0 <= self.drain <= MOST:
            raise ValueError(f"drain is {self.drain}; it must be 0 to {MOST:,} seconds")


def keys_of(text: str | None) -> tuple[str, ...]:
    """API keys from a variable, separated by commas. One that is set and holds none is an error: a server that was
    meant to have keys must not come up open."""
    if text is None:
        return ()
    keys = tuple(key for key in (part.strip() for part in text.split(",")) if key)
    if not keys:
        raise ValueError(
            "RORQUAL_API_KEYS is set but holds no key: unset it, or give keys separated by commas"
        )
    return keys


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys from a file: one a line; empty lines and lines that begin with # do not count."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no key: write one a line")
    return keys
