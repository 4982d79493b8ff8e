"""What is told of a model's inside is what a plain pass over the same tokens gives; who doesn't ask pays nothing."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rorqual
from rorqual.engine import Completion, Facts, Inside, Look, graphs, runner
from rorqual.engine.engine import Engine
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling
from rorqual.family import account
from rorqual.model import Model
from rorqual.nn import InputError, Trace, Transformer
from rorqual.nn.indexer import choose, index_scores
from rorqual.nn.paged import page_bytes
from tests.engine import ranks
from tests.engine.conftest import build
from tests.engine.members import build_member, members
from tests.engine.ranks import together
from tests.engine.test_engine import as_on_a_gpu, engine_of, idle

ALL = Inside(experts=True, drafts=True, seen=True)
NAMES = [
    "deepseek-coder-1.3b-base", "deepseek-moe-16b-base", "deepseek-v2", "deepseek-v3-base", "deepseek-v3.2-exp-base",
    "deepseek-v4-flash-base", "deepseek-v4-pro-base", "v4 of rates 2, 4, 8 and 32", "v3 held as FP8",
]  # fmt: skip
CASES = [(name, False) for name in NAMES] + [(name, True) for name in NAMES if members()[name].mtp]


def greedy(count: int, **more: Any) -> Sampling:
    return Sampling(0.0, max_new_tokens=count, ignore_eos=True, **more)


def traced(model: Model, ids: list[int]) -> Trace:
    trace = Trace()
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.device), trace=trace)
    return trace


def check(model: Model, prompt: list[int], done: Completion) -> tuple[int, int]:
    """Every look of an answer against a plain pass over prompt and answer; how many choices differ, and of how many."""
    looks, config = done.inside, model.config
    assert looks is not None and [look.index for look in looks] == list(range(len(done.ids)))
    trace = traced(model, prompt + done.ids)
    layers = Facts.of(model).expert_layers
    others = count = 0
    for look in looks[:-1]:
        position = len(prompt) + look.index
        assert (look.experts is None) == (not layers)
        for layer, chosen in zip(layers, look.experts or [], strict=True):
            assert len(chosen) == config.layers[layer].ff.top_k  # type: ignore[union-attr]
            others += set(chosen) != set(trace.experts[layer][0][position].tolist())
            count += 1
        assert (look.seen is None) == (not trace.selected)
        for sight in look.seen or []:
            assert list(sight.positions) == sorted(sight.positions)
            part: Any = config.layers[sight.layer].attention
            every = part.compress.ratio if hasattr(part, "compress") else 1
            assert sight.every == every and all(at % every == 0 for at in sight.positions)
            if sight.layer in trace.selected:
                picked = trace.selected[sight.layer][0, position]
                found = {int(at) * every for at in picked if at >= 0}
            else:  # HCA: every entry that is finished
                found = {at * every for at in range((position + 1) // every)}
            others += set(sight.positions) != found
            count += 1
    assert done.accepted == sum(look.drafted for look in looks)
    assert done.drafted - done.accepted == sum(len(look.refused) for look in looks)
    return others, count


def life(engine: Engine, vocab: int) -> list[tuple[list[int], Handle]]:
    """Requests that look inside among others that don't, thrown out now and then, some beginning alike."""
    random.seed(f"{vocab} {engine.speculate}")
    stem = [random.randrange(3, vocab) for _ in range(36)]
    jobs: list[tuple[list[int], Handle]] = []
    while len(jobs) < 8:
        prompt = [*stem[: random.randint(4, 36)], *(random.randrange(3, vocab) for _ in range(3))]
        if len(jobs) == 4:  # goes on from an answer
            prompt = [*jobs[-1][0], *jobs[-1][1].completion.ids, *prompt[-2:]]
        asked = ALL if len(jobs) % 2 == 0 else Inside(experts=True) if len(jobs) == 3 else None
        jobs.append((prompt, engine.submit(prompt, greedy(random.randint(6, 14)), inside=asked)))
        for _ in range(random.randint(1, 3)):
            engine.step()
        if engine.scheduler.running:
            engine.scheduler.preempt(random.choice(engine.scheduler.running))
        if len(jobs) % 4 == 0:
            while engine.busy:
                engine.step()
    while engine.busy:
        engine.step()
    idle(engine)
    return jobs


