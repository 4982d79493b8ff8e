"""Claim 9: MLA against multi-head attention, and against grouped-query attention of the same cache."""

from __future__ import annotations

from functools import partial

from experiments.compare import below
from experiments.frame import Arm, Experiment, Results, Setup, Verdict, together
from experiments.models import model, recipe
from rorqual.family import GQA, MLA, Layer, ModelConfig, Rope, SwiGLU
from rorqual.family.parts import Attention
from rorqual.train.recipe import Recipe

KV_HEADS = 2
"""Of the grouped-query arm: its cache, 2 * 2 heads, is what MLA's latent and rotary key share out."""
WORSE = 0.005
"""Of a loss: what still counts as no worse."""


def arms(setup: Setup) -> tuple[Arm, ...]:
    return tuple(Arm(name, partial(make, name=name)) for name in ("MLA", "MHA", "GQA"))


def make(setup: Setup, name: str) -> Recipe:
    return recipe(setup, f"attention {name}", config(setup, name))


def config(setup: Setup, name: str) -> ModelConfig:
    """Dense layers whose SwiGLU takes what the attention leaves of as many parameters as multi-head attention has."""
    heads, d, layers, width = (4, 16, 2, 96) if setup.quick else (8, 64, 6, 1408)
    hidden, half = heads * d, d // 2
    parts: dict[str, tuple[Attention, int]] = {
        "MHA": (GQA(heads, heads, d, Rope(d)), 4 * hidden**2),
        "GQA": (GQA(heads, KV_HEADS, d, Rope(d)), 2 * hidden**2 + 2 * hidden * KV_HEADS * d),
        "MLA": (
            MLA(heads, 2 * KV_HEADS * d - half, d, half, d, Rope(half, interleaved=True)),
            hidden * heads * (d + half) + 2 * KV_HEADS * d * hidden
            + (2 * KV_HEADS * d - half) * heads * 2 * d + heads * d * hidden,
        ),
    }  # fmt: skip
    attention, matrices = parts[name]
    rest = round((parts["MHA"][1] - matrices) / (3 * hidden))
    kind = "deepseek_v3" if name == "MLA" else "llama"
    return model(setup, kind, (Layer(attention, SwiGLU(width + rest)),) * layers, hidden=hidden)


def judge(results: Results) -> Verdict:
    slack = WORSE * results.mean("MHA", "held-out loss")
    no_worse = below(results, "MLA", "MHA", "held-out loss", slack)
    return together(no_worse, below(results, "MLA", "GQA", "held-out loss"))


EXPERIMENT = Experiment(
    name="attention",
    claims=(9,),
    claim="MLA is no worse than MHA, and better than GQA of equal cache",
    rule=(
        "On held-out loss, runs paired by seed. MLA has to lie less than 0.5 % of the loss above MHA, and "
        "below GQA, each by the whole of its 90 % interval: then the claim held. It did not hold if the "
        "whole interval of one of the two lies on the other side; else it is undecided."
    ),
    limits=(
        "Small models, few tokens (the table has both), sequences of 512. Parameters are equal because "
        "SwiGLU takes what an attention leaves: GQA has the widest. The cache is a quarter of MHA's (256 "
        "numbers a token and layer); V2's is 1/57. All arms have one learning rate, tuned for none of them."
    ),
    arms=arms,
    judge=judge,
)
