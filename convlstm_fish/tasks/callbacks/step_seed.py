"""StepSeed: dropout and every other random number of a step depend on (seed, process, step) alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch


class StepSeed(pl.Callback):
    """Reseeds torch before each training step, so that a resumed run draws what the uninterrupted one would have.

    It also makes processes differ: ``seed_everything`` gives all of them one stream. Lightning saves no random state.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed from the number of batches that the run has finished."""
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        sequence = np.random.SeedSequence([self.seed, trainer.global_rank, total.processed])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))
