"""One process at a time in a run's folder: two would write the same log and the same checkpoints."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"


class Busy(ValueError):
    """Another process has a run's folder."""


class Hold:
    """A folder, held until nobody has this any more, or the process has ended in whatever way."""

    def __init__(self, file: int) -> None:
        self.close = weakref.finalize(self, os.close, file)


_mine: weakref.WeakValueDictionary[tuple[int, Path], Hold] = weakref.WeakValueDictionary()
"""By process and folder: to close any handle of a locked file unlocks it, so a process has one."""


def hold(folder: Path) -> Hold | None:
    """Hold a folder that is there; in the same process again and again. None where a system has no locks, or a disk.
    Busy if another process has it."""
    key = os.getpid(), folder.resolve()
    held = _mine.get(key)
    if held is not None or fcntl is None:
        return held
    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(file)
        raise Busy(
            f"{folder} is another process's run, which goes on: wait for its end, or give this one another folder"
        ) from None
    except OSError:  # a disk without locks
        os.close(file)
        return None
    held = _mine[key] = Hold(file)
    return held
