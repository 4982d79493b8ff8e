"""Where documents come from: text, JSON lines, parquet, whole folders of them, or a dataset on the Hugging Face hub.

Sources are cut into pieces of about `PIECE` bytes before anything is read, so that pieces can be read side by side, and
again after an interruption; the cut depends on the files alone.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rorqual.data.errors import DataError

PIECE = 64 * 2**20
"""Bytes of a piece, about: files are cut only between lines, borders or groups of rows."""

CHUNK = 2**20
"""Bytes read at a time."""

HUB = "hf:"

JSON_LINES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
PARQUET = (".parquet",)
LEFT_OUT = (".safetensors", ".gguf", ".bin", ".pt", ".png", ".jpg", ".pdf")
PACKED = (".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".tar.gz", ".7z")


@dataclass(frozen=True)
class Span:
    """A part of a file: bytes `begin` to `end` (of parquet: groups of rows), and the file's size when it was cut."""

    path: str
    begin: int
    end: int
    size: int


Piece = tuple[Span, ...]


@dataclass(frozen=True)
class Reading:
    """How documents are read. `field`: where the text stands in JSON lines and parquet, dots going inwards. `border`:
    what separates documents in plain text; without one a file is a document. `stop`: whether a document that can't be
    read ends the build (else it is left out and counted)."""

    field: str = "text"
    border: str | None = None
    stop: bool = True


def kind(path: Path) -> str:
    """ "jsonl", "parquet" or "text"."""
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return "jsonl"
    return "parquet" if name.endswith(PARQUET) else "text"


def files_of(sources: Sequence[str], warn: Callable[[str], None] = print) -> list[Path]:
    """All files of the sources, each once, folders searched through, in an order of their own. What is left out of
    folders though it may hold text is told to `warn`. DataError for what is not there."""
    found: list[Path] = []
    for source in sources:
        path = _from_hub(source) if source.startswith(HUB) else Path(source)
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path))]
            inside = sorted(inside)
            packed = [p for p in inside if p.name.lower().endswith(PACKED)]
            if packed:
                warn(
                    f"{source}: {len(packed)} packed files are left out, {packed[0].name} first: unpack them, or as .gz"
                )
            files = [p for p in inside if not p.name.lower().endswith((*LEFT_OUT, *PACKED))]
            if not files:
                raise DataError(f"{source} holds no files of text, JSON lines or parquet")
            found += files
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{source} is not there; datasets on the hub are written {HUB}owner/name")
    return list({path.resolve(): path for path in reversed(found)}.values())[::-1]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _from_hub(source: str) -> Path:
    """The dataset's files in the hub's cache, downloaded where they are not there yet."""
    from huggingface_hub import snapshot_download

    name = source.removeprefix(HUB)
    try:
        return Path(snapshot_download(name, repo_type="dataset", ignore_patterns=["*.md", ".gitattributes"]))
    except Exception as error:  # of many kinds: no such name, no network, no right
        raise DataError(f"dataset {name!r} can't be had from the Hugging Face hub: {error}") from error


def cut(files: Sequence[Path], reading: Reading, size: int = PIECE) -> list[Piece]:
    """The files as pieces of about `size` bytes; small files share one."""
    pieces: list[Piece] = []
    together: list[Span] = []
    held = 0
    for path in files:
        for span in _spans(path, reading, size):
            weight = span.size if kind(path) == "parquet" else span.end - span.begin
            if together and held + weight > size:
                pieces.append(tuple(together))
                together, held = [], 0
            together.append(span)
            held += weight
    return [*pieces, tuple(together)] if together else pieces


