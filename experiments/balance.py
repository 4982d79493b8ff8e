"""Claims 13 and 14: experts balanced by a bias, by a loss, or not at all."""

from __future__ import annotations

import math
from functools import partial

from experiments.compare import below
from experiments.frame import Arm, Experiment, Results, Setup, Verdict, together
from experiments.models import moe, recipe
from rorqual.family import Router
from rorqual.train.recipe import Recipe
from rorqual.train.schedule import constant

PLAIN = Router("sigmoid", normalize=True)
BIASES = {"bias 0.001": 0.001, "bias 0.01": 0.01}
"""Speeds γ: V3's, which had far more steps, and ten times as much."""
LOSSES = {"loss 0.001": 0.001, "loss 0.01": 0.01}
"""Factors of the auxiliary loss: MoE-16B's and V2-Lite's, and that of MoE's small models (facts 3.3)."""
EVEN = 0.2
"""How much more violation still counts as equal balance: a fifth of a fair share."""
COLLAPSED, STARVED = 2.0, 0.1
"""The busiest expert has more than three times its share, and a tenth of all experts less than a tenth of theirs."""


def biased(setup: Setup, speed: float = 0.001) -> Recipe:
    return recipe(setup, f"balance bias {speed}", moe(setup), speed=constant(speed))


def unbalanced(setup: Setup) -> Recipe:
    return recipe(setup, "balance none", moe(setup, PLAIN))


def by_loss(setup: Setup, factor: float) -> Recipe:
    return recipe(setup, f"balance loss {factor}", moe(setup, PLAIN), balance=factor)


NONE = Arm("none", unbalanced)


def biases(setup: Setup) -> tuple[Arm, ...]:
    return tuple(Arm(name, partial(biased, speed=speed)) for name, speed in BIASES.items())


def arms(setup: Setup) -> tuple[Arm, ...]:
    losses = (Arm(name, partial(by_loss, factor=factor)) for name, factor in LOSSES.items())
    return *biases(setup), *losses, NONE


def judge(results: Results) -> Verdict:
    """The bias and the auxiliary loss that balance best."""
    bias, loss = (min(of, key=lambda name: results.mean(name, "violation")) for of in (BIASES, LOSSES))
    even = below(results, bias, loss, "violation", slack=EVEN)
    return together(even, below(results, bias, loss, "held-out loss"))


def judge_collapse(results: Results) -> Verdict:
    worst, starved = results.of("none", "violation"), results.of("none", "starved")
    if math.inf in worst.values():
        return Verdict(None, ("a run without balancing broke down",))
    shown = [worst[seed] > COLLAPSED and starved[seed] > STARVED for seed in worst]
    held = True if all(shown) else None if any(shown) else False
    said = ", ".join(f"{1 + worst[seed]:.1f}× and {100 * starved[seed]:.0f} %" for seed in worst)
    return Verdict(held, (f"without balancing, busiest expert and starved experts: {said}",))


LIMITS = (
    "Small models (3 layers of 32 experts, 4 a token) and few tokens. The auxiliary loss is V3's sequence-wise "
    "one with a larger factor, at two factors; the one that balances over a whole batch is not tried. "
    "All arms have one learning rate."
)
MEASURES = ("held-out loss", "training loss", "violation", "starved")

BALANCE = Experiment(
    name="balance",
    claims=(13,),
    claim="A bias balances experts as well as an auxiliary loss does, at a lower loss",
    rule=(
        "Violation is the busiest expert's load over its fair share, less 1, in a batch, averaged over layers "
        "and the last fifth of a run. Of the two speeds of the bias, and of the two factors of the auxiliary "
        "loss, the one with the lower violation counts. Runs paired by seed: the bias's violation has to lie "
        "less than 0.2 above the loss's, and its held-out loss below, each by the whole of its 90 % interval: "
        "then the claim held. It did not hold if the whole interval of one of the two lies on the other side; "
        "else it is undecided."
    ),
    limits=LIMITS,
    arms=arms,
    judge=judge,
    measures=MEASURES,
)

COLLAPSE = Experiment(
    name="collapse",
    claims=(14,),
    claim="Without balancing, routing collapses",
    rule=(
        "Collapse: over the last fifth of a run the busiest expert has more than three times its share "
        "(violation above 2), and more than a tenth of all experts get less than a tenth of theirs "
        "(starved). The claim held if that is so in all runs without balancing, did not hold if in none; "
        "else it is undecided."
    ),
    limits=LIMITS + " Collapse may come later in longer runs, or with more experts.",
    arms=lambda setup: (*biases(setup), NONE),
    judge=judge_collapse,
    measures=MEASURES,
)
