"""`rorqual data`: corpora made, shown and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

app = App(name="data", help="Corpora: documents to tokens on disk.")


@app.command
def build(
    *sources: str,
    out: Path,
    tokenizer: str,
    field: str = "text",
    border: str | None = None,
    hold_out: float = 0.0,
    fim: float = 0.0,
    split_tokens: float = 0.0,
    bos: bool = True,
    eos: bool = True,
    seed: int = 0,
    skip_bad: bool = False,
    workers: int | None = None,
    piece: int = 64,
) -> None:
    """Turn documents into a corpus: token shards, a manifest, and the tokenizer beside them.

    Stopped at any moment, the same command goes on where it was. What comes out depends on the sources and
    options alone, not on the number of workers.

    Example: rorqual data build books/ chat.jsonl --out corpus --tokenizer deepseek-v3 --hold-out 0.01

    Parameters
    ----------
    sources
        Files and folders of text, JSON lines (.gz too) or parquet, or hf:owner/name.
    out
        The corpus's folder.
    tokenizer
        A folder with tokenizer.json, a checkpoint, a .gguf file, a hub id or a name of `rorqual models`.
    field
        Where the text stands in JSON lines and parquet; dots lead inwards.
    border
        What separates documents in plain text, such as "\\n\\n"; by default a file is a document.
    hold_out
        Share of documents kept out of training, in a split of their own.
    fim
        Share of documents put in fill-in-the-middle order (V3 took 0.1).
    split_tokens
        Share of tokens of punctuation with a line break that are taken apart.
    bos
        Begin each document with the tokenizer's BOS.
    eos
        End each document with the tokenizer's EOS.
    seed
        Of everything that is drawn.
    skip_bad
        Leave out documents that can't be read, and count them, instead of stopping.
    workers
        Processes; by default one a core.
    piece
        MiB of the sources that become one shard.
    """
    from rorqual.data import Options, Reading, Shape
    from rorqual.data import build as make
    from rorqual.model import load_tokenizer

    if not sources:
        raise ValueError("name at least one file, folder or hf:owner/name to read")
    text = border.encode().decode("unicode_escape") if border is not None and border.isascii() else border
    options = Options(
        Reading(field, text, stop=not skip_bad),
        Shape(fim, split_tokens, bos, eos),
        hold_out,
        seed,
        piece * 2**20,
    )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("reading", total=None)

        def told(done: int, of: int) -> None:
            progress.update(task, completed=done, total=of)

        manifest = make(
            sources, out, load_tokenizer(tokenizer), options, workers=workers, told=told,
            warn=lambda text: progress.console.print(text, style="yellow"),
        )  # fmt: skip
    if manifest.skipped:
        Console(stderr=True).print(
            f"{manifest.skipped:,} documents could not be read and were left out", style="yellow"
        )
    show(out)


@app.command
def show(folder: Path, *, json_: Annotated[bool, Parameter(name="--json")] = False) -> None:
    """What a corpus holds.

    Example: rorqual data show corpus

    Parameters
    ----------
    folder
        The corpus.
    json_
        Print its counts as JSON instead.
    """
    from rorqual.data import Manifest

    manifest = Manifest.read(folder)
    splits = list(dict.fromkeys(entry.split for entry in manifest.shards))
    counts = {
        split: {
            "tokens": sum(entry.tokens for entry in manifest.of(split)),
            "documents": sum(entry.documents for entry in manifest.of(split)),
            "shards": len(manifest.of(split)),
            "bytes": sum(entry.bytes for entry in manifest.of(split)),
        }
        for split in splits
    }
    if json_:
        about = {"tokenizer": manifest.tokenizer, "vocab": manifest.vocab, "skipped": manifest.skipped}
        print(json.dumps(about | {"options": manifest.options, "splits": counts}, indent=1))
        return
    table = Table(title=str(folder))
    table.add_column("split")
    for name in ("tokens", "documents", "shards", "bytes"):
        table.add_column(name, justify="right")
    for split, found in counts.items():
        table.add_row(split, *(f"{number:,}" for number in found.values()))
    Console().print(table)


@app.command
def check(folder: Path) -> None:
    """Read every shard of a corpus and compare its checksum with the manifest's.

    Example: rorqual data check corpus

    Parameters
    ----------
    folder
        The corpus.
    """
    from rorqual.data import Corpus, DataError, Manifest

    manifest, wrong = Manifest.read(folder), []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("checking", total=len(manifest.shards))
        for split in dict.fromkeys(entry.split for entry in manifest.shards):
            wrong += Corpus(folder, split).check(lambda _: progress.advance(task))
    if wrong:
        raise DataError(
            f"{', '.join(wrong)}: not what was built. The command that built {folder} replaces such shards"
        )
    Console().print(f"{len(manifest.shards)} shards are whole")
