"""Claim 21: FP8 training beside bf16."""

from __future__ import annotations

from dataclasses import replace

from experiments.compare import within
from experiments.frame import Arm, Experiment, Results, Setup, Verdict, together
from experiments.models import moe, recipe
from rorqual.train.recipe import Recipe

OFF = 0.0025
"""Of the bf16 loss (V3 report 3.3)."""


def bf16(setup: Setup) -> Recipe:
    return recipe(setup, "fp8 bf16", moe(setup), dtype="bfloat16")


def fp8(setup: Setup) -> Recipe:
    return replace(bf16(setup), name="fp8 fp8", fp8=True)


def judge(results: Results) -> Verdict:
    return together(
        *(within(results, "fp8", "bf16", measure, OFF) for measure in ("held-out loss", "training loss"))
    )


EXPERIMENT = Experiment(
    name="fp8",
    claims=(21,),
    claim="FP8 training stays within 0.25 % of the bf16 loss",
    rule=(
        "On held-out loss and on training loss over the last fifth of 1,000 steps, runs paired by seed: the "
        "difference has to lie within 0.25 % of the bf16 loss by the whole of its 90 % interval, on both: "
        "then the claim held. It did not hold if the whole interval of one lies outside; else it is "
        "undecided."
    ),
    limits=(
        "Small models, 1,000 steps. V3 shows it at 16B and 230B over 1T tokens, where errors have longer to "
        "add up, and sums over wider matrices are longer."
    ),
    arms=lambda setup: (Arm("fp8", fp8), Arm("bf16", bf16)),
    judge=judge,
)
