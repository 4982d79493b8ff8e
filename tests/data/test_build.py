"""A corpus is a function of its sources and options: not of workers, interruptions or luck."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rorqual.data import HELD, TRAIN, Corpus, DataError, Options, Reading, Shape, build, fingerprint, shards
from rorqual.data.reshape import Shaper, combined
from rorqual.text import Tokenizer
from rorqual.text import tokens as t
from tests.data.corpora import TOKENIZER, json_lines, texts, tokenizer

SMALL = Options(held=0.2, piece=700, seed=3)


def ids(corpus: Corpus) -> list[int]:
    return corpus.read(0, corpus.tokens)[0].tolist()


def contents(folder: Path) -> dict[str, bytes]:
    """What a build wrote, its own notes left out."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_documents_come_back(tmp_path: Path) -> None:
    expected = texts(60)
    source = json_lines(tmp_path / "a.jsonl", expected)
    manifest = build([str(source)], tmp_path / "c", TOKENIZER, SMALL, workers=1)
    found: list[str] = []
    for split in (TRAIN, HELD):
        corpus = Corpus(tmp_path / "c", split)
        row, numbers = corpus.read(0, corpus.tokens)
        assert corpus.documents == numbers.max() + 1 == sum(e.documents for e in manifest.of(split))
        for number in range(corpus.documents):
            document = row[numbers == number].tolist()
            assert document[0] == TOKENIZER.bos and document[-1] == TOKENIZER.eos[0]
            found.append(TOKENIZER.decode(document[1:-1]))
    assert sorted(found) == sorted(expected) and len(manifest.shards) > 4
    held = sum(e.documents for e in manifest.of(HELD))
    assert 3 <= held <= 25  # a fifth of 60


def test_any_number_of_workers_and_any_part_makes_the_same(tmp_path: Path) -> None:
    source = str(json_lines(tmp_path / "a.jsonl", texts(60)))
    options = replace(SMALL, shape=Shape(fim=0.5, split=0.5))
    build([source], tmp_path / "one", TOKENIZER, options, workers=1)
    build([source], tmp_path / "many", TOKENIZER, options, workers=2)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "many") == expected
    # Half of it lost, one shard changed: the same command mends it.
    for number, path in enumerate(sorted((tmp_path / "many").glob("*.safetensors"))):
        if number % 2:
            path.unlink()
    shard = next((tmp_path / "many").glob("train-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x07")
    (tmp_path / "many" / "manifest.json").unlink()
    with pytest.raises(DataError, match="run it again"):
        Corpus(tmp_path / "many")
    build([source], tmp_path / "many", TOKENIZER, options, workers=2)
    assert contents(tmp_path / "many") == expected


def building(source: Path, folder: Path, tokenizer: Path, piece: int) -> list[str]:
    """A build as a process of its own."""
    code = (
        "from rorqual.data import Options, build\nfrom rorqual.text import Tokenizer\n"
        f"build([{str(source)!r}], {str(folder)!r}, Tokenizer.from_dir({str(tokenizer)!r}), "
        f"Options(piece={piece}), workers=2)"
    )
    return [sys.executable, "-c", code]


def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(3000))
    TOKENIZER.save(tmp_path / "tokenizer")
    begin = building(source, tmp_path / "c", tmp_path / "tokenizer", 4000)
    kills = 0
    for more in (3, 6, 9):
        child = subprocess.Popen(begin, start_new_session=True)
        end = time.monotonic() + 60
        before = len(list((tmp_path / "c").glob("*.safetensors")))
        while child.poll() is None and time.monotonic() < end:
            if len(list((tmp_path / "c").glob("*.safetensors"))) >= before + more:
                break
            time.sleep(0.005)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills == 3
    build([str(source)], tmp_path / "c", TOKENIZER, Options(piece=4000), workers=1)
    build([str(source)], tmp_path / "d", TOKENIZER, Options(piece=4000), workers=1)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")


