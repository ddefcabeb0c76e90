"""Exact random numbers, a clean stop, no NaN in the weights, and what TensorBoard is told."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.callbacks import (
    ClipFigures,
    EpochLine,
    GracefulStop,
    NonFiniteError,
    NonFiniteGuard,
    SignalStop,
    StepSeed,
    StopRequested,
    TrainingMonitor,
)


class Tiny(pl.LightningModule):
    """One linear layer with dropout; ``change`` may spoil the loss of a batch."""

    def __init__(self, change: Callable[[Tensor, int], Tensor] | None = None, fused: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.fused = fused
        self.change = change
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.dropout(self.layer(batch["video"]), 0.5).square().mean()
        self.losses.append(float(loss.detach()))
        return loss if self.change is None else self.change(loss, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1, fused=self.fused)


def data(batches: int = 8) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(0)
    items = [
        {"video": torch.rand(4, 3, generator=rng), "index": torch.arange(4) + 10 * batch} for batch in range(batches)
    ]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return pl.Trainer(callbacks=list(callbacks), **(settings | options))


# -- StepSeed ----------------------------------------------------------------------------------------------------------


def losses_with(seed: int, disturbance: int) -> list[float]:
    torch.manual_seed(1)
    module = Tiny()
    torch.manual_seed(disturbance)
    trainer(StepSeed(seed)).fit(module, data())
    return module.losses


def test_random_numbers_of_a_step_depend_on_the_step_alone() -> None:
    assert losses_with(0, disturbance=5) == losses_with(0, disturbance=6)
    assert losses_with(0, disturbance=5) != losses_with(1, disturbance=5)


def test_processes_and_steps_draw_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    module, runner = Tiny(), trainer()
    drawn = []
    for rank, step in ((0, 0), (1, 0), (0, 1)):
        monkeypatch.setattr(type(runner), "global_rank", rank)
        runner.fit_loop.epoch_loop.batch_progress.total.processed = step  # type: ignore[attr-defined]
        StepSeed(3).on_train_batch_start(runner, module, None, 0)
        drawn.append(float(torch.rand(())))
    assert len(set(drawn)) == 3


# -- NonFiniteGuard ----------------------------------------------------------------------------------------------------


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * float("nan")


def nan_loss(at: int) -> Callable[[Tensor, int], Tensor]:
    return lambda loss, batch: loss * float("nan") if batch == at else loss


def nan_gradient(at: int) -> Callable[[Tensor, int], Tensor]:
    return lambda loss, batch: _NanGradient.apply(loss) if batch >= at else loss  # type: ignore[no-any-return]


@pytest.mark.parametrize("batches", [8, 4], ids=["on its way", "in its last step"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spoil", [nan_loss(3), nan_gradient(3)], ids=["loss", "gradient"])
def test_nan_stops_before_the_weights_change(spoil: Callable[[Tensor, int], Tensor], fused: bool, batches: int) -> None:
    torch.manual_seed(0)
    module, clean = Tiny(spoil, fused), Tiny(fused=fused)
    clean.load_state_dict(module.state_dict())
    trainer(StepSeed(), limit_train_batches=3).fit(clean, data())
    with pytest.raises(
        NonFiniteError, match=r"step 3: the (loss|gradient) is not a finite number.*clips 30, 31, 32, 33"
    ):
        trainer(StepSeed(), NonFiniteGuard(), limit_train_batches=batches).fit(module, data())
    assert torch.equal(module.layer.weight, clean.layer.weight)


def test_without_the_guard_the_weights_would_be_lost() -> None:
    module = Tiny(nan_loss(3))
    trainer().fit(module, data())
    assert not module.layer.weight.isfinite().any()


def test_accumulated_batches_are_named_one_by_one() -> None:
    with pytest.raises(NonFiniteError, match=r"clips 40, 41, 42, 43$"):
        trainer(NonFiniteGuard(), accumulate_grad_batches=4).fit(Tiny(nan_loss(4)), data())


def scaled(*callbacks: pl.Callback) -> pl.Trainer:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    return trainer(*callbacks, plugins=[precision], max_epochs=3)


def test_a_gradient_scaler_may_skip_some_steps_but_not_all() -> None:
    now_and_then = Tiny(lambda loss, batch: _NanGradient.apply(loss) if batch % 4 < 2 else loss)
    scaled(NonFiniteGuard(max_skipped_steps=2)).fit(now_and_then, data())
    assert now_and_then.layer.weight.isfinite().all()
    with pytest.raises(NonFiniteError, match="the gradient is not a finite number 6 times in a row"):
        scaled(NonFiniteGuard(max_skipped_steps=5)).fit(Tiny(nan_gradient(1)), data())


def test_no_checkpoint_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    module = Tiny()
    module.register_buffer("running_mean", torch.tensor([float("inf")]))  # as batch norm after an overflow
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    with pytest.raises(NonFiniteError, match="running_mean is not finite, so no checkpoint is written"):
        trainer(NonFiniteGuard(), saver).fit(module, data())
    assert not list(tmp_path.iterdir())


# -- GracefulStop ------------------------------------------------------------------------------------------------------


class SignalAt(pl.Callback):
    """Sends this process a signal before a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    module, saver = Tiny(), ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    with pytest.raises(StopRequested) as stop:
        trainer(GracefulStop(), SignalAt(number, 3), saver).fit(module, data())
    assert stop.value.code == 128 + number
    assert len(module.losses) == 4
    assert f"stopped by {name}; go on with --ckpt_path" in capsys.readouterr().err
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 4
    assert signal.getsignal(number) == before


