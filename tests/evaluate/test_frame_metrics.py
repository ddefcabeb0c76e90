"""Frame metrics against scikit-image and NumPy."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from convlstm_fish.evaluate.frame_metrics import METRICS, FrameReport, copy_last, frame_metrics, ssim


@pytest.fixture
def videos() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    truth = torch.rand(3, 4, 2, 17, 12)
    return truth + 0.3 * torch.randn(truth.shape), truth  # some predictions lie outside [0, 1]


@pytest.mark.parametrize(("name", "data_range"), [("ssim", 1.0), ("ssim_range2", 2.0)])
def test_ssim_is_scikit_images(videos: tuple[torch.Tensor, torch.Tensor], name: str, data_range: float) -> None:
    prediction, truth = videos
    ours = frame_metrics(prediction, truth)[name]
    assert ours.shape == (3, 4)
    for n in range(3):
        for t in range(4):
            theirs = structural_similarity(
                prediction[n, t].clamp(0, 1).double().numpy(),
                truth[n, t].double().numpy(),
                data_range=data_range,
                channel_axis=0,
            )
            assert ours[n, t].item() == pytest.approx(theirs, abs=1e-10)


@pytest.mark.parametrize("window", [3, 11])
def test_ssim_windows_and_gradient(videos: tuple[torch.Tensor, torch.Tensor], window: int) -> None:
    prediction, truth = (v.double() for v in videos)
    theirs = structural_similarity(prediction[0, 0, 0].numpy(), truth[0, 0, 0].numpy(), data_range=1.5, win_size=window)
    x = prediction[0, 0, :1].clone().requires_grad_()
    assert ssim(x, truth[0, 0, :1], data_range=1.5, window=window).item() == pytest.approx(theirs, abs=1e-10)
    assert torch.autograd.gradcheck(lambda p: ssim(p, truth[0, 0, :1], window=window), x)


def test_psnr_is_scikit_images_and_finite(videos: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, truth = videos
    ours = frame_metrics(prediction, truth)["psnr"]
    for n in range(3):
        for t in range(4):
            theirs = peak_signal_noise_ratio(
                truth[n, t].double().numpy(), prediction[n, t].clamp(0, 1).double().numpy(), data_range=1
            )
            assert ours[n, t].item() == pytest.approx(theirs, abs=1e-10)
    assert (frame_metrics(truth, truth)["psnr"] == 100).all()


def test_errors_are_sums_and_means(videos: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, truth = (v.double().numpy() for v in videos)
    ours = frame_metrics(*videos)
    assert set(ours) == set(METRICS)
    for name, difference in (("mse", (prediction - truth) ** 2), ("mae", abs(prediction - truth))):
        np.testing.assert_allclose(ours[name].numpy(), difference.sum((2, 3, 4)), rtol=1e-12)
        np.testing.assert_allclose(ours[f"{name}_pixel"].numpy(), difference.mean((2, 3, 4)), rtol=1e-12)
        # OpenSTL's figure: mean over sequences and frames first, then the sum over pixels
        assert ours[name].mean().item() == pytest.approx(difference.mean((0, 1)).sum())


def test_copy_last_frame() -> None:
    video = torch.rand(2, 5, 1, 8, 8)
    copy = copy_last(video, 3)
    assert copy.shape == (2, 3, 1, 8, 8)
    assert all(torch.equal(copy[:, t], video[:, 4]) for t in range(3))


def test_report_says_what_it_was_given(videos: tuple[torch.Tensor, torch.Tensor]) -> None:
    prediction, truth = videos
    model = {k: v.numpy() for k, v in frame_metrics(prediction, truth).items()}
    baseline = {k: v.numpy() for k, v in frame_metrics(copy_last(truth, 4), truth).items()}
    report = FrameReport(np.array([7, 8, 9]), model, baseline)
    parsed = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert parsed["sequences"] == 3
    for name in METRICS:
        entry = parsed["model"][name]
        assert entry["per_frame"] == pytest.approx(list(model[name].mean(0)))
        assert entry["mean"] == pytest.approx(model[name].mean())
        assert entry["per_sequence"]["quantiles"]["50%"] == pytest.approx(np.median(model[name].mean(1)))
    assert parsed["copy_last_frame"]["psnr"]["per_frame"][-1] == 100
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["index"] for row in rows] == ["7", "8", "9"]
    assert float(rows[1]["mae"]) == pytest.approx(model["mae"][1].mean(), rel=1e-8)
    assert float(rows[2]["copy_last_ssim"]) == pytest.approx(baseline["ssim"][2].mean(), rel=1e-8)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    for values, form in ((model["mse"], ".2f"), (baseline["psnr"], ".2f"), (baseline["ssim"], ".4f")):
        assert format(values.mean(), form) in text
        assert format(values[:, 0].mean(), form) in text
    assert f"MAE {model['mae_pixel'].mean():.5f}" in text


def test_small_or_unequal_images_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(6, 9\)"):
        ssim(torch.rand(1, 6, 9), torch.rand(1, 6, 9))
    with pytest.raises(ValueError, match="shape"):
        ssim(torch.rand(1, 8, 9), torch.rand(1, 9, 8))
    assert math.isclose(ssim(torch.full((1, 7, 7), 0.5), torch.full((1, 7, 7), 0.5)).item(), 1.0, rel_tol=1e-6)