def test_texts_that_come_twice_are_on_one_side(tmp_path: Path) -> None:
    one, two = (json_lines(tmp_path / name, texts(60)) for name in ("a.jsonl", "b.jsonl"))
    sides = []
    for piece in (700, 10**6):
        build(
            [str(one), str(two)], tmp_path / f"{piece}", TOKENIZER, Options(held=0.3, piece=piece), workers=1
        )
        sides.append([set(documents(Corpus(tmp_path / f"{piece}", split))) for split in (TRAIN, HELD)])
    (train, held), other = sides
    assert not train & held and len(train | held) == 60 and 8 < len(held) < 30
    assert other == [train, held]  # nor does it depend on the cut


def documents(corpus: Corpus) -> list[tuple[int, ...]]:
    row, numbers = corpus.read(0, corpus.tokens)
    return [tuple(row[numbers == number]) for number in range(corpus.documents)]


def test_a_piece_may_be_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(60))
    build([str(source)], tmp_path / "one", TOKENIZER, Options(held=0.2), workers=1)
    monkeypatch.setattr(shards, "OPEN", 2)
    monkeypatch.setattr(sys.modules["rorqual.data.build"], "SHARD", 200)
    build([str(source)], tmp_path / "many", TOKENIZER, Options(held=0.2), workers=1)
    one, many = (Corpus(tmp_path / name) for name in ("one", "many"))
    assert len(many.manifest.of(TRAIN)) > 5 and ids(one) == ids(many)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    assert ids(many) == ids(one) and many._shard.cache_info().currsize <= 2
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_build_that_died_at_its_beginning_can_begin_again(tmp_path: Path) -> None:
    source = str(json_lines(tmp_path / "a.jsonl", texts(5)))
    (tmp_path / "c" / "build").mkdir(parents=True)
    (tmp_path / "c" / "build" / ".plan.json.7.part").write_text("{")
    build([source], tmp_path / "c", TOKENIZER, workers=1)
    tokenizer("sea").save(tmp_path / "c" / "tokenizer")  # not what the plan says
    (tmp_path / "c" / "build" / "000000.json").unlink()
    before = contents(tmp_path / "c")
    build([source], tmp_path / "c", TOKENIZER, workers=1)
    assert contents(tmp_path / "c") == before
    assert Corpus(tmp_path / "c").manifest.tokenizer == fingerprint(
        Tokenizer.from_dir(tmp_path / "c" / "tokenizer")
    )


def test_workers_end_with_who_began_them(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(4000))
    TOKENIZER.save(tmp_path / "tokenizer")
    begin = building(source, tmp_path / "c", tmp_path / "tokenizer", 3000)
    child = subprocess.Popen(begin, start_new_session=True)
    end = time.monotonic() + 60
    while not list((tmp_path / "c").glob("*.safetensors")) and time.monotonic() < end:
        time.sleep(0.01)
    assert child.poll() is None, "it ended before it could be killed"
    child.kill()
    child.wait()
    while time.monotonic() < end:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return  # nobody is left in its session
        time.sleep(0.05)
    os.killpg(child.pid, signal.SIGKILL)
    pytest.fail("workers have outlived the build")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": Options(seed=4)}, "other options"),
        ({"tokenizer": tokenizer("sea")}, "another tokenizer"),
        ({"more": True}, "other sources"),
    ],
)
def test_another_build_in_the_same_folder_is_refused(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(5))
    build([str(source)], tmp_path / "c", TOKENIZER, Options(seed=3), workers=1)
    before = contents(tmp_path / "c")
    if change.get("more"):
        source.write_text(source.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(DataError, match=why):
        build(
            [str(source)], tmp_path / "c", change.get("tokenizer", TOKENIZER), change.get("options", Options(seed=3)),
            workers=1,
        )  # fmt: skip
    assert contents(tmp_path / "c") == before


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(5))
    with pytest.raises(DataError, match="not empty"):
        build([str(source)], tmp_path, TOKENIZER, workers=1)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no documents"):
        build([str(tmp_path / "empty.jsonl")], tmp_path / "d", TOKENIZER, workers=1)


