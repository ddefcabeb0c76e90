"""Runs that were stopped go on bit for bit, and weights start a new run."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from convlstm_fish.cli import main
from convlstm_fish.tasks.callbacks import TrainingMonitor
from convlstm_fish.tasks.checkpoint_io import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("step", [2, 4, 6])  # in the middle of the first epoch, at its last step, in the second
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, losses: Callable[[Path], dict[int, float]]
) -> None:
    assert main(["--config", config, "--run_dir", "whole"]) == 0
    whole = tmp_path / "whole" / "version_0"
    assert len(losses(whole)) == 10

    original = TrainingMonitor.on_train_batch_end

    def stop(self: TrainingMonitor, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        # GracefulStop looks after its turn in this step, so the run stops at the end of the next one.
        patch.setattr(TrainingMonitor, "on_train_batch_end", stop)
        assert main(["--config", config, "--run_dir", "parts"]) == 143
    parts = tmp_path / "parts" / "version_0"
    assert load_checkpoint(parts / "checkpoints/last.ckpt")["global_step"] == step + 1
    assert main(["fit", "--ckpt_path", "last", "--run_dir", "parts"]) == 0
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["version_0"]
    assert losses(parts) == losses(whole)
    for name in ("last", "best"):
        a, b = (load_checkpoint(run / f"checkpoints/{name}.ckpt") for run in (whole, parts))
        assert all(torch.equal(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"])
        for key, value in a["optimizer_states"][0]["state"].items():
            assert torch.equal(value["exp_avg_sq"], b["optimizer_states"][0]["state"][key]["exp_avg_sq"])
        assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"])


FRAMES_OF_DIGITS = {"train_size": 20, "validation_size": 4, "test_size": 4, "image_size": 32, "context_frames": 3}
FRAMES_OF_A_TANK = {"splits": [0.6, 0.2, 0.2], "stride": 25, "eval_stride": 40, "flips": "random", "context_frames": 3}


@pytest.mark.parametrize("source", ["digits", "tank"])
def test_a_frame_prediction_goes_on_bit_for_bit_in_the_middle_of_an_epoch(
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_tank: Path,
    weights: Callable[[Path], dict[str, torch.Tensor]],
    losses: Callable[[Path], dict[int, float]],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = {"architecture": "stacked", "hidden_channels": [3], "kernel_size": 3, "patch_size": 4, "lr": 0.01}
    model |= {"sampling_start": 1.0, "sampling_steps": 20, "loss_on_context": True, "lr_schedule": "openstl"}
    if source == "digits":
        data = {"class_path": "MovingMNIST", "init_args": {**FRAMES_OF_DIGITS, "future_frames": 4}}
    else:
        options = {**FRAMES_OF_A_TANK, "path": str(small_tank), "image_size": [24, 32], "future_frames": 4}
        data = {"class_path": "RecordingFrames", "init_args": options}
    content = {
        "model": {"class_path": "FramePrediction", "init_args": model},
        "data": data,
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    Path("frames.yaml").write_text(yaml.safe_dump(content))
    assert main(["--config", "frames.yaml", "--batch_size=4", "--run_dir", "whole"]) == 0
    whole, parts = (tmp_path / name / "version_0" for name in ("whole", "parts"))
    steps = len(losses(whole))
    original = TrainingMonitor.on_train_batch_end

    def stop(self: TrainingMonitor, trainer: Any, *args: Any) -> None:
        original(self, trainer, *args)
        if trainer.global_step == steps // 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingMonitor, "on_train_batch_end", stop)
        assert main(["--config", "frames.yaml", "--batch_size=4", "--run_dir", "parts"]) == 143
    stopped = load_checkpoint(parts / "checkpoints/last.ckpt")
    assert (stopped["epoch"], stopped["global_step"]) == (0, steps // 4 + 1)
    assert 0 < stopped["global_step"] < steps // 2
    assert main(["fit", "--ckpt_path", "last", "--run_dir", "parts"]) == 0
    assert losses(parts) == losses(whole)
    ends = [weights(run / "checkpoints/last.ckpt") for run in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_resuming_keeps_the_settings_and_weights_start_anew(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    assert main(["--config", config, "--trainer.max_epochs=1"]) == 0
    run = tmp_path / "runs/tiny/version_0"
    last = str(run / "checkpoints/last.ckpt")
    capsys.readouterr()
    for args, told in (
        (["--ckpt_path", last, "--model.lr=0.5"], "--model.lr 0.5: the checkpoint was trained with 0.01"),
        (["--ckpt_path", last, "--weights", last], "give one of them"),
        (["--ckpt_path", last, "--batch_size=2"], "global batch of 8"),
        (["--weights", last, "--model.hidden_channels=[5]"], "does not fit ClipClassification"),
    ):
        assert main(["fit", *args]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1
    before = weights(run / "checkpoints/last.ckpt")
    assert main(["fit", "--weights", last, "--model.lr=1e-30", "--trainer.max_epochs=1"]) == 0
    after = load_checkpoint(tmp_path / "runs/tiny/version_1/checkpoints/last.ckpt")
    assert after["hyper_parameters"]["lr"] == 1e-30
    assert all(torch.equal(before[n], v) for n, v in after["state_dict"].items() if n.endswith("weight_ih"))

    # A run that is done says so, and settings that a checkpoint beats are told.
    other = tmp_path / "other.yaml"
    other.write_text(Path(config).read_text().replace("lr: 0.01", "lr: 0.7").replace("dropout: 0.2", "dropout: 2e-1"))
    capsys.readouterr()
    assert (
        main(["fit", "--config", str(other), "--ckpt_path", last, "--run_dir", "runs/tiny", "--trainer.max_epochs=1"])
        == 0
    )
    told = capsys.readouterr().out
    assert f"--config {other}: the network and its settings are those of checkpoint {last}; not used: lr 0.7" in told
    assert "dropout" not in told
    assert "nothing was left to train" in told
    assert "has done 1 epochs" in told

    # Another experiment that goes on from this run has a folder of its own.
    assert main(["fit", "--config", config, "--run_dir", "other", "--ckpt_path", last]) == 0
    assert (tmp_path / "other/version_0/checkpoints/last.ckpt").is_file()
    assert load_checkpoint(last)["epoch"] == 0

    # A file with weights alone, such as import-keras writes, is where a new run starts.
    bare = {name: after[name] for name in ("state_dict", "hyper_parameters", "pytorch-lightning_version")}
    torch.save({**bare, "hyper_parameters": {**bare["hyper_parameters"], "lr": 1e-30}}, tmp_path / "bare.ckpt")
    args = ["--config", config, "--trainer.max_epochs=1", "--ckpt_path", "bare.ckpt"]
    assert main(["fit", *args]) == 0
    again = weights(tmp_path / "runs/tiny/version_2/checkpoints/last.ckpt")
    assert all(torch.equal(before[n], v) for n, v in again.items() if n.endswith("weight_ih"))
    assert main(["test", "--config", config, "--ckpt_path", "bare.ckpt"]) == 0


_TWO = ["--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.accelerator=cpu"]


@pytest.mark.early
@pytest.mark.parametrize(
    ("to_all", "workers"), [(False, 0), pytest.param(True, 1, marks=pytest.mark.slow)], ids=["one", "all"]
)
def test_two_processes_stop_together_and_go_on(config: str, tmp_path: Path, to_all: bool, workers: int) -> None:
    command = [sys.executable, str(ROOT / "main.py"), "--config", config, "--batch_size=4", "--run_dir=two", *_TWO]
    command.append(f"--data.num_workers={workers}")
    endless = ["--trainer.max_epochs=100000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *endless],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        if to_all:
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()
        began = time.monotonic()
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 143, errors
    assert time.monotonic() - began < 100
    assert "stopped by SIGTERM" in errors
    last = tmp_path / "two/version_0/checkpoints/last.ckpt"
    stopped = load_checkpoint(last)["global_step"]
    done = subprocess.run(
        [*command, *endless, "--ckpt_path=last", f"--trainer.max_steps={stopped + 3}", "--test_after_fit"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert load_checkpoint(last)["global_step"] == stopped + 3
    with open(tmp_path / "two/version_0/test_predictions.csv") as file:
        frames = [int(row["frame"]) for row in csv.DictReader(file)]
    assert frames == sorted(set(frames))
    assert len(frames) > 10
