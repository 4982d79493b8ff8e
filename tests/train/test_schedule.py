"""Schedules are the papers'."""

from __future__ import annotations

import math

import pytest

from rorqual.train.schedule import Phase, Schedule, Stage, Steps, constant, cosine, multi_step, v3, wsd


def test_v3s_learning_rate() -> None:
    """V3 report 4.2: 2.2e-4 until 10T, cosine to 2.2e-5 over 4.3T, constant for 333B, 7.3e-6 for 167B."""
    rate = v3(2.2e-4, 5e9, 14.8e12)
    assert rate(0) == 0 and rate(2.5e9) == pytest.approx(1.1e-4) and rate(9.99e12) == 2.2e-4
    assert rate(12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rate(14.29999e12) == pytest.approx(2.2e-5, rel=1e-6) and rate(14.5e12) == 2.2e-5
    assert rate(14.64e12) == pytest.approx(7.3e-6) and rate(99e12) == pytest.approx(7.3e-6)


def test_v2s_and_v1s() -> None:
    rate = multi_step(2.4e-4, 10, 1000, [(0.6, 0.316), (0.9, 0.316**2)])
    assert [rate(t) for t in (5, 100, 599)] == pytest.approx([1.2e-4, 2.4e-4, 2.4e-4])
    assert [rate(t) for t in (600, 899, 900, 2000)] == pytest.approx(
        [2.4e-4 * 0.316, 2.4e-4 * 0.316, 2.4e-4 * 0.316**2, 2.4e-4 * 0.316**2]
    )


def test_others() -> None:
    assert constant(3.0)(10**15) == 3.0
    assert cosine(1.0, 10, 110)(60) == pytest.approx(0.5) and cosine(1.0, 10, 110, 0.2)(500) == 0.2
    assert [wsd(1.0, 10, 100)(t) for t in (5, 50, 79, 90, 100)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert Schedule(1.0, (Phase(10, 2.0), Phase(20, 4.0, "linear")))(15) == 3.0
    with pytest.raises(ValueError, match="one after the other"):
        Schedule(1.0, (Phase(10, 2.0), Phase(10, 4.0)))


def test_batches_grow_and_sequences_lengthen() -> None:
    steps = Steps((Stage(length=4, batch=2, to=8, ramp=80, multiple=2), Stage(length=16, batch=2, start=200)))
    seen, first, stage = 0, 0, 0
    sizes = []
    for n in range(30):
        now, begin, samples, before = steps[n]
        assert before == seen
        if now != stage:
            stage, first = now, 0
        assert begin == first
        first += samples
        seen += samples * (4, 16)[now]
        sizes.append((now, samples))
    assert sizes[0] == (0, 2) and (0, 8) in sizes and sizes[-1] == (1, 2)
    assert [s for n, s in sizes if n == 0] == sorted(s for n, s in sizes if n == 0)
    assert all(s % 2 == 0 for _, s in sizes)
    again = Steps(steps.stages)
    assert again[25] == steps[25]  # asked for without those before
    for stages in ((), (Stage(4, 2, start=5),), (Stage(4, 2), Stage(8, 2))):
        with pytest.raises(ValueError, match="one after the other"):
            Steps(stages)
    with pytest.raises(ValueError, match="multiples"):
        Steps((Stage(4, 3, multiple=2),))
    for wrong in ({"multiple": 0}, {"to": 0}, {"ramp": -1}):
        with pytest.raises(ValueError, match="above 0"):
            Steps((Stage(4, 2, **wrong),))
    for start, until, to in (
        (math.nan, 1.0, 1.0),
        (-1.0, 1.0, 1.0),
        (0.0, 1.0, math.inf),
        (0.0, math.nan, 1.0),
    ):
        with pytest.raises(ValueError, match="schedule"):
            Schedule(start, (Phase(until, to),))
    assert math.isfinite(seen)
