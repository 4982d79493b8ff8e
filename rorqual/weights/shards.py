"""safetensors files on disk: headers, the index over several files, and bytes read straight into tensors.

The format: 8 bytes with the length of a JSON header (little endian), the header (name -> dtype, shape,
[begin, end) in the data), the data, without gaps. Everything is checked against the file's real size
before any tensor is read.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.weights.errors import CheckpointError, some

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of types."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STAGING = ".rorqual-saving"
"""Where `save` makes its files."""
JOURNAL = ".rorqual-saving.json"
"""Stands in a directory while `save` puts its finished files in place."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_HEADER = 100 * 2**20
CHUNK = 8 * 2**20
"""Bytes read at a time where a tensor isn't read in one piece."""


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: where its bytes are, and what they mean."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


def refuse_pickles(directory: Path, names: list[str]) -> None:
    """Raise CheckpointError if `names` (of files in `directory`) holds pickled weights: loading runs code."""
    found = sorted(
        n for n in names if n.endswith(PICKLES) or n.endswith(tuple(p + ".index.json" for p in PICKLES))
    )
    if found:
        raise CheckpointError(
            f"{directory} holds its weights as pickles ({some(found)}), which run code when read and are refused. "
            "Convert them once in a sandbox: load with transformers' from_pretrained, then "
            "save_pretrained(..., safe_serialization=True)"
        )


