"""The text that experiments learn from: what Python brings along, its library's sources and its language reference."""

from __future__ import annotations

import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from rorqual.data import Options, build
from rorqual.data.shards import write_atomically
from rorqual.recipes.mini import embedded_text
from rorqual.text import Tokenizer
from rorqual.text.train import train_tokenizer

VOCAB = 4096
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings", "pydoc_data", "data"}
"""Folders that are not the library, or tables."""
LARGEST = 200_000
"""Bytes over which a file is a table, too."""


def texts() -> Iterator[str]:
    """Documents: the language reference, then every module, in the order of their names. They differ a little from
    one version of Python to the next, and some systems leave the library's own tests out."""
    yield from embedded_text()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if LEFT_OUT & set(path.relative_to(root).parts) or not 200 < path.stat().st_size < LARGEST:
            continue
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # tests of exactly that
            continue


def prepare(folder: Path, vocab: int = VOCAB) -> Path:
    """Build it in `folder`/corpus with a tokenizer of its own, unless it is there. Under a minute."""
    place = folder / "corpus"
    if (place / "manifest.json").is_file():
        return place
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "text.jsonl"
    if not source.is_file():  # what a build was begun with stays
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts())
        write_atomically(source, lines.encode())
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        read = (json.loads(line)["text"] for line in source.open(encoding="utf-8"))
        train_tokenizer(read, vocab).save(folder / "tokenizer")
    tokenizer = Tokenizer.from_dir(folder / "tokenizer")
    options = Options(held=0.05, piece=4 * 2**20)
    build([str(source)], place, tokenizer, options, workers=min(8, os.cpu_count() or 1))
    about = f"library and language reference of Python {platform.python_version()}"
    write_atomically(place / "about.txt", about.encode())
    return place