@pytest.mark.parametrize(("name", "speculate"), CASES)
def test_looks_are_those_of_a_plain_pass(name: str, speculate: bool) -> None:
    """For every kind of layer, with preemption, prefix hits, drafts, chunks; half of them as a GPU would run them."""
    model = build_member(name, 6 if speculate else None)
    engine = engine_of(model, 160, step_tokens=24, speculate=speculate)
    if CASES.index((name, speculate)) % 2:
        as_on_a_gpu(engine)
    jobs = life(engine, model.config.vocab)
    assert engine.scheduler.preemptions > 0 and not engine.scheduler._looking
    requests = [handle.request for _, handle in jobs]
    assert any(r is not None and r.looks is not None and r.preemptions for r in requests)
    assert any(r is not None and r.cached for r in requests)
    alone = model.generate([p for p, _ in jobs], [r.sampling for r in requests if r is not None])
    for number, ((prompt, handle), plain) in enumerate(zip(jobs, alone, strict=True)):
        done = handle.completion
        assert done.ids == plain.ids
        deltas = handle.come()
        assert [d.id for d in deltas] == done.ids
        if number % 2 and number != 3:
            assert done.inside is None and not any(d.inside for d in deltas)
        elif number != 3:
            assert [look for d in deltas for look in d.inside] == done.inside
            assert all(look.index <= n for n, d in enumerate(deltas) for look in d.inside)
            assert check(model, prompt, done)[0] == 0
        else:
            assert all(
                look.seen is None and not look.drafted and not look.refused for look in done.inside or ()
            )
    if speculate:
        asked = [handle.completion for _, handle in jobs[::2]]
        assert sum(c.accepted for c in asked) > 0 and sum(c.drafted - c.accepted for c in asked) > 0


