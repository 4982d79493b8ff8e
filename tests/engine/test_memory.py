"""An engine's memory is free once it is closed, or once nobody knows it any more: without the garbage collector, which
does not know when a GPU is full."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rorqual import Sampling
from rorqual.engine import Engine
from rorqual.engine.loop import Answer
from rorqual.kernels.single_ring import Rings
from rorqual.model import Model
from tests.engine.conftest import MEMBERS, build
from tests.engine.test_engine import as_on_a_gpu, engine_of

GREEDY = Sampling(0.0, max_new_tokens=6, ignore_eos=True)
SAMPLED = Sampling(0.9, top_p=0.9, seed=3, max_new_tokens=6, ignore_eos=True, logprobs=2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def nothing_collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def serving(model: Model, speculate: bool, ahead: bool) -> tuple[Engine, list[Any], list[weakref.ref[Any]]]:
    """An engine that has answered, handles of it, and what must not outlive it."""
    engine = engine_of(model, 200, step_tokens=16, speculate=speculate)
    if ahead:
        as_on_a_gpu(engine)
    handles = [engine.submit([5] * 30, GREEDY), engine.submit([6, 7, 8], SAMPLED)]
    engine.step()
    handles.append(engine.submit([9] * 4, GREEDY))
    engine.step()
    handles[2].cancel()
    assert len(handles[0].result().ids) == len(handles[1].result().ids) == 6
    while engine.busy:
        engine.step()
    memory = [weakref.ref(part) for store in engine.runner.stores for part in store.values()]
    assert memory and (engine.runner.graphs is None or engine.runner.graphs.newest is not None)
    return engine, handles, [*memory, weakref.ref(engine.runner)]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("kind", "speculate"), MEMBERS)
def test_dropping_an_engine_frees_it(kind: str, speculate: bool, ahead: bool, device: str) -> None:
    model, left = build(kind).to(device), []
    for _ in range(2):  # the first has the model keep joined weights, and libraries their workspaces
        engine, handles, parts = serving(model, speculate, ahead)
        del engine
        assert not [part() for part in parts if part() is not None], "something keeps it alive"
        assert [handle.completion.finish_reason for handle in handles] == ["length", "length", "cancelled"]
        for handle in handles:
            handle.cancel()  # nothing to stop any more
        left.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    assert left[1] <= left[0], f"{left} bytes of the GPU's memory are left behind"


@pytest.mark.parametrize("threaded", [False, True])
def test_closing_frees_what_is_still_known(threaded: bool, device: str) -> None:
    engine, handles, parts = serving(build("v3").to(device), True, True)
    runner = parts.pop()
    late = engine.submit([5] * 100, Sampling(0.0, max_new_tokens=60))
    if threaded:
        engine.start()
    else:
        engine.step()
    engine.close()
    assert not [part() for part in parts if part() is not None] and runner() is not None
    assert runner().graphs is None and late.result().finish_reason == "cancelled" and handles
    assert not engine.busy and not engine.step()
    engine.weights_changed()
    engine.close()


def test_a_stream_has_its_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer has ended, but its last token has not been handed out yet: an iterator waits for it."""
    plain, ended = Answer.take, threading.Event()

    def take(self: Answer, token: int) -> str:
        text = plain(self, token)
        if self.done.finish_reason is not None:
            ended.set()
            time.sleep(0.2)
        return text

    monkeypatch.setattr(Answer, "take", take)
    engine = engine_of(build("gqa"), 200)
    stream = iter(engine.submit([5, 6, 7], Sampling(0.0, max_new_tokens=2, ignore_eos=True)))
    found = [next(stream)]
    engine.start()
    assert ended.wait(20)
    found += stream
    engine.close()
    assert [delta.finish_reason for delta in found] == [None, "length"]


def test_start_meets_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start` inside `close`, while it waits for the thread, and after it: the thread ends, and none follows."""
    engine = engine_of(build("gqa"), 200)
    plain = threading.Thread.join

    def join(self: threading.Thread, timeout: float | None = None) -> None:
        engine.start()
        plain(self, timeout)

    engine.start()
    monkeypatch.setattr(threading.Thread, "join", join)
    closing = threading.Thread(target=engine.close)
    closing.start()
    plain(closing, 20)
    assert not closing.is_alive(), "close hangs"
    engine.start()
    assert engine._thread is None
    assert not [t for t in threading.enumerate() if t.name == "rorqual-engine"]


def test_start_and_stop_race() -> None:
    engine = engine_of(build("gqa"), 200)

    def many(work: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: [work() for _ in range(300)], daemon=True)
        thread.start()
        return thread

    threads = [many(engine.start), many(engine.stop)]
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "stop hangs"
    engine.close()
    assert not [t for t in threading.enumerate() if t.name == "rorqual-engine"]


def test_a_thread_ends_with_its_engine() -> None:
    engine, _, parts = serving(build("gqa"), False, False)
    engine.start()
    assert engine.submit([5] * 9, GREEDY).result().finish_reason == "length"
    thread = engine._thread
    assert thread is not None
    time.sleep(0.1)  # it waits for work again
    del engine
    thread.join(20)
    assert not thread.is_alive() and not [part() for part in parts if part() is not None]


def test_errors_keep_nothing() -> None:
    """A caller may keep a failed request's error for long."""
    engine = engine_of(build("gqa"), 200)
    parts = [weakref.ref(engine.runner), *(weakref.ref(t) for s in engine.runner.stores for t in s.values())]

    def forward(plan: Any, runner: Any = engine.runner) -> Any:
        raise RuntimeError("a kernel failed")

    engine.runner.forward = forward  # type: ignore[method-assign]
    handle = engine.submit([5, 6], GREEDY)
    del forward
    with pytest.raises(RuntimeError, match="a kernel failed") as caught:
        handle.result()
    assert "in forward" in "".join(caught.value.__notes__)
    del engine.runner.forward
    del engine
    assert not [part() for part in parts if part() is not None], "the error keeps the engine"


def test_an_iterator_that_waits_keeps_nothing() -> None:
    engine = engine_of(build("gqa"), 200)
    stream = iter(engine.submit([5, 6], GREEDY))
    next(stream)
    while engine.busy:
        engine.step()
    parts = [weakref.ref(engine.runner)]
    del engine
    assert parts[0]() is None
    assert len(list(stream)) == 5


def test_one_engine_a_gpu_has_the_rings() -> None:
    """Two launches at a time whose programs wait for each other would never end."""
    here, there = torch.device("cuda", 6), torch.device("cuda", 7)
    first = Rings.claim(here)
    assert first is not None and Rings.claim(here) is None and Rings.claim(there) is not None
    del first
    assert Rings.claim(here) is not None
    assert Rings.claim(torch.device("cpu")) is None


def test_rings_outlast_a_change_of_weights() -> None:
    engine = engine_of(build("v3"), 200)
    as_on_a_gpu(engine)
    engine.runner._rings = Rings.claim(torch.device("cuda", 6))
    engine.runner.graphs = engine.runner.new_graphs()
    assert engine.runner.graphs._rings is not None
    engine.submit([5, 6], GREEDY).result()
    engine.model.embed.weight.data = engine.model.embed.weight.data.clone()  # at another place
    engine.weights_changed()
    assert engine.runner.graphs is not None and engine.runner.graphs._rings is engine.runner._rings
    engine.submit([5, 6], GREEDY).result()
    engine.close()
    gc.collect()  # what stands for a recorded graph on a CPU knows itself
    assert Rings.claim(torch.device("cuda", 6)) is not None
