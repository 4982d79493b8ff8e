"""What a route makes of a request: the job to run, and how its answer is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rorqual.serve.driver import Job
from rorqual.serve.parts import Part
from rorqual.serve.turn import Turn


class Writer(Protocol):
    """Writes an answer as a stream: pieces of bytes, ready to be sent."""

    def start(self) -> Iterator[bytes]: ...

    def feed(self, index: int, part: Part) -> Iterable[bytes]: ...

    def end(self) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Ask:
    """A request understood. `whole` makes the body of a whole answer, `writer` writes a stream."""

    job: Job
    stream: bool
    whole: Callable[[Sequence[Turn]], Mapping[str, Any]]
    writer: Callable[[], Writer]
    ping: bytes = b": keep-alive\n\n"