def test_bad_documents_stop_it_or_are_counted(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(5))
    source.write_text(source.read_text() + "{bad\n")
    for workers in (1, 2):
        with pytest.raises(DataError, match="a.jsonl, byte .*--skip-bad"):
            build([str(source)], tmp_path / f"c{workers}", TOKENIZER, Options(piece=100), workers=workers)
    made = build([str(source)], tmp_path / "d", TOKENIZER, Options(Reading(stop=False)), workers=1)
    assert made.skipped == 1 and Corpus(tmp_path / "d").documents == 5


def test_a_full_disk_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = json_lines(tmp_path / "a.jsonl", texts(60))
    write, room = os.fsync, [5]

    def sync(number: int) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(number)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(DataError, match="no room is left"):
        build([str(source)], tmp_path / "c", TOKENIZER, SMALL, workers=1)
    kept = contents(tmp_path / "c")
    assert kept and not any(name.endswith(".part") for name in kept)
    monkeypatch.undo()
    build([str(source)], tmp_path / "c", TOKENIZER, SMALL, workers=1)
    build([str(source)], tmp_path / "d", TOKENIZER, SMALL, workers=1)
    assert contents(tmp_path / "c") == contents(tmp_path / "d")
    assert all(contents(tmp_path / "c")[name] == content for name, content in kept.items())


# ------------------------------------------------------------------------------------ what is read


def made(tmp_path: Path) -> Path:
    source = json_lines(tmp_path / "a.jsonl", texts(20))
    build([str(source)], tmp_path / "c", TOKENIZER, Options(piece=10**6), workers=1)
    (shard,) = (tmp_path / "c").glob("train-*.safetensors")
    return shard


@pytest.mark.parametrize("left", [0, 4, 8, 60, -1])
def test_a_shard_cut_off_anywhere_is_named(tmp_path: Path, left: int) -> None:
    shard = made(tmp_path)
    shard.write_bytes(shard.read_bytes()[:left])
    with pytest.raises(DataError, match=shard.name):
        Corpus(shard.parent)


