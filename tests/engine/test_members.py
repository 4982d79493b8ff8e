"""Greedy answers of the engine are `model.generate`'s, token for token, for every member of the family: under random
arrivals, cancellation, preemption, prefix hits and speculation. On the GPU, by kernels and graphs, the same within
what rounding can turn."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import pytest
import torch

from rorqual.engine.engine import Engine
from rorqual.engine.request import Handle
from rorqual.engine.sampling import Sampling
from rorqual.model import Model
from tests.engine.members import build_member, members
from tests.engine.test_engine import engine_of, idle

FEW = 8
"""Words of the vocabulary with speculation: a random MTP module has to guess right now and then."""

CASES = [(name, False) for name in members()] + [(name, True) for name, c in members().items() if c.mtp]


@dataclass
class Job:
    """A prompt on its way through an engine, and the answer that `model.generate` gives to it alone."""

    prompt: list[int]
    handle: Handle
    alone: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.handle.completion.ids


def live(engine: Engine, count: int, plain: Model) -> list[Job]:
    """A random life of an engine: requests of three conversations come at any time and with any priority,
    running ones are thrown out now and then, some are cancelled; every third waits until all is quiet and then
    asks what was asked before. The same life on a CPU and on a GPU."""
    vocab = plain.config.vocab
    random.seed(f"{plain.config} {engine.speculate}")
    stems = [[random.randrange(3, vocab) for _ in range(40)] for _ in range(3)]
    jobs: list[Job] = []
    while len(jobs) < count:
        prompt = stems[random.randrange(3)][: random.randint(8, 40)]
        prompt = [*prompt, *(random.randrange(3, vocab) for _ in range(random.randint(1, 9)))]
        if len(jobs) % 3 == 2:
            while engine.busy:
                engine.step()
            prompt = [*jobs[-1].prompt, *jobs[-1].ids, *prompt[-2:]]
        sampling = Sampling(
            0.0, max_new_tokens=random.randint(4, 16), ignore_eos=random.random() < 0.8, logprobs=True
        )
        job = Job(prompt, engine.submit(prompt, sampling, priority=random.choice([0, 0, 1])))
        jobs.append(job)
        for _ in range(random.randint(0, 4)):
            engine.step()
            engine.pages.check()
        if engine.scheduler.running and len(jobs) % 2:
            engine.scheduler.preempt(random.choice(engine.scheduler.running))
        if random.random() < 0.15:
            random.choice(jobs).handle.cancel()
    while engine.busy:
        engine.step()
    idle(engine)
    for job in jobs:
        if job.handle.error is not None:
            raise job.handle.error
    samplings = [job.handle.request.sampling for job in jobs]  # type: ignore[union-attr]
    for job, done in zip(jobs, plain.generate([job.prompt for job in jobs], samplings), strict=True):
        job.alone = done.ids
    assert engine.scheduler.preemptions > 0, "nothing was preempted"
    assert sum(job.handle.request.cached for job in jobs) > 0, "no prefix was found"  # type: ignore[union-attr]
    if engine.speculate:
        assert sum(job.handle.completion.accepted for job in jobs) > 0, "no draft stood"
    return jobs


def engine_for(model: Model, speculate: bool) -> Engine:
    """Memory for about two and a half requests; passes of at most 24 tokens."""
    return engine_of(model, 160, step_tokens=24, speculate=speculate)


@pytest.mark.parametrize(("name", "speculate"), CASES)
def test_equals_generate(name: str, speculate: bool) -> None:
    model = build_member(name, FEW if speculate else None)
    jobs = live(engine_for(model, speculate), 12, model)
    for job in jobs:
        cancelled = job.handle.completion.finish_reason == "cancelled"
        assert job.ids == (job.alone[: len(job.ids)] if cancelled else job.alone)
    assert sum(job.handle.completion.finish_reason != "cancelled" for job in jobs) > 6


# ------------------------------------------------------------------------------------------------ GPU

NEAR = {False: 1e-3, True: 1.0}
"""How far behind the best logit a token's may lie and still be drawn on the GPU; True: weights held as codes.

Logits here have a spread of about one, so any token but a few lies further behind. In fp32, sums of a few hundred
products in another order move them by some 1e-6, and every token has been the CPU's best so far: 1e-3 leaves room
for a tie alone. FP8 products also round activations, to three bits behind the leading one, in whatever groups a
kernel takes, and a choice of experts or of indexed positions can turn on that: 0.46 has been seen."""


def behind(model: Model, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """How far each token's logit lies behind the best one, by a plain pass over prompt and answer; and how far its
    log-probability is from the one the engine gave."""
    ids = torch.tensor([job.prompt + job.ids], device=model.device)
    with torch.inference_mode():
        logits = model(ids)[0, len(job.prompt) - 1 : -1].float()
    chosen = ids[0, len(job.prompt) :, None]
    gap = logits.amax(-1) - logits.gather(1, chosen)[:, 0]
    told = torch.tensor(job.handle.completion.logprobs, device=model.device)
    return gap.cpu(), (logits.log_softmax(-1).gather(1, chosen)[:, 0] - told).abs().cpu()


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "speculate"), CASES)
def test_equals_generate_on_the_gpu(name: str, speculate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token of the engine's is the CPU's best one after the same tokens, or within `NEAR` of it. Models held
    as codes are compared with a plain pass on the GPU, where products round as the engine's do."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    plain = build_member(name, FEW if speculate else None)
    coded = plain.config.quantization is not None
    model = copy.deepcopy(plain).cuda()
    jobs = [job for job in live(engine_for(model, speculate), 12, plain) if job.ids]
    found = [behind(model if coded else plain, job) for job in jobs]
    gaps, distances = (torch.cat(parts) for parts in zip(*found, strict=True))
    other = sum(a != b for job in jobs for a, b in zip(job.ids, job.alone, strict=False))
    print(
        f"\n{name}{', speculating' if speculate else ''}: {len(gaps)} tokens, {other} other than the CPU's, at most "
        f"{gaps.max():.1e} behind the best; log-probabilities {distances.median():.1e} apart, at most {distances.max():.1e}"
    )
    assert gaps.max() <= NEAR[coded]
    assert coded or distances.max() <= NEAR[coded]
    assert distances.median() <= 0.05
