"""What test and predict leave in the run folder."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from convlstm_fish.data.modules import FishClips
from convlstm_fish.evaluate import evaluate_recording, print_table, write_report
from convlstm_fish.files import write_text
from convlstm_fish.tasks import ClipClassification, FramePrediction
from convlstm_fish.tasks.callbacks.video_summary import encode_gif

PREDICTED_FPS = 5.0


def write_test(
    task: pl.LightningModule,
    datamodule: pl.LightningDataModule,
    figures: Mapping[str, float],
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """Print the table of a test, and write metrics.json and what else the task has.

    A yes-or-no question about a recording gets the panel of baselines, report.html and test_predictions.csv;
    several classes get test_predictions.csv.

    Args:
        task: after its test.
        datamodule: that it was tested on.
        figures: what the test logged.
        folder: of the run.
        settings: of the run, for the report.
    """
    if isinstance(task, ClipClassification):
        said = task.predictions
        fps = datamodule.fps if isinstance(datamodule, FishClips) else None
        write_text(
            folder / "test_predictions.csv", predictions_csv(said["index"], said["probability"], fps, said["label"])
        )
        if isinstance(datamodule, FishClips) and said["probability"].ndim == 1:
            result = evaluate_recording(
                datamodule.recording,
                said["index"],
                said["probability"],
                label=datamodule.label,
                horizon_seconds=datamodule.horizon_seconds,
                clip_frames=datamodule.clip_frames,
                threshold=datamodule.threshold,
                name=folder.parent.name,
            )
            print_table(result)
            write_text(folder / "metrics.json", result.to_json())
            report = write_report(result, folder / "report.html", settings)
            print(f"report: {report}")
            return
    if not isinstance(task, FramePrediction):  # which has printed its own, frame by frame
        table = Table("metric", "value")
        for name, value in figures.items():
            table.add_row(name, f"{value:.5g}")
        Console().print(table)
    write_text(folder / "metrics.json", json.dumps(dict(figures), indent=2) + "\n")


def write_predictions(
    trainer: pl.Trainer, datamodule: pl.LightningDataModule, parts: list[Any], folder: Path
) -> Path | None:
    """Gather what every process predicted, and write it in the first one.

    Probabilities become predictions.csv; predicted frames predictions.npz, with ``index`` (K,) and ``frames``
    (K, T', C, H, W), uint8, and the first few of them predictions.gif, to look at. What is there already stays: the
    next ones are predictions_2 and so on.

    Args:
        trainer: after ``predict``.
        datamodule: that was predicted.
        parts: dicts with ``index`` and ``probability`` or ``frames``, one a batch.
        folder: of the run.
    """
    if trainer.world_size > 1:
        gathered: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(gathered, parts)
        parts = [part for rank in gathered for part in rank]
    if not trainer.is_global_zero:
        return None
    index = torch.cat([part["index"].cpu() for part in parts]).numpy()
    order = np.argsort(index, kind="stable")
    film = getattr(datamodule, "path", None)
    of = "" if film is None else f" of {film}"
    if "frames" in parts[0]:
        folder.mkdir(parents=True, exist_ok=True)
        path = free_name(folder / "predictions.npz")
        beside = path.with_suffix(".npz.tmp")
        with open(beside, "wb") as file:
            np.savez(
                file, index=index[order], frames=torch.cat([part["frames"].cpu() for part in parts]).numpy()[order]
            )
        os.replace(beside, path)
        print(f"{len(index)} predicted sequences{of}: {path}")
        if "given" in parts[0]:
            shown = path.with_suffix(".gif")
            shown.write_bytes(encode_gif(predicted_video(parts[0]["given"], parts[0]["frames"]), PREDICTED_FPS))
            print(f"the first of them, predicted frames with a white edge: {shown}")
        return path
    probability = torch.cat([part["probability"].float().cpu() for part in parts]).numpy()
    fps = datamodule.fps if isinstance(datamodule, FishClips) else None
    path = free_name(folder / "predictions.csv")
    write_text(path, predictions_csv(index[order], probability[order], fps))
    print(f"{len(index)} predictions{of}: {path}")
    return path


def free_name(path: Path) -> Path:
    """The path, or where a file stands there the first free one of NAME_2, NAME_3, ...: predictions of other films."""
    free, number = path, 1
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}_{number}")
    return free


def predicted_video(given: torch.Tensor, predicted: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Sequences side by side, the frames that were given with a grey edge and the predicted ones with a white one.

    Args:
        given: uint8 (n, T, C, H, W).
        predicted: uint8 (n or more, T', C, H, W).

    Returns:
        uint8 (T + T', H + 4, n * (W + 4)), or with a last dimension of 3 where there are three channels.
    """
    parts = []
    for frames, edge in ((given.cpu(), 96), (predicted[: len(given)].cpu(), 255)):
        if frames.shape[2] not in (1, 3):  # no picture has two channels: show their mean
            frames = frames.float().mean(2, keepdim=True).to(torch.uint8)
        parts.append(torch.nn.functional.pad(frames, (2, 2, 2, 2), value=edge))
    video = torch.cat(list(torch.cat(parts, dim=1)), dim=3).permute(0, 2, 3, 1).numpy()
    return video[..., 0] if video.shape[3] == 1 else video


def predictions_csv(
    index: npt.NDArray[Any], probability: npt.NDArray[Any], fps: float | None, label: npt.NDArray[Any] | None = None
) -> str:
    """One row a clip: its last frame, that frame's time, the probability (or one for each class), and the label."""
    columns = ["frame"] + ([] if fps is None else ["time_s"])
    many = probability.ndim == 2
    columns += [f"probability_{k}" for k in range(probability.shape[1])] if many else ["probability"]
    columns += [] if label is None else ["label"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in range(len(index)):
        values = np.atleast_1d(probability[row])
        cells = [int(index[row])] + ([] if fps is None else [f"{index[row] / fps:.4f}"])
        cells += [f"{value:.7g}" for value in values]
        writer.writerow(cells + ([] if label is None else [int(label[row])]))
    return text.getvalue()
