"""Documents to shards: in parallel, and again from where it stopped.

Each piece of the sources becomes one shard a split. What a build is of stands in `PLAN` before the first
document is read, and each finished piece in `build/`, so that the same command goes on with what is missing and a
command with other options is refused. What is written depends on the sources and options alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.data.errors import DataError
from rorqual.data.numbers import uniform
from rorqual.data.reshape import Shape, Shaper
from rorqual.data.shards import (
    HELD,
    PLAN,
    TRAIN,
    Entry,
    Manifest,
    digest,
    token_type,
    write_atomically,
    write_shard,
)
from rorqual.data.sources import PIECE, Bad, Piece, Reading, cut, documents, files_of
from rorqual.text import Tokenizer

WORK = Path(PLAN).parent
TOKENIZER = "tokenizer"
SHARD = 2**26
"""Tokens of a shard, about, where a piece has more."""
HELD_OUT = 1
"""Which of a document's numbers says whether it is held out."""


@dataclass(frozen=True)
class Options:
    """What a corpus is made with. held: share of documents that go into the held-out split."""

    reading: Reading = field(default_factory=Reading)
    shape: Shape = field(default_factory=Shape)
    held: float = 0.0
    seed: int = 0
    piece: int = PIECE

    def __post_init__(self) -> None:
        if not 0 <= self.held < 1:
            raise DataError(f"held is {self.held}; it is a share, from 0 to under 1")
        if self.seed < 0 or self.piece < 1:
            raise DataError("seed must not be negative, and a piece has at least one byte")


@dataclass(frozen=True)
class Done:
    """What became of a piece."""

    entries: tuple[Entry, ...]
    skipped: int
    why: str = ""
    """Of the first document that was left out."""


def fingerprint(tokenizer: Tokenizer) -> str:
    """What a corpus and a run compare, to know that they speak of the same tokens."""
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest()


def build(
    sources: Sequence[str],
    folder: str | os.PathLike[str],
    tokenizer: Tokenizer,
    options: Options | None = None,
    *,
    workers: int | None = None,
    told: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = print,
) -> Manifest:
    """Make a corpus of the sources (files, folders, `hf:owner/name`) in `folder`, or go on making it.

    `told(done, of)` hears of bytes whenever a piece is finished, `warn` of what is left out. Raises DataError for
    sources that can't be read, for a folder with another build, and for a full disk; finished pieces are kept.
    """
    options, folder = options or Options(), Path(folder)
    Shaper(tokenizer, options.shape, options.seed)  # refuses what this tokenizer can't do, before any work
    pieces = cut(files_of(sources, warn), options.reading, options.piece)
    if not pieces:
        raise DataError(f"{', '.join(sources)}: there is nothing in it")
    with _room(folder):
        _settle(folder, tokenizer, options, pieces)
    weights = [sum(span.end - span.begin for span in piece) for piece in pieces]
    found: dict[int, Done] = {}
    for number, done in _run(folder, options, pieces, workers or os.cpu_count() or 1):
        found[number] = done
        if told is not None:
            told(sum(weights[n] for n in found), sum(weights))
    ordered = [found[number] for number in sorted(found)]
    shards = tuple(entry for done in ordered for entry in done.entries)
    if not any(entry.split == TRAIN for entry in shards):
        why = next((done.why for done in ordered if done.why), "")
        raise DataError(f"{', '.join(sources)}: no documents in it {why and '(' + why + ')'}".rstrip())
    skipped = sum(done.skipped for done in ordered)
    manifest = Manifest(fingerprint(tokenizer), tokenizer.vocab_size, asdict(options), shards, skipped)
    with _room(folder):
        manifest.write(folder)
    return manifest


def _settle(folder: Path, tokenizer: Tokenizer, options: Options, pieces: list[Piece]) -> None:
    """Write down what this build is of, or see that it is what was begun here."""
    plan = {
        "tokenizer": fingerprint(tokenizer),
        "options": asdict(options),
        "pieces": [[asdict(span) for span in piece] for piece in pieces],
    }
    text, path = json.dumps(plan, indent=1), folder / PLAN
    if path.is_file():
        if path.read_text(encoding="utf-8") != text:
            what = _difference(path, plan)
            raise DataError(
                f"{folder} holds a build with {what}: give this one another folder, or delete that one"
            )
    else:
        if any(p.is_file() and not p.name.endswith(".part") for p in folder.rglob("*")):
            raise DataError(
                f"{folder} is not empty, and no corpus was begun there: give the corpus its own folder"
            )
        (folder / WORK).mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    for left in (*folder.glob(".*.part"), *(folder / WORK).glob(".*.part")):  # of a build that was killed
        left.unlink(missing_ok=True)
    if not _same(folder / TOKENIZER, fingerprint(tokenizer)):
        tokenizer.save(folder / TOKENIZER)


