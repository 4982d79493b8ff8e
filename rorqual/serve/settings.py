"""What whoever runs a server may set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """The server's own settings; the engine has others (`rorqual.Engine`).

    name: the model's name in requests and answers; `aliases` are names taken for it too. `keys`: bearer keys, none
    for an open server. `max_body` bytes of a request; `max_queue` answers at once, running and waiting, beyond
    which requests get 429; `max_choices` answers a request (`n`). `timeout` seconds for a whole answer,
    `first_timeout` until its first token; None for no limit. `body_timeout` seconds for a request's body to arrive,
    `stall` seconds that a client may leave unread what it is sent, after which its answer is given up.
    `keep_alive`: seconds of silence after which something is sent to keep the connection open. `max_tokens`: of an
    answer that names no limit; None for what the context leaves. `strict` refuses unknown fields, which are ignored
    otherwise. `cors`: origins that browsers may call from. `retry_after`: seconds that a client turned away is
    asked to wait. `drain`: seconds that a shutdown leaves to answers under way. `remembered`: tokens of past
    answers kept, so that they go back into a context exactly as they were written. `inside`: requests may ask
    for what goes on inside the model. `page`: whether `/` is a page to talk on.
    """

    name: str = "rorqual"
    aliases: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    max_body: int = 16 * 2**20
    max_queue: int = 1024
    max_choices: int = 16
    timeout: float | None = None
    first_timeout: float | None = 600.0
    body_timeout: float = 60.0
    stall: float = 120.0
    keep_alive: float = 10.0
    max_tokens: int | None = None
    strict: bool = False
    cors: tuple[str, ...] = ()
    retry_after: int = 1
    drain: float = 60.0
    remembered: int = 8_000_000
    page: bool = True
    inside: bool = True

    def __post_init__(self) -> None:
        for key in self.keys:
            if not key or not key.isascii() or any(letter.isspace() for letter in key):
                raise ValueError("an API key must be one word of ASCII letters, digits and signs")
        for name in (
            "max_body",
            "max_queue",
            "max_choices",
            "body_timeout",
            "stall",
            "keep_alive",
            "remembered",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0")


def read_keys(path: Path) -> tuple[str, ...]:
    """API keys from a file: one a line; empty lines and lines that begin with # do not count."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} holds no key: write one a line")
    return keys
