"""FrameGrids: what a frame predictor sees, predicts and gets wrong, in TensorBoard."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from convlstm_fish.errors import require
from convlstm_fish.tasks.callbacks.video_summary import add_video

GAP = 2  # dark pixels between the frames of a grid


def frame_grid(video: Tensor, prediction: Tensor, truth: Tensor) -> Tensor:
    """One picture of a sequence: the input with the prediction, the input with the truth, the squared error.

    Args:
        video: (T, C, H, W), C 1 or 3.
        prediction, truth: (T', C, H, W).

    Returns:
        (C, 3 rows, T + T' columns of frames) in [0, 1].
    """
    blank = torch.zeros_like(video)
    rows = ([video, prediction.clamp(0, 1)], [video, truth], [blank, (prediction - truth).square().clamp(0, 1)])
    framed = [torch.nn.functional.pad(torch.cat(row), (0, GAP, 0, GAP), value=0.25) for row in rows]
    return torch.cat([torch.cat(list(row), dim=2) for row in framed], dim=1)


def frame_video(video: Tensor, prediction: Tensor, truth: Tensor) -> Tensor:
    """The same as a video: the three rows side by side, (T + T', C, H, 3 columns of frames)."""
    grid = frame_grid(video, prediction, truth)
    cells = grid.unflatten(2, (len(video) + len(truth), -1)).unflatten(1, (3, -1))  # (C, 3, H, T + T', W)
    return cells.permute(3, 0, 2, 1, 4).flatten(3)


class FrameGrids(pl.Callback):
    """Every so many steps, writes the first sequences of the training batch to TensorBoard as a grid and as a video.

    Args:
        every_n_steps: optimizer steps between two pictures; the first is taken before the first step.
        sequences: how many of the batch.
        fps: of the video.
    """

    def __init__(self, every_n_steps: int = 250, sequences: int = 1, fps: float = 4.0) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("sequences", sequences), ("fps", fps)):
            require(name, value, value > 0, "above 0")
        self.every_n_steps, self.sequences, self.fps = every_n_steps, sequences, fps
        self._last = -1

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Predict once more, without gradients, and draw."""
        step = trainer.global_step
        due = step % self.every_n_steps == 0 and step != self._last  # a step may have several batches
        if not (due and trainer.is_global_zero):
            return
        self._last = step
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        video, future = batch["video"][: self.sequences], batch["future"][: self.sequences]
        if not loggers:
            return
        training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            predicted = pl_module(video, future.shape[1])
        pl_module.train(training)
        for k in range(len(video)):
            parts = [_showable(part[k]) for part in (video, predicted, future)]
            grid, animation = frame_grid(*parts), frame_video(*parts)
            pixels = (animation * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
            for logger in loggers:
                logger.experiment.add_image(f"frames/{k}_input_prediction_truth_error", grid, step)
                tag = f"frames_video/{k}_prediction_truth_error"
                add_video(logger.experiment, tag, pixels[..., 0] if pixels.shape[3] == 1 else pixels, step, self.fps)


def _showable(frames: Tensor) -> Tensor:
    """(T, C, H, W) in float32 with one channel or three: any other number becomes its mean."""
    frames = frames.float()
    return frames if frames.shape[1] in (1, 3) else frames.mean(1, keepdim=True)
