"""The miniature that experiments vary, at a GPU's size and at a quick one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.frame import Setup
from rorqual.family import MLA, Layer, ModelConfig, MoE, Rope, Router, SwiGLU
from rorqual.train.recipe import Recipe, Source
from rorqual.train.schedule import Stage, constant, wsd

RATE = 2e-3
BIASED = Router("sigmoid", bias=True, normalize=True)
"""V3's, in one group."""


@dataclass(frozen=True)
class Size:
    """Of a model and of its run. Widths of the full one are multiples of 128, FP8's block (facts 3.5)."""

    hidden: int
    heads: int
    head_dim: int
    layers: int
    experts: int
    top_k: int
    expert_width: int
    dense_width: int
    length: int
    batch: int
    steps: int

    @property
    def latent(self) -> int:
        """MLA's: two heads wide."""
        return 2 * self.head_dim


FULL = Size(384, 6, 64, 4, 32, 4, 128, 1024, length=512, batch=32, steps=1000)
QUICK = Size(48, 3, 16, 3, 8, 2, 24, 96, length=32, batch=4, steps=20)


def size(setup: Setup) -> Size:
    return QUICK if setup.quick else FULL


def mla(s: Size) -> MLA:
    """Without a query latent; half a head is rotary, as in V2 and V3."""
    half = s.head_dim // 2
    return MLA(s.heads, s.latent, s.head_dim, half, s.head_dim, Rope(half, interleaved=True))


def moe(setup: Setup, router: Router = BIASED, *, mtp: int = 0) -> ModelConfig:
    """V3 in miniature: MLA, a dense layer, then fine-grained experts beside a shared one."""
    s = size(setup)
    sparse = Layer(mla(s), MoE(s.experts, s.top_k, s.expert_width, 1, router))
    layers = (Layer(mla(s), SwiGLU(s.dense_width)), *(sparse,) * (s.layers - 1))
    return model(setup, "deepseek_v3", layers, mtp=(sparse,) * mtp)


def model(setup: Setup, kind: str, layers: tuple[Layer, ...], *, hidden: int = 0, **more: Any) -> ModelConfig:
    """Of these layers, as wide as the size says or as `hidden`."""
    s = size(setup)
    return ModelConfig(
        kind, setup.vocab, hidden or s.hidden, layers, s.length, dtype=dtype(setup), eos=(1,), **more
    )


def dtype(setup: Setup) -> str:
    return "float32" if setup.device == "cpu" else "bfloat16"


def recipe(setup: Setup, name: str, config: ModelConfig, *, rate: float = RATE, **changes: Any) -> Recipe:
    """A run: warm-up over 5 %, then constant, down to a tenth over the last 30 %. Experts' biases move by V3's γ and
    there is no balance loss, if `changes` don't say otherwise."""
    s = size(setup)
    tokens = (setup.steps or s.steps) * s.batch * s.length
    facts: dict[str, Any] = {
        "rate": wsd(rate, 0.05 * tokens, tokens, decay=0.3, end=rate / 10),
        "mtp": constant(0.3),
        "speed": constant(0.001),
        "balance": 0.0,
        "micro": s.batch,
        "dtype": dtype(setup),
        "evaluate_every": 10**9,  # at the end
    }
    return Recipe(
        name=name,
        config=config,
        sources=(Source(setup.corpus),),
        stages=(Stage(s.length, s.batch),),
        tokens=tokens,
        **(facts | changes),
    )
