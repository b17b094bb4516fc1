"""What a method was worth over several seeds: paired differences between students and their twins, and a sentence."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from scipy import special

CONFIDENCE = 0.95
"""Of the interval."""


class Verdict(NamedTuple):
    """Paired differences of one metric, student minus baseline, and what they say."""

    differences: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None
    """Student's t interval of the mean, ``CONFIDENCE``; None of fewer than two differences."""
    outcome: str
    """"gain", "loss", "no difference" or, of one seed, "unknown"."""
    sentence: str


def judge(
    students: Sequence[float], baselines: Sequence[float], metric: str, *, higher_is_better: bool = True
) -> Verdict:
    """Compares students with their twins, seed by seed.

    A gain or a loss is one whose interval leaves zero out: with three seeds the mean must be 2.5 times the standard
    deviation of the differences.

    >>> judge([20.1, 19.8, 20.6], [16.0, 16.4, 16.1], "AP").sentence
    'A gain: over 3 seeds the student is +4.00 AP (95 %: +2.62 to +5.38) beside its twin.'
    >>> judge([16.1, 15.8, 16.6], [16.0, 16.4, 16.1], "AP").outcome
    'no difference'
    >>> judge([16.0, 16.4], [16.0, 16.4], "AP").sentence
    'No difference: over 2 seeds the student is +0.00 AP (95 %: +0.00 to +0.00) beside its twin.'

    Args:
        students: the metric of each seed's student.
        baselines: of each seed's baseline, in the same order.
        metric: its name, for the sentence.
        higher_is_better: of the metric.
    """
    differences = tuple(a - b for a, b in zip(students, baselines, strict=True))
    count, mean = len(differences), statistics.fmean(differences)
    if not math.isfinite(mean):
        sentence = f"Nothing can be said: some {metric} is no number, as where nothing is to be found."
        return Verdict(differences, mean, None, "unknown", sentence)
    if count < 2:
        sentence = f"One seed answers nothing: the student is {mean:+.2f} {metric} beside its twin; give several seeds."
        return Verdict(differences, mean, None, "unknown", sentence)
    half = float(special.stdtrit(count - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(count)
    low, high = mean - half, mean + half
    better, worse = (low > 0, high < 0) if higher_is_better else (high < 0, low > 0)
    outcome = "gain" if better else "loss" if worse else "no difference"
    words = {"gain": "A gain", "loss": "A loss", "no difference": "No difference"}[outcome]
    sentence = (
        f"{words}: over {count} seeds the student is {mean:+.2f} {metric} "
        f"({CONFIDENCE:.0%}: {low:+.2f} to {high:+.2f}) beside its twin."
    ).replace("%:", " %:")
    return Verdict(differences, mean, (low, high), outcome, sentence)
