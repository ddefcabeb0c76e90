"""Confidence intervals that respect time: resampling of whole blocks of neighbouring frames."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convlstm_fish.evaluate.metrics import Bools, Floats
from convlstm_fish.progress import progress

MIN_BLOCKS = 5
# Weights drawn at a time: small enough for the processor's caches.
_CHUNK_ELEMENTS = 500_000
# From this many on the resampling takes seconds and shows a progress bar.
_MANY_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class Interval:
    """A percentile confidence interval."""

    low: float
    high: float


def block_weights(
    frames: npt.NDArray[np.int64], block_frames: int, resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """How often each scored frame occurs in each resample of a circular moving-block bootstrap.

    Blocks of ``block_frames`` consecutive frames are drawn with replacement, anywhere on the span of
    ``frames`` closed to a circle, until they are as long as the span (Politis and Romano 1992).

    Args:
        frames: (K,) ascending frame indices; gaps are kept as gaps.
        block_frames: length of a block, at most the span.
        resamples: number of resamples R.
        rng: where the draws come from.

    Returns:
        (R, K) whole-number weights.
    """
    span = int(frames[-1] - frames[0]) + 1
    n_blocks = -(-span // block_frames)
    starts = rng.integers(0, span, size=(resamples, n_blocks)) + span * np.arange(resamples)[:, None]
    started = np.bincount(starts.ravel(), minlength=resamples * span).reshape(resamples, span)
    # A frame is covered by the blocks that started on it or on one of the block_frames - 1 before it.
    wrapped = np.concatenate((started[:, span - block_frames + 1 :], started), axis=1)
    total = np.concatenate((np.zeros((resamples, 1), np.int64), np.cumsum(wrapped, axis=1)), axis=1)
    covered = total[:, block_frames:] - total[:, :-block_frames]
    return covered[:, frames - frames[0]].astype(np.int32)


class _Sorted:
    """One scorer's frames in order of score, so that each resample needs no sorting.

    Args:
        scores: (K,).
        positive: (K,).
    """

    def __init__(self, scores: Floats, positive: Bools) -> None:
        self.positive_at = np.flatnonzero(positive)
        negative_at = np.flatnonzero(~positive)
        self.negative_at = negative_at[np.argsort(scores[negative_at], kind="stable")]
        ascending = scores[self.negative_at]
        self.below = np.searchsorted(ascending, scores[self.positive_at], side="left")
        self.not_above = np.searchsorted(ascending, scores[self.positive_at], side="right")

    def auc(self, weights: npt.NDArray[np.int32]) -> Floats:
        """AUC under each row of ``weights`` (R, K), ties counting half; NaN where a class is absent."""
        beaten = np.zeros((len(weights), len(self.negative_at) + 1))
        np.cumsum(weights[:, self.negative_at], axis=1, out=beaten[:, 1:])
        positive_weight = weights[:, self.positive_at].astype(np.float64)
        wins = np.einsum("rk,rk->r", positive_weight, beaten[:, self.below] + beaten[:, self.not_above]) / 2
        pairs = positive_weight.sum(axis=1) * beaten[:, -1]
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def bootstrap_auc(
    frames: npt.NDArray[np.int64],
    scores: list[Floats],
    positive: Bools,
    *,
    block_frames: int,
    resamples: int,
    seed: int,
) -> Floats:
    """AUC of every scorer in every resample; one resample means the same frames for all of them.

    Args:
        frames: (K,) ascending frame indices.
        scores: S arrays (K,).
        positive: (K,).
        block_frames: length of a block in frames.
        resamples: number of resamples R.
        seed: same seed, same resamples.

    Returns:
        (S, R), NaN where a resample drew one class only. Differences of two rows are paired.
    """
    rng = np.random.default_rng(seed)
    span = int(frames[-1] - frames[0]) + 1
    chunk = max(1, _CHUNK_ELEMENTS // span)
    ordered = [_Sorted(s, positive) for s in scores]
    parts = []
    with progress() if resamples * span > _MANY_ELEMENTS else nullcontext() as bar:
        firsts = range(0, resamples, chunk)
        for first in bar.track(firsts, description="Resampling for the intervals") if bar else firsts:
            weights = block_weights(frames, block_frames, min(chunk, resamples - first), rng)
            parts.append(np.stack([one.auc(weights) for one in ordered]))
    return np.concatenate(parts, axis=1)


def percentile_interval(values: Floats, confidence: float) -> Interval | None:
    """The central ``confidence`` of the finite values; None where fewer than half of them are finite."""
    finite = values[np.isfinite(values)]
    if 2 * len(finite) < len(values) or not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
