"""A callback that notes how long an epoch took, for fit_rate.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from measure import now

# Kernels are compiled and graphs captured in the first steps: the steady rate is counted after them.
WARM = 30


class EpochClock(pl.Callback):
    """Writes seconds and clips of a training epoch to the file that EPOCH_CLOCK names."""

    def __init__(self) -> None:
        self.clips = self.clips_warm = 0
        self.since = self.warm = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.since, self.clips = now(), 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.clips += len(batch["video"]) * trainer.world_size
        if batch_idx + 1 == WARM:
            self.warm, self.clips_warm = now(), self.clips

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        ended = now()
        if not trainer.is_global_zero:
            return
        row = {"epoch_seconds": ended - self.since, "clips": self.clips}
        row["per_second"] = self.clips / row["epoch_seconds"]
        if self.warm:
            row["steady_per_second"] = (self.clips - self.clips_warm) / (ended - self.warm)
        if torch.cuda.is_available():
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        Path(os.environ["EPOCH_CLOCK"]).write_text(json.dumps(row))
