"""The tiny checkpoints of `tiny.py` as fixtures: each is built once a session and copied for a test that
changes it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.weights.tiny import Checkpoint, Quantised, make_checkpoint, quantise


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A checkpoint by its key in `CONFIGS`. Not to be changed."""
    root = tmp_path_factory.mktemp("made")
    done: dict[str, Checkpoint] = {}

    def make(key: str) -> Checkpoint:
        if key not in done:
            done[key] = make_checkpoint(key, root)
        return done[key]

    return make


@pytest.fixture
def checkpoint(made: Callable[[str], Checkpoint], tmp_path: Path) -> Callable[[str], Checkpoint]:
    """A checkpoint by its key, in a directory of the test's own."""

    def copy(key: str) -> Checkpoint:
        original = made(key)
        shutil.copytree(original.path, tmp_path / "checkpoint")
        return Checkpoint(tmp_path / "checkpoint", original.ids, original.logits)

    return copy


@pytest.fixture
def quantised(made: Callable[[str], Checkpoint], tmp_path: Path) -> Callable[[str], Quantised]:
    """ "fp8" (fp32 scales, ragged blocks), "ue8m0" (powers of two in fp32) or "fp4" (V4)."""

    def make(kind: str) -> Quantised:
        key = "deepseek_v4" if kind == "fp4" else "deepseek_v32" if kind == "ue8m0" else "deepseek_v3"
        root = tmp_path / kind
        if kind == "fp4":
            return quantise(made(key), root, block=32, power=True, v4=True)
        return quantise(made(key), root, block=24, power=kind == "ue8m0", v4=False)

    return make
