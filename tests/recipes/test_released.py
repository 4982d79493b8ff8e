"""Recipes of released members and miniatures. The numbers below were typed from the facts sheet (3.2, 3.3, 3.7, 3.8,
3.10), not from the recipes."""

from __future__ import annotations

import itertools
import math
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import rorqual
from rorqual.data import Options, build
from rorqual.family import MLA, from_hub, to_hub
from rorqual.recipes import RECIPES, entry, v1
from rorqual.train.optim import AdamW, Muon
from rorqual.train.recipe import Recipe, Source
from rorqual.train.schedule import Steps
from rorqual.train.trainer import Trainer
from tests.data.corpora import TOKENIZER, json_lines, texts
from tests.recipes.test_pretrain import run

T, B = 10**12, 10**9
RELEASED = [name for name in RECIPES if not name.startswith("mini")]
MINI = [name for name in RECIPES if name.startswith("mini")]


def make(name: str) -> Recipe:
    return entry(name).make(Path("nowhere"))


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("v1-7b", "deepseek-llm-7b-base"),
        ("v1-67b", "deepseek-llm-67b-base"),
        ("v2", "DeepSeek-V2"),
        ("v2-long", "DeepSeek-V2"),
        ("v2-lite", "DeepSeek-V2-Lite"),
        ("v3", "DeepSeek-V3-Base"),
        ("v3-long", "DeepSeek-V3-Base"),
        ("v3.2-warm-up", "DeepSeek-V3.2-Exp-Base"),
        ("v3.2", "DeepSeek-V3.2-Exp-Base"),
        ("v4-flash", "DeepSeek-V4-Flash-Base"),
        ("v4-pro", "DeepSeek-V4-Pro-Base"),
    ],
)
def test_the_config_is_the_released_one(name: str, member: str) -> None:
    """V2 and V3 learnt at 4K before they had YaRN: all but that."""
    config, released = make(name).config, rorqual.config(member)
    if name not in ("v2", "v2-lite", "v3"):
        assert config == released
        return
    ours, theirs = to_hub(config), to_hub(released)
    stretch = {"rope_scaling", "rope_parameters", "max_position_embeddings"}
    assert {k for k in ours | theirs if ours.get(k) != theirs.get(k)} <= stretch
    assert ours["max_position_embeddings"] == 4096
    for layer in (*config.layers, *config.mtp):
        assert isinstance(layer.attention, MLA) and layer.attention.rope.scaling is None
        assert layer.attention.scale == pytest.approx(192**-0.5)


RATES: dict[str, list[tuple[float, float]]] = {
    "v1-7b": [(1.59 * T, 4.2e-4), (1.61 * T, 0.316 * 4.2e-4), (1.81 * T, 4.2e-5), (2 * T, 4.2e-5)],
    "v1-67b": [(1.59 * T, 3.2e-4), (1.61 * T, 0.316 * 3.2e-4), (1.81 * T, 3.2e-5)],
    "v2": [(4.85 * T, 2.4e-4), (4.87 * T, 0.316 * 2.4e-4), (7.28 * T, 0.316 * 2.4e-4), (7.3 * T, 2.4e-5)],
    "v2-lite": [(4.55 * T, 4.2e-4), (4.57 * T, 0.316 * 4.2e-4), (5.14 * T, 4.2e-5)],
    "v3": [
        (9.9 * T, 2.2e-4),
        (12.15 * T, 1.21e-4),
        (14.31 * T, 2.2e-5),
        (14.62 * T, 2.2e-5),
        (14.64 * T, 7.3e-6),
    ],
    "v3-long": [(0, 7.3e-6), (125 * B, 7.3e-6)],
    "v3.2-warm-up": [(0, 1e-3), (2.09 * B, 1e-3)],
    "v3.2": [(0, 7.3e-6), (943 * B, 7.3e-6)],
    "v4-flash": [(32 * T, 2.7e-5)],
    "v4-pro": [(33 * T, 2.0e-5)],
}
PEAKS = {
    "v1-7b": 4.2e-4,
    "v1-67b": 3.2e-4,
    "v2": 2.4e-4,
    "v2-lite": 4.2e-4,
    "v3": 2.2e-4,
    "v4-flash": 2.7e-4,
    "v4-pro": 2e-4,
}


