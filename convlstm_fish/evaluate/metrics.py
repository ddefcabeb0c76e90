"""Scores against labels at every threshold: the numbers of one row of the evaluation table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_roc

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold that maximises something, and what it gives.

    A frame is called positive where its score is at least ``threshold``; ``inf`` calls none positive.
    """

    threshold: float
    value: float
    tpr: float
    fpr: float


@dataclass(frozen=True)
class Curve:
    """True and false positives at every distinct threshold, from the strictest (``inf``) to the laxest."""

    thresholds: Floats
    true_positives: Floats
    false_positives: Floats
    positives: int
    negatives: int

    @property
    def tpr(self) -> Floats:
        """True positive rate (recall, sensitivity) at each threshold."""
        return self.true_positives / self.positives

    @property
    def fpr(self) -> Floats:
        """False positive rate (1 - specificity) at each threshold."""
        return self.false_positives / self.negatives

    @property
    def precision(self) -> Floats:
        """Precision at each threshold; 1 where nothing is called positive, as the curve's usual end."""
        called = self.true_positives + self.false_positives
        return np.divide(self.true_positives, called, out=np.ones_like(called), where=called > 0)

    @property
    def accuracy(self) -> Floats:
        """Share of frames called rightly at each threshold."""
        right = self.true_positives + self.negatives - self.false_positives
        return right / (self.positives + self.negatives)

    @property
    def youden_j(self) -> Floats:
        """Youden's J = TPR - FPR at each threshold."""
        return self.tpr - self.fpr

    def best(self, what: Floats) -> OperatingPoint:
        """The strictest threshold at which ``what``, one value per threshold, is largest."""
        i = int(np.argmax(what))
        return OperatingPoint(
            threshold=float(self.thresholds[i]),
            value=float(what[i]),
            tpr=float(self.tpr[i]),
            fpr=float(self.fpr[i]),
        )


@dataclass(frozen=True)
class Metrics:
    """Threshold-free and best-threshold figures of one scorer on one set of frames.

    The two best thresholds are chosen on the very frames they are reported for, as in the published
    experiment; they are upper bounds of what a threshold fixed beforehand would reach.
    """

    auc: float
    average_precision: float
    best_accuracy: OperatingPoint
    best_j: OperatingPoint
    curve: Curve


def dense_ranks(scores: Floats) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Distinct scores in ascending order, and each score's position among them."""
    distinct, ranks = np.unique(scores, return_inverse=True)
    return distinct, ranks.astype(np.int64)


def compute_metrics(scores: Floats, positive: Bools) -> Metrics:
    """AUC, average precision and both best operating points of ``scores`` (K,) against ``positive`` (K,).

    Both classes must occur. torchmetrics squashes anything outside [0, 1] through a sigmoid and would
    merge frame differences of 1e-3 into ties, so it is given the scores' ranks, which carry the same order.
    """
    distinct, ranks = dense_ranks(scores)
    predictions = torch.from_numpy(ranks / len(distinct))
    target = torch.from_numpy(positive.astype(np.int64))
    fpr, tpr, rank_thresholds = binary_roc(predictions, target)
    positives = int(positive.sum())
    negatives = len(positive) - positives
    # torchmetrics puts one more threshold in front, above every score, at which nothing is positive.
    indices = np.rint(rank_thresholds[1:].numpy() * len(distinct)).astype(np.int64)
    curve = Curve(
        thresholds=np.concatenate(([np.inf], distinct[indices])),
        # Its rates are float32; the counts they stand for are whole numbers.
        true_positives=np.rint(tpr.numpy().astype(np.float64) * positives),
        false_positives=np.rint(fpr.numpy().astype(np.float64) * negatives),
        positives=positives,
        negatives=negatives,
    )
    return Metrics(
        auc=float(binary_auroc(predictions, target)),
        average_precision=float(binary_average_precision(predictions, target)),
        best_accuracy=curve.best(curve.accuracy),
        best_j=curve.best(curve.youden_j),
        curve=curve,
    )


def rank_auc(scores: Floats, positive: Bools) -> Floats:
    """AUC of one series of scores against many labellings at once.

    The Mann-Whitney form, ties counting half: AUC = (sum of the positives' mid-ranks - P(P+1)/2) / (P N).

    Args:
        scores: (K,).
        positive: (H, K), one labelling a row.

    Returns:
        (H,), NaN where a labelling holds one class only.
    """
    _, ranks = dense_ranks(scores)
    counts = np.bincount(ranks)
    mid_ranks = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    n_positive = positive.sum(axis=1, dtype=np.float64)
    pairs = n_positive * (positive.shape[1] - n_positive)
    wins = positive @ mid_ranks - n_positive * (n_positive + 1) / 2
    return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
