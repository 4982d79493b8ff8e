"""The adapter to lm-eval: scores and answers are the model's own. With a stub of lm-eval's classes where it isn't
installed; then what runs its tasks is skipped."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rorqual.engine import Sampling
from rorqual.model import Model
from tests.data.corpora import TOKENIZER
from tests.engine.conftest import config

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_it = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed (extra eval)")


class TemplateLM:
    """What the adapter takes from lm-eval's class of this name."""

    def __init__(self) -> None:
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def loglikelihood(self: Any, requests: list[Any]) -> Any:
        found = []
        for context, more in (request.args for request in requests):
            if context:
                start = self.tok_encode(context)
                found.append(((context, more), start, self.tok_encode(context + more)[len(start) :]))
            else:
                found.append((("", more), [self.prefix_token_id], self.tok_encode(more)))
        return self._loglikelihood_tokens(found)


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not INSTALLED:
        parts: dict[str, dict[str, Any]] = {
            "lm_eval": {"simple_evaluate": None},
            "lm_eval.api": {},
            "lm_eval.api.model": {"TemplateLM": TemplateLM},
            "lm_eval.tasks": {"TaskManager": None},
            "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
        }
        for name, held in parts.items():
            stub = ModuleType(name)
            vars(stub).update(held)
            monkeypatch.setitem(sys.modules, name, stub)
        monkeypatch.delitem(sys.modules, "rorqual.harness", raising=False)
    import rorqual.harness

    yield rorqual.harness
    if not INSTALLED:
        sys.modules.pop("rorqual.harness", None)


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture
def model() -> Model:
    made = Model(config("v3", TOKENIZER.vocab_size), seed=3)
    made.tokenizer = TOKENIZER
    return made


def plain(model: Model, context: list[int], more: list[int]) -> tuple[float, bool]:
    """One pass of its own, token by token."""
    with torch.no_grad():
        logits = model(torch.tensor([(context + more)[:-1] or context]))[0].log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(more) - 1)
    total = sum(float(logits[at, token]) for at, token in zip(places, more, strict=True))
    return total, all(int(logits[at].argmax()) == token for at, token in zip(places, more, strict=True))


def test_scores_are_those_of_single_passes(harness: Any, model: Model) -> None:
    lm = harness.Harness(model, batch=2)
    ids = TOKENIZER.encode("the sea and the whale")
    liked = model.generate(ids, Sampling(temperature=0, max_new_tokens=4, ignore_eos=True)).ids
    pairs = [(ids, ids[:3]), (ids[:2], ids), (ids, liked), (ids[:1], ids[1:2]), (ids, [])]
    for (context, more), (score, greedy) in zip(pairs, lm.scores(pairs), strict=True):
        expected, is_greedy = plain(model, context, more)
        assert score == pytest.approx(expected, abs=1e-4) and greedy == is_greedy
    assert lm.scores(pairs)[2][1] and not lm.scores(pairs)[1][1]
    (one, two) = lm.loglikelihood(asked(("the sea", " is deep"), ("", "whale")))
    start, whole = TOKENIZER.encode("the sea"), TOKENIZER.encode("the sea is deep")
    assert one[0] == pytest.approx(plain(model, start, whole[len(start) :])[0], abs=1e-4)
    assert two[0] == pytest.approx(plain(model, [lm.prefix_token_id], TOKENIZER.encode("whale"))[0], abs=1e-4)
    long = ids * 100  # cut at its beginning: 200 positions are there
    score, _ = lm.scores([(long, ids)])[0]
    assert score == pytest.approx(plain(model, long[-201 + len(ids) :], ids)[0], abs=1e-3)


def test_answers_end_where_the_task_says(harness: Any, model: Model) -> None:
    lm = harness.Harness(model, batch=2)
    free = model.generate("the sea", Sampling(temperature=0, max_new_tokens=12)).text
    assert free and len(free) > 2
    stop = free[2]
    found = lm.generate_until(
        asked(
            ("the sea", {"until": [stop], "max_gen_toks": 12}),
            ("the sea", {"until": "", "max_gen_toks": 12, "do_sample": False, "temperature": 0.7}),
            ("", {"max_gen_toks": 3}),
            ("the sea " * 300, {"max_gen_toks": 5}),
        )
    )
    assert found[0] == free[: free.index(stop)] and found[1] == free and len(found) == 4
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        harness.Harness(model)


@needs_it
def test_whole_texts(harness: Any, model: Model) -> None:
    lm = harness.Harness(model)
    text = "the sea and the whale " * 60
    ids, prefix = TOKENIZER.encode(text), lm.prefix_token_id
    assert len(ids) > 300
    total = plain(model, [prefix], ids[:200])[0]
    rest, at = ids[200:], 200
    while rest:  # each window after the first is as full as it can be, and its tokens count once
        now, rest = rest[:200], rest[200:]
        at += len(now)
        total += plain(model, ids[max(0, at - 201) : at - len(now)], now)[0]
    assert lm.loglikelihood_rolling(asked((text,)))[0] == pytest.approx(total, rel=1e-4)


@needs_it
def test_a_task_of_ones_own(
    harness: Any, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"question": "the sea", "options": [" is deep", " whale"], "answer": n % 2} for n in range(6)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "seas.yaml").write_text(
        "task: seas\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'd.jsonl'}\noutput_type: multiple_choice\ntest_split: test\n"
        "doc_to_text: question\ndoc_to_choice: options\ndoc_to_target: answer\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    only_ours = functools.partial(harness.TaskManager, include_defaults=False)  # thousands of files fewer
    monkeypatch.setattr(harness, "TaskManager", only_ours)
    manager = harness.known_tasks(["seas"], tmp_path)
    before = random.getstate(), torch.get_rng_state()
    found = harness.evaluate(model, ["seas"], limit=5, manager=manager)
    assert (random.getstate(), True) == (before[0], torch.equal(before[1], torch.get_rng_state()))
    start = TOKENIZER.encode("the sea")
    wholes = [TOKENIZER.encode(f"the sea{option}") for option in (" is deep", " whale")]
    first, second = (plain(model, start, whole[len(start) :])[0] for whole in wholes)
    assert found == {"seas acc": pytest.approx(3 / 5 if first > second else 2 / 5)}
    with pytest.raises(ValueError, match="has no task nope"):
        harness.known_tasks(["nope"])