def _same(place: Path, wanted: str) -> bool:
    """Whether the tokenizer with this fingerprint lies there."""
    try:
        return fingerprint(Tokenizer.from_dir(place)) == wanted
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """What goes wrong with the disk, as a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{folder}: {error}") from error
        raise DataError(
            f"no room is left under {folder}: make some and run the same command again"
        ) from error


def _difference(path: Path, plan: dict[str, Any]) -> str:
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["tokenizer"] != plan["tokenizer"]:
            return "another tokenizer"
        if before["options"] != plan["options"]:
            return f"other options ({before['options']})"
    except (KeyError, TypeError, ValueError):
        return "a plan that can't be read"
    return "other sources, or files that have changed since"


# ----------------------------------------------------------------------------------------- the work


def _run(folder: Path, options: Options, pieces: list[Piece], workers: int) -> Iterable[tuple[int, Done]]:
    """What became of each piece, as they end."""
    if min(workers, len(pieces)) == 1:
        _begin(folder, options, ignore_signals=False)
        for number, piece in enumerate(pieces):
            yield number, _work(number, piece)
        return
    pool = ProcessPoolExecutor(
        min(workers, len(pieces)), _context(), initializer=_begin, initargs=(folder, options, True)
    )
    try:
        waiting = {pool.submit(_work, number, piece): number for number, piece in enumerate(pieces)}
        while waiting:
            ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in ended:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool:
        raise DataError(
            "a worker was killed, most likely for want of memory: run it again with fewer --workers; "
            "finished pieces are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> BaseContext:
    """How workers begin: from a process that has imported everything once, where the system has that."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


_shaper: Shaper | None = None
_options = Options()
_folder = Path()


def _begin(folder: Path, options: Options, ignore_signals: bool) -> None:
    """A worker begins."""
    global _shaper, _options, _folder
    if ignore_signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever began it tells it to end,
        threading.Thread(target=_follow, daemon=True).start()  # or has ended itself
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _shaper = Shaper(Tokenizer.from_dir(folder / TOKENIZER), options.shape, options.seed)
    _options, _folder = options, folder


def _follow() -> None:
    """End when the process that began this one has ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int, piece: Piece) -> Done:
    """Make a piece's shards, unless they are there."""
    note = _folder / WORK / f"{number:06d}.json"
    done = _finished(note)
    if done is None:
        with _room(_folder):
            done = _make(number, piece)
            write_atomically(note, json.dumps(asdict(done)).encode())
    return done


def _finished(note: Path) -> Done | None:
    """What a note says, if the shards it names are what it says."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        entries = tuple(Entry(**entry) for entry in found.pop("entries"))
        sound = all(digest(_folder / entry.file) == entry.sha256 for entry in entries)
        return Done(entries, **found) if sound else None
    except (OSError, TypeError, ValueError, KeyError):
        return None


def _make(number: int, piece: Piece) -> Done:
    assert _shaper is not None
    vocab = _shaper.tokenizer.vocab_size
    kind = token_type(vocab)
    splits: dict[str, list[NDArray[Any]]] = {TRAIN: [], HELD: []}
    held_back, entries = dict.fromkeys(splits, 0), []  # type: dict[str, int], list[Entry]
    skipped, why = 0, ""

    def flush(split: str) -> None:
        found, splits[split], held_back[split] = splits[split], [], 0
        part = sum(entry.split == split for entry in entries)
        path = _folder / f"{split}-{number:06d}-{part:02d}.safetensors"
        write_shard(path, found, vocab, f"rorqual tokens: {split}, piece {number}, part {part}")
        tokens = sum(len(ids) for ids in found)
        entries.append(Entry(path.name, split, tokens, len(found), path.stat().st_size, digest(path)))

    for place, text in enumerate(documents(piece, _options.reading)):
        if isinstance(text, Bad):
            if _options.reading.stop:
                raise DataError(f"{text.why}. Mend it, or leave such documents out with --skip-bad")
            skipped, why = skipped + 1, why or text.why
            continue
        # By what it says: a text that comes twice is on one side.
        content = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
        split = HELD if uniform(_options.seed, HELD_OUT, content) < _options.held else TRAIN
        ids = np.array(_shaper.ids(text, number, place), dtype=kind)
        splits[split].append(ids)
        held_back[split] += len(ids)
        if held_back[split] >= SHARD:
            flush(split)
    for split, found in splits.items():
        if found:
            flush(split)
    return Done(tuple(entries), skipped, why)
