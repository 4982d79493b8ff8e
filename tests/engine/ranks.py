"""Work for several processes at once, with the CPU's collectives: what `test_parallel` starts."""

from __future__ import annotations

import os
import queue
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "rorqual", "tests.engine.conftest"])


def together(work: Callable[..., Any], ranks: int, *args: Any, seconds: float = 120) -> list[Any]:
    """`work(*args)` in `ranks` processes as torchrun would start them: what each returned, or the text of what it
    raised. A process that ended without a word gives its exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, ranks, port, answers, work, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        for process in processes:
            process.join(seconds)
        while len(found) < ranks:
            try:
                rank, value = answers.get(timeout=0.5)
            except queue.Empty:
                break
            found[rank] = value
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return [found.get(rank, process.exitcode) for rank, process in enumerate(processes)]


def _rank(rank: int, ranks: int, port: int, answers: Any, work: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        answers.put((rank, work(*args)))
    except BaseException as error:
        traceback.print_exc()
        answers.put((rank, f"{type(error).__name__}: {error}"))