@pytest.mark.parametrize("name", RATES)
def test_rates_are_the_reports(name: str) -> None:
    plan = make(name)
    # 0.316 squared is what "10 %" stands for in V2: 0.2 % off.
    assert [plan.rate(t) for t, _ in RATES[name]] == pytest.approx(
        [rate for _, rate in RATES[name]], rel=3e-3
    )
    if name in PEAKS:  # all of them warm up for 2,000 steps
        steps = Steps(plan.stages)
        assert plan.rate(0) == 0 and plan.rate(steps[1000][3]) < 0.6 * PEAKS[name]
        assert (
            plan.rate(steps[1990][3]) < PEAKS[name] == pytest.approx(plan.rate(steps[2000][3] + 1), rel=1e-6)
        )


def test_lengths_and_batches_are_the_reports() -> None:
    tokens = {
        "v1-7b": 2 * T, "v1-67b": 2 * T, "v2": 8.1 * T, "v2-lite": 5.7 * T, "v3": 14.8 * T, "v4-flash": 32 * T,
        "v4-pro": 33 * T, "v3.2-warm-up": 2.1 * B, "v3.2": 943.7 * B,
    }  # fmt: skip
    for name, wanted in tokens.items():
        assert make(name).tokens == pytest.approx(wanted, rel=2e-3), name
    firsts = {
        "v1-7b": (4096, 2304), "v1-67b": (4096, 4608), "v2": (4096, 2304), "v2-long": (32768, 576),
        "v2-lite": (4096, 4608), "v3": (4096, 3072), "v3-long": (32768, 1920), "v3.2-warm-up": (131072, 16),
        "v3.2": (131072, 480),
    }  # fmt: skip
    for name, wanted in firsts.items():
        stage = make(name).stages[0]
        assert (stage.length, stage.batch) == wanted, name
    assert [(make(n).stages[0].to, make(n).stages[0].ramp) for n in ("v2", "v3")] == [
        (9216, 225 * B),
        (15360, 469 * B),
    ]
    for name, steps in (("v2-long", 1000), ("v3.2-warm-up", 1000), ("v3.2", 15_000), ("v3-long", 2000)):
        plan = make(name)
        assert Steps(plan.stages)[steps][3] == plan.tokens
    assert [(s.length, s.batch) for s in make("v3-long").stages] == [(32768, 1920), (131072, 480)]
    for name, wanted in (("v4-flash", 75.5e6), ("v4-pro", 94.4e6)):
        plan = make(name)
        assert [s.length for s in plan.stages] == [4096, 16384, 65536, 1048576]
        assert all(s.length * s.batch == pytest.approx(wanted, rel=1e-3) for s in plan.stages)
        assert plan.stages[-1].start < plan.tokens
    assert make("v4-flash").stages[2].start == 1 * T


def test_balance_mtp_and_optimizers_are_the_reports() -> None:
    v2, lite, v3 = make("v2").v2, make("v2-lite").v2, make("v3")
    assert v2 is not None and (v2.expert, v2.device, v2.communication) == (0.003, 0.05, 0.02)
    assert lite is not None and (lite.expert, lite.device, lite.communication) == (0.001, 0, 0)
    assert [v3.mtp(t) for t in (0, 9.9 * T, 10.1 * T, 14.8 * T)] == [0.3, 0.3, 0.1, 0.1]
    assert [v3.speed(t) for t in (0, 14.2 * T, 14.4 * T)] == [0.001, 0.001, 0] and v3.balance == 1e-4
    assert isinstance(v3.optimizer, AdamW) and v3.optimizer.betas == (0.9, 0.95) and v3.optimizer.decay == 0.1
    assert v3.optimizer.moments == torch.bfloat16 and not v3.apart
    flash = make("v4-flash")
    assert isinstance(flash.optimizer, Muon) and flash.optimizer.rest.eps == 1e-20 and flash.apart
    assert (
        flash.speed(T) == 0.001 and flash.balance == 1e-4 and flash.mtp(0) == 0.3 and flash.mtp(31 * T) == 0.1
    )
    assert all(make(name).clip == 1.0 for name in RELEASED)
    assert [make(name).dsa for name in ("v3", "v3.2-warm-up", "v3.2")] == ["", "warm-up", "sparse"]
    with pytest.raises(ValueError, match="dsa is 'x'; it can be"):
        replace(v3, dsa="x")


