"""What a network said of every clip, gathered over all processes, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import (
    binary_accuracy,
    binary_auroc,
    binary_average_precision,
    binary_roc,
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_average_precision,
)
from torchmetrics.utilities import dim_zero_cat


@dataclass(frozen=True)
class Predictions:
    """One row a clip, in order of ``index``."""

    index: Tensor  # (K,) int64: last frame of the clip, -1 where the batches did not tell
    probability: Tensor  # (K,) of label 1, or (K, classes)
    label: Tensor  # (K,) int64


class Scores(Metric):
    """Collects probabilities and labels; ``compute`` gives the figures of a task's table.

    Args:
        num_classes: 1 for a yes-or-no question.
    """

    full_state_update = False
    index: list[Tensor]
    probability: list[Tensor]
    label: list[Tensor]

    def __init__(self, num_classes: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        for name in ("index", "probability", "label"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, probability: Tensor, label: Tensor) -> None:
        """Add clips: index (N,), probability (N,) or (N, classes), label (N,)."""
        self.index.append(index)
        self.probability.append(probability.float())
        self.label.append(label)

    def predictions(self) -> Predictions:
        """All clips so far, of all processes once the metric is synchronised, in order of their index."""
        if not len(self.index):  # a list of parts, or one tensor once synchronised
            empty = torch.zeros(0, dtype=torch.int64, device=self.device)
            return Predictions(empty, torch.zeros(0, device=self.device), empty)
        index = dim_zero_cat(self.index)
        order = torch.argsort(index, stable=True)
        return Predictions(index[order], dim_zero_cat(self.probability)[order], dim_zero_cat(self.label)[order])

    def compute(self) -> dict[str, Tensor]:
        """AUROC, average precision, accuracy, and for one class Youden's J with its threshold.

        What is not defined, as AUROC is not where all labels are equal, is left out.
        """
        gathered = self.predictions()
        probability, label = gathered.probability, gathered.label
        if not len(label):
            return {}
        if self.num_classes > 1:
            figures = {"accuracy": multiclass_accuracy(probability, label, self.num_classes, average="micro")}
            if len(label.unique()) == self.num_classes:
                figures["auroc"] = multiclass_auroc(probability, label, self.num_classes)
                figures["average_precision"] = multiclass_average_precision(probability, label, self.num_classes)
            return figures
        figures = {"accuracy": binary_accuracy(probability, label)}
        if label.min() != label.max():
            figures["auroc"] = binary_auroc(probability, label)
            figures["average_precision"] = binary_average_precision(probability, label)
            false_positive, true_positive, thresholds = binary_roc(probability, label)
            best = (true_positive - false_positive).argmax()
            figures["youden_j"] = (true_positive - false_positive)[best]
            figures["youden_threshold"] = thresholds[best]
        return figures
