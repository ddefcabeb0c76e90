"""The metrics of every predicted frame, gathered over all processes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from convlstm_fish.evaluate.frame_metrics import METRICS, FrameReport, copy_last, frame_metrics, metric_dtype


class FrameScores(Metric):
    """The metrics of every frame of every sequence, for the prediction and for the copy of the last frame."""

    full_state_update = False
    index: list[Tensor]
    model: list[Tensor]
    baseline: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("index", "model", "baseline"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, index: Tensor, prediction: Tensor, video: Tensor, future: Tensor) -> None:
        """Add sequences: index (N,), prediction and future (N, T', C, H, W), video (N, T, C, H, W); N may be 0."""
        steps = future.shape[1]
        self.index.append(index)
        for scores, frames in ((self.model, prediction), (self.baseline, copy_last(video, steps))):
            if len(index):
                scores.append(torch.stack(list(frame_metrics(frames, future).values()), dim=-1))
            else:
                none = torch.empty(0, steps, len(METRICS), dtype=metric_dtype(index.device), device=index.device)
                scores.append(none)

    def compute(self) -> dict[str, Tensor]:
        """All sequences so far, of all processes once synchronised: (N,), (N, T', metrics) and the same again."""
        return {name: dim_zero_cat(getattr(self, name)) for name in ("index", "model", "baseline") if len(self.index)}

    def report(self) -> FrameReport | None:
        """All sequences of all processes in order of their index; None without any."""
        parts = {name: value.cpu().numpy() for name, value in self.compute().items()}
        if not parts or not parts["index"].size:
            return None
        index = parts["index"].reshape(-1)  # torchmetrics makes a scalar of a single one
        order = np.argsort(index, kind="stable")
        named = [
            {name: parts[who][order, :, k].astype(np.float64) for k, name in enumerate(METRICS)}
            for who in ("model", "baseline")
        ]
        return FrameReport(index[order], *named)
