"""The bar shows the training loss, a step late, and no step of training waits for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from torch.utils.data import DataLoader

from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.callbacks import CudaGraphs, LateProgressBar, NonFiniteGuard, StepSeed, TrainingMonitor


def fit(device: str, batches: int, *callbacks: pl.Callback) -> None:
    pl.seed_everything(4, verbose=False)
    task = ClipClassification(in_channels=2, hidden_channels=[8, 16], lr=1e-3)
    data = [
        {
            "video": torch.rand(4, 5, 2, 20, 24, device=device),
            "label": torch.arange(4, device=device) % 2,
            "index": torch.arange(4, device=device) + 4 * k,
        }
        for k in range(batches)
    ]
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=1, limit_val_batches=0, logger=False,
        log_every_n_steps=1000, enable_checkpointing=False, enable_model_summary=False, callbacks=list(callbacks),
    )  # fmt: skip
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(task, loader, loader)


class Look(pl.Callback):
    """Notes each step's loss, and what the bar shows after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.shown: list[Any] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        bar: Any = trainer.progress_bar_callback
        self.losses.append(float(outputs["loss"]))
        self.shown.append(bar.get_metrics(trainer, pl_module).get("train/loss"))


def test_the_bar_shows_the_loss_of_the_step_before() -> None:
    look = Look()
    fit("cpu", 5, LateProgressBar(refresh_rate=1), look)
    assert look.shown == [None, *look.losses[:-1]]
    assert len(set(look.losses)) == 5


def test_a_bar_of_lightnings_own_shows_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    fit("cpu", 3, TQDMProgressBar())
    assert "train/loss=" in capsys.readouterr().out


class Strict(pl.Callback):
    """In the steps 10 to 18 whatever waits for the GPU is an error; at the end of an epoch it may wait."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, i: int) -> None:
        if i == 10:
            torch.cuda.set_sync_debug_mode("error")
        if i == 19:
            torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        torch.cuda.set_sync_debug_mode("default")


def fit_strictly(bar: pl.Callback) -> None:
    fit("cuda", 20, Strict(), StepSeed(), NonFiniteGuard(), TrainingMonitor(), CudaGraphs(), bar)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")  # torch says so of its own tool
def test_no_step_waits_for_the_gpu() -> None:
    fit_strictly(LateProgressBar())
    with pytest.raises(RuntimeError, match="synchronizing"):  # with Lightning's own bar each step does
        fit_strictly(TQDMProgressBar())
