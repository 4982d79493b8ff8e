"""`rorqual serve --gpus N`: one process a GPU, started and watched by torchrun's own launcher.

The process that was called starts the ranks, and does nothing but watch: rank 0 serves, the others follow its engine.
A signal to stop goes to rank 0 alone, which drains and then ends the engine on all ranks. If a rank dies, the launcher
tells the others to go: rank 0's requests get 503, and the whole ends with an error that names who it was. No rank
outlives the process that started it, whatever way that ends: each looks whether it is still there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rorqual.engine import Engine, TeamError
from rorqual.family import MoE
from rorqual.nn import Layout, Transformer
from rorqual.nn.spread import spread
from rorqual.serve.run import log, prepare_logs
from rorqual.weights import read_config

PLACE, WATCHER = "RORQUAL_RANKS_DIR", "RORQUAL_RANKS_WATCHER"
"""Variables that ranks get: where to note their process ids, and the process to watch."""

GRACE = 15
"""Seconds beyond the drain after which ranks that are still there are killed."""
LOST = 10
"""Seconds that the others have to tell their clients when a rank has died."""

M = TypeVar("M", bound=Transformer)


class RanksError(ValueError):
    """The ranks ended, and not because they were told to."""


def launch(count: int, arguments: Sequence[str], *, drain: float) -> None:
    """Run `rorqual *arguments` as `count` ranks of this machine until rank 0 ends. Raises RanksError if a rank dies."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    with tempfile.TemporaryDirectory(prefix="rorqual-ranks-") as place:
        os.environ |= {PLACE: place, WATCHER: str(os.getpid())}
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        told: dict[str, Any] = {"signals_to_handle": "SIGQUIT", "shutdown_timeout": LOST}
        known = {field.name for field in fields(LaunchConfig)}
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=f"rorqual-{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=place),
            **{name: value for name, value in told.items() if name in known},
        )
        stopper = _Stopper(Path(place), count, drain)
        stopper.install()
        try:
            elastic_launch(config, sys.executable)("-m", "rorqual", *arguments)
        except ChildFailedError as error:
            if stopper.signal is not None and not stopper.overdue:
                raise SystemExit(128 + stopper.signal) from None  # told to stop while they were still loading
            rank, failure = min(error.failures.items(), key=lambda item: item[1].timestamp)
            how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else "failed"
            raise RanksError(f"rank {rank} {how} (code {failure.exitcode}); the server has ended") from None
        finally:
            stopper.kill()


class _Stopper:
    """What signals do to the ranks. The first one goes to rank 0, the second ends everything at once."""

    def __init__(self, place: Path, count: int, drain: float) -> None:
        self.place, self.count, self.drain = place, count, drain
        self.signal: int | None = None
        self.overdue = False

    def install(self) -> None:
        """Take the signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.kill()
            os._exit(128 + number)
        self.signal = number
        first = self.pid(0)
        if first is not None:
            _send(first, signal.SIGTERM)
        else:
            self.kill()
        timer = threading.Timer(self.drain + GRACE, self._too_late)
        timer.daemon = True
        timer.start()

    def _too_late(self) -> None:
        self.overdue = True
        self.kill()

    def pid(self, rank: int) -> int | None:
        """A rank's process; None if it has not begun."""
        try:
            return int((self.place / f"{rank}.pid").read_text())
        except (OSError, ValueError):
            return None

    def kill(self) -> None:
        """End every rank that is still there."""
        for rank in range(self.count):
            pid = self.pid(rank)
            if pid is not None:
                _send(pid, signal.SIGKILL)


def _send(pid: int, number: int) -> None:
    """Send a signal to a rank, if the number is still its own: once a child has been waited for, another process may
    have it."""
    with contextlib.suppress(ProcessLookupError, PermissionError, ChildProcessError):
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # ChildProcessError: not ours
        os.kill(pid, number)


# ------------------------------------------------------------------------------------------ in a rank


def is_rank() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def begin() -> None:
    """What a rank does first: note its process id, and begin to look whether the process that watches it lives."""
    place, watcher = os.environ.get(PLACE), os.environ.get(WATCHER)
    if place is None or watcher is None:
        return  # started by torchrun itself
    path = Path(place, f"{os.environ['RANK']}.pid")
    path.with_suffix(".new").write_text(str(os.getpid()))
    path.with_suffix(".new").rename(path)
    threading.Thread(target=_watch, args=(int(watcher),), name="rorqual-watcher", daemon=True).start()


def _watch(watcher: int) -> None:
    while os.getppid() == watcher:
        time.sleep(0.5)
    os._exit(1)


def follow(model: Any, **options: Any) -> None:
    """Ranks other than 0: run in step with rank 0 until it ends the engine. Signals to stop are rank 0's affair."""
    engine = Engine(model, **options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine.follow()
    except TeamError as error:
        print(f"rank {os.environ.get('RANK')} ends: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


# --------------------------------------------------------------------------------------- its weights


def layout_for(
    place: Path,
    *,
    data: int | None = None,
    tensor: int | None = None,
    expert: int | None = None,
    speculate: bool = False,
    device: str | None = None,
) -> Layout:
    """The layout of this rank for the checkpoint at `place`. Unless told otherwise: rows of data for models with
    experts, which are then spread over all ranks; tensor ranks for dense models, and with drafts, which rows that share
    experts can't make. Raises InputError for numbers that don't make up the ranks there are."""
    world = int(os.environ["WORLD_SIZE"])
    layers = read_config(place).layers if place.is_dir() else ()  # a .gguf file is a dense model's
    sparse = any(isinstance(layer.ff, MoE) for layer in layers)
    if tensor is None:
        rows = data or (world if sparse and not speculate else 1)
        tensor = max(1, world // rows)
    kind = "cpu" if device == "cpu" else None
    layout = Layout(data=data, tensor=tensor, expert=expert, device=kind)
    if layout.rank == 0:
        prepare_logs()
        told = "%d processes: %d data x %d tensor ranks, experts over %d"
        log.info(told, layout.world, layout.data, layout.tensor, layout.expert)
    return layout


def in_turns(layout: Layout, place: Path, load: Callable[[], M]) -> M:
    """`load()` the model at `place` into this machine's memory and cut it to this rank's share: as many ranks at a
    time as the memory holds whole models, since each reads the model whole."""
    files = place.glob("*.safetensors") if place.is_dir() else (place,)
    size = sum(file.stat().st_size for file in files)
    local = int(os.environ.get("LOCAL_RANK", layout.rank))
    room = int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    together = max(1, room // max(size, 1))
    turns = -(-int(os.environ.get("LOCAL_WORLD_SIZE", layout.world)) // together)
    found: M | None = None
    for turn in range(-layout.least(-turns)):
        if local // together == turn:
            found = load()
            spread(found, layout)
        layout.least(0)  # all meet here
    assert found is not None
    return found
