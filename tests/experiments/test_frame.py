"""The frame of the experiments, gone through in seconds: their figures mean nothing here, but they come."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from experiments import __main__ as command
from experiments import attention, balance, card, corpus, fp8, mtp, muon, pool, run
from experiments.compare import Difference, below, difference, within
from experiments.frame import Outcome, Results, Setup
from rorqual.data import Options, build
from rorqual.nn import Transformer
from rorqual.train.trainer import Trainer, TrainError
from tests.data.corpora import TOKENIZER, json_lines, texts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("corpus")
    source = json_lines(place / "a.jsonl", texts(300))
    build([str(source)], place / "c", TOKENIZER, Options(held=0.1), workers=1)
    return place / "c"


def go(data: Path, out: Path, *names: str, **more: Any) -> None:
    options: dict[str, Any] = {"device": "cpu", "steps": 3, "seeds": 2, "quick": True, "commit": "abc"} | more
    command.main(*names, data=data, out=out, **options)


def test_runs_are_shared_resumed_and_told_of(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own: "bias 0.001" and "without" are the same runs, and nothing is run twice."""
    go(data, tmp_path, "mtp", "collapse", jobs=2)
    files = sorted((tmp_path / "runs").glob("*.json"))
    assert len(files) == 8  # two and three arms, one of them in common, and two seeds
    text = (tmp_path / "cards" / "collapse.md").read_text()
    for said in (
        "Claim 14",
        "Verdict: ",
        "| bias 0.001 | ",
        "| none | ",
        "Rule, written before",
        "not show",
        "commit: abc",
    ):
        assert said in text
    assert (
        "Quick size" in text
        and "python -m experiments collapse --device cpu --quick --steps 3 --seeds 2" in text
    )
    record = json.loads((tmp_path / "cards" / "mtp.json").read_text())
    losses = [record["arms"]["with"][seed]["measures"]["held-out loss"] for seed in "01"]
    shown = f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"
    assert shown in (tmp_path / "cards" / "mtp.md").read_text()
    assert "<svg" in (tmp_path / "cards" / "mtp.svg").read_text()
    files[0].write_text(files[0].read_text()[:50])  # cut off
    before = {file: file.read_bytes() for file in files[1:]}
    tried: list[str] = []
    real = run.outcome

    def outcome(recipe: Any, device: str) -> Outcome:
        tried.append(recipe.name)
        return real(recipe, device)

    monkeypatch.setattr(run, "outcome", outcome)
    go(data, tmp_path, "mtp", "collapse")
    assert len(tried) == 1 and before == {file: file.read_bytes() for file in files[1:]}
    again = json.loads((tmp_path / "cards" / "mtp.json").read_text())
    assert [again["arms"]["with"][s]["measures"] for s in "01"] == [
        record["arms"]["with"][s]["measures"] for s in "01"
    ]
    go(data, tmp_path, "mtp", steps=4, seeds=1)  # that is another run
    assert len(tried) == 3
    assert "undecided" in capsys.readouterr().out


