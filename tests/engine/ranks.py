"""Several processes as torchrun would start them, and what `test_parallel` has them do."""

from __future__ import annotations

import asyncio
import os
import queue
import random
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

from rorqual.engine.engine import Engine
from rorqual.engine.inside import Inside
from rorqual.engine.sampling import Sampling
from rorqual.model import Model
from rorqual.nn import InputError
from rorqual.nn.layout import Layout
from rorqual.nn.paged import page_bytes, ring_bytes
from tests.engine.conftest import config
from tests.forks import CONTEXT
from tests.parity.zoo import stir_ours

GREEDY = Sampling(0.0, max_new_tokens=10, ignore_eos=True)


def together(work: Callable[..., Any], ranks: int, *args: Any, seconds: float = 120) -> list[Any]:
    """`work(*args)` in `ranks` processes: what each returned, or the text of what it raised. A process that ended
    without a word gives its exit code, one that had to be ended None."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, ranks, port, answers, work, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < ranks and any(p.is_alive() for p in processes) and seconds > 0:
            try:
                rank, value = answers.get(timeout=0.2)
                found[rank] = value
            except queue.Empty:
                seconds -= 0.2
        while not answers.empty():
            rank, value = answers.get(timeout=1)
            found[rank] = value
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return [found.get(rank, process.exitcode) for rank, process in enumerate(processes)]


def _rank(rank: int, ranks: int, port: int, answers: Any, work: Callable[..., Any], args: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        answers.put((rank, work(*args)))
    except BaseException as error:
        traceback.print_exc()
        answers.put((rank, f"{type(error).__name__}: {error}"))


# --------------------------------------------------------------------------------------- what they do


def stirred(kind: str, dtype: str = "float64") -> Model:
    """A small member, the same in every process."""
    model = Model(config(kind).replace(dtype=dtype), seed=0)
    stir_ours(model)
    return model


def engine_of(
    model: Model, layout: Layout, tokens: int, slots: int = 3, ahead: bool = False, **options: Any
) -> Engine:
    """An engine whose ranks hold pages for about `tokens` tokens each; `ahead`: passes as on a GPU, laid out as its
    graphs have them, and begun before the draws of the one before are read."""
    lanes = model.lanes()[: None if options.get("speculate") else len(model.layers)]
    size = max(4, *(lane.every for kinds in lanes for lane in kinds.values()))
    memory = 2 * slots * ring_bytes(lanes) + page_bytes(lanes, size) * max(-(-tokens // size), 2)
    engine = Engine(model, layout=layout, max_requests=slots, memory=memory, page_size=size, **options)
    if ahead:
        engine.runner.graphs = engine.runner.new_graphs()
        engine._ahead = True
    return engine


def books(engine: Engine) -> list[int]:
    """What a rank counts once all is over: pages lost, passes, requests still known, preemptions."""
    engine.pages.check()
    lost = engine.pages.total - engine.pages.available
    return [
        lost,
        engine.steps,
        len(engine.scheduler.everyone()) + len(engine.team._own),
        engine.scheduler.preemptions,
    ]


def prompts_of(count: int) -> list[list[int]]:
    """Prompts of which many begin alike."""
    stem = [random.randrange(60) for _ in range(20)]
    return [
        stem[: random.choice([0, 9, 20])] + [random.randrange(60) for _ in range(5)] for _ in range(count)
    ]


def serve(
    cases: list[tuple[str, tuple[int, ...], dict[str, Any]]], device: str = "cpu", direct: bool = False
) -> list[Any]:
    """Each case's model and layout under random arrivals, cancels and short memory. Rank 0 gives what is wrong
    with the answers; every rank its books."""
    dtype = "float64" if device == "cpu" else "float32"
    out: list[Any] = []
    layouts: dict[tuple[int, ...], Layout] = {}
    for kind, numbers, options in cases:
        random.seed(f"{kind}{numbers}")
        if numbers not in layouts:
            layouts[numbers] = Layout(*numbers, device=device if device == "cpu" else None, direct=direct)
        engine = engine_of(stirred(kind, dtype), layouts[numbers], 52, step_tokens=24, **options)
        if not engine.leads:
            engine.follow()
            out.append(([], books(engine)))
            continue
        with engine:
            wrong = _submit_and_compare(engine, stirred(kind, dtype), options)
            while engine.busy:
                engine.step()
        out.append((wrong, books(engine)))
    return out


def _submit_and_compare(engine: Engine, alone: Model, options: dict[str, Any]) -> list[str]:
    jobs = []
    for i, prompt in enumerate(prompts_of(12)):
        hot = i % 3 == 2 and not options.get("speculate")
        sampling = Sampling(
            0.9 if hot else 0.0,
            seed=i,
            top_p=0.8,
            frequency_penalty=0.5 if i % 4 == 1 else 0.0,
            logit_bias={7: 1.5} if i % 4 == 3 else (),
            logprobs=2 if i % 2 else False,
            max_new_tokens=random.randint(1, 14),
            ignore_eos=True,
        )
        jobs.append((prompt, sampling, engine.submit(prompt, sampling, priority=random.choice([0, 0, 1]))))
        for _ in range(random.randint(0, 3)):
            engine.step()
        if i in (5, 8):
            jobs[i].__getitem__(2).cancel()
    for _, _, handle in jobs:
        handle.result()
    wrong = []
    plain = alone.generate([p for p, _, _ in jobs], [s for _, s, _ in jobs])
    for i, ((_, sampling, handle), right) in enumerate(zip(jobs, plain, strict=True)):
        done = handle.completion
        ended = done.finish_reason != "cancelled"
        if done.ids != right.ids[: None if ended else len(done.ids)]:
            wrong.append(f"{i}: {done.ids} is not {right.ids}")
        if ended and done.finish_reason != right.finish_reason:
            wrong.append(f"{i}: {done.finish_reason}")
        if sampling.logprobs and ended:
            far = max(abs(a - b) for a, b in zip(done.logprobs or [], right.logprobs or [], strict=True))
            tops = [[t for t, _ in top] for top in done.top_logprobs or []]
            if far > 1e-4 or tops != [[t for t, _ in top] for top in right.top_logprobs or []]:
                wrong.append(f"{i}: log-probabilities {far:.1e} off")
    if sum(handle.completion.finish_reason == "cancelled" for _, _, handle in jobs) == 0:
        wrong.append("nothing was cancelled in time: the test has to")
    if sum(handle.request.cached for _, _, handle in jobs) == 0:
        wrong.append("nothing was found in the prefix cache: the test has to")
    if options.get("speculate") and sum(h.completion.drafted for _, _, h in jobs) == 0:
        wrong.append("nothing was drafted")
    return wrong


def break_down(rank: int, when: int, device: str) -> list[str]:
    """A pass of one rank raises in the middle of a model's layers; what each rank hears."""
    layout = Layout(device=None if device == "cuda" else device)
    engine = engine_of(stirred("v3", "float32"), layout, 200)
    passes = 0

    def fail(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if layout.rank == rank and passes >= when:
            raise ArithmeticError("a kernel failed")

    engine.model.layers[1].ff.register_forward_pre_hook(fail)
    heard = []
    try:
        if not engine.leads:
            engine.follow()
        handles = [engine.submit(p, GREEDY) for p in prompts_of(4)]
        handles[0].result()
    except Exception as error:
        heard.append(f"{type(error).__name__}: {error}")
    if engine.leads:
        heard += [f"{type(h.error).__name__}: {h.error}" for h in handles]
        try:
            engine.submit([1], GREEDY)
        except Exception as error:
            heard.append(f"{type(error).__name__}: {error}")
    return heard


def doubtful() -> list[Any]:
    """Requests that go wrong by themselves, weights that change, wrong calls, and an engine used twice."""
    layout, out = Layout(tensor=2, device="cpu"), []
    model = stirred("v3")
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    engine = engine_of(model, layout, 200)
    if not engine.leads:
        try:
            engine.submit([1], GREEDY)
        except ValueError as error:
            out.append(str(error))
        engine.follow()
        return out
    with engine:
        bad, good = engine.submit([3, 7, 4], GREEDY), engine.submit([3, 6, 4], GREEDY)
        out.append(good.result().ids == stirred("v3").generate([3, 6, 4], GREEDY).ids)
        try:
            bad.result()
        except Exception as error:
            out.append(f"{type(error).__name__}: {error}"[:60])
        found = []
        for turn in range(3):
            if turn == 2:
                engine.weights_changed()
            handle = engine.submit(list(range(20, 29)), GREEDY)
            handle.result()
            found.append(handle.request.cached)
        out.append(found)
        long = engine.submit([3, 6, 4], Sampling(0.0, max_new_tokens=100, ignore_eos=True))
        for _ in range(5):
            engine.step()
        busy = len(engine.scheduler.everyone())
        long.cancel()
        for _ in range(2):
            engine.step()
        out.append([busy, long.completion.finish_reason, len(engine.scheduler.everyone())])
        out.append(asyncio.run(_streamed(engine)) == good.completion.ids)
        try:
            engine.follow()
        except ValueError as error:
            out.append(str(error))
    try:
        engine.submit([1], GREEDY)
    except ValueError as error:
        out.append(str(error))
    return out


async def _streamed(engine: Engine) -> list[int]:
    return [delta.id async for delta in engine.stream([3, 6, 4], GREEDY)]


def look_inside() -> list[str]:
    """What is told from inside by two ranks of a tensor row, one of which drafts; and by two rows that share experts."""
    asked, out = Inside(experts=True, drafts=True, seen=True), []
    for kind, numbers, speculate in (("v3", (1, 2), True), ("v32", (1, 2), False), ("v3", (2, 1), False)):
        engine = engine_of(
            stirred(kind), Layout(*numbers, device="cpu"), 200, speculate=speculate, ahead=speculate
        )
        if not engine.leads:
            engine.follow()
            continue
        with engine:
            try:
                done = engine.generate(list(range(20, 29)), GREEDY, inside=asked)
            except InputError:
                out.append("refused")
                continue
        alone = Engine(stirred(kind), page_size=4, memory=2**20, speculate=speculate)
        right = alone.generate(list(range(20, 29)), GREEDY, inside=asked)
        full = len(right.inside) == 10 and any(look.experts for look in right.inside)
        out.append("told" if full and done.inside == right.inside else f"{done.inside} is not {right.inside}")
    return out


def differ() -> str:
    """Rank 1 draws other tokens than rank 0."""
    model, layout = stirred("v3"), Layout(tensor=2, device="cpu")
    if layout.rank == 1:
        plain = model.logits
        model.logits = lambda hidden: -plain(hidden)  # type: ignore[method-assign]
    engine = engine_of(model, layout, 200)
    try:
        if engine.leads:
            engine.generate([1, 2, 3], GREEDY)
        else:
            engine.follow()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def leave_early() -> str:
    """Rank 0 goes without a word."""
    engine = engine_of(stirred("gqa"), Layout(device="cpu"), 200)
    if engine.leads:
        engine.generate([1, 2, 3], GREEDY)
        os._exit(3)
    try:
        engine.follow()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
