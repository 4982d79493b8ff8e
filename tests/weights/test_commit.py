"""A save that is killed, at every step: the old checkpoint, the new one, or a clear refusal, never a mixture."""

import json
import os
import shutil

import pytest
import torch

import rorqual.weights.write as write
from rorqual.nn import Transformer
from rorqual.weights import CheckpointError, load, save
from rorqual.weights.shards import INDEX, JOURNAL, SINGLE, STAGING

KILLED = 77


def killed_commit(place, directory, shards, step):
    """Run `commit` in a process that dies at its `step`-th change of the directory; whether it died."""
    if not (child := os.fork()):
        left = step

        def dying(real):
            def call(*args, **options):
                nonlocal left
                if left == 0:
                    os._exit(KILLED)
                left -= 1
                return real(*args, **options)

            return call

        try:
            os.replace, os.unlink = dying(os.replace), dying(os.unlink)
            write.commit(place, directory, shards)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED


def names(directory):
    return {p.name for p in directory.iterdir()}


@pytest.mark.parametrize("limits", [(10**9, 10**9), (60_000, 60_000), (10**9, 60_000), (60_000, 10**9)])
def test_a_kill_at_any_step_never_mixes_two_checkpoints(made, tmp_path, limits):
    old = load(made("llama").path, mapped=False)
    new = Transformer(old.config.replace(norm_eps=1e-3), dtype=torch.float32, seed=5)
    refused = finished = 0
    for step in range(100):
        to = tmp_path / f"to{step}"
        save(old, to, max_shard_bytes=limits[0])
        save(new, tmp_path / "new", max_shard_bytes=limits[1])
        staged = names(tmp_path / "new")
        (tmp_path / "new").rename(to / STAGING)
        shards = sorted(n for n in staged if n.endswith(".safetensors"))
        if len(shards) > 1:  # shards never take the names of old ones
            index = json.loads((to / STAGING / INDEX).read_text())
            for shard in shards:
                (to / STAGING / shard).rename(to / STAGING / f"fresh-{shard}")
            index["weight_map"] = {n: f"fresh-{f}" for n, f in index["weight_map"].items()}
            (to / STAGING / INDEX).write_text(json.dumps(index))
            shards = [f"fresh-{shard}" for shard in shards]
        killed = killed_commit(to / STAGING, to, shards, step)
        try:
            found = load(to)
        except CheckpointError as error:
            assert "interrupted" in str(error) and JOURNAL in str(error)
            refused += 1
        else:
            expected = new if found.config.norm_eps == 1e-3 else old
            assert found.config.norm_eps == expected.config.norm_eps
            assert torch.equal(found.embed.weight, expected.embed.weight)
            finished += expected is new
            del found
        if killed and (to / JOURNAL).exists():
            write.finish(to)
            assert torch.equal(load(to).embed.weight, new.embed.weight)
            assert load(to).config.norm_eps == 1e-3
        save(old, to)
        assert names(to) == {"config.json", SINGLE}
        assert torch.equal(load(to).embed.weight, old.embed.weight)
        shutil.rmtree(to)
        if not killed:
            break
    assert refused >= 2 and finished >= 1 and not killed


def test_a_journal_that_cannot_be_followed_stays_until_a_save_is_whole(made, tmp_path):
    model = load(made("llama").path)
    for text in ("{", '{"move": ["../x"], "delete": []}', '{"move": ["gone.safetensors"], "delete": []}'):
        save(model, tmp_path / "to")
        (tmp_path / "to" / JOURNAL).write_text(text)
        with pytest.raises(CheckpointError, match="interrupted"):
            load(tmp_path / "to")
        write.finish(tmp_path / "to")
        with pytest.raises(CheckpointError, match="interrupted"):
            load(tmp_path / "to")
        save(model, tmp_path / "to")
        assert names(tmp_path / "to") == {"config.json", SINGLE}


def test_two_checkpoints_in_one_directory_are_refused(made, tmp_path):
    model = load(made("llama").path, mapped=False)
    save(model, tmp_path / "to", max_shard_bytes=60_000)
    save(model, tmp_path / "one")
    shutil.copy(tmp_path / "one" / SINGLE, tmp_path / "to")
    with pytest.raises(CheckpointError, match=f"two checkpoints.*delete {INDEX} to load the first"):
        load(tmp_path / "to")
    index = json.loads((tmp_path / "to" / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], SINGLE)
    (tmp_path / "to" / INDEX).write_text(json.dumps(index))
    load(tmp_path / "to")


def test_places_that_can_not_be_saved_to(made, tmp_path):
    model = load(made("llama").path)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / STAGING).write_text("a file")
    with pytest.raises(CheckpointError, match=f"can't be saved to: .*{STAGING}"):
        save(model, tmp_path / "to")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="can't be saved to: .*"):
        save(model, tmp_path / "file" / "below")
