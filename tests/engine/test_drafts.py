"""The engine's drafts: as it decodes on a GPU, from packed numbers and a pass ahead, and as it does on a CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rorqual import Sampling
from rorqual.engine import Sampler
from rorqual.engine.runner import Runner
from rorqual.nn.paged import PagedStep
from tests.engine.conftest import build
from tests.engine.test_engine import as_on_a_gpu, engine_of, idle

DEVICES = ["cpu", "cpu, ahead", pytest.param("cuda", marks=pytest.mark.gpu)]


def placed(where: str, model: Any, *sizes: int, **options: Any) -> Any:
    if where == "cuda":
        return engine_of(model.cuda(), *sizes, speculate=True, **options)
    engine = engine_of(model, *sizes, speculate=True, **options)
    return as_on_a_gpu(engine) if where == "cpu, ahead" else engine


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("kind", ["v3", "v4"])
@pytest.mark.parametrize("right", [1, 2, 3])
def test_right_drafts_stand_and_wrong_ones_fall(
    monkeypatch: pytest.MonkeyPatch, where: str, kind: str, right: int
) -> None:
    """MTP drafts what the main model will say but at every `right`-th position; requests end at different places,
    also in the middle of two tokens."""
    model = build(kind)
    whole = [5, 6, 7, *model.generate([5, 6, 7], Sampling(0.0, max_new_tokens=45, ignore_eos=True)).ids]
    answers = torch.tensor([*whole, 0, 0, 0, 0, 0, 0])
    genuine = Runner._further

    def knowing(self: Runner, state: Tensor, next_1N: Tensor, step: PagedStep, columns: Tensor) -> Tensor:
        logits = genuine(self, state, next_1N, step, columns)
        place = (step.positions_N[columns] + 2).clamp(max=len(answers) - 1)
        token = there[place] + ((place % right == 0) & (right > 1)).long()
        return torch.zeros_like(logits).scatter_(1, (token % 60)[:, None], 99.0)

    monkeypatch.setattr(Runner, "_further", knowing)
    there = answers.cuda() if where == "cuda" else answers
    engine = placed(where, model, 400)
    counts = (41, 30, 17, 2, 1, 8)
    handles = [engine.submit([5, 6, 7], Sampling(0.0, max_new_tokens=n, ignore_eos=True)) for n in counts]
    for n, handle in zip(counts, handles, strict=True):
        done = handle.result()
        assert done.ids == whole[3 : 3 + n]
        if right == 1:
            assert done.accepted == done.drafted and (n - 1) // 2 <= done.drafted <= n // 2
    idle(engine)
    if right == 1:
        assert engine.steps < 60, "drafts that stand have to save passes"


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}])
def test_sampled_answers_have_the_plain_distribution(where: str, filters: dict[str, Any]) -> None:
    """All answers of three tokens over four words: counts against the model's exact probabilities."""
    words, length, samples = 4, 3, 1500
    model = build("v3", vocab=words)
    prompt = [1, 2, 3]
    s = Sampling(temperature=1.3, max_new_tokens=length, ignore_eos=True, **filters)
    definition = Sampler(words, torch.device("cpu"), 1)
    definition.admit(0, s, prompt)
    exact = {}
    for answer in itertools.product(range(words), repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(answer)]))[0, 2:-1]
        exact[answer] = math.prod(
            float(definition.distribution(logits[i : i + 1], [0])[0, t]) for i, t in enumerate(answer)
        )
    engine = placed(where, model, 128 * 12, 128)
    greedy = Sampling(0.0, max_new_tokens=length, ignore_eos=True)
    said = model.cpu().generate(prompt, greedy).ids if where != "cuda" else None
    samplings = [Sampling(**{**vars(s), "seed": i}) if i % 50 else greedy for i in range(samples)]
    done = engine.generate([prompt] * samples, samplings)
    assert said is None or all(d.ids == said for d in done[::50])
    drawn = [d for i, d in enumerate(done) if i % 50]
    counts = dict.fromkeys(exact, 0)
    for d in drawn:
        counts[tuple(d.ids)] += 1
    assert 0.05 < sum(d.accepted for d in drawn) / sum(d.drafted for d in drawn) < 0.95
    rare = [a for a in exact if exact[a] * len(drawn) < 10]
    cells = [(counts[a], exact[a] * len(drawn)) for a in exact if a not in rare]
    cells.append((sum(counts[a] for a in rare), sum(exact[a] for a in rare) * len(drawn)))
    cells = [(o, e) for o, e in cells if e > 0]
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    assert chi2 < len(cells) - 1 + 4 * math.sqrt(2 * (len(cells) - 1))
