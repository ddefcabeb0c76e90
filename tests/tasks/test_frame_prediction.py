"""FramePrediction: its losses, scheduled sampling, schedule, scores, files and pictures."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence
from pytorch_lightning.loggers import TensorBoardLogger
from skimage.metrics import structural_similarity
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from convlstm_fish.data.modules.moving_mnist import MovingMNIST
from convlstm_fish.errors import UserError
from convlstm_fish.models import EncoderForecaster, FramePredictor, StackedPredictor
from convlstm_fish.tasks import FramePrediction
from convlstm_fish.tasks.callbacks import FrameGrids
from convlstm_fish.tasks.callbacks.frame_grids import frame_grid, frame_video
from convlstm_fish.tasks.callbacks.video_summary import encode_gif

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]

SMALL: dict[str, Any] = {"hidden_channels": [3, 4], "kernel_size": 3}
STACKED: dict[str, Any] = {**SMALL, "architecture": "stacked", "patch_size": 2}


def batches(sequences: int, size: int, pad: int = 0) -> list[dict[str, torch.Tensor]]:
    """Random sequences, 3 frames and 2 more, the last ``pad`` of them padding with absurd content."""
    generator = torch.Generator().manual_seed(4)
    out = []
    for start in range(0, sequences, size):
        index = torch.arange(start, min(start + size, sequences))
        whole = torch.rand(len(index), 5, 1, 8, 10, generator=generator)
        whole[index >= sequences - pad] = 1e4
        batch = {"video": whole[:, :3], "future": whole[:, 3:], "index": 100 - index}
        out.append({**batch, "valid": index < sequences - pad})
    return out


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def trainer(**options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(**(settings | options))


@pytest.mark.parametrize(
    ("options", "network"),
    [
        ({}, FramePredictor),
        ({"architecture": "encoder_forecaster", "patch_size": 2}, EncoderForecaster),
        ({"architecture": "stacked", "patch_size": 2}, StackedPredictor),
    ],
)
def test_architectures_take_their_options(options: dict[str, Any], network: type) -> None:
    task = FramePrediction(**SMALL, **options, in_channels=2, bias=False, output_activation="sigmoid")
    assert type(task.network) is network
    cells = [m for m in task.network.modules() if hasattr(m, "weight_hh")]
    assert {c.hidden_channels for c in cells} == {3, 4}
    assert all(c.bias is None for c in cells)
    assert cells[0].in_channels == 2 * options.get("patch_size", 1) ** 2
    assert task(torch.rand(2, 3, 2, 8, 8), 4).shape == (2, 4, 2, 8, 8)


def test_published_widths_are_the_defaults() -> None:
    assert [c.hidden_channels for c in FramePrediction().network.encoder] == [64, 64]
    assert [c.hidden_channels for c in FramePrediction("encoder_forecaster").network.encoder] == [128, 64, 64]
    assert [c.hidden_channels for c in FramePrediction("stacked").network.recurrent] == [128] * 4


def test_losses() -> None:
    batch = batches(4, 4)[0]
    logits = torch.randn(batch["future"].shape)
    frames, truth = torch.sigmoid(logits), batch["future"]

    def mean(**options: Any) -> float:
        return FramePrediction(**SMALL, **options).loss(logits, truth).mean().item()

    assert mean() == pytest.approx(F.mse_loss(frames, truth).item(), rel=1e-6)
    assert mean(output_activation="identity") == pytest.approx(F.mse_loss(logits, truth).item(), rel=1e-6)
    assert mean(loss="bce") == pytest.approx(F.binary_cross_entropy(frames, truth).item(), rel=1e-6)
    alike = np.mean(
        [
            structural_similarity(frames[n, t, 0].numpy(), truth[n, t, 0].numpy(), data_range=1)
            for n in range(4)
            for t in range(2)
        ]
    )
    l1 = F.l1_loss(frames, truth).item()
    assert mean(loss="l1_ssim", ssim_weight=0.3) == pytest.approx(0.3 * (1 - alike) + 0.7 * l1, rel=1e-5)


def test_loss_on_context_counts_the_given_frames() -> None:
    batch = batches(2, 2)[0]
    task = FramePrediction(**STACKED, loss_on_context=True)
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    truth = torch.cat([batch["video"], batch["future"]], 1)[:, 1:]
    expected = F.mse_loss(task.network(batch["video"], 2, with_context=True), truth)
    assert task.training_step(batch, 0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_sampling_rate_is_openstls() -> None:
    task = FramePrediction(**STACKED, sampling_start=1.0, sampling_steps=50_000)
    eta = 1.0
    for step in range(2000):
        eta -= 0.00002
        assert task.sampling_rate(step) == pytest.approx(eta, abs=1e-9)
    assert task.sampling_rate(50_000) == 0.0
    assert FramePrediction(**STACKED, sampling_start=0.5, sampling_steps=10).sampling_rate(4) == pytest.approx(0.25)


def test_scheduled_sampling_feeds_true_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    task = FramePrediction(**STACKED, sampling_start=1.0, sampling_steps=10)
    video, future = torch.rand(400, 2, 1, 4, 4), torch.rand(400, 6, 1, 4, 4)
    seen: list[torch.Tensor] = []

    def spy(video: torch.Tensor, steps: int, future: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        seen.append(teacher)
        assert steps == 6
        return future

    monkeypatch.setattr(task.network, "forward", spy)
    fed = trainer()
    task.trainer = fed
    shares = []
    for step in (0, 4, 9, 30):
        monkeypatch.setattr(type(fed), "global_step", step)
        task.on_train_batch_start({}, 0)
        task._training_logits(video, future)
        shares.append(seen[-1].float().mean().item())
    assert seen[0].shape == (400, 5)
    assert shares == pytest.approx([0.9, 0.5, 0.0, 0.0], abs=0.05)


def test_scores_are_of_what_counts_and_the_files_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    task = FramePrediction(**STACKED)
    data = batches(11, 4, pad=3)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    figures = trainer(logger=logger).test(task, loader(data), verbose=False)[0]
    video, future = (torch.cat([b[key] for b in data])[:8] for key in ("video", "future"))
    with torch.no_grad():
        predicted = task(video, 2)
    assert figures["test/loss"] == pytest.approx(F.mse_loss(predicted, future).item(), rel=1e-5)
    assert figures["test/mse"] == pytest.approx((predicted - future).square().sum((2, 3, 4)).mean().item(), rel=1e-5)
    last = video[:, -1:].expand_as(future)
    assert figures["test/copy_last_mae"] == pytest.approx((last - future).abs().sum((2, 3, 4)).mean().item(), rel=1e-5)
    assert task.report is not None
    assert task.report.index.tolist() == list(range(93, 101))  # in order of the index, not of the batches
    first = (predicted[7] - future[7]).square().sum((1, 2, 3))
    np.testing.assert_allclose(task.report.model["mse"][0], first.numpy(), rtol=1e-5)
    written = json.loads((tmp_path / "run" / "frame_metrics.json").read_text())
    assert written["sequences"] == 8
    assert written["model"]["ssim"]["mean"] == pytest.approx(figures["test/ssim"], rel=1e-6)
    rows = list(csv.DictReader((tmp_path / "run" / "frame_metrics.csv").read_text().splitlines()))
    assert [int(r["index"]) for r in rows] == list(range(93, 101))
    assert "8 sequences" in capsys.readouterr().out
    # validation says the same, without the files
    again = trainer().validate(task, loader(data), verbose=False)[0]
    assert again["val/mse"] == pytest.approx(figures["test/mse"], rel=1e-6)
    assert again["val/copy_last_psnr"] == pytest.approx(figures["test/copy_last_psnr"], rel=1e-6)


def test_predictions_are_frames(tmp_path: Path) -> None:
    task = FramePrediction(**SMALL, output_activation="identity")
    with torch.no_grad():
        task.network.head.bias.fill_(2.0)  # far above 1
    data = batches(5, 5, pad=2)
    out = trainer().predict(task, loader(data))[0]
    assert out["index"].tolist() == [100, 99, 98]
    assert out["frames"].shape == (3, 2, 1, 8, 10)
    assert out["frames"].dtype == torch.uint8
    assert out["frames"].max() == 255


def test_openstl_schedule_is_one_cycle_and_can_be_stretched(tmp_path: Path) -> None:
    data = loader([{k: v for k, v in b.items() if k != "valid"} for b in batches(8, 2)])

    class Rates(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[float, float]] = []

        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            group = trainer.optimizers[0].param_groups[0]
            self.seen.append((group["lr"], group["betas"][0]))

    def fit(steps: int, **options: Any) -> tuple[Rates, pl.Trainer]:
        torch.manual_seed(0)
        rates = Rates()
        fitting = trainer(max_steps=steps, callbacks=[rates])
        fitting.fit(FramePrediction(**STACKED, lr=5e-4, lr_schedule="openstl"), data, **options)
        return rates, fitting

    rates, fitting = fit(8)
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=5e-4)
    judge = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=8)
    for lr, beta in rates.seen:
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        judge.step()
    fitting.save_checkpoint(tmp_path / "end.ckpt")
    longer, _ = fit(16, ckpt_path=tmp_path / "end.ckpt", weights_only=True)
    whole, _ = fit(16)
    np.testing.assert_allclose(longer.seen, whole.seen[8:], rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_optimizer_and_schedule(optimizer: str) -> None:
    task = FramePrediction(**SMALL, optimizer=optimizer, lr=0.25, betas=[0.5, 0.9], eps=1e-3, warmup_steps=4)
    task.trainer = trainer()
    made = task.configure_optimizers()
    group = made["optimizer"].param_groups[0]
    assert group["lr"] == 0.25 / 4
    assert group["eps"] == 1e-3
    assert group.get("alpha", group.get("betas")) == (0.9 if optimizer == "rmsprop" else (0.5, 0.9))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "bce", "architecture": "encoder_forecaster", "patch_size": 2},
        {"loss": "l1_ssim"},
        {"architecture": "stacked", "loss_on_context": True, "sampling_start": 1.0, "sampling_steps": 30},
        {"architecture": "encoder_forecaster", "feedback": True, "sampling_start": 1.0, "optimizer": "rmsprop"},
    ],
    ids=["shi", "ssim", "openstl", "feedback"],
)
def test_every_kind_learns(options: dict[str, Any]) -> None:
    pl.seed_everything(0, verbose=False)
    task = FramePrediction(**SMALL, **options, lr=5e-3, betas=[0.9, 0.99])
    video = torch.zeros(6, 5, 1, 8, 8)
    for t in range(5):
        video[:, t, :, 2:5, t : t + 3] = 1  # a square that moves to the right
    batch = {"video": video[:, :3], "future": video[:, 3:]}
    data = loader([batch] * 40)
    validation = loader([batch])
    before = trainer().validate(task, validation, verbose=False)[0]["val/loss"]
    trainer(max_epochs=1).fit(task, data)
    after = trainer().validate(task, validation, verbose=False)[0]["val/loss"]
    assert after < 0.75 * before


def test_moving_mnist_through_a_trainer(tmp_path: Path) -> None:
    data = MovingMNIST(batch_size=2, train_size=6, validation_size=3, test_size=3, future_frames=3)
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    fit = trainer(
        logger=logger,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[FrameGrids(every_n_steps=2)],
        num_sanity_val_steps=0,
    )
    task = FramePrediction(**{**SMALL, "hidden_channels": 2})
    fit.fit(task, data)
    assert fit.global_step == 3
    assert math.isfinite(fit.callback_metrics["val/loss"])
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    tags = set(events.Tags()["images"])
    assert tags == {"frames/0_input_prediction_truth_error", "frames_video/0_prediction_truth_error"}
    grids = events.Images("frames/0_input_prediction_truth_error")
    assert [g.step for g in grids] == [0, 2]
    assert (grids[0].height, grids[0].width) == (3 * 66, 13 * 66)
    video = events.Images("frames_video/0_prediction_truth_error")[0]
    assert (video.height, video.width) == (66, 3 * 66)
    path = tmp_path / "video.gif"
    path.write_bytes(video.encoded_image_string)
    with Image.open(path) as gif:
        assert gif.format == "GIF"
        assert gif.n_frames == 13


def test_fast_dev_run(tmp_path: Path) -> None:
    data = MovingMNIST(batch_size=2, future_frames=2)
    trainer(fast_dev_run=True, default_root_dir=tmp_path).fit(FramePrediction(**{**SMALL, "hidden_channels": 2}), data)


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    written = []
    for devices in (1, 2):
        torch.manual_seed(0)
        task = FramePrediction(**STACKED)
        data = MovingMNIST(batch_size=2, test_size=5, future_frames=2)
        several: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        logger = TensorBoardLogger(tmp_path, name="", version=str(devices))
        testing = trainer(logger=logger, use_distributed_sampler=False, **several)
        testing.test(task, data, verbose=False)
        written.append((tmp_path / str(devices) / "frame_metrics.csv").read_text().splitlines())
    assert [line.split(",")[0] for line in written[1]] == ["index", "0", "1", "2", "3", "4"]
    for one, two in zip(*written):
        if not one.startswith("index"):
            np.testing.assert_allclose(
                [float(x) for x in two.split(",")], [float(x) for x in one.split(",")], rtol=1e-5
            )


def test_hyper_parameters_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    task = FramePrediction(**STACKED, loss_on_context=True, lr=0.5)
    fit = trainer(max_steps=1)
    fit.fit(task, loader([{k: v for k, v in batches(2, 2)[0].items() if k != "valid"}]))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    again = FramePrediction.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert dict(again.hparams) == dict(task.hparams)
    video = torch.rand(1, 3, 1, 8, 8)
    torch.testing.assert_close(again(video, 2), task(video, 2))
    assert "teacher_rate" not in task.state_dict()


def test_the_grid_shows_what_it_says() -> None:
    video, truth = torch.rand(3, 1, 5, 6), torch.rand(2, 1, 5, 6)
    prediction = truth + torch.tensor([0.5, -2.0])[:, None, None, None]
    grid = frame_grid(video, prediction, truth)
    assert grid.shape == (1, 3 * 7, 5 * 8)

    def cell(row: int, column: int) -> torch.Tensor:
        return grid[:, row * 7 : row * 7 + 5, column * 8 : column * 8 + 6]

    for t in range(3):
        assert torch.equal(cell(0, t), video[t])
        assert torch.equal(cell(1, t), video[t])
        assert cell(2, t).max() == 0
    assert torch.equal(cell(0, 3), prediction[0].clamp(0, 1))
    assert torch.equal(cell(1, 4), truth[1])
    torch.testing.assert_close(cell(2, 3), torch.full((1, 5, 6), 0.25))
    torch.testing.assert_close(cell(2, 4), torch.ones(1, 5, 6))
    moving = frame_video(video, prediction, truth)
    assert moving.shape == (5, 1, 7, 24)
    for t in range(5):
        for row in range(3):
            assert torch.equal(moving[t, :, :5, row * 8 : row * 8 + 6], cell(row, t))


def test_gifs_keep_every_frame_and_its_pixels(tmp_path: Path) -> None:
    frames = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 2)[:, None, None] + np.zeros((1, 6, 9), np.uint8)
    path = tmp_path / "x.gif"
    path.write_bytes(encode_gif(frames, fps=10))
    with Image.open(path) as gif:
        shown = [np.asarray(f.convert("L")) for f in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] in (100, 200)
    assert {f.shape for f in shown} == {(6, 9)}
    assert sorted({int(f[0, 0]) for f in shown}) == [0, 50, 100, 150, 200]
    with pytest.raises(ValueError, match="float64"):
        encode_gif(np.zeros((2, 3, 3)), 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "transformer"}, "architecture: 'transformer'"),
        ({"loss": "hinge"}, "loss: 'hinge'"),
        ({"optimizer": "sgd"}, "optimizer: 'sgd'"),
        ({"lr_schedule": "step"}, "lr_schedule: 'step'"),
        ({"ssim_weight": 1.5}, "ssim_weight: 1.5"),
        ({"sampling_steps": 0}, "sampling_steps: 0"),
        ({"feedback": True}, "feedback"),
        ({"loss": "bce", "output_activation": "identity"}, "sigmoid"),
        ({"loss_on_context": True}, "loss_on_context"),
        ({"sampling_start": 0.5}, "sampling_start"),
        ({"hidden_channels": [0]}, "hidden_channels"),
        ({"patch_size": 0}, "patch_size"),
        ({"lr_schedule": "openstl", "optimizer": "rmsprop"}, "openstl"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FramePrediction(**options)


def test_grids_need_sensible_numbers() -> None:
    with pytest.raises(UserError, match="every_n_steps: 0"):
        FrameGrids(every_n_steps=0)
