"""ClipFigures: curves, clips, states and gates of a clip classifier, as TensorBoard shows them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchmetrics.classification import BinaryPrecisionRecallCurve, BinaryROC
from torchvision.utils import make_grid

from convlstm_fish.errors import UserError
from convlstm_fish.tasks.callbacks.video_summary import add_video

_MOST_FRAMES = 60
_CAPTION_ROWS = 14
_LEAST_WIDTH = 160  # of a shown clip, so that its caption fits
_SYMMETRIC = ("h", "c", "g")  # from -1 to 1; the other gates are from 0 to 1


class ClipFigures(pl.Callback):
    """After each validation: ROC and precision-recall curves, some clips with their probabilities, a clip's gates.

    The clips are spread evenly over the validation; they are the same ones each time.

    Args:
        n_clips: how many clips are shown.
        every_n_validations: how often.
    """

    def __init__(self, n_clips: int = 4, every_n_validations: int = 1) -> None:
        if n_clips < 1 or every_n_validations < 1:
            raise UserError(f"n_clips and every_n_validations must be 1 or more, got {n_clips}, {every_n_validations}")
        self.n_clips, self.every_n_validations = n_clips, every_n_validations
        self._validations = 0
        self._clips: dict[int, Tensor] = {}  # last frame of the clip -> the clip

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first clip of some batches."""
        if not trainer.is_global_zero or "index" not in batch or trainer.sanity_checking:
            return
        batches = int(trainer.num_val_batches[0])
        chosen = {round(n * (batches - 1) / max(1, self.n_clips - 1)) for n in range(self.n_clips)}
        if batch_idx in chosen:
            self._clips[int(batch["index"][0])] = batch["video"][0].detach()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draw."""
        clips, self._clips = self._clips, {}
        writer = next((g.experiment for g in trainer.loggers if isinstance(g, TensorBoardLogger)), None)
        if writer is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations == 0:
            step = trainer.global_step
            said = pl_module.predictions
            if said["probability"].ndim == 1:
                _curves(writer, said, step)
            for number, (index, video) in enumerate(clips.items()):
                _clip(writer, number, index, video, said, step)
            if clips:
                _gates(writer, pl_module, next(iter(clips.values())), step)


def _curves(writer: SummaryWriter, said: dict[str, Any], step: int) -> None:
    label = torch.as_tensor(said["label"])
    if not len(label) or label.min() == label.max():
        return  # with one class there is no curve
    # They see the clips of every process already, and only the first process draws: it must not wait for the others.
    alone: dict[str, Any] = {"sync_on_compute": False}
    curves = {"val/roc": BinaryROC(**alone), "val/precision_recall": BinaryPrecisionRecallCurve(**alone)}
    for tag, metric in curves.items():
        metric.update(torch.as_tensor(said["probability"]), label)
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.add_subplot()
        metric.plot(score=True, ax=axes)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        writer.add_figure(tag, figure, step, close=False)


def _clip(writer: SummaryWriter, number: int, index: int, video: Tensor, said: dict[str, Any], step: int) -> None:
    row = int(np.searchsorted(said["index"], index))
    probability = np.atleast_1d(said["probability"][row])
    told = " ".join(f"{p:.2f}" for p in probability)
    frames = video.float().flatten(0, 1)  # time-channels are consecutive frames
    frames = frames[:: -(-len(frames) // _MOST_FRAMES)]
    pixels = (frames.clamp(0, 1) * 255).byte().cpu().numpy()
    caption = f"{index}: p {told}, label {int(said['label'][row])}"
    add_video(writer, f"val/clip_{number}", np.stack([_captioned(frame, caption) for frame in pixels]), step, fps=15)


def _captioned(frame: np.ndarray, caption: str) -> np.ndarray:
    scale = max(1, -(-_LEAST_WIDTH // frame.shape[1]))
    large = Image.fromarray(frame.repeat(scale, 0).repeat(scale, 1))
    framed = Image.new("L", (large.width, large.height + _CAPTION_ROWS))
    framed.paste(large, (0, _CAPTION_ROWS))
    ImageDraw.Draw(framed).text((2, 1), caption, fill=255)
    return np.asarray(framed)


def _gates(writer: SummaryWriter, pl_module: Any, video: Tensor, step: int) -> None:
    was_training = pl_module.training
    pl_module.eval()
    for name, value in pl_module.network.gates(video[None]).items():
        maps = value[0].float().cpu()
        maps = (maps + 1) / 2 if name in _SYMMETRIC else maps
        side = int(np.ceil(np.sqrt(len(maps))))
        writer.add_image(f"gates/{name}", make_grid(maps[:, None].clamp(0, 1), nrow=side, pad_value=0.5), step)
    pl_module.train(was_training)
