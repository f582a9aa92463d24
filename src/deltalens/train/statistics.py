"""Accuracies from repeated attempts, with their intervals. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["mean_at_k", "pass_at_k", "wilson_interval"]

_Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution


def wilson_interval(successes: float, trials: float, z: float = _Z95) -> tuple[float, float]:
    """Wilson's score interval for a binomial proportion (Wilson 1927), as fractions.

    Unlike the normal approximation it stays within [0, 1] and has a width where no or all trials succeed.

    Args:
        successes: number of successes; need not be whole, see `mean_at_k`.
        trials: number of trials, above 0.
        z: normal quantile; the default makes it a 95 % interval.
    """
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    # At the ends the interval touches 0 or 1 exactly; the subtraction misses by a rounding.
    return (0.0 if share == 0 else middle - half), (1.0 if share == 1 else middle + half)


def mean_at_k(correct: Sequence[int], k: int) -> tuple[float, float, float]:
    """Mean accuracy over k attempts at each problem, and its 95 % interval.

    Attempts at one problem are not independent, so their number may not stand as the number of trials: the interval
    is Wilson's at the effective sample size p(1-p) / v, where v is the variance of the mean over problems (Kish's
    design effect, as Korn and Graubard 1998 use it), bounded by the numbers of problems and of attempts.
    With k = 1 it is the plain Wilson interval.

    Args:
        correct: for each problem, how many of its k attempts were right.
        k: attempts at each problem.

    Returns:
        The mean, and the low and high end, as fractions.
    """
    problems = len(correct)
    shares = [count / k for count in correct]
    mean = math.fsum(shares) / problems
    effective = float(problems)
    if k > 1 and problems > 1 and 0 < mean < 1:
        variance = math.fsum((share - mean) ** 2 for share in shares) / (problems - 1) / problems
        most = float(problems * k)
        effective = most if variance == 0 else min(most, max(problems, mean * (1 - mean) / variance))
    return mean, *wilson_interval(mean * effective, effective)


def pass_at_k(correct: Sequence[int], k: int) -> tuple[float, float, float]:
    """Share of problems with at least one right answer in k attempts, and its 95 % Wilson interval.

    Args:
        correct: for each problem, how many of its k attempts were right.
        k: attempts at each problem (with exactly k drawn, the unbiased estimator of Chen et al. 2021 is this share).
    """
    solved = sum(count > 0 for count in correct)
    return solved / len(correct), *wilson_interval(solved, len(correct))
