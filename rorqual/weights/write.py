"""Writing safetensors files tensor by tensor, and putting a finished checkpoint in the place of an old one.

Nothing of the directory is touched before every new file is complete and on the disk. New shards never
take the name of an old one, so the old checkpoint stays whole until the one rename that ends it.
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

from rorqual.weights.shards import DTYPE_NAMES, INDEX, SINGLE, raw_bytes

STAGING = ".rorqual-saving"


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
    raise FileExistsError(f"{directory} is full of shards of other saves: remove those that are not needed")


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A fresh place inside `directory` for unfinished files; gone afterwards, whatever happens."""
    directory.mkdir(parents=True, exist_ok=True)
    place = directory / STAGING
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def commit(place: Path, directory: Path, shards: Sequence[str]) -> None:
    """Put the staged files in `directory`, the old checkpoint's out.

    One rename (of the single file or the index) makes the new weights the valid ones; config.json goes just
    before it. An error leaves the old checkpoint as it was.
    """
    single = list(shards) == [SINGLE]
    old_index = _bytes(directory / INDEX)
    old_config = _bytes(directory / "config.json")
    moved: list[Path] = []
    try:
        if not single:
            for shard in shards:
                os.replace(place / shard, directory / shard)
                moved.append(directory / shard)
        os.replace(place / "config.json", directory / "config.json")
        if single:
            os.replace(place / SINGLE, directory / SINGLE)
        else:
            os.replace(place / INDEX, directory / INDEX)
            moved.append(directory / INDEX)
            (directory / SINGLE).unlink(missing_ok=True)
    except BaseException:
        for path in moved:
            path.unlink(missing_ok=True)
        _restore(directory / "config.json", old_config)
        if directory / INDEX in moved:
            _restore(directory / INDEX, old_index)
        raise
    _remove_old(directory, old_index, keep=set(shards), single=single)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def _remove_old(directory: Path, old_index: bytes | None, keep: set[str], *, single: bool) -> None:
    """Delete the shards that only the old index named."""
    if old_index is None:
        return
    if single:
        (directory / INDEX).unlink(missing_ok=True)
    try:
        named = set(json.loads(old_index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return
    for name in named - keep:
        if isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors"):
            (directory / name).unlink(missing_ok=True)