@pytest.mark.parametrize("name", RECIPES)
def test_what_is_unverified_is_a_field(name: str) -> None:
    for path in entry(name).unverified:
        place: Any = make(name)
        for part in path.split("."):
            assert is_dataclass(place) and part in {f.name for f in fields(place)}, path
            place = getattr(place, part)


@pytest.mark.parametrize("name", RELEASED)
def test_shorter_runs_are_the_same_in_small(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And every one can be looked at without data or memory."""
    whole, part = make(name), entry(name).make(Path("nowhere"), make(name).tokens // 1000)
    for share in (0.0, 1e-3, 0.1, 0.5, 0.65, 0.85, 0.95, 0.995):
        for of in ("rate", "mtp", "speed"):
            long, short = getattr(whole, of)(share * whole.tokens), getattr(part, of)(share * part.tokens)
            assert short == pytest.approx(long, rel=1e-3), (of, share)
    run(
        f"recipe:{name}",
        "--out",
        str(tmp_path / "a"),
        "--dry-run",
        "--override",
        f"tokens={whole.tokens // 1000}",
    )
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{part.tokens:,} tokens" in said and not (tmp_path / "a").exists()


def test_v1s_fits_give_what_v1_was_trained_with() -> None:
    """7B and 67B at 2T tokens each: rates 4.2e-4 and 3.2e-4, batches of 2,304 and 4,608 sequences of 4,096."""
    for member, rate, batch in (
        ("deepseek-llm-7b-base", 4.2e-4, 2304),
        ("deepseek-llm-67b-base", 3.2e-4, 4608),
    ):
        compute = v1.flops_per_token(rorqual.config(member), 4096) * 2 * T
        assert v1.best_rate(compute) == pytest.approx(rate, rel=0.1)
        assert v1.best_batch(compute) == pytest.approx(batch * 4096, rel=0.1)
    for compute in (1e17, 3e20, 1e24):
        assert v1.best_model(compute) * v1.best_data(compute) == pytest.approx(compute, rel=2e-3)
    # 6 FLOPs a parameter, and attention on top: 6.9B of which 0.8B are embedding and head.
    assert v1.flops_per_token(rorqual.config("deepseek-llm-7b-base"), 0) == pytest.approx(
        6 * 6.07e9, rel=0.02
    )
    with pytest.raises(ValueError, match="V1's dense layers"):
        v1.flops_per_token(rorqual.config("DeepSeek-V3"), 4096)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("corpus")
    source = json_lines(place / "a.jsonl", texts(300))
    build([str(source)], place / "c", TOKENIZER, Options(held=0.1), workers=1)
    return str(place / "c")


@pytest.mark.parametrize("name", MINI)
def test_miniatures_train(name: str, corpus: str, tmp_path: Path) -> None:
    plan = entry(name).make(tmp_path)
    assert (
        from_hub(to_hub(plan.config)).layers == plan.config.layers
    )  # so it can be written as a released model
    few = tuple(replace(stage, batch=2, to=None, ramp=0) for stage in plan.stages)
    trainer = Trainer(
        replace(plan, sources=(Source(corpus),), stages=few, evaluate_every=0), tmp_path / "run"
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    first, second = itertools.islice(trainer, 2)
    assert math.isfinite(second.values["loss"]) and not first.skipped and not second.skipped
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) > (0 if plan.dsa == "warm-up" else len(before) / 2)
