"""Checksums of corpora, compared while something else goes on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from rorqual.data.shards import Corpus

AT_ONCE = 2**31
"""Bytes of corpora that are waited for: a second or two."""


class Checking:
    """Reads every shard of some corpora in a thread. `wrong` names the first one that is not what its manifest says, ""
    if there is none so far; small corpora are done with at once."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        thread = ThreadPoolExecutor(1, "checksums")
        self._running: list[tuple[Corpus, Future[list[str]]]] = [(c, thread.submit(c.check)) for c in corpora]
        thread.shutdown(wait=False)
        self._wrong = ""
        size = sum(entry.bytes for c in corpora for entry in c.manifest.of(c.split))
        if size <= AT_ONCE:
            self.wrong(wait=True)

    def wrong(self, wait: bool = False) -> str:
        """What is known by now, or with `wait` at the end."""
        while self._running and not self._wrong and (wait or self._running[0][1].done()):
            corpus, found = self._running.pop(0)
            names = found.result()
            if names:
                self._wrong = (
                    f"{corpus.folder / names[0]} is not what its manifest says: its bytes have changed"
                )
        return self._wrong
