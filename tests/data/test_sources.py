"""Documents come out whole and in order, wherever files are cut, and what is wrong with them is named."""

from __future__ import annotations

import gzip
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.data import DataError, Reading
from rorqual.data.sources import Bad, cut, documents, files_of
from tests.data.corpora import json_lines, texts


def read(paths: list[Path], reading: Reading | None = None, size: int = 2**20) -> list[Any]:
    reading = reading or Reading()
    return [text for piece in cut(paths, reading, size) for text in documents(piece, reading)]


@pytest.mark.parametrize("size", [1, 7, 100, 1001, 10**6])
def test_json_lines_cut_anywhere(tmp_path: Path, size: int) -> None:
    path, expected = json_lines(tmp_path / "a.jsonl", texts(40)), texts(40)
    assert read([path], size=size) == expected
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read([packed], size=size) == expected


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.text("ab\n <|>", max_size=6), min_size=1, max_size=8),
    border=st.sampled_from(["\n\n", "<|>", "\n", "aba", "ab"]),
    size=st.integers(1, 30),
)
def test_text_cut_anywhere_gives_what_splitting_gives(
    tmp_path_factory: Any, parts: list[str], border: str, size: int
) -> None:
    """Also where two borders can overlap, as in three line breaks."""
    path, whole = tmp_path_factory.mktemp("t") / "a.txt", border.join(parts)
    path.write_bytes(whole.encode())
    expected = [part for part in whole.split(border) if part.strip()]
    assert read([path], Reading(border=border), size) == expected


def test_parquet_by_groups_of_rows(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    expected = texts(50)
    nested = [{"body": {"text": text}, "n": n} for n, text in enumerate(expected)]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "a.parquet", row_group_size=7)
    for size in (1, 500, 10**7):
        assert read([tmp_path / "a.parquet"], Reading("body.text"), size) == expected
    with pytest.raises(DataError, match="no column 'text'; it has body, n"):
        read([tmp_path / "a.parquet"])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match="cut off"):
        read([tmp_path / "cut.parquet"])


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.md", "a.py", ".git/config", "b/.hidden", "weights.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(files_of([str(tmp_path)])) == ["a.py", "b/1.md", "b/2.txt"]
    assert len(cut(files_of([str(tmp_path)]), Reading())) == 1  # small files share a piece
    with pytest.raises(DataError, match="is not there"):
        files_of([str(tmp_path / "nope")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        files_of([str(tmp_path / "empty")])


def test_names_say_how_files_are_read(tmp_path: Path) -> None:
    said: list[str] = []
    lines = json_lines(tmp_path / "a.json", texts(3)).read_bytes()
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(lines))
    (tmp_path / "c.TXT.gz").write_bytes(gzip.compress(b"one text"))
    (tmp_path / "d.jsonl.zst").write_bytes(b"packed")
    found = read(files_of([str(tmp_path)], said.append))
    assert found == [*texts(3), *texts(3), "one text"] and len(said) == 1 and "d.jsonl.zst" in said[0]
    # Named twice it is read once.
    again = files_of([str(tmp_path), str(tmp_path / "a.json"), str(tmp_path / "." / "a.json")], said.append)
    assert len(again) == 3


def test_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    json_lines(tmp_path / "a.jsonl", texts(3))
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["repo_type"]))
        if name == "no/such":
            raise OSError("404")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read(files_of(["hf:owner/name"])) == texts(3) and asked == [("owner/name", "dataset")]
    with pytest.raises(DataError, match="no/such"):
        files_of(["hf:no/such"])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{bad", "byte 21"),
        (b'{"other": 1}', "no field 'text' .there is: other."),
        (b'{"text": 5}', "a int, not text"),
        (b"[1]", "no field 'text' .there is: list."),
        (b'{"text": "\xff"}', "byte 21"),
        (b"[" * 100_000, "byte 21"),
        (rb'{"text": "cut \ud83d"}', "half a character .letter 4."),
    ],
)
def test_bad_lines_are_named_and_the_others_read(tmp_path: Path, line: bytes, why: str) -> None:
    good = json.dumps({"text": "good one"}).encode()
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n\n" + good)
    first, bad, last = read([tmp_path / "a.jsonl"])
    assert (first, last) == ("good one", "good one") and isinstance(bad, Bad)
    assert re.search(why, bad.why)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    (bad,) = read([tmp_path / "a.txt"])
    assert isinstance(bad, Bad) and "byte 3" in bad.why and "UTF-8" in bad.why


def test_files_that_changed_or_are_cut_off(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl", texts(5))
    (piece,) = cut([path], Reading())
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="has changed"):
        list(documents(piece, Reading()))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes())[:-20])
    with pytest.raises(DataError, match="can't be read to its end"):
        read([tmp_path / "b.jsonl.gz"])


def test_parquet_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="pip install"):
        read([tmp_path / "a.parquet"])
