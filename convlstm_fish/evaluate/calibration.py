"""Whether a probability of 0.3 comes true three times in ten."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from convlstm_fish.evaluate.metrics import Bools, Floats

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """Reliability of probabilities in equal bins of [0, 1]; empty bins are left out.

    Attributes:
        lower: lower edge of each bin that holds frames.
        count: frames in it.
        predicted: their mean probability.
        observed: their share of label 1.
        ece: expected calibration error, sum of count/K * |predicted - observed| (Naeini et al. 2015).
        brier: Brier score, the mean of (probability - label)^2.
        brier_skill: 1 - brier / brier of always forecasting the base rate; None where that is 0.
    """

    lower: tuple[float, ...]
    count: tuple[int, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    ece: float
    brier: float
    brier_skill: float | None


def calibrate(probabilities: Floats, positive: Bools, bins: int = BINS) -> Calibration:
    """Reliability table, ECE and Brier score of ``probabilities`` (K,) in [0, 1] against ``positive`` (K,)."""
    at = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    count = np.bincount(at, minlength=bins)
    held = count > 0
    predicted = np.bincount(at, weights=probabilities, minlength=bins)[held] / count[held]
    observed = np.bincount(at, weights=positive, minlength=bins)[held] / count[held]
    brier = float(np.mean((probabilities - positive) ** 2))
    base = float(positive.mean())
    return Calibration(
        lower=tuple((np.flatnonzero(held) / bins).tolist()),
        count=tuple(count[held].tolist()),
        predicted=tuple(predicted.tolist()),
        observed=tuple(observed.tolist()),
        ece=float(np.sum(count[held] * np.abs(predicted - observed)) / len(probabilities)),
        brier=brier,
        brier_skill=None if base in (0.0, 1.0) else 1 - brier / (base * (1 - base)),
    )
