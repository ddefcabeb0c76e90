"""Train and score a network that predicts the next frames of a video."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torchmetrics import MeanMetric

from convlstm_fish.errors import UserError, require
from convlstm_fish.evaluate.frame_metrics import METRICS, FrameReport, ssim
from convlstm_fish.files import write_text
from convlstm_fish.models import EncoderForecaster, FramePredictor, StackedPredictor
from convlstm_fish.models.frame_network import FrameNetwork
from convlstm_fish.tasks.base import Batch, Task, schedule_factor, valid_and_index
from convlstm_fish.tasks.frame_scores import FrameScores

ARCHITECTURES: dict[str, Callable[..., FrameNetwork]] = {
    "encoder_decoder": FramePredictor,
    "encoder_forecaster": EncoderForecaster,
    "stacked": StackedPredictor,
}
LOSSES = ("mse", "bce", "l1_ssim")
SHOWN = 4
"""Predicted sequences that are kept to be looked at."""


class OneCycle(OneCycleLR):
    """OneCycleLR of which a checkpoint restores the position only: in a longer run the cycle is longer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the position and set the learning rate that this run has there."""
        self._step_count, self.last_epoch = state_dict["_step_count"], state_dict["last_epoch"] - 1
        self.step()


class FramePrediction(Task):
    """Predict the frames that follow, with one of three networks of ConvLSTMs.

    Batches: ``video`` (N, T, C, H, W) and ``future`` (N, T', C, H, W) in [0, 1]; optional ``index`` (N,) and ``valid``
    (N,), False for padding that counts nowhere. To predict, ``future_frames``, a number, does instead of ``future``.

    Validation and test report the metrics of `convlstm_fish.evaluate.frame_metrics`; ``test`` prints them by frame
    beside those of the copy of the last frame, and writes ``frame_metrics.json`` and ``frame_metrics.csv`` (a line per
    sequence) into the log folder.

    Args:
        architecture: "encoder_decoder" (`FramePredictor`), "encoder_forecaster" (Shi's) or "stacked" (OpenSTL's).
        in_channels: channels of a frame.
        hidden_channels: width of each layer; None for the architecture's published ones, as for the next four.
        kernel_size: of the ConvLSTM convolutions.
        patch_size: frames are cut into patches of this side first.
        bias: whether the ConvLSTMs have biases.
        output_activation: "sigmoid" or "identity".
        peephole: None, "channel", or the size [H, W] of the frames after patching for weights per pixel.
        recurrent_activation, backend: as in ConvLSTM.
        feedback: with "encoder_forecaster", feed each predicted frame to the next step.
        loss: "mse", "bce" (cross-entropy per pixel; needs the sigmoid) or "l1_ssim".
        ssim_weight: share of 1 - SSIM in "l1_ssim", the rest is the mean absolute error (Zhao et al. 2017,
            arXiv:1511.08861, with single-scale SSIM).
        loss_on_context: with "stacked", the loss also counts predictions of the frames that are given.
        sampling_start: scheduled sampling where frames are fed back: probability in training, at first, that a true
            frame is fed instead of a predicted one; 0 for none.
        sampling_steps: the probability falls linearly to 0 over so many optimizer steps.
        optimizer: "adam", or "rmsprop" as in Shi et al. 2015, whose decay is betas[1].
        lr, betas, eps, weight_decay, warmup_steps: see :class:`~convlstm_fish.tasks.base.Task`.
        lr_schedule: as there, or "openstl": torch's OneCycleLR with its defaults (30 % of the run up from lr / 25,
            the rest down to lr / 250,000, Adam's first beta between 0.85 and 0.95).

    Attributes:
        report: after ``validate`` or ``test``, the metrics of every frame of every sequence, of all processes.

    Raises:
        UserError: for a hyper-parameter that makes no sense.
    """

    teacher_rate: Tensor

    def __init__(
        self,
        architecture: str = "encoder_decoder",
        in_channels: int = 1,
        hidden_channels: int | list[int] | None = None,
        kernel_size: int | None = None,
        patch_size: int | None = None,
        bias: bool | None = None,
        output_activation: str | None = None,
        peephole: str | list[int] | None = None,
        recurrent_activation: str = "sigmoid",
        backend: str = "auto",
        feedback: bool = False,
        loss: str = "mse",
        ssim_weight: float = 0.84,
        loss_on_context: bool = False,
        sampling_start: float = 0.0,
        sampling_steps: int = 50_000,
        optimizer: str = "adam",
        lr: float = 1e-4,
        betas: list[float] = [0.9, 0.98],  # noqa: B006 (never changed; jsonargparse shows it in --help)
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        openstl = lr_schedule == "openstl"
        super().__init__(lr, betas, eps, weight_decay, "constant" if openstl else lr_schedule, warmup_steps)
        self.save_hyperparameters()
        for name, value, known in (
            ("architecture", architecture, tuple(ARCHITECTURES)),
            ("loss", loss, LOSSES),
            ("optimizer", optimizer, ("adam", "rmsprop")),
        ):
            require(name, value, value in known, f"one of {', '.join(known)}")
        for name, number in (("ssim_weight", ssim_weight), ("sampling_start", sampling_start)):
            require(name, number, 0 <= number <= 1, "a number from 0 to 1")
        require("sampling_steps", sampling_steps, sampling_steps >= 1, "1 or more")
        if openstl and (optimizer != "adam" or warmup_steps):
            raise UserError("lr_schedule: openstl has its own rise and needs optimizer adam and warmup_steps 0")
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()
        self.report: FrameReport | None = None

    # -- set-up ----------------------------------------------------------------------------------------------------

    def configure_models(self) -> None:
        """Build the network from the hyper-parameters."""
        h = self.hparams
        options = {
            name: h[name]
            for name in ("hidden_channels", "kernel_size", "patch_size", "bias", "output_activation")
            if h[name] is not None
        }
        if h["architecture"] == "encoder_forecaster":
            options["feedback"] = h["feedback"]
        elif h["feedback"]:
            raise UserError(f"feedback: architecture {h['architecture']} has no such choice")
        if h["architecture"] != "encoder_decoder" and isinstance(h["hidden_channels"], int):
            options["hidden_channels"] = [h["hidden_channels"]]
        try:
            self.network = ARCHITECTURES[h["architecture"]](
                in_channels=h["in_channels"],
                peephole=h["peephole"],
                recurrent_activation=h["recurrent_activation"],
                backend=h["backend"],
                **options,
            )
        except ValueError as error:
            raise UserError(f"model: {error}") from error

    def configure_losses(self) -> None:
        """Check that loss and network fit, and keep the sampling probability where the network is."""
        h = self.hparams
        if h["loss"] == "bce" and self.network.output_activation != "sigmoid":
            raise UserError("loss: bce needs output_activation sigmoid")
        if h["loss_on_context"] and not self.network.predicts_context:
            raise UserError(f"loss_on_context: architecture {h['architecture']} does not predict the given frames")
        if h["sampling_start"] and not self.network.feeds_frames_back:
            raise UserError("sampling_start: this network is fed no frames that a true one could replace")
        # A tensor that is filled, not a number, so that a captured CUDA graph sees it change.
        self.register_buffer("teacher_rate", torch.zeros(()), persistent=False)

    def configure_metrics(self) -> None:
        """Scores and mean loss of validation and test."""
        self.val_scores, self.test_scores = FrameScores(), FrameScores()
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def configure_optimizers(self) -> Any:
        """Adam or RMSProp with the task's hyper-parameters, and the schedule."""
        h = self.hparams
        if h["optimizer"] == "adam" and h["lr_schedule"] != "openstl":
            return super().configure_optimizers()
        total = int(self.trainer.estimated_stepping_batches) if h["lr_schedule"] != "constant" else 0
        if h["optimizer"] == "rmsprop":
            optimizer: torch.optim.Optimizer = torch.optim.RMSprop(
                self.parameters(), lr=h["lr"], alpha=h["betas"][1], eps=h["eps"], weight_decay=h["weight_decay"]
            )
            factor = schedule_factor(h["lr_schedule"], h["warmup_steps"], total)
            scheduler: Any = LambdaLR(optimizer, factor)
        else:
            optimizer = self.adam(torch.optim.Adam)
            scheduler = OneCycle(optimizer, h["lr"], total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -- parts of a step -------------------------------------------------------------------------------------------

    def forward(self, video: Tensor, steps: int = 10) -> Tensor:
        """The next ``steps`` frames (N, steps, C, H, W) of videos (N, T, C, H, W), not clipped."""
        frames: Tensor = self.network.to_frames(self.network(video, steps))
        return frames

    def loss(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Loss of each sequence (N,), in float32, from logits (N, T', C, H, W)."""
        logits, truth = logits.float(), truth.float()
        if self.hparams["loss"] == "bce":
            return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").flatten(1).mean(1)
        frames = self.network.to_frames(logits)
        if self.hparams["loss"] == "mse":
            return (frames - truth).square().flatten(1).mean(1)
        weight = self.hparams["ssim_weight"]
        with torch.autocast(frames.device.type, enabled=False):
            similarity = ssim(frames, truth).mean(1)
        return weight * (1 - similarity) + (1 - weight) * (frames - truth).abs().flatten(1).mean(1)

    def sampling_rate(self, step: int) -> float:
        """Probability at an optimizer step, counted from 0, that a true frame is fed in place of a predicted one."""
        h = self.hparams
        return max(0.0, h["sampling_start"] * (1 - (step + 1) / h["sampling_steps"]))

    def _training_logits(self, video: Tensor, future: Tensor) -> Tensor:
        steps = future.shape[1]
        options: dict[str, Any] = {}
        if self.hparams["sampling_start"]:
            draws = torch.rand(len(video), steps - 1, device=video.device)
            options = {"future": future, "teacher": draws < self.teacher_rate}
        if self.hparams["loss_on_context"]:
            options["with_context"] = True
        logits: Tensor = self.network(video, steps, **options)
        return logits

    def _score(self, batch: Batch, scores: FrameScores, mean_loss: MeanMetric) -> None:
        valid, index = valid_and_index(batch)
        logits = self.network(batch["video"], batch["future"].shape[1])[valid]
        video, future = batch["video"][valid], batch["future"][valid]
        if len(index):
            mean_loss.update(self.loss(logits, future))
        scores.update(index, self.network.to_frames(logits.float()), video, future)

    def _report(self, stage: str, scores: FrameScores, mean_loss: MeanMetric) -> None:
        self.log(f"{stage}/loss", mean_loss, prog_bar=stage == "val")
        self.report = scores.report()
        scores.reset()
        if self.report is not None:
            parts = {"": self.report.model, "copy_last_": self.report.baseline}
            for prefix, values in parts.items():
                for name in METRICS if stage == "test" else ("mse", "mae", "ssim", "psnr"):
                    # The report is the same in all processes: the mean of its values is their value.
                    self.log(f"{stage}/{prefix}{name}", float(values[name].mean()), sync_dist=True)

    # -- steps -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the probability of scheduled sampling."""
        if self.hparams["sampling_start"]:
            self.teacher_rate.fill_(self.sampling_rate(self.trainer.global_step))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of the batch."""
        video, future = batch["video"], batch["future"]
        truth = torch.cat([video[:, 1:], future], dim=1) if self.hparams["loss_on_context"] else future
        total = self.loss(self._training_logits(video, future), truth).mean()
        self._log_loss(total)
        return total

    def on_test_epoch_end(self) -> None:
        """Report the test: log, print the table, write the files."""
        super().on_test_epoch_end()
        report = self.report
        folder = self.trainer.log_dir  # asked by every process, for they agree on it
        if report is None or not self.trainer.is_global_zero:
            return
        rich.print(report.table())
        if folder is not None and self.trainer.loggers:
            write_text(Path(folder) / "frame_metrics.json", json.dumps(report.to_json(), indent=2) + "\n")
            write_text(Path(folder) / "frame_metrics.csv", report.to_csv())

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``index`` and ``frames``, uint8 (N, T', C, H, W), of the sequences that are no padding.

        The first batch also has ``given``, uint8 (n, T, C, H, W), the frames before its first few, to be shown.
        """
        valid, index = valid_and_index(batch)
        frames = self(batch["video"], batch["future"].shape[1] if "future" in batch else batch["future_frames"])
        said = {"index": index, "frames": _pixels(frames[valid])}
        return said if batch_idx else {**said, "given": _pixels(batch["video"][valid][:SHOWN])}


def _pixels(frames: Tensor) -> Tensor:
    """Numbers from 0 to 1 as uint8."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8)