def test_bytes_that_changed_are_found(tmp_path: Path) -> None:
    shard = made(tmp_path)
    whole = shard.read_bytes()
    assert Corpus(shard.parent).check() == []
    for at in (-3, len(whole) // 2):
        wrong = bytearray(whole)
        wrong[at] ^= 1
        shard.write_bytes(bytes(wrong))
        try:
            assert Corpus(shard.parent).check() == [shard.name]
        except DataError as error:  # borders that contradict themselves are seen at once
            assert shard.name in str(error)
    # An id outside the vocabulary is seen when it is read.
    at = whole.index(np.array([TOKENIZER.bos], "<u2").tobytes(), 8 + int.from_bytes(whole[:8], "little"))
    shard.write_bytes(whole[:at] + b"\xff\xff" + whole[at + 2 :])
    corpus = Corpus(shard.parent)
    with pytest.raises(DataError, match=f"{shard.name} is corrupt: it holds id 65535"):
        corpus.read(0, corpus.tokens)


def test_a_manifest_that_does_not_match_is_refused(tmp_path: Path) -> None:
    shard = made(tmp_path)
    path = shard.parent / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, why in (
        ({"format": 9}, "format 9"),
        ({"shards": [manifest["shards"][0] | {"tokens": 5}]}, "another build"),
        ({"shards": [manifest["shards"][0] | {"file": "other.safetensors"}]}, "other.safetensors is missing"),
        ({"shards": [{}]}, "can't be read"),
        ({"shards": 3}, "can't be read"),
        ({"surprise": 3}, "can't be read"),
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(DataError, match=why):
            Corpus(shard.parent)
    path.write_text("[]")
    with pytest.raises(DataError, match="can't be read"):
        Corpus(shard.parent)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no 'held' split"):
        Corpus(shard.parent, HELD)
    with pytest.raises(DataError, match="no corpus"):
        Corpus(tmp_path)


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    shards.write_shard(tmp_path / "s", [[1, 70_000], [], [5]], 129_280)
    shard = shards.Shard(tmp_path / "s")
    assert shard.tokens.tolist() == [1, 70_000, 5] and shard.borders.tolist() == [0, 2, 2, 3]
    assert shard.tokens.dtype == np.uint32


# --------------------------------------------------------------------------------- what is reshaped


def test_fill_in_the_middle() -> None:
    """Prefix, suffix, middle (V3 report 4.1): put back in order they are the text."""
    shaper = Shaper(TOKENIZER, Shape(fim=1.0), seed=1)
    seen = set()
    for number, text in enumerate(texts(50)):
        row = TOKENIZER.decode(shaper.ids(text, 0, number))
        found = row.removeprefix(t.BOS + t.FIM_BEGIN).removesuffix(t.EOS)
        prefix, _, rest = found.partition(t.FIM_HOLE)
        suffix, _, middle = rest.partition(t.FIM_END)
        assert prefix + middle + suffix == text
        seen.add((len(prefix), len(middle)))
    assert len(seen) > 40
    some = Shaper(TOKENIZER, Shape(fim=0.1), seed=1)
    begin = TOKENIZER.id_of(t.FIM_BEGIN)
    share = np.mean([begin in some.ids("the sea", 0, n) for n in range(2000)])
    assert 0.07 < share < 0.13


def test_tokens_taken_apart_read_the_same() -> None:
    halves = combined(TOKENIZER)
    assert {TOKENIZER.decode([token]) for token in halves} == {
        ".\n",
        ".\n\n",
        ");\n",
    }  # not "\n\n": no punctuation
    text = "the end.\n\nf(x);\nthe end.\n" * 30
    whole, parted = Shaper(TOKENIZER, Shape(), 1), Shaper(TOKENIZER, Shape(split=1.0), 1)
    assert TOKENIZER.decode(parted.ids(text, 0, 0)) == TOKENIZER.decode(whole.ids(text, 0, 0))
    assert not halves.keys() & set(parted.ids(text, 0, 0))
    half = [token in halves for token in Shaper(TOKENIZER, Shape(split=0.5), 1).ids(text, 0, 0)]
    assert 20 < sum(half) < 70  # of 90


def test_what_a_tokenizer_cannot_do_is_said_before_any_work(tmp_path: Path) -> None:
    bare = Tokenizer(TOKENIZER._backend)
    with pytest.raises(DataError, match="--no-bos"):
        build(["nowhere"], tmp_path / "c", bare)
    with pytest.raises(DataError, match="--no-eos"):
        build(["nowhere"], tmp_path / "c", bare, Options(shape=Shape(bos=False)))
    for options in ({"held": 1.0}, {"seed": -1}, {"piece": 0}):
        with pytest.raises(DataError):
            Options(**options)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="fim is 2"):
        Shape(fim=2)


def test_added_tokens_spelled_in_a_document_are_text() -> None:
    row = Shaper(TOKENIZER, Shape(), 1).ids(f"a{t.EOS}b", 0, 0)
    assert row.count(TOKENIZER.eos[0]) == 1 and TOKENIZER.decode(row[1:-1]) == f"a{t.EOS}b"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rorqual.cli import app

    source = tmp_path / "a.txt"
    source.write_text("\n\n".join(text.strip() for text in texts(30)))
    TOKENIZER.save(tmp_path / "tokenizer")
    given = ["--out", str(tmp_path / "c"), "--tokenizer", str(tmp_path / "tokenizer"), "--workers", "1"]

    def run(*words: str) -> None:
        app(["data", *words], exit_on_error=False, result_action="return_value")

    run("build", str(source), *given, "--border", r"\n\n", "--hold-out", "0.1")
    capsys.readouterr()
    run("show", str(tmp_path / "c"), "--json")
    told = json.loads(capsys.readouterr().out)
    assert sum(split["documents"] for split in told["splits"].values()) == 30
    run("check", str(tmp_path / "c"))
    shard = next((tmp_path / "c").glob("train*"))
    wrong = bytearray(shard.read_bytes())
    wrong[-40] ^= 1
    shard.write_bytes(bytes(wrong))
    with pytest.raises(DataError, match=shard.name):
        run("check", str(tmp_path / "c"))
    with pytest.raises(ValueError, match="at least one file"):
        run("build", *given)