@pytest.mark.parametrize("ahead", [False, True])
def test_drafts_are_those_that_were_judged(ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told of a draft is what the pass brought and what the verdict was."""
    model = build("v3", vocab=12)
    engine = engine_of(model, 400, speculate=True)
    if ahead:
        as_on_a_gpu(engine)
    judged: list[tuple[list[int], Tensor, list[int]]] = []
    plain = engine.runner.draw

    def draw(passed: Any) -> Any:
        drafts = passed.drafts_D.clone()
        flight = plain(passed)
        judged.append((drafts.tolist(), passed.drawn_4R.clone(), passed.widths))
        return flight

    monkeypatch.setattr(engine.runner, "draw", draw)
    done = engine.generate([4, 5, 6, 7], greedy(40), inside=Inside(drafts=True))
    told: list[Any] = [(look.drafted, look.refused, done.ids[look.index]) for look in done.inside]
    want: list[Any] = []
    for drafts, drawn, widths in judged:
        first, second, stand, _ = (int(x) for x in drawn[:, 0])
        if widths[0] == 2 and stand == 2:
            want += [(True, (), first), (False, (), second)]
            assert drafts[0] == first
        else:
            want.append((False, (drafts[0],) if widths[0] == 2 else (), first))
    assert told == want[: len(told)]
    assert done.accepted > 0 and any(refused for _, refused, _ in told)
    assert all(look.experts is None and look.seen is None for look in done.inside)


def test_v3_chooses_by_groups() -> None:
    """Worked out by hand from what the router reads: sigmoid, bias, the two best groups, the best three of those."""
    model = build("v3")
    prompt = [7, 8, 9, 10]
    done = engine_of(model, 100).generate(prompt, greedy(10), inside=Inside(experts=True))
    router: Any = model.layers[1].ff.router  # type: ignore[union-attr]
    read: list[Tensor] = []
    hook = router.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    traced(model, prompt + done.ids)
    hook.remove()
    weight, bias, x_ND = (t.tolist() for t in (router.weight, router.bias, read[0]))
    for look in done.inside[:-1]:
        x = x_ND[len(prompt) + look.index]
        logits = [sum(a * b for a, b in zip(row, x, strict=True)) for row in weight]
        score = [1 / (1 + math.exp(-y)) + b for y, b in zip(logits, bias, strict=True)]
        pairs = [sum(sorted(score[at : at + 2])) for at in range(0, 8, 2)]
        kept = sorted(range(4), key=lambda g: -pairs[g])[:2]
        best = sorted((e for e in range(8) if e // 2 in kept), key=lambda e: -score[e])[:3]
        assert look.experts == [best]
    assert len({str(look.experts) for look in done.inside}) > 3


def test_v4_looks_experts_up_by_token() -> None:
    model = build_member("deepseek-v4-flash-base")
    done = engine_of(model, 100).generate([7, 8, 9], greedy(10), inside=Inside(experts=True))
    tables = [layer.ff.router.table for layer in model.layers]  # type: ignore[union-attr]
    assert sum(table is not None for table in tables) == 2
    for look in done.inside[:-1]:
        for table, chosen in zip(tables, look.experts, strict=True):
            assert table is None or chosen == table[done.ids[look.index]].tolist()  # type: ignore[index]


def test_dsa_sees_what_its_indexer_scores_best() -> None:
    """Scores worked out from what the indexer projects."""
    model = build("v32")
    prompt = [7, 8, 9, 10, 11]
    done = engine_of(model, 100).generate(prompt, greedy(12), inside=Inside(seen=True))
    index: Any = model.layers[0].attention.index  # type: ignore[union-attr]
    project, made = index.project, []

    def noted(*args: Any) -> Any:
        made.append(project(*args))
        return made[-1]

    index.project = noted
    traced(model, prompt + done.ids)
    del index.project
    q, k, w = made[0]
    limits = torch.arange(1, q.shape[1] + 1)[None]
    best = choose(index_scores(q, k, w), limits, index.part.top_k)[0]
    for look in done.inside[:-1]:
        position = len(prompt) + look.index
        assert look.experts is None
        sight = look.seen[0]
        assert (sight.layer, sight.every) == (0, 1)
        assert list(sight.positions) == sorted(int(p) for p in best[position] if p >= 0)
        assert len(sight.positions) == min(6, position + 1)


def test_token_by_token() -> None:
    """Batch-invariant mode without kernels: each token is a pass of its own."""
    model = build("v32")
    engine = engine_of(model, 100, invariant=True, step_tokens=7)
    prompt = [7, 8, 9, 10, 11]
    handle = engine.submit(prompt, greedy(9), inside=ALL)
    for _ in range(6):
        engine.step()
    engine.scheduler.preempt(engine.scheduler.running[0])
    assert check(model, prompt, handle.result())[0] == 0


class Ops(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ops(engine: Engine, inside: Inside | None) -> tuple[list[list[str]], list[list[str]]]:
    """The operations of each forward pass, and of each draw, of one request."""
    found: tuple[list[list[str]], list[list[str]]] = ([], [])
    originals = engine.runner.forward, engine.runner.draw
    for name, plain, noted in zip(("forward", "draw"), originals, found, strict=True):

        def counted(given: Any, plain: Any = plain, noted: list[list[str]] = noted) -> Any:
            with Ops() as mode:
                made = plain(given)
            noted.append(mode.names)
            return made

        setattr(engine.runner, name, counted)
    engine.generate([5, 6, 7, 8], greedy(6), inside=inside)
    engine.runner.forward, engine.runner.draw = originals  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("kind", "speculate"), [("v3", True), ("v32", False), ("v4", True)])
def test_who_does_not_ask_pays_nothing(
    kind: str, speculate: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operation by operation: a pass with a watch does in its layers just what one without does, and the copies come
    with the draw. Passes without one make none, whatever ran before, and replay the graph they always had."""
    model = build(kind)
    with monkeypatch.context() as patch:

        def never(*_: object) -> None:
            raise AssertionError("a watch was made")

        patch.setattr(runner, "Watch", never)
        patch.setattr(graphs, "Watch", never)
        patch.setattr(runner.Insights, "__init__", never)
        engine = engine_of(model, 100, prefix_cache=False, speculate=speculate)
        if ahead:
            as_on_a_gpu(engine)
        ops(engine, None)  # copies of weights are made
        plain = ops(engine, None)
    ops(engine, ALL)  # its graphs are made
    looking = ops(engine, ALL)
    again = ops(engine, None)
    assert plain == again
    # On a CPU rows that an indexer gave are seen flat: a view, of no memory and no work.
    view = "aten.flatten.using_ints"
    kept = [[[op for op in ops_of if op != view] for ops_of in found[0]] for found in (looking, plain)]
    assert kept[0] == kept[1]
    assert [len(some) > len(none) for some, none in zip(looking[1], plain[1], strict=True)][1:] == [True] * (
        len(plain[1]) - 1
    )
    assert looking[1][0] == plain[1][0], "nothing is told of a prompt"
    if ahead:
        assert engine.runner.graphs is not None
        made = engine.runner.graphs._made
        assert {key[3] for key in made} == {(False, False), (True, kind != "v3")}
        assert all((made[key].step.watch is None) == (key[3] == (False, False)) for key in made)


def test_drafts_alone_need_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "Watch", None)
    engine = engine_of(build("v3"), 100, speculate=True)
    done = engine.generate([5, 6, 7], greedy(8), inside=Inside(drafts=True))
    assert len(done.inside) == 8 and done.drafted > 0