def _spans(path: Path, reading: Reading, size: int) -> Iterator[Span]:
    total = path.stat().st_size
    if kind(path) == "parquet":
        groups = _parquet(path).num_row_groups
        each = max(1, groups * size // max(total, 1))
        for begin in range(0, groups, each):
            yield Span(str(path), begin, min(begin + each, groups), total)
    elif _gzipped(path) or (kind(path) == "text" and not _cuttable(reading.border)):
        yield Span(str(path), 0, total, total)  # can't be entered in the middle
    else:
        for begin in range(0, total, size):
            yield Span(str(path), begin, min(begin + size, total), total)


def _gzipped(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def _whole(path: Path) -> bytes:
    """A text file's bytes."""
    try:
        return gzip.decompress(path.read_bytes()) if _gzipped(path) else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read to its end: {error}") from error


def _cuttable(border: str | None) -> bool:
    return bool(border) and not _overlaps((border or "").encode())


@dataclass(frozen=True)
class Bad:
    """A document that can't be read, and why."""

    why: str


def documents(piece: Piece, reading: Reading) -> Iterator[str | Bad]:
    """The piece's documents in order. Those that can't be read come as `Bad`. DataError for a file that has changed."""
    for span in piece:
        path = Path(span.path)
        if not path.is_file() or path.stat().st_size != span.size:
            raise DataError(
                f"{path} has changed since the build began: give the build another folder, or delete this one"
            )
        match kind(path):
            case "jsonl":
                yield from _json_lines(path, span, reading)
            case "parquet":
                yield from _rows(path, span, reading)
            case _:
                yield from _texts(path, span, reading)


def _json_lines(path: Path, span: Span, reading: Reading) -> Iterator[str | Bad]:
    for at, line in _parts(path, span, b"\n"):
        if not line.strip():
            continue
        try:
            yield _field(json.loads(line), reading.field)
        except (ValueError, DataError, RecursionError) as error:
            yield Bad(f"{path}, byte {at}: {error}")


def _texts(path: Path, span: Span, reading: Reading) -> Iterator[str | Bad]:
    border = (reading.border or "").encode()
    parts = _parts(path, span, border) if border else [(0, _whole(path))]
    for at, part in parts:
        try:
            text = part.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Bad(f"{path}, byte {at + error.start}: not UTF-8")
            continue
        if text.strip():
            yield text


def _parquet(path: Path) -> Any:
    """The file, opened."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow; pip install 'rorqual[data]'") from None
    try:
        return pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{path} is cut off or no parquet file: {error}") from error


def _rows(path: Path, span: Span, reading: Reading) -> Iterator[str | Bad]:
    file = _parquet(path)
    column = reading.field.split(".")[0]
    if column not in file.schema_arrow.names:
        names = ", ".join(file.schema_arrow.names)
        raise DataError(f"{path} has no column {column!r}; it has {names}. Name one with --field")
    for group in range(span.begin, span.end):
        for batch in file.iter_batches(row_groups=[group], columns=[column]):
            for number, row in enumerate(batch.to_pylist()):
                try:
                    yield _field(row, reading.field)
                except DataError as error:
                    yield Bad(f"{path}, group {group}, row {number}: {error}")


def _field(record: Any, field: str) -> str:
    value = record
    for name in field.split("."):
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise DataError(f"no field {name!r} (there is: {there}); name one with --field")
        value = value[name]
    if not isinstance(value, str):
        raise DataError(f"field {field!r} is a {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"field {field!r} holds half a character (letter {error.start})") from None
    return value


def _parts(path: Path, span: Span, border: bytes) -> Iterator[tuple[int, bytes]]:
    """What stands between borders, with the byte it begins at: the parts that begin within the span."""
    with path.open("rb") as raw:
        if _gzipped(path):
            with gzip.open(raw) as unpacked:
                yield from _between(unpacked, 0, border, path)
            return
        # A part that begins where the span does is the span's: so look for a border right before it.
        start = max(0, span.begin - len(border))
        raw.seek(start)
        parts = _between(raw, start, border, path)
        if span.begin:
            next(parts, None)
        for at, part in parts:
            if at >= span.end:
                return
            yield at, part


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes: ...


def _between(file: Readable, at: int, border: bytes, path: Path) -> Iterator[tuple[int, bytes]]:
    """All that stands between borders from here on, `at` being here."""
    rest, more = b"", True
    while more:
        try:
            chunk = file.read(max(CHUNK, len(rest)))
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} can't be read to its end: {error}") from error
        more = bool(chunk)
        *whole, rest = (rest + chunk).split(border)
        for part in whole if more else [*whole, rest]:
            yield at, part
            at += len(part) + len(border)


def _overlaps(border: bytes) -> bool:
    """Whether two of them can overlap: then where one is found depends on where one began to look."""
    return any(border[:n] == border[-n:] for n in range(1, len(border)))
