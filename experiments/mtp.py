"""Claim 18: multi-token prediction beside next-token prediction."""

from __future__ import annotations

from experiments.balance import biased
from experiments.compare import below
from experiments.frame import Arm, Experiment, Results, Setup, Verdict
from experiments.models import moe, recipe
from rorqual.train.recipe import Recipe


def with_mtp(setup: Setup) -> Recipe:
    """λ is 0.3 throughout (V3's for two thirds of its run)."""
    return recipe(setup, "mtp with", moe(setup, mtp=1))


def judge(results: Results) -> Verdict:
    return below(results, "with", "without", "held-out loss")


EXPERIMENT = Experiment(
    name="mtp",
    claims=(18,),
    claim="Multi-token prediction lowers the main model's loss",
    rule=(
        "On the held-out loss of the next token, the module left out, at equal tokens, runs paired by seed: "
        "with it the loss has to lie below that without by the whole of its 90 % interval: then the claim "
        "held. It did not hold if the whole interval lies above; else it is undecided."
    ),
    limits=(
        "Small models, few tokens (the table has both). Equal tokens is not equal compute: the module is one "
        "layer more, and a second product with the head. V3 reports gains on benchmarks at 16B and 230B, not "
        "in loss. Drafting is another claim (19)."
    ),
    arms=lambda setup: (Arm("with", with_mtp), Arm("without", biased)),
    judge=judge,
)
