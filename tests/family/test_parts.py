"""Every part refuses numbers that contradict themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rorqual.family import ConfigError, HyperConnection, LinearScaling, Llama3Scaling, Rope, Yarn, config

SMALL = config("deepseek-v2-lite").replace(vocab=100, bos=1, eos=(2,))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, "1", True])
def test_numbers_are_finite_and_positive(value: Any) -> None:
    for make in (
        lambda: Rope(8, theta=value),
        lambda: Rope(8, theta=1.0, scaling=Yarn(4.0, 32)),
        lambda: LinearScaling(value),
        lambda: Yarn(value, 32),
        lambda: Yarn(4.0, 32, amplitude=value),
        lambda: Llama3Scaling(value, 32),
        lambda: HyperConnection(eps=value),
        lambda: SMALL.replace(norm_eps=value),
        lambda: SMALL.replace(init_std=value),
    ):
        with pytest.raises(ConfigError):
            make()
    assert HyperConnection(eps=0.0).eps == 0.0


@pytest.mark.parametrize(
    "change",
    [
        {"bos": 100},
        {"bos": -1},
        {"bos": 1.0},
        {"eos": (2, 100)},
        {"eos": (None,)},
        {"eos": "2"},
        {"pad": 100},
        {"pad": -2},
    ],
)
def test_token_ids_are_inside_the_vocabulary(change: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=f"{next(iter(change))}_token_id .* is not a token: vocab_size is 100"
    ):
        SMALL.replace(**change)


def test_sequences_become_tuples() -> None:
    model = SMALL.replace(eos=[2, 3], layers=list(SMALL.layers), mtp=[])
    assert (model.eos, model.layers, model.mtp) == ((2, 3), SMALL.layers, ())
    assert SMALL.replace(eos=5).eos == (5,)
    assert hash(model.layers)
