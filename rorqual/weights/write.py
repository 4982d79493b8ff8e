"""Writing safetensors files tensor by tensor, and putting a finished checkpoint in the place of an old one.

Nothing of the directory is touched before every new file is complete and on the disk. New shards never
take the name of an old one, so the old checkpoint stays whole until the one rename that ends it. While files
change places a journal stands beside them: a directory that has one is not loaded, and the next save
finishes what was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.weights.errors import CheckpointError
from rorqual.weights.shards import DTYPE_NAMES, INDEX, JOURNAL, SINGLE, STAGING, raw_bytes


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: its hub name, type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Shard:
    """One safetensors file being written; its tensors may come in any order."""

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begin = 0
        # Wide types first, so that each tensor stays aligned to its own width.
        for entry in sorted(entries, key=lambda e: -e.dtype.itemsize):
            header[entry.name] = {
                "dtype": DTYPE_NAMES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [begin, begin + entry.nbytes],
            }
            begin += entry.nbytes
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._header, self._base = header, 8 + len(raw)
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(self._base + begin)
        self._left = {entry.name: entry for entry in entries}

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor, of the announced type and shape."""
        entry = self._left.pop(name)
        assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, f"{name}: {tensor.dtype}"
        if tensor.numel():
            self._file.seek(self._base + self._header[name]["data_offsets"][0])
            self._file.write(raw_bytes(tensor.detach().to("cpu").contiguous()))

    def close(self) -> None:
        """Everything to the disk."""
        assert not self._left, f"never written: {list(self._left)[:3]}"
        sync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close what will be thrown away."""
        self._file.close()


def sync(descriptor: int) -> None:
    """Wait until a file is on the disk."""
    os.fsync(descriptor)


def write_text(path: Path, text: str) -> None:
    """A small file, on the disk when this returns."""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        sync(f.fileno())


def shard_names(count: int, directory: Path) -> list[str]:
    """File names for `count` shards, none of which exists in `directory` (unless it is the single file)."""
    if count == 1:
        return [SINGLE]
    for number in range(1000):
        stem = "model" if number == 0 else f"model-r{number}"
        names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if not any((directory / name).exists() for name in names):
            return names
    raise CheckpointError(f"{directory} is full of shards of other saves: remove those that are not needed")


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A fresh place inside `directory` for unfinished files; gone afterwards, whatever happens.

    Finishes first what an interrupted save left. Raises CheckpointError where no such place can be made.
    """
    place = directory / STAGING
    try:
        directory.mkdir(parents=True, exist_ok=True)
        finish(directory)
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    except OSError as error:
        raise CheckpointError(
            f"{directory}: can't be saved to: {error.filename}: {error.strerror or error}"
        ) from error
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, directory: Path, shards: Sequence[str]) -> None:
    """Put the staged files in `directory`, the old checkpoint's out.

    An error leaves the old checkpoint as it was. A kill leaves the old one, the new one, or the journal.
    """
    names = [*shards, "config.json", INDEX] if list(shards) != [SINGLE] else ["config.json", SINGLE]
    old = {name: _bytes(directory / name) for name in ("config.json", INDEX)}
    plan = _Plan(names, _stale(directory, old[INDEX], names))
    unfinished = (directory / JOURNAL).exists()  # a journal that could not be followed: not to be lost
    try:
        plan.write(place, directory)
        for name in names:
            os.replace(place / name, directory / name)
        _sync_directory(directory)
        _remove(directory, plan.stale)
        _sync_directory(directory)
    except BaseException:
        taken = not (place / names[-1]).exists()  # the rename that can't be taken back
        if taken:
            _remove(directory, plan.stale)
        else:
            _undo(place, directory, names, old)
        if taken or not unfinished:
            (directory / JOURNAL).unlink(missing_ok=True)
        raise
    (directory / JOURNAL).unlink(missing_ok=True)


def finish(directory: Path) -> None:
    """Do the rest of a commit that was killed, if there is one.

    A journal that can't be followed to its end stays: the save that asked will write its own over it.
    """
    plan = _Plan.read(directory)
    if plan is None:
        return
    place = directory / STAGING
    for name in plan.names:
        if (place / name).exists():
            os.replace(place / name, directory / name)
    if plan.names and all((directory / name).exists() for name in plan.names):
        _remove(directory, plan.stale)
        _sync_directory(directory)
        (directory / JOURNAL).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Plan:
    """The journal: the files to move out of the staging place, in order, and those to delete after."""

    names: list[str]
    stale: list[str]

    def write(self, place: Path, directory: Path) -> None:
        """On the disk before anything is moved."""
        write_text(place / JOURNAL, json.dumps({"move": self.names, "delete": self.stale}))
        os.replace(place / JOURNAL, directory / JOURNAL)
        _sync_directory(directory)

    @classmethod
    def read(cls, directory: Path) -> _Plan | None:
        """None without a journal; an empty plan for one that can't be read. Only plain file names count."""
        text = _bytes(directory / JOURNAL)
        if text is None:
            return None
        try:
            table = json.loads(text)
            names, stale = ([str(n) for n in table[key]] for key in ("move", "delete"))
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls([], [])
        plain = all(Path(n).name == n for n in (*names, *stale))
        return cls(names, stale) if plain else cls([], [])


def _stale(directory: Path, old_index: bytes | None, names: Sequence[str]) -> list[str]:
    """Files that the old checkpoint had and the new one has not."""
    out = [SINGLE, INDEX]
    for text in (old_index, _bytes(directory / JOURNAL)):
        try:
            table = json.loads(text or b"{}")
            out += [*table.get("weight_map", {}).values(), *table.get("move", ()), *table.get("delete", ())]
        except (ValueError, TypeError, AttributeError, RecursionError):
            continue
    ours = {n for n in out if isinstance(n, str) and Path(n).name == n}
    return sorted(n for n in ours if n == INDEX or n.endswith(".safetensors") if n not in names)


def _undo(place: Path, directory: Path, names: Sequence[str], old: dict[str, bytes | None]) -> None:
    """Take back the moves that were made."""
    for name in names:
        if (place / name).exists():
            continue
        content = old.get(name)
        if content is None:
            (directory / name).unlink(missing_ok=True)
        else:
            (directory / name).write_bytes(content)


def _remove(directory: Path, names: Sequence[str]) -> None:
    for name in names:
        (directory / name).unlink(missing_ok=True)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
