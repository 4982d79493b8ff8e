"""Processes for tests, forked from one that has imported everything: they cost next to nothing.

Python has one such server a process, and it knows the modules that were named before it began. So there is one list
for all tests, and the server is begun with it before the first of them (`rorqual.data` names modules of its own).
"""

from __future__ import annotations

from multiprocessing import forkserver, get_context

CONTEXT = get_context("forkserver")
IMPORTED = [
    "rorqual.data.build",
    "rorqual.serve.ranks",
    "rorqual.serve.run",
    "rorqual.train.trainer",
    "tests.engine.ranks",
    "tests.kernels.test_exchange",
    "tests.serve.processes",
    "tests.serve.puppet",
    "tests.train.test_trainer",
    "tests.weights.test_resources",
    "torch.distributed",
]
USERS = {"data", "engine", "kernels", "recipes", "serve", "train", "weights"}
"""Folders of tests that fork."""


def begin() -> None:
    CONTEXT.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()