def test_deltas_are_the_same_but_for_what_is_told() -> None:
    model = build("v4")
    sampling = Sampling(0.9, seed=3, max_new_tokens=12, ignore_eos=True, logprobs=2)
    one, other = (engine_of(model, 100) for _ in "ab")
    plain, looking = one.submit([5, 6, 7], sampling), other.submit([5, 6, 7], sampling, inside=ALL)
    for a, b in zip(list(plain), list(looking), strict=True):
        assert (a.id, a.text, a.finish_reason, a.inside) == (b.id, b.text, b.finish_reason, ())
    assert plain.completion.logprobs == looking.completion.logprobs


def test_what_is_not_there_or_not_asked_for() -> None:
    dense = engine_of(build("gqa"), 100)
    done = dense.generate([5, 6], greedy(4), inside=ALL)
    assert done.inside == [Look(n) for n in range(4)]
    asked = engine_of(build("v4"), 100).generate([[5, 6], [7, 8]], greedy(4), inside=Inside(seen=True))
    assert all(look.experts is None for done in asked for look in done.inside)
    assert all(look.seen for done in asked for look in done.inside[:-1])
    some = engine_of(build("v4"), 100).generate([5, 6], greedy(4), inside=Inside(seen=[1, 2]))  # type: ignore[arg-type]
    assert [[sight.layer for sight in look.seen] for look in some.inside[:-1]] == [[1]] * 3
    assert some.inside[0].seen == asked[0].inside[0].seen[1:]


