"""Tokens on disk: shards that are read by memory map, and the manifest that names them.

A corpus is a folder. `manifest.json` lists its shards with their sizes and checksums, the options it was built with and
its tokenizer, which lies beside it in `tokenizer/`. A shard is a safetensors file of two arrays: `tokens`, all
documents one after the other, and `borders` int64 [documents + 1], where each begins.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from rorqual.data.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "build/plan.json"
"""What a build that has not ended is of."""
TRAIN, HELD = "train", "held"
"""The splits: what is trained on, and the documents held out."""

_TYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_LONGEST_HEADER = 2**20

OPEN = 128
"""Shards of a corpus that are open at once."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Entry:
    """What a manifest says of one shard."""

    file: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str


def token_type(vocab: int) -> np.dtype[Any]:
    """The smallest type that holds ids below `vocab`."""
    return _TYPES["U16"] if vocab <= 2**16 else _TYPES["U32"]


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all, also if the machine stops."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_shard(
    path: Path, documents: Sequence[Sequence[int] | NDArray[Any]], vocab: int, about: str = ""
) -> None:
    """Documents of token ids as a shard; `about` goes into its header. The same documents make the same bytes."""
    kind = token_type(vocab)
    borders = np.zeros(len(documents) + 1, dtype=np.int64)
    np.cumsum([len(document) for document in documents], out=borders[1:])
    tokens = np.empty(int(borders[-1]), dtype=kind)
    for begin, end, document in zip(borders, borders[1:], documents, strict=False):
        tokens[begin:end] = document
    # One entry only: the library writes several in an order that changes.
    write_atomically(path, save({"tokens": tokens, "borders": borders}, {"about": about}))


def digest(path: Path) -> str:
    """The file's sha256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Shard:
    """One shard, as arrays over its file: `tokens` [n] and `borders` int64 [documents + 1], which `check` has read
    through."""

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 0 < length <= min(size - 8, _LONGEST_HEADER):
                    raise DataError(f"{path} is cut off or no shard (its header would have {length} bytes)")
                header = json.loads(file.read(length))
            whole = np.memmap(path, dtype=np.uint8, mode="r")  # one for both: each holds a file open
            self.tokens = self._array(header, "tokens", whole[8 + length :])
            self.borders = self._array(header, "borders", whole[8 + length :])
        except FileNotFoundError:
            raise DataError(f"{path} is missing: build the corpus again, whole shards are kept") from None
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"{path} is no shard: its header can't be read ({error})") from error
        borders = self.borders
        if check and (
            len(borders) == 0
            or borders[0] != 0
            or borders[-1] != len(self.tokens)
            or (np.diff(borders) < 0).any()
        ):
            raise DataError(f"{path} is corrupt: the borders of its documents contradict its tokens")

    def _array(self, header: dict[str, Any], name: str, data: NDArray[np.uint8]) -> NDArray[Any]:
        begin, end = header[name]["data_offsets"]
        kind, (count,) = _TYPES[header[name]["dtype"]], header[name]["shape"]
        if not 0 <= begin <= end or end - begin != count * kind.itemsize:
            raise DataError(f"{self.path} is corrupt: {name} has {end - begin} bytes for {count} numbers")
        if end > len(data):
            raise DataError(f"{self.path} is cut off: {len(data)} bytes of data, {end} are named")
        return data[begin:end].view(kind)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.borders) - 1


@dataclass(frozen=True)
class Manifest:
    """What a corpus consists of."""

    tokenizer: str
    """sha256 of the tokenizer's tokenizer.json."""
    vocab: int
    """Entries of the tokenizer; all ids are below it."""
    options: dict[str, Any]
    shards: tuple[Entry, ...]
    skipped: int = 0
    """Documents that were left out because they could not be read."""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises DataError for a folder that is no corpus, or not a whole one."""
        path = folder / MANIFEST
        if not path.is_file():
            hint = "its build has not ended: run it again" if (folder / PLAN).is_file() else "no corpus"
            raise DataError(f"{folder} has no {MANIFEST} ({hint}); `rorqual data build` writes it")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.get("format") != FORMAT:
                raise DataError(f"{path} is of format {found.get('format')!r}, this version reads {FORMAT}")
            shards = tuple(Entry(**entry) for entry in found.pop("shards"))
            return cls(**found, shards=shards)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{path} can't be read: {error}. Build the corpus again; whole shards are kept"
            ) from error

    def write(self, folder: Path) -> None:
        """Put it in place."""
        write_atomically(folder / MANIFEST, json.dumps(asdict(self), indent=1).encode())

    def of(self, split: str) -> list[Entry]:
        """The shards of a split."""
        return [entry for entry in self.shards if entry.split == split]


class Corpus:
    """A split of a corpus as one long row of tokens, document after document, read where asked."""

    def __init__(self, folder: str | os.PathLike[str], split: str = TRAIN) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.read(self.folder)
        entries = self.manifest.of(split)
        if not entries:
            raise DataError(f"{folder} has no {split!r} split")
        for entry in entries:
            shard = Shard(self.folder / entry.file)
            if (len(shard.tokens), shard.documents) != (entry.tokens, entry.documents):
                raise DataError(
                    f"{shard.path} holds {len(shard.tokens)} tokens in {shard.documents} documents, the manifest says "
                    f"{entry.tokens} in {entry.documents}: it belongs to another build; build the corpus again"
                )
        # Some at a time: an open file each, and systems allow a thousand.
        self._shard = lru_cache(maxsize=OPEN)(lambda n: Shard(self.folder / entries[n].file, check=False))
        self._begins = np.cumsum([0, *(entry.tokens for entry in entries)])
        self._first_documents = np.cumsum([0, *(entry.documents for entry in entries)])

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self._begins[-1])

    @property
    def documents(self) -> int:
        """Documents in all."""
        return int(self._first_documents[-1])

    def read(self, begin: int, count: int) -> tuple[Ints, Ints]:
        """`count` tokens from `begin` on: their ids, and the number of the document that each belongs to."""
        if begin < 0 or begin + count > self.tokens:
            raise IndexError(f"tokens {begin} to {begin + count} of {self.tokens}")
        ids, documents = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done, number = 0, int(np.searchsorted(self._begins, begin, side="right")) - 1
        while done < count:
            shard, at = self._shard(number), begin + done - int(self._begins[number])
            here = min(count - done, len(shard.tokens) - at)
            if here > 0:
                part = shard.tokens[at : at + here]
                if (most := int(part.max())) >= self.manifest.vocab:
                    raise DataError(
                        f"{shard.path} is corrupt: it holds id {most}, the tokenizer has {self.manifest.vocab}; "
                        "the command that built the corpus replaces such shards"
                    )
                ids[done : done + here] = part
                inside = np.searchsorted(shard.borders, np.arange(at, at + here), side="right") - 1
                documents[done : done + here] = inside + self._first_documents[number]
                done += here
            number += 1
        return ids, documents

    def check(self, told: Callable[[Entry], None] | None = None) -> list[str]:
        """Read every shard of the split: the names of those whose checksum is not the manifest's."""
        wrong = []
        for entry in self.manifest.of(self.split):
            if digest(self.folder / entry.file) != entry.sha256:
                wrong.append(entry.file)
            if told is not None:
                told(entry)
        return wrong
