"""How far predicted frames are from the true ones: squared and absolute error, SSIM and PSNR, frame by frame."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table
from torch import Tensor

SSIM_WINDOW = 7
MAX_PSNR = 100.0
METRICS: dict[str, str] = {
    "mse": "squared error, summed over a frame's pixels and channels",
    "mae": "absolute error, summed over a frame's pixels and channels",
    "mse_pixel": "squared error, mean over a frame's pixels and channels",
    "mae_pixel": "absolute error, mean over a frame's pixels and channels",
    "ssim": f"structural similarity, {SSIM_WINDOW}x{SSIM_WINDOW} uniform window, range 1",
    "ssim_range2": "the same with range 2, which scikit-image took for float images when OpenSTL's tables were made",
    "psnr": f"peak signal-to-noise ratio in dB, range 1, at most {MAX_PSNR:g}",
}


def ssim(prediction: Tensor, truth: Tensor, *, data_range: float = 1.0, window: int = SSIM_WINDOW) -> Tensor:
    r"""Structural similarity of images, differentiable, as scikit-image defines it by default.

    With means, variances and covariance over every window x window square that lies inside the image, the latter with
    the sample's n / (n - 1)::

        ssim = (2 μ_x μ_y + C1)(2 σ_xy + C2) / ((μ_x² + μ_y² + C1)(σ_x² + σ_y² + C2))

    averaged over squares and channels, C1 = (0.01 data_range)², C2 = (0.03 data_range)². Source: Wang, Bovik, Sheikh
    and Simoncelli 2004.

    Args:
        prediction, truth: (..., C, H, W).
        data_range: largest minus smallest possible value.
        window: side of the squares.

    Returns:
        (...,).

    Raises:
        ValueError: different shapes, or images smaller than the window.
    """
    return _similarity(_moments(prediction, truth, window), data_range)


def _moments(prediction: Tensor, truth: Tensor, window: int) -> tuple[Tensor, ...]:
    """Means, variances and covariance in every window."""
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and truth {tuple(truth.shape)} differ in shape")
    if min(truth.shape[-2:]) < window:
        raise ValueError(f"SSIM's {window}x{window} window needs larger images than {tuple(truth.shape[-2:])}")
    x, y = (image.reshape(-1, *image.shape[-3:]) for image in (prediction, truth))
    both = torch.stack([x, y, x * x, y * y, x * y])
    pooled = F.avg_pool2d(both.flatten(0, 1), window, 1)
    mean_x, mean_y, xx, yy, xy = pooled.view(5, *truth.shape[:-3], *pooled.shape[1:])
    bessel = window**2 / (window**2 - 1)
    return mean_x, mean_y, bessel * (xx - mean_x**2), bessel * (yy - mean_y**2), bessel * (xy - mean_x * mean_y)


def _similarity(moments: tuple[Tensor, ...], data_range: float) -> Tensor:
    mean_x, mean_y, var_x, var_y, covariance = moments
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score = score / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return score.mean(dim=(-3, -2, -1))


def metric_dtype(device: torch.device) -> torch.dtype:
    """float64, but float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def frame_metrics(prediction: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Every metric of `METRICS` for every frame, in `metric_dtype`.

    Errors are those of the values as they are; SSIM and PSNR are those of the prediction clipped to [0, 1]. A perfect
    frame's PSNR is infinite; `MAX_PSNR` stands for it, so that means exist.

    Args:
        prediction: (N, T, C, H, W).
        truth: same shape, values in [0, 1].

    Returns:
        name -> (N, T).
    """
    dtype = metric_dtype(truth.device)
    prediction, truth = prediction.detach().to(dtype), truth.to(dtype)
    difference = prediction - truth
    clipped = prediction.clamp(0, 1)
    moments = _moments(clipped, truth, SSIM_WINDOW)
    pixels = (-3, -2, -1)
    mse = difference.square().mean(pixels)
    clipped_mse = (clipped - truth).square().mean(pixels)
    return {
        "mse": difference.square().sum(pixels),
        "mae": difference.abs().sum(pixels),
        "mse_pixel": mse,
        "mae_pixel": difference.abs().mean(pixels),
        "ssim": _similarity(moments, 1.0),
        "ssim_range2": _similarity(moments, 2.0),
        "psnr": -10 * torch.log10(clipped_mse.clamp_min(10 ** (-MAX_PSNR / 10))),
    }


def copy_last(video: Tensor, steps: int) -> Tensor:
    """The baseline that any prediction must beat: the last frame of ``video`` (N, T, C, H, W), ``steps`` times."""
    return video[:, -1:].expand(-1, steps, -1, -1, -1)


@dataclass(frozen=True)
class FrameReport:
    """The metrics of a set of sequences, for a model and for the copy of the last frame.

    Attributes:
        index: (N,) which sequence each row is.
        model, baseline: metric -> (N, T) float64, T the future frames.
    """

    index: np.ndarray
    model: Mapping[str, np.ndarray]
    baseline: Mapping[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """Means over sequences: per future frame, and over all; and the spread of the sequences."""

        def part(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
            return {
                name: {
                    "mean": float(v.mean()),
                    "per_frame": [float(x) for x in v.mean(0)],
                    "per_sequence": {
                        "std": float(v.mean(1).std()),
                        "quantiles": dict(
                            zip(("1%", "50%", "99%"), np.quantile(v.mean(1), (0.01, 0.5, 0.99)).tolist())
                        ),
                    },
                }
                for name, v in values.items()
            }

        return {
            "sequences": len(self.index),
            "definitions": METRICS,
            "model": part(self.model),
            "copy_last_frame": part(self.baseline),
        }

    def to_csv(self) -> str:
        """One line per sequence: its index and each metric's mean over its frames, of the model and the baseline."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["index", *self.model, *(f"copy_last_{name}" for name in self.baseline)])
        columns = [v.mean(1) for v in (*self.model.values(), *self.baseline.values())]
        for k in range(len(self.index)):
            writer.writerow([int(self.index[k]), *(f"{column[k]:.9g}" for column in columns)])
        return out.getvalue()

    def table(self, title: str = "Predicted frames") -> Table:
        """MSE, MAE, SSIM and PSNR by future frame and over all, the copy of the last frame beside the model."""
        shown = {"mse": ".2f", "mae": ".2f", "ssim": ".4f", "psnr": ".2f"}
        sides = {"\n": self.model, "copy\n": self.baseline}
        per_pixel = ", ".join(
            f"{who}MSE {values['mse_pixel'].mean():.5f} MAE {values['mae_pixel'].mean():.5f}"
            for who, values in (("", self.model), ("copy ", self.baseline))
        )
        table = Table(
            title=f"{title} of {len(self.index)} sequences",
            caption="copy: the last given frame, repeated. MSE, MAE: summed over a frame;\n"
            f"per pixel {per_pixel}.\nSSIM: 7x7 window, range 1. PSNR: dB, range 1.",
            box=box.SIMPLE_HEAD,
        )
        table.add_column("\nframe", justify="right", no_wrap=True)
        for who in sides:
            for name in shown:
                table.add_column(
                    f"{who}{name.upper()}", justify="right", no_wrap=True, style="dim" if who.strip() else None
                )
        steps = self.model["mse"].shape[1]
        for row in [*range(steps), None]:
            cells = [
                format(float((values[name] if row is None else values[name][:, row]).mean()), form)
                for values in sides.values()
                for name, form in shown.items()
            ]
            if row is None:
                table.add_section()
            table.add_row("all" if row is None else str(row + 1), *cells)
        return table
