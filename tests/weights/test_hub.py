"""From a name to a directory, and never to the network when a path is there."""

import huggingface_hub
import pytest

from rorqual.weights import CheckpointError, resolve


@pytest.fixture
def asked(monkeypatch):
    """Records downloads; they fail unless the test sets `asked.result`."""

    class Asked(list):
        result = None

    calls = Asked()

    def snapshot_download(name, **options):
        calls.append((name, options))
        if calls.result is None:
            raise OSError("no route to host\nsecond line")
        return calls.result

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_an_existing_path_stays_off_the_network(asked, tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path and resolve(str(tmp_path)) == tmp_path
    (tmp_path / "deepseek-ai").mkdir()
    (tmp_path / "deepseek-ai" / "DeepSeek-V3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("deepseek-ai/DeepSeek-V3").samefile(tmp_path / "deepseek-ai" / "DeepSeek-V3")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/deepseek-ai") == tmp_path / "deepseek-ai"
    assert not asked


def test_a_hub_id_is_downloaded_without_pickles(asked, tmp_path):
    asked.result = str(tmp_path)
    assert resolve("deepseek-ai/DeepSeek-V3", revision="abc") == tmp_path
    ((name, options),) = asked
    assert name == "deepseek-ai/DeepSeek-V3" and options["revision"] == "abc"
    patterns = options["allow_patterns"]
    assert "*.safetensors" in patterns and "*.json" in patterns and not any(".bin" in p for p in patterns)


def test_what_is_neither_a_path_nor_reachable(asked, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"deepseek-ai/Nothing at revision v9 is neither .*OSError: no route to host\)"
    ):
        resolve("deepseek-ai/Nothing", revision="v9")
    assert len(asked) == 1
    for name in (tmp_path / "nowhere", "./nowhere", "nowhere", "a/b/c", "model/file.gguf", "../x/y", ""):
        if name != "":
            with pytest.raises(CheckpointError, match="does not exist, and is not a hub id"):
                resolve(name)
    assert len(asked) == 1


def test_a_name_that_is_nearly_one_gets_a_hint(asked):
    with pytest.raises(CheckpointError, match="not a hub id.*did you mean .*deepseek-v3"):
        resolve("deepseek-v33")
    assert not asked
