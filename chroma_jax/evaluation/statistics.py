"""Means, shares and their uncertainty. Every draw is seeded: the same numbers give the same intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

DRAWS = 10_000
LEVEL = 0.95
_BLOCK_VALUES = 1 << 22  # drawn at a time


class Estimate(NamedTuple):
    """A mean with its interval, over `n` items."""

    value: float
    low: float
    high: float
    n: int


def mean(values: ArrayLike, seed: int = 0) -> Estimate | None:
    """The mean with a percentile bootstrap interval of 95 % over items; None of no values."""
    values = np.asarray(values, np.float64)
    return ratio(values, np.ones(len(values)), seed)


def ratio(numerators: ArrayLike, denominators: ArrayLike, seed: int = 0) -> Estimate | None:
    """Sum over sum, as a corpus error rate, with items resampled; None of no items.

    Raises ValueError for denominators that are not positive.
    """
    over, under = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if over.shape != under.shape or over.ndim != 1:
        raise ValueError(f"wanted two lists of one length, got {over.shape} and {under.shape}")
    if not len(over):
        return None
    if (under <= 0).any():
        raise ValueError("denominators must be positive")
    rng, n, draws = np.random.default_rng(seed), len(over), []
    for start in range(0, DRAWS, block := max(1, _BLOCK_VALUES // n)):
        picked = rng.integers(0, n, (min(block, DRAWS - start), n))
        draws.append(over[picked].sum(1) / under[picked].sum(1))
    return Estimate(float(over.sum() / under.sum()), *_interval(np.concatenate(draws)), n)


def crossed_mean(
    values: ArrayLike, sessions: Sequence, items: Sequence, seed: int = 0
) -> Estimate | None:
    """A mean of answers with sessions and items both resampled: answers of one listener, or to one item, are not independent."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return None
    rng = np.random.default_rng(seed)
    _, session = np.unique(np.asarray(sessions, object).astype(str), return_inverse=True)
    _, item = np.unique(np.asarray(items, object).astype(str), return_inverse=True)
    draws = []
    many, kinds = session.max() + 1, item.max() + 1
    for start in range(0, DRAWS, block := max(1, _BLOCK_VALUES // len(values))):
        count = min(block, DRAWS - start)
        weight = rng.multinomial(many, np.full(many, 1 / many), count)[:, session]
        weight = weight * rng.multinomial(kinds, np.full(kinds, 1 / kinds), count)[:, item]
        total = weight.sum(1)
        # A draw of sessions that answered none of the drawn items says nothing.
        draws.append((weight @ values)[total > 0] / total[total > 0])
    return Estimate(float(values.mean()), *_interval(np.concatenate(draws)), len(values))


def sign_test(wins: int, losses: int) -> float:
    """The two-sided exact p-value of as many wins against losses, ties left out; 1 where there are neither."""
    if not wins + losses:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