def test_what_goes_wrong_stays_with_its_experiment(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that breaks down is a result; one that fails is none, and the others go on."""
    real = Trainer._take

    def take(self: Trainer) -> Any:
        if self.recipe.name == "balance none" and self.step == 1:
            raise TrainError("the loss is nan")
        if self.recipe.name == "mtp with":
            raise RuntimeError("out of memory")
        return real(self)

    monkeypatch.setattr(Trainer, "_take", take)
    with pytest.raises(SystemExit, match="without a result.*mtp"):
        go(data, tmp_path, "mtp", "collapse", seeds=1)
    said = capsys.readouterr().out
    assert "out of memory" in said and "broke down at step 1: the loss is nan" in said
    assert not (tmp_path / "cards" / "mtp.md").exists()
    text = (tmp_path / "cards" / "collapse.md").read_text()
    assert "Verdict: undecided" in text and "- none, seed 0: the loss is nan" in text


def test_what_is_wrong_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no experiment 'nope'; there are attention, balance"):
        go(data, tmp_path, "nope")
    with pytest.raises(ValueError, match="--jobs 0"):
        go(data, tmp_path, "mtp", jobs=0)
    with pytest.raises(ValueError, match="--device sofa can't be used"):
        go(data, tmp_path, "mtp", device="sofa")
    source = json_lines(tmp_path / "a.jsonl", texts(30))
    build([str(source)], tmp_path / "c", TOKENIZER, workers=1)
    with pytest.raises(ValueError, match="holds nothing out"):
        go(tmp_path / "c", tmp_path, "mtp")


# ------------------------------------------------------------------------------------------ verdicts


def results(**arms: Any) -> Results:
    """Arms of measures, each a list over seeds; a bare list is the held-out loss."""
    made: dict[str, dict[int, Outcome]] = {}
    for arm, given in arms.items():
        named = given if isinstance(given, dict) else {"held-out loss": given, "training loss": given}
        count = len(next(iter(named.values())))
        made[arm.replace("_", " ")] = {
            seed: {"measures": {name: values[seed] for name, values in named.items()}}
            for seed in range(count)
        }
    return Results(made)


def test_intervals_are_students() -> None:
    """Paired differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, and 2.920 for two degrees of freedom."""
    found = difference({0: 1.1, 1: 2.2, 2: 3.3, 7: 9.0}, {0: 1.0, 1: 2.0, 2: 3.0, 8: 5.0})
    reach = 2.920 * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.2, 0.2 - reach, 0.2 + reach)
    ) and found.pairs == 3
    assert found.below(0.4) is True and found.below(0.0) is False and found.below(0.2) is None
    assert difference({0: 1.0}, {0: 2.0}).below(0) is None  # of one pair nothing is known
    assert difference({0: 1.0, 1: math.inf}, {0: 2.0, 1: 2.0}).below(0) is False
    assert difference({0: math.inf}, {0: math.inf}) != Difference(0, 0, 0, 1)
    assert difference({0: math.inf}, {0: math.inf}).below(0) is None
    with pytest.raises(ValueError, match="no seed in common"):
        difference({0: 1.0}, {1: 1.0})


LOW, MID, HIGH = [2.00, 2.01, 2.02], [2.10, 2.12, 2.11], [2.20, 2.23, 2.21]


def test_verdicts_follow_the_rules() -> None:
    assert below(results(a=LOW, b=MID), "a", "b", "held-out loss").held is True
    near = [x + 0.0001 * s for x, s in zip(MID, (1, -1, 0.3), strict=True)]
    far = [1.01 * x for x in MID]
    for other, held in ((near, True), (far, False), ([2.0, 2.2, 2.11], None)):
        assert within(results(a=other, b=MID), "a", "b", "held-out loss", 0.0025).held is held
        assert fp8.judge(results(fp8=other, bf16=MID)).held is held
    for mla, mha, gqa, held in (
        (LOW, MID, HIGH, True),
        (near, MID, HIGH, True),  # a hair above MHA is no worse
        (HIGH, MID, HIGH, False),
        (MID, MID, LOW, False),
        (MID, MID, near, None),
    ):
        assert attention.judge(results(MLA=mla, MHA=mha, GQA=gqa)).held is held
    assert [mtp.judge(results(**{"with": w, "without": MID})).held for w in (LOW, HIGH, near)] == [
        True,
        False,
        None,
    ]


def test_verdicts_on_balance_and_rates() -> None:
    def arm(loss: list[float], violation: float, starved: float = 0.0) -> dict[str, list[float]]:
        spread = (0.01, -0.01, 0.0)
        return {
            "held-out loss": loss, "violation": [violation + s for s in spread], "starved": [starved] * 3,
        }  # fmt: skip

    # The second loss balances best, so it is the one to beat.
    losses = {"loss 0.001": arm(LOW, 1.5), "loss 0.01": arm(MID, 0.5)}
    for bias, held in ((arm(LOW, 0.55), True), (arm(LOW, 1.0), False), (arm(HIGH, 0.3), False)):
        worse = arm(HIGH, 1.2)  # of the two speeds, the one that balances better counts
        assert balance.judge(results(**{"bias 0.001": worse, "bias 0.01": bias}, **losses)).held is held
    for none, held in ((arm(MID, 3.0, 0.2), True), (arm(MID, 1.0, 0.2), False), (arm(MID, 3.0, 0.05), False)):
        assert balance.judge_collapse(results(none=none)).held is held

    def searches(adam: dict[float, float], muons: dict[float, float]) -> dict[str, Any]:
        named = {"AdamW": adam, "Muon": muons}
        return {f"{o} {rate:g}": [loss] for o, found in named.items() for rate, loss in found.items()}

    inside, end = {1e-3: 2.3, 2e-3: 2.2, 4e-3: 2.4}, {1e-3: 2.4, 2e-3: 2.3, 4e-3: 2.2}
    muons = {1e-3: 2.2, 2e-3: 2.0, 4e-3: math.inf}
    found = results(**searches(inside, muons))
    setup = Setup("", 300, quick=True)
    assert [arm.name for arm in muon.more(setup, found)] == ["AdamW 0.002", "Muon 0.002"]
    for search, best, loss, held in ((inside, "AdamW 0.002", HIGH, True), (end, "AdamW 0.004", HIGH, None)):
        chosen = {best: loss, "Muon 0.002": LOW}
        assert muon.judge(results(**(searches(search, muons) | chosen))).held is held
    lost = searches(end, muons) | {"AdamW 0.004": [1.9, 1.9, 1.91], "Muon 0.002": LOW}
    assert muon.judge(results(**lost)).held is False


# --------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize("quick", [True, False])
def test_attentions_have_equal_parameters_and_caches(quick: bool) -> None:
    setup = Setup("", 4096, quick)
    configs = {name: attention.config(setup, name) for name in ("MLA", "MHA", "GQA")}
    sizes = {
        name: sum(p.numel() for p in Transformer(config, device="meta").parameters())
        for name, config in configs.items()
    }
    assert max(sizes.values()) / min(sizes.values()) < 1.003
    caches = {}
    for name, config in configs.items():
        model = Transformer(config, device="meta")
        caches[name] = sum(c.growing_bytes(1) for c in model.new_cache(1, 8).layers)
    assert caches["MLA"] == caches["GQA"] and caches["MHA"] >= 2 * caches["GQA"]


@pytest.mark.parametrize("name", command.EXPERIMENTS)
def test_experiments_are_ready_for_the_gpu(name: str, data: Path) -> None:
    """Arms of an experiment see the same tokens in the same order, and differ."""
    experiment = command.EXPERIMENTS[name]
    setup = Setup(str(data), 4096, device="cuda")
    plans = [arm.make(setup) for arm in experiment.arms(setup)]
    assert len({plan.fingerprint() for plan in plans}) == len(plans)
    assert len({(plan.tokens, plan.stages, plan.sources) for plan in plans}) == 1
    assert plans[0].tokens == 1000 * 32 * 512 and all(plan.dtype == "bfloat16" for plan in plans)
    assert card.command(experiment, setup) == f"python -m experiments {name} --device cuda"


def test_pythons_own_library_is_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = corpus.texts()
    first = [next(found) for _ in range(300)]
    assert len(set(first)) > 290 and any("def " in text for text in first)
    monkeypatch.setattr(corpus, "texts", lambda: iter(texts(400)))
    place = corpus.prepare(tmp_path, vocab=300)
    wrote = (place / "manifest.json").stat().st_mtime_ns
    assert (
        corpus.prepare(tmp_path, vocab=300) == place and (place / "manifest.json").stat().st_mtime_ns == wrote
    )
    assert "Python 3." in (place / "about.txt").read_text()
    assert pool.commit_here()
