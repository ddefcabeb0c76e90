"""Several processes agree to stop without waiting for each other in each step; see also tests/test_cli_resume.py."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock, patch

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.callbacks import GracefulStop

# What makes a process, and with it its GPU, wait for the others; DDP's own exchange of gradients is none of these.
_WAITING = ("barrier", "broadcast", "all_gather_object", "broadcast_object_list")


class NoWaiting(pl.Callback):
    """Raises after the steps 2 to 4 if one of them waited for the other process."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        if i == 1:
            # Lightning goes on if its broadcast fails, so the calls are counted.
            self.seen = {name: Mock(wraps=getattr(torch.distributed, name)) for name in _WAITING}
            self.patches = [patch.object(torch.distributed, name, mock) for name, mock in self.seen.items()]
            for each in self.patches:
                each.start()
        if i == 4:
            for each in self.patches:
                each.stop()
            called = [name for name, mock in self.seen.items() if mock.called]
            if called:
                raise RuntimeError(f"a step waits for the other process: {', '.join(called)}")


def fit(*callbacks: pl.Callback) -> None:
    task = ClipClassification(in_channels=2, hidden_channels=[4, 4])
    data = [{"video": torch.rand(2, 3, 2, 8, 8), "label": torch.arange(2)} for _ in range(6)]
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_fork", max_epochs=1, limit_val_batches=0, logger=False,
        log_every_n_steps=1000, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        use_distributed_sampler=False, callbacks=list(callbacks),
    )  # fmt: skip
    trainer.fit(task, loader, loader)


def test_no_step_waits_for_the_other_process() -> None:
    fit(GracefulStop(), NoWaiting())
    with pytest.raises(Exception, match="a step waits for the other process"):  # as Lightning alone does
        fit(NoWaiting())
