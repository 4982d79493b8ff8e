"""What holds for every test: no network, its own seed, one thread a worker, `gpu` only beside a GPU."""

import os
import random
import signal
import zlib
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs a hub is no test; before any hub library
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists(
    "/dev/nvidiactl"
):  # kernels run in Triton's interpreter; said before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torch

from tests import forks
from tests.interpreter import hasten

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and there is none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


# Each fixture and each test draws from global generators seeded by its own name, so what it sees does not
# depend on what ran before it, nor on which worker it landed.


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: Any) -> None:
    _seed(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item.nodeid)


class _TorchRandom:
    """torch's global generator in the shape that hypothesis manages, so that examples replay and shrink."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_torch_random = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_torch_random)
hypothesis.settings.register_profile("rorqual", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("rorqual")


@pytest.fixture(scope="session", autouse=True)
def _interpreter_in_haste() -> None:
    hasten()


@pytest.fixture(scope="session", autouse=True)
def _processes(request: pytest.FixtureRequest) -> None:
    if any(item.path.parent.name in forks.USERS for item in request.session.items):
        forks.begin()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests run in the background of a shell that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
