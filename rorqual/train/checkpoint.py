"""Checkpoints of a run: whole or not there, by canonical names, written while training goes on.

A checkpoint is a folder `step-N` of safetensors files (`model`, `optimizer`, `ema`) and `state.json`, which is written
last and names the others with their sizes and checksums. It is made under another name and renamed when all of it is
on the disk, so a folder of that name is whole unless a disk has lost something, which the checksums tell.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from rorqual.data.shards import write_atomically

NAME = re.compile(r"step-(\d{8})")


class CheckpointLost(ValueError):
    """A checkpoint that can't be read, and what to do."""


@dataclass
class Kept:
    """What a checkpoint holds: tensors by group and name, and plain facts."""

    step: int
    facts: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, oldest first."""
    found = (NAME.fullmatch(place.name) for place in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match is not None)


def place_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def write(folder: Path, kept: Kept) -> Path:
    """Put a checkpoint in place. OSError leaves everything else as it was."""
    place = place_of(folder, kept.step)
    part = folder / f".{place.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        files = {}
        for group, tensors in kept.tensors.items():
            content = save({name: t.contiguous() for name, t in sorted(tensors.items())})
            files[f"{group}.safetensors"] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            _write(part / f"{group}.safetensors", content)
        state = {"step": kept.step, "facts": kept.facts, "files": files}
        _write(part / "state.json", json.dumps(state, indent=1).encode())
        old = folder / f".{place.name}.old"
        if place.exists():  # one that is being replaced stays until the new one stands
            shutil.rmtree(old, ignore_errors=True)
            os.replace(place, old)
        os.replace(part, place)
        _sync(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return place


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Have the folder's own entries on the disk."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def read(folder: Path, step: int) -> Kept:
    """A checkpoint, compared with its checksums. CheckpointLost if anything is missing, cut off or changed."""
    place = place_of(folder, step)
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        kept = Kept(int(state["step"]), dict(state["facts"]))
        for name, said in state["files"].items():
            content = (place / name).read_bytes()
            if len(content) != said["bytes"] or hashlib.sha256(content).hexdigest() != said["sha256"]:
                raise CheckpointLost(
                    f"{place / name} is not what was written ({len(content)} bytes of {said['bytes']}): delete "
                    f"{place.name} and resume from the one before it"
                )
            kept.tensors[name.removesuffix(".safetensors")] = load_file(place / name)
    except (OSError, KeyError, TypeError, AttributeError, SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointLost):
            raise
        raise CheckpointLost(
            f"{place} can't be read ({type(error).__name__}: {error}): delete it and resume from the one before it"
        ) from error
    return kept


def facts_of(folder: Path, step: int) -> dict[str, Any]:
    """The facts of a checkpoint, its tensors unread; none of one that can't be read."""
    try:
        return dict(json.loads((place_of(folder, step) / "state.json").read_text(encoding="utf-8"))["facts"])
    except (OSError, KeyError, TypeError, ValueError):
        return {}


def best(folder: Path) -> list[int]:
    """The steps whose checkpoints know their held-out loss (the fact `held`), lowest first, the earlier of equals."""
    held = [(facts_of(folder, step).get("held"), step) for step in steps_in(folder)]
    return [step for _, step in sorted((h, s) for h, s in held if h is not None and math.isfinite(h))]


def amend(folder: Path, kept: Kept) -> None:
    """Give the checkpoint of its step other facts; all at once, its tensors untouched."""
    path = place_of(folder, kept.step) / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path, json.dumps(state | {"facts": kept.facts}, indent=1).encode())


def newest(folder: Path) -> tuple[Kept | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer. One that was being replaced
    when all ended is put back."""
    for old in folder.glob(".step-*.old"):
        place = folder / old.name.removeprefix(".").removesuffix(".old")
        if not place.exists():
            os.replace(old, place)
    wrong: list[str] = []
    for step in reversed(steps_in(folder)):
        try:
            return read(folder, step), wrong
        except CheckpointLost as error:
            wrong.append(str(error))
    return None, wrong


def set_aside(folder: Path, after: int) -> None:
    """Give checkpoints of steps after `after`, which can't be read, another name."""
    for step in steps_in(folder):
        if step > after:
            place = place_of(folder, step)
            aside = folder / f"broken-{place.name}"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(place, aside)


def drop(folder: Path, after: int) -> None:
    """Delete the checkpoints of steps after `after`, the newest first."""
    for step in reversed(steps_in(folder)):
        if step > after:
            shutil.rmtree(place_of(folder, step))


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, and deletes old ones: the last `last` stay, and the
    `best` ones. A write that fails is told to `warn`, and the next one is tried; two in a row are raised."""

    def __init__(
        self, folder: Path, last: int = 2, warn: Callable[[str], None] = print, best: int = 0
    ) -> None:
        self.folder, self.last, self.warn, self.best = folder, max(1, last), warn, best
        self._failed = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def put(self, kept: Kept) -> None:
        """Have it written, after what is being written now. The tensors are copied first."""
        self.join()
        copied = {
            group: {name: t.detach().to("cpu", copy=True) for name, t in tensors.items()}
            for group, tensors in kept.tensors.items()
        }
        own = Kept(kept.step, kept.facts, copied)
        self._thread = threading.Thread(target=self._write, args=(own,), name="rorqual-checkpoint")
        self._thread.start()

    def _write(self, kept: Kept) -> None:
        try:
            write(self.folder, kept)
            older = [step for step in steps_in(self.folder) if step <= kept.step]
            stay = {*older[-self.last :], *best(self.folder)[: self.best]}
            for step in older:
                if step not in stay:
                    shutil.rmtree(place_of(self.folder, step))
            self._failed = 0
        except Exception as error:
            self._failed += 1
            self._error = error
            self.warn(f"the checkpoint of step {kept.step} could not be written: {error}")

    def join(self) -> None:
        """Until nothing is being written. Raises what went wrong if two writes in a row did."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise(more_than=1)

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong with the last write."""
        self.join()
        self._raise(more_than=0)

    def _raise(self, more_than: int) -> None:
        if self._error is None or self._failed <= more_than:
            return
        if isinstance(self._error, OSError):
            raise OSError(
                f"{self.folder}: no checkpoint could be written ({self._error}). Make room, and go on from the last "
                "one by --resume"
            ) from self._error
        raise self._error


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two groups of tensors hold the same bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
