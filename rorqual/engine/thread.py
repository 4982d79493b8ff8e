"""The thread that an engine may have of its own, and what an error leaves behind: neither keeps an engine alive."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from rorqual.engine.core import Core


def drive(
    known: weakref.ref[Core], device: torch.device, progress: threading.Condition, ended: threading.Event
) -> None:
    """What an engine's thread does until it is told to end, or nobody knows the engine any more."""
    work_alone(device)
    while True:
        with progress:
            while True:
                engine = known()
                if engine is None or ended.is_set():
                    return
                if engine.busy:
                    break
                del engine
                progress.wait()
        if not engine._drive_once():
            return
        del engine


def release_pool(device: torch.device) -> None:
    """Let go of the threads that OpenMP keeps for the calling thread's tensor operations; the next such operation makes
    them anew. To be called before another thread takes work on a CPU over: each thread that works gets threads of its
    own, and while they are more than the machine's cores OpenMP puts them to sleep between any two operations, which
    costs a small model a third of its speed. Does nothing for other devices (there the driver's threads need the cores)
    and where OpenMP is older than 5.0 or not there."""
    if device.type == "cpu":
        _openmp("omp_pause_resource_all", 1)  # softly: what the program has set stays


def work_alone(device: torch.device) -> None:
    """Let the calling thread, which runs passes on a GPU, do by itself what little they have for the CPU, instead of
    with a pool of threads more beside the main thread's."""
    if device.type != "cpu":
        torch.get_num_threads()  # PyTorch sets the number when a thread first asks
        _openmp("omp_set_num_threads", 1)


def _openmp(function: str, argument: int) -> None:
    """Call a function of the OpenMP that PyTorch brought along, if there is one."""
    # TypeError: on Windows, which has no list of all that is loaded.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        getattr(ctypes.CDLL(None), function)(argument)


def waker(progress: threading.Condition) -> Any:
    """For when an engine is gone: its thread looks."""

    def wake(_: object) -> None:
        with progress:
            progress.notify_all()

    return wake


def forget_frames(error: BaseException | None) -> None:
    """Let go of the frames an error came through, which keep a pass's tensors and the engine alive as long as somebody
    keeps the error; where it came from stays as a note."""
    if error is not None and error.__traceback__ is not None:
        error.add_note("It came up in a pass of the engine:\n" + "".join(traceback.format_exception(error)))
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
