"""Comparisons of two arms, run by run: the same seed has the same data in the same order."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from experiments.frame import Results, Verdict

STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""The 95 % quantile of Student's t for 1, 2, ... degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """Of two arms over their common seeds: the mean, and what it lies within at 90 % (each side errs in 5 %)."""

    mean: float
    low: float
    high: float
    pairs: int

    def below(self, limit: float) -> bool | None:
        """Whether it lies below: True and False where the whole interval says so."""
        if self.high < limit:
            return True
        return False if self.low > limit else None


def difference(a: dict[int, float], b: dict[int, float]) -> Difference:
    """a - b. With one pair nothing is known about the spread, and the interval has no end."""
    pairs = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
    if not pairs:
        raise ValueError("the two arms have no seed in common: there is nothing to compare")
    broken = [math.isinf(x) for x, _ in pairs], [math.isinf(y) for _, y in pairs]
    if any(broken[0]) or any(broken[1]):  # a run that broke down is worse than any that did not
        sign = any(broken[0]) - any(broken[1])
        end = sign * math.inf if sign else math.nan
        return Difference(end, end, end, len(pairs))
    found = [x - y for x, y in pairs]
    mean = statistics.fmean(found)
    if len(found) == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    reach = STUDENT[min(len(found) - 2, len(STUDENT) - 1)] * statistics.stdev(found) / len(found) ** 0.5
    return Difference(mean, mean - reach, mean + reach, len(found))


def below(results: Results, a: str, b: str, measure: str, slack: float = 0.0) -> Verdict:
    """That arm `a` has less of a measure than arm `b`, or less than `slack` more."""
    found = difference(results.of(a, measure), results.of(b, measure))
    wanted = f"wanted below {slack:.4f}" if slack else "wanted below 0"
    return Verdict(found.below(slack), (f"{measure}, {a} − {b}: {_said(found)}, {wanted}",))


def within(results: Results, a: str, b: str, measure: str, share: float) -> Verdict:
    """That a measure of arm `a` lies within a `share` of arm `b`'s on both sides."""
    found = difference(results.of(a, measure), results.of(b, measure))
    limit = share * results.mean(b, measure)
    held = None
    if found.low > -limit and found.high < limit:
        held = True
    elif found.high < -limit or found.low > limit:
        held = False
    return Verdict(held, (f"{measure}, {a} − {b}: {_said(found)}, wanted within ±{limit:.4f}",))


def _said(found: Difference) -> str:
    if found.pairs == 1:
        return f"{found.mean:+.4f} (one pair: no interval)"
    return f"{found.mean:+.4f} (90 % interval {found.low:+.4f} to {found.high:+.4f}, {found.pairs} pairs)"