def read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file. Raises CheckpointError for a truncated or corrupt file."""

    def corrupt(why: str) -> CheckpointError:
        return CheckpointError(f"{file}: corrupt or truncated safetensors file: {why}")

    try:
        size = file.stat().st_size
        if size == 0:
            raise CheckpointError(f"{file}: the file is empty")
        with open(file, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise corrupt(f"the header should take {length} bytes, the file has {size}")
            raw = f.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read: {error.strerror or error}") from error
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise corrupt(f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise corrupt("its header is not a JSON object")
    header.pop("__metadata__", None)
    found = {}
    base = 8 + length
    for name, entry in header.items():
        found[name] = _entry(file, name, entry, base, corrupt)
    reached = base
    for stored in sorted(found.values(), key=lambda s: (s.start, s.nbytes)):
        if stored.start != reached:
            raise corrupt(f"{stored.name} begins at byte {stored.start}, expected {reached}")
        reached += stored.nbytes
    if reached != size:
        raise corrupt(f"its tensors end at byte {reached}, the file has {size} bytes")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return out


def _entry(file: Path, name: str, entry: Any, base: int, corrupt: Any) -> Stored:
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(v) is int and v >= 0 for v in (*shape, begin, end)) and isinstance(kind, str)
    except (TypeError, KeyError, ValueError) as error:
        raise corrupt(f"the entry of {name} is malformed") from error
    if not whole:
        raise corrupt(f"the entry of {name} is malformed")
    if kind not in DTYPES:
        raise CheckpointError(f"{file}: {name} has the type {kind!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[kind]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise corrupt(f"{name} {list(shape)} {kind} has {end - begin} bytes")
    return Stored(name, file, dtype, shape, base + begin, end - begin)


def read_directory(directory: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint directory: `model.safetensors`, or the files its index names.

    Raises CheckpointError for an empty directory, pickles, an index and files that don't agree, and for two
    checkpoints in one directory.
    """
    names = sorted(p.name for p in directory.iterdir())
    if JOURNAL in names:
        raise CheckpointError(
            f"{directory}: a save to it was interrupted while it put its files in place. Save to it again; or, "
            f"if {directory / STAGING} holds the rest of the new files, move them up and delete "
            f"{JOURNAL} and the old checkpoint's weights"
        )
    if SINGLE in names and INDEX not in names:
        return read_header(directory / SINGLE)
    if INDEX not in names:
        refuse_pickles(directory, names)
        loose = [n for n in names if n.endswith(".safetensors")]
        found = (
            f"found {some(loose)}, but no index over them" if loose else f"found {some(names) or 'nothing'}"
        )
        raise CheckpointError(f"{directory} has no weights: expected {SINGLE} or {INDEX}, {found}")
    where = read_json(directory / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{directory / INDEX}: expected a `weight_map` from tensor to file, found none")
    files = sorted(set(where.values()))
    if SINGLE in names and files != [SINGLE]:
        raise CheckpointError(
            f"{directory} holds two checkpoints, {SINGLE} and the files of {INDEX}: delete {INDEX} to load the "
            f"first, or {SINGLE} to load the second"
        )
    outside = [f for f in files if Path(f).name != f]
    absent = [f for f in files if f not in names]
    if outside or absent:
        raise CheckpointError(
            f"{directory / INDEX} names {len(outside or absent)} files that are not in the directory: "
            f"{some(outside or absent)}"
        )
    return _gather(directory, where, {f: read_header(directory / f) for f in files})


def _gather(
    directory: Path, where: Mapping[str, str], headers: Mapping[str, dict[str, Stored]]
) -> dict[str, Stored]:
    """One table of all tensors; the index and the files' own headers must agree in both directions."""
    lacking = [f"{name} (not in {file})" for name, file in where.items() if name not in headers[file]]
    if lacking:
        raise CheckpointError(
            f"{directory / INDEX} points {len(lacking)} tensors to files lacking them: {some(lacking)}"
        )
    holders: dict[str, list[str]] = {}
    for file, header in headers.items():
        for name in header:
            holders.setdefault(name, []).append(file)
    twice = [f"{name} (in {' and '.join(files)})" for name, files in holders.items() if len(files) > 1]
    if twice:
        raise CheckpointError(f"{directory}: {len(twice)} tensors stand in two files: {some(twice)}")
    unnamed = [f"{name} (in {files[0]})" for name, files in holders.items() if name not in where]
    if unnamed:
        raise CheckpointError(f"{directory / INDEX} does not name {len(unnamed)} tensors: {some(unnamed)}")
    return {name: headers[file][name] for name, file in where.items()}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is absent or holds something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: can't be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------- bytes


class Reader:
    """Reads tensors' bytes. One file descriptor a file, usable from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        self._local = threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def open(self, files: set[Path]) -> None:
        """Open `files`; must come before `read`."""
        for file in files - self._open.keys():
            self._open[file] = os.open(file, os.O_RDONLY)

    def read(self, stored: Stored, into: Tensor, offset: int = 0) -> None:
        """Fill the contiguous CPU tensor `into` with the bytes of `stored` from byte `offset` on."""
        if not into.numel():
            return
        view = raw_bytes(into)
        done = 0
        while done < len(view):
            got = os.preadv(self._open[stored.file], [view[done:]], stored.start + offset + done)
            if got == 0:
                raise CheckpointError(f"{stored.file}: the file ended inside {stored.name}")
            done += got

    def piece(self, stored: Stored, offset: int, shape: tuple[int, ...]) -> Tensor:
        """Some of a tensor's numbers, from byte `offset` on. The memory is this thread's and used again by
        its next `piece`, so that many pieces leave no holes in the heap."""
        nbytes = math.prod(shape) * stored.dtype.itemsize
        scratch = getattr(self._local, "scratch", None)
        if scratch is None or scratch.numel() < nbytes:
            scratch = self._local.scratch = torch.empty(max(nbytes, CHUNK), dtype=torch.uint8)
        out = scratch[:nbytes].view(stored.dtype).view(shape)
        self.read(stored, out, offset)
        return out

    def tensor(self, stored: Stored) -> Tensor:
        """The whole tensor in its stored type, in memory of its own."""
        out = torch.empty(stored.shape, dtype=stored.dtype)
        self.read(stored, out)
        return out

    def same_bytes(self, a: Stored, b: Stored) -> bool:
        """Whether two stored tensors agree in type, shape and every byte."""
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        for offset in range(0, a.nbytes, CHUNK):
            left, right = (torch.empty(min(CHUNK, a.nbytes - offset), dtype=torch.uint8) for _ in "ab")
            self.read(a, left, offset)
            self.read(b, right, offset)
            if not torch.equal(left, right):
                return False
        return True


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data
