"""From a name to a directory on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from rorqual.family import ConfigError, card
from rorqual.weights.errors import CheckpointError
from rorqual.weights.packaged import PACKAGED, packaged

PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja"]
"""What a checkpoint needs of a hub repository."""


TEXT = ["tokenizer*", "*.model", "*.jinja", "*config.json", "special_tokens_map.json"]
"""What its tokenizer needs."""


def resolve(
    path_or_hub_id: str | PathLike[str], revision: str | None = None, patterns: Sequence[str] = PATTERNS
) -> Path:
    """An existing path as it is, never touching the network; a hub id or a name of `rorqual models`
    downloaded (with progress bars; the files of `patterns`) or found in the hub's cache; or a packaged model such as
    "smollm2".

    Raises CheckpointError if it is none of them, or the hub can't be reached and its cache has no copy.
    """
    name = str(path_or_hub_id)
    try:
        path = Path(path_or_hub_id).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a home that is unknown
        shown = name if len(name) <= 80 else f"{name[:80]}... ({len(name)} characters)"
        raise CheckpointError(f"{shown!r} is neither a path nor a hub id: {_why(error)}") from error
    if name in PACKAGED:
        return packaged(name)
    hint = ""
    try:
        name = card(name).hub_id
    except ConfigError as error:
        hint = str(error).partition(": ")[2]
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) or path.suffix in (
        ".gguf",
        ".safetensors",
    ):
        raise CheckpointError(
            f"{name} does not exist, and is not a hub id (owner/name)" + (f": {hint}" if hint else "")
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises many kinds, of its own and of its transports
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"{name}{at} is neither a path on this machine nor a repository that could be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