def test_cancelled_and_refused() -> None:
    engine = engine_of(build("v3"), 100)
    handle = engine.submit([5, 6, 7], greedy(20), inside=ALL)
    for _ in range(5):
        engine.step()
    handle.cancel()
    done = handle.completion
    assert [look.index for look in done.inside or ()] == list(range(len(done.ids))) and len(done.ids) >= 4
    assert done.inside and done.inside[-1].experts is None and done.inside[-2].experts
    idle(engine)
    with pytest.raises(InputError, match="inside"):
        engine.submit([5], inside=True)  # type: ignore[arg-type]
    for wrong in ({"experts": 1}, {"drafts": None}, {"seen": 1}, {"seen": [1.0]}, {"seen": "all"}):
        with pytest.raises(InputError, match=rf"inside\.{next(iter(wrong))}"):
            Inside(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["deepseek-moe-16b-base", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash"]
)
def test_cache_is_counted_as_inspect_counts_it(name: str) -> None:
    """At released sizes, on the meta device: bf16 as `rorqual inspect` has it, the FP8 layouts where they are released,
    and the engine's pages."""
    config = rorqual.config(name)
    model = Transformer(config, dtype=torch.bfloat16, device="meta")
    facts = Facts.of(model)
    assert facts.cache == account.cache(config)
    assert facts.mha_bytes == 2 * account.mha_elements(config)
    if name in ("deepseek-v3.2", "deepseek-v4-flash"):
        assert Facts.of(model, fp8_cache=True).cache.at(10_000) == pytest.approx(
            account.cache(config, "serving").at(10_000), rel=1e-9
        )
    lanes = model.lanes()[: len(model.layers)]
    assert facts.cache.growing * 128 * 64 == page_bytes(lanes, 128 * 64)
    assert facts.layers == len(config.layers) == len(facts.attention) == len(facts.every)


def test_facts_of_members() -> None:
    v4 = Facts.of(build_member("deepseek-v4-flash-base"), speculate=True)
    assert v4.attention == ("window", "csa", "hca", "csa") and v4.every == (1, 4, 16, 4) and v4.window == 8
    assert v4.picked == (0, 3, 10, 3), "entries of 16 in 160 positions"
    assert (v4.expert_layers, v4.experts, v4.chosen, v4.drafts) == ((0, 1, 2, 3), 8, 3, 1)
    v3 = Facts.of(build("v3"))
    assert (v3.attention, v3.expert_layers, v3.window, v3.drafts) == (("mla", "mla"), (1,), 0, 0)
    assert v3.cache.growing == 2 * 24 * 4, "fp32"
    assert v3.picked == (0, 0) and Facts.of(build("v32")).picked == (6, 6)
    assert Facts.of(build("v32")).attention == ("dsa", "dsa") and Facts.of(build("gqa")).attention == (
        "gqa",
        "gqa",
    )


def test_two_ranks_of_one_row() -> None:
    """Rank 0's callers are told what one process tells; where rows share experts it is refused."""
    found = together(ranks.look_inside, 2)
    assert found == [["told", "told", "refused"], []]


# ------------------------------------------------------------------------------------------------ GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "speculate"), [case for case in CASES if "FP8" not in case[0]])
def test_looks_on_the_gpu(name: str, speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels and graphs, against a plain pass on the CPU: but for a rare tie that rounding turns."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    plain = build_member(name, 6 if speculate else None)
    engine = engine_of(copy.deepcopy(plain).cuda(), 160, step_tokens=24, speculate=speculate)
    jobs = life(engine, plain.config.vocab)
    found = [check(plain, prompt, handle.completion) for prompt, handle in jobs[::2]]
    others, count = (sum(column) for column in zip(*found, strict=True))
    print(f"\n{name}{', speculating' if speculate else ''}: {others} of {count} choices differ")
    assert others <= 0.01 * count
    assert engine.runner.graphs is not None
    kinds = {key[3] for key in engine.runner.graphs._made}
    assert kinds - {(False, False)} or not engine.facts.expert_layers


@pytest.mark.gpu
@pytest.mark.parametrize("speculate", [False, True])
def test_no_step_waits_for_the_gpu(speculate: bool) -> None:
    from tests.engine.test_packed import wide

    engine = engine_of(wide().cuda(), 400, slots=4, speculate=speculate)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    for _ in range(2):
        first = engine.generate(prompts, greedy(20), inside=ALL)
    handles = [engine.submit(prompt, greedy(20), inside=ALL) for prompt in prompts]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        while engine.busy:
            engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [h.result().inside for h in handles] == [c.inside for c in first]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["v3", "v32", "v4"])
def test_the_same_kernels_on_the_gpu(kind: str) -> None:
    """A replay that keeps choices launches what one that doesn't launches, kernel by kernel."""
    engine = engine_of(build(kind).cuda(), 200)
    found = []
    for inside in (None, ALL):
        for _ in range(2):
            engine.generate([5, 6, 7], greedy(6), inside=inside)
        assert engine.runner.graphs is not None and engine.runner.graphs.newest is not None
        made = engine.runner.graphs.newest
        assert (made.step.watch is None) == (inside is None)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            made.replay()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        names = [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
        # By what a copy is done follows from where its memory lies.
        found.append(["copy" if "memcpy" in name.lower() else name for name in names])
    assert found[0] and found[0] == found[1]