def test_a_stop_waits_for_accumulated_gradients(tmp_path: Path) -> None:
    module, saver = Tiny(), ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    with pytest.raises(StopRequested):
        trainer(GracefulStop(), SignalAt(signal.SIGTERM, 0), saver, accumulate_grad_batches=4).fit(module, data())
    assert len(module.losses) == 4
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


class SignalInBatch(pl.Callback):
    """Sends this process a signal in the first batch that is not of training."""

    def _send(self, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _send


@pytest.mark.parametrize("method", ["validate", "test", "predict"])
def test_a_signal_ends_what_is_not_training(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    task = ClipClassification(in_channels=2, hidden_channels=[2])
    with pytest.raises(StopRequested) as stop:
        getattr(trainer(SignalStop(), SignalInBatch()), method)(task, clips(3))
    assert stop.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "stopped by SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    stop = GracefulStop()
    stop._ask(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._ask(signal.SIGINT, None)


# -- what is told ------------------------------------------------------------------------------------------------------


def clips(batches: int) -> DataLoader[Any]:
    rng = torch.Generator().manual_seed(0)
    items = [
        {
            "video": torch.rand(4, 5, 2, 12, 16, generator=rng),
            "label": torch.tensor([0, 1, 0, 1]),
            "index": torch.arange(4) + 4 * batch,
        }
        for batch in range(batches)
    ]
    return DataLoader(items, batch_size=None)  # type: ignore[arg-type]


def test_tensorboard_gets_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = ClipClassification(in_channels=2, hidden_channels=[3, 4], lr=1e-2)
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    runner = trainer(
        TrainingMonitor(), EpochLine(), ClipFigures(n_clips=3), logger=logger, max_epochs=2, log_every_n_steps=2
    )
    runner.fit(task, clips(4), clips(5))
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "scalars": 0}).Reload()
    scalars, images = set(events.Tags()["scalars"]), set(events.Tags()["images"])
    assert {"train/loss", "train/lr", "train/gradient_norm", "train/clips_per_second"} <= scalars
    assert {"val/loss", "val/auroc", "val/average_precision", "val/accuracy", "val/youden_j"} <= scalars
    assert {"val/roc", "val/precision_recall", "val/clip_0", "val/clip_1", "val/clip_2"} <= images
    assert {f"gates/{name}" for name in "hcifgo"} <= images
    assert [e.step for e in events.Images("val/roc")] == [4, 8]
    assert events.Images("val/clip_0")[0].encoded_image_string.startswith(b"GIF89a")
    assert all(e.value > 0 for e in events.Scalars("train/gradient_norm"))
    assert events.Scalars("train/lr")[0].value == pytest.approx(1e-2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 2
    assert lines[1].startswith("epoch 2/2  train/loss 0.")
    assert "val/auroc" in lines[1]


def test_one_class_alone_has_no_curves(tmp_path: Path) -> None:
    task = ClipClassification(in_channels=2, hidden_channels=[3])
    logger = TensorBoardLogger(tmp_path, name="", version="run", default_hp_metric=False)
    loader = clips(2)
    for batch in loader.dataset:
        batch["label"].zero_()
    trainer(ClipFigures(), logger=logger, log_every_n_steps=1).fit(task, clips(1), loader)
    images = set(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["images"])
    assert "val/roc" not in images
    assert "val/clip_0" in images
