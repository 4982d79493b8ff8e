"""OpenMP's threads go with the work from one thread to another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks import CONTEXT

PROGRAM = """
import os, threading, torch
from rorqual.engine import Engine, Sampling
from rorqual.serve.driver import Driver
from tests.serve.puppet import Puppet
from tests.engine.conftest import build

torch.set_num_threads(3)

def work():
    (torch.randn(256, 256) @ torch.randn(256, 256)).exp()
    torch.randn(1 << 20).exp()

def count():
    return len(os.listdir("/proc/self/task"))

before = count()
work()
assert count() == before + 2, "no pool was made: this test tells nothing"
BEGIN
assert count() == before + 1, f"{count()} threads, {before} at first"
work()
assert count() == before + 3
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="it looks at /proc")
@pytest.mark.parametrize(
    "begin",
    [
        'engine = Engine(build("gqa"), memory=4_000_000, page_size=8); engine.start()',
        'driver = Driver(Puppet("x"), torch.device("cpu")); driver.start()',
    ],
)
def test_who_starts_a_thread_lets_go(begin: str) -> None:
    program = PROGRAM.replace("BEGIN", begin)
    child = CONTEXT.Process(target=exec, args=(program, {}))
    child.start()
    child.join(60)
    assert child.exitcode == 0, "its own words are on standard error"
