"""Claim 32: Muon against AdamW, each at its best learning rate."""

from __future__ import annotations

from functools import partial

from experiments.compare import below
from experiments.frame import Arm, Experiment, Results, Setup, Verdict
from experiments.models import moe, recipe
from rorqual.train.optim import AdamW, Muon
from rorqual.train.recipe import Recipe

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
"""Muon's updates are as large as AdamW's by V4's factor of 0.18, so both search the same."""
SETTINGS = {"AdamW": AdamW(), "Muon": Muon()}


def make(setup: Setup, optimizer: str, rate: float) -> Recipe:
    return recipe(setup, f"muon {optimizer} {rate:g}", moe(setup), rate=rate, optimizer=SETTINGS[optimizer])


def name(optimizer: str, rate: float) -> str:
    return f"{optimizer} {rate:g}"


def arms(setup: Setup) -> tuple[Arm, ...]:
    """The search: one run each."""
    rates = RATES[:3] if setup.quick else RATES
    return tuple(
        Arm(name(optimizer, rate), partial(make, optimizer=optimizer, rate=rate), seeds=(0,))
        for optimizer in SETTINGS
        for rate in rates
    )


def searched(results: Results, optimizer: str) -> dict[float, float]:
    """Losses of seed 0 by rate, from the lowest rate on."""
    found = {arm: results.of(arm, "held-out loss")[0] for arm in results.runs if arm.startswith(optimizer)}
    return dict(sorted((float(arm.split()[1]), loss) for arm, loss in found.items()))


def best(results: Results, optimizer: str) -> float:
    losses = searched(results, optimizer)
    return min(losses, key=losses.__getitem__)


def more(setup: Setup, results: Results) -> tuple[Arm, ...]:
    """The best of each, with all seeds."""
    chosen = ((optimizer, best(results, optimizer)) for optimizer in SETTINGS)
    return tuple(
        Arm(name(optimizer, rate), partial(make, optimizer=optimizer, rate=rate))
        for optimizer, rate in chosen
    )


def judge(results: Results) -> Verdict:
    rates = {optimizer: best(results, optimizer) for optimizer in SETTINGS}
    found = below(results, name("Muon", rates["Muon"]), name("AdamW", rates["AdamW"]), "held-out loss")
    inside = {o: rates[o] not in (min(s := searched(results, o)), max(s)) for o in SETTINGS}
    said = tuple(
        f"{o}'s best rate {rates[o]:g} {'lies inside' if inside[o] else 'is an end of'} its search"
        for o in SETTINGS
    )
    # Whoever lost might have won beyond the end of its search.
    loser = {True: "AdamW", False: "Muon"}.get(found.held) if found.held is not None else None
    held = found.held if loser is None or inside[loser] else None
    return Verdict(held, (*found.because, *said))


EXPERIMENT = Experiment(
    name="muon",
    claims=(32,),
    claim="Muon learns faster than AdamW, token for token",
    rule=(
        "Both are tried at four learning rates with one seed; the rate with the lowest held-out loss is run "
        "with all seeds. Runs paired by seed at equal tokens: Muon's held-out loss has to lie below AdamW's "
        "by the whole of its 90 % interval: then the claim held. It did not hold if the whole interval lies "
        "above. It is undecided in between, and also if the loser's best rate is an end of its search."
    ),
    limits=(
        "Small models, few tokens (the table has both). Only the learning rate is searched, not decay, "
        "momentum or warm-up; seed 0 both chose the rate and counts. Per token, not per second."
    ),
    arms=arms,
    judge=judge,
    more=more,
)
