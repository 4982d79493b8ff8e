"""Where the time of some steps goes: a trace that chrome://tracing and Perfetto read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from rorqual.train.trainer import Report


class Profile:
    """Records steps `first` to `last`, both with them, of a run that begins at step `begin`; to be told of each step.
    The trace is in `path` when the last is done, or at `close`."""

    def __init__(self, folder: Path, first: int, last: int, begin: int = 0) -> None:
        if first < begin:
            raise ValueError(f"step {first} can't be profiled: the run is at step {begin} already")
        self.first, self.last = first, last
        self.path = folder / f"trace-{first}-{last}.json"
        self._running: Any = None
        if first == begin:
            self._start()

    def __call__(self, report: Report) -> None:
        if self._running is None and report.step == self.first - 1 and not self.path.exists():
            self._start()
        elif report.step >= self.last:
            self.close()

    def _start(self) -> None:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._running = profile(activities=[ProfilerActivity.CPU, *cuda], record_shapes=True)
        self._running.start()

    def close(self) -> None:
        """Write what was recorded, if it isn't written."""
        if self._running is not None:
            running, self._running = self._running, None
            running.stop()
            running.export_chrome_trace(str(self.path))


def steps_of(text: str) -> tuple[int, int]:
    """ "5" or "5:9" as the first and the last step. ValueError for anything else."""
    first, colon, last = text.partition(":")
    if not first.isdecimal() or (colon and not last.isdecimal()) or (colon and int(last) < int(first)):
        raise ValueError(f"--profile {text}: write a step, or the first and the last such as 20:22")
    return int(first), int(last or first)
