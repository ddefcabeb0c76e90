"""The command line as a person uses it: every call goes through main()."""

from __future__ import annotations

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from convlstm_fish.cli import main
from convlstm_fish.commands import COMMANDS
from convlstm_fish.data.clips import nearest
from convlstm_fish.tasks.callbacks import EpochLine, TrainingMonitor
from convlstm_fish.tasks.checkpoint_io import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tmp_path: Path, small_tank: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config that trains in a second, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    content = {
        "model": {
            "class_path": "ClipClassification",
            "init_args": {"hidden_channels": [3], "dropout": 0.2, "lr": 0.01},
        },
        "data": {
            "class_path": "FishClips",
            "init_args": {
                "path": str(small_tank),
                "splits": [0.6, 0.2, 0.2],
                "batch_size": 8,
                "clip_frames": 8,
                "image_size": [12, 16],
                "clip_stride": 12,
                "eval_stride": 8,
                "flips": "random",
                "noise": 0.01,
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = load_checkpoint(path)["state_dict"]
    return state


def losses(run: Path) -> dict[int, float]:
    events = EventAccumulator(str(run)).Reload()
    return {event.step: event.value for event in events.Scalars("train/loss")}


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_fit_test_validate_predict(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", config, "--test_after_fit"]) == 0
    run = tmp_path / "runs" / "tiny" / "version_0"
    written = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {
        *("config.yaml", "metrics.json", "predictions.csv", "report.html"),
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    } <= written
    output = capsys.readouterr()
    assert "Verdict" in output.out
    assert "epoch 2/2" in output.out
    assert "Warning" not in output.err
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rows"][0]["name"] == "tiny"
    events = EventAccumulator(str(run)).Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert "test/loss" in events.Tags()["scalars"]

    # The run folder is enough for everything after: its config, its checkpoint, its place for results.
    (run / "report.html").unlink()
    assert main(["test", "--ckpt_path", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert json.loads((run / "metrics.json").read_text())["rows"][0] == metrics["rows"][0]
    assert main(["validate", "--ckpt_path", str(run.parent)]) == 0
    assert '"val/loss"' in capsys.readouterr().out
    assert main(["predict", "--config", config, "--data.predict_split=validation"]) == 0
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["frame", "time_s", "probability"]
    assert rows[0]["frame"] == str(540 + 7)
    assert float(rows[0]["time_s"]) == pytest.approx(547 / 30, abs=1e-4)
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]


def test_the_saved_config_repeats_the_run(config: str, tmp_path: Path) -> None:
    assert main(["--config", config, "--batch_size=4", "--use_amp", "--n_gpus=0", "--run_dir", "first"]) == 0
    saved = tmp_path / "first" / "version_0" / "config.yaml"
    content = yaml.safe_load(saved.read_text())
    assert content["data"]["init_args"]["batch_size"] == 4
    assert content["trainer"]["precision"] == "bf16-mixed"
    assert [content[name] for name in ("n_gpus", "use_amp", "batch_size", "ckpt_path")] == [None] * 4
    assert main(["fit", "--config", str(saved), "--run_dir", "second"]) == 0
    first, second = (weights(tmp_path / f / "version_0/checkpoints/last.ckpt") for f in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- precedence --------------------------------------------------------------------------------------------------------


def settings(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return content


@pytest.mark.parametrize(
    ("args", "batch_size", "precision"),
    [
        ([], 8, "32-true"),
        (["--data.batch_size=5"], 5, "32-true"),
        (["--batch_size", "16", "--use_amp", "True", "--n_gpus", "0"], 16, "bf16-mixed"),
        (["--batch_size=16", "--data.batch_size=5", "--use_amp=False"], 16, "32-true"),
        (["--use_amp", "--trainer.precision=32-true"], 8, "bf16-mixed"),
        (["--trainer.precision=bf16-mixed", "--use_amp", "false"], 8, "32-true"),
    ],
)
@pytest.mark.parametrize("with_fit", [False, True])
def test_short_options_beat_long_ones_beat_the_config(
    config: str, tmp_path: Path, args: list[str], batch_size: int, precision: str, with_fit: bool
) -> None:
    few = ["--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    place = ["--config", config] if with_fit else []
    tail = [] if with_fit else [f"--config={config}"]
    assert main([*(["fit"] if with_fit else []), *place, *args, *few, "--trainer.logger=false", *tail]) == 0
    saved = settings(tmp_path / "runs/tiny/version_0")
    assert saved["data"]["init_args"]["batch_size"] == batch_size
    assert (saved["trainer"]["precision"] or "32-true") == precision


def test_the_seed_reaches_data_and_weights(config: str, tmp_path: Path) -> None:
    few = ["--config", config, "--trainer.max_epochs=1", "--trainer.limit_val_batches=1"]
    for args in ([], ["--seed_everything=7"], ["--seed_everything=7", "--data.seed=3"]):
        assert main([*few, *args]) == 0
    runs = [tmp_path / f"runs/tiny/version_{n}" for n in range(3)]
    assert [settings(run)["data"]["init_args"]["seed"] for run in runs] == [0, 7, 3]
    first = [losses(run)[0] for run in runs]
    assert len(set(first)) == 3


def test_predicted_frames_of_a_whole_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["--data.path", str(small_tank), "--data.simulate=null", "--data.image_size=[24,32]", "--batch_size=3"]
    small += ["--model.hidden_channels=[2]", "--data.context_frames=3", "--data.future_frames=5", "--n_gpus=0"]
    short = ["--trainer.max_steps=1", "--trainer.callbacks=[]", "--data.eval_stride=50"]
    assert main(["fit", "--config", "fish_frames", *small, *short]) == 0
    assert main(["predict", "--ckpt_path", "runs/fish_frames"]) == 0
    run = tmp_path / "runs/fish_frames/version_0"
    recording = np.load(small_tank / "frames.npy", mmap_mode="r")
    with np.load(run / "predictions.npz") as file:
        index, frames = file["index"], file["frames"]
    assert index[-1] + 2 * 3 == len(recording) - 1, "the last three frames given are the last of the recording"
    assert set(np.diff(index)) == {50}
    assert frames.shape == (len(index), 5, 1, 24, 32)
    assert "predictions.gif" in capsys.readouterr().out
    with Image.open(run / "predictions.gif") as gif:
        shown = [np.asarray(frame.convert("L")).astype(int) for frame in ImageSequence.Iterator(gif)]
    assert len(shown) == 8
    assert shown[0].shape == (28, 3 * 36)
    cut = recording[index[1] :: 3][:3][:, nearest(48, 24)][:, :, nearest(64, 32)]
    for t, part in enumerate([*cut, *frames[1, :, 0]]):
        assert abs(shown[t][2:26, 38:70] - part).max() <= 1
        assert abs(shown[t][0] - (96 if t < 3 else 255)).max() <= 1


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 6])  # in the middle of the first epoch, at its last step, in the second
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
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
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tank: Path
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
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
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


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False])
def test_two_processes_stop_together_and_go_on(config: str, tmp_path: Path, to_all: bool) -> None:
    command = [sys.executable, str(ROOT / "main.py"), "--config", config, "--batch_size=4", "--run_dir=two", *_TWO]
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
    with open(tmp_path / "two/version_0/predictions.csv") as file:
        frames = [int(row["frame"]) for row in csv.DictReader(file)]
    assert frames == sorted(set(frames))
    assert len(frames) > 10


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--n_gpus", "64"], "--n_gpus 64: this machine has"),
        (["--n_gpus=-1"], "n_gpus"),
        (["--n_gpu=0"], "unrecognized arguments: --n_gpu=0"),
        (["--batch_sise=3"], "unrecognized arguments: --batch_sise=3"),
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=abc"], "batch_size"),
        (["--use_amp=maybe"], "use_amp: expected bool. Got value: maybe"),
        (["--use_amp=1"], "use_amp: expected bool"),
        (["--model.lr=fast"], "lr: expected float. Got value: fast"),
        (["--model.lr=-1"], "lr: -1.0 is not a number above 0"),
        (["--model.width=3"], "Option 'width' is not accepted"),
        (["--model.head=tail"], "head must be one of"),
        (["--model.in_channels=3"], "in_channels"),
        (["--data.flips=sideways"], "'sideways' is not one of all, random, none"),
        (["--data.path=nowhere"], "nowhere"),
        (["--data.clip_frames=4000"], "frames"),
        (["--trainer.precision=7"], "trainer.precision"),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--trainer.accelerator=gpu"], "gpu"),
        (["--model=Perceptron"], "Perceptron"),
        (["--config", "absent.yaml"], "--config absent.yaml: no such file"),
        (["--config", "broken.yaml"], "--config broken.yaml: not a YAML file"),
        (["--config", "wrong.yaml"], "colour"),
        (["--ckpt_path", "absent.ckpt"], "absent.ckpt: no such file"),
        (["--ckpt_path", "broken.yaml"], "broken.yaml: not a readable checkpoint"),
        (["--ckpt_path", "http://127.0.0.1:9/x.ckpt"], "only local files"),
        (["--ckpt_path", "last"], "--ckpt_path last: no run with a checkpoint below"),
        (["--weights", "absent.ckpt"], "absent.ckpt: no such file"),
        (["extra"], "unrecognized arguments: extra"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    if torch.cuda.is_available() and args == ["--trainer.accelerator=gpu"]:
        pytest.skip("there is a GPU")
    (tmp_path / "broken.yaml").write_text("a: [")
    (tmp_path / "wrong.yaml").write_text("colour: red")
    base = ["fit"] if "--config" in args else ["fit", "--config", config]
    assert main([*base, *args]) == 2
    output = capsys.readouterr()
    assert told in output.err
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train"], "train: no such command"),
        (["test"], "no run with a checkpoint below"),
        (["simulate"], "--out: must be given"),
        (["import-keras"], "source, --out: must be given"),
        (["simulate", "--out", "x", "--minutes", "long"], "minutes"),
        (["prepare", "absent.avi", "--out", "x"], "absent.avi"),
        (["simulate", "--out", "x", "--minute", "1"], "--minute"),
    ],
)
def test_errors_of_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


WEIGHT = "network.layers.0.cells.0.weight_ih"
LEFT_OUT = "its hyper-parameters are not names with numbers"
NOT_RESTORED = "its state cannot be restored"


@pytest.fixture(scope="module")
def trained(small_tank: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """Options that train in a second, and the checkpoint that they gave."""
    folder = tmp_path_factory.mktemp("trained")
    options = [
        *("--config", "quickstart", f"--data.path={small_tank}", "--data.simulate=null", "--n_gpus=0"),
        *("--data.batch_size=8", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"),
        *("--model.stem_channels=[]", "--trainer.max_epochs=1", "--test_after_fit=false", f"--run_dir={folder}"),
    ]
    assert main(["fit", *options]) == 0
    return options, load_checkpoint(next(folder.rglob("last.ckpt")))


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("hyper_parameters", "lr"), torch.ones(2), LEFT_OUT),
        (("hyper_parameters", "lr"), b"x", LEFT_OUT),
        (("hyper_parameters", 5), 5, LEFT_OUT),
        (("hyper_parameters",), [1, 2], LEFT_OUT),
        (("hyper_parameters", "foo"), 1, "its hyper-parameters are refused: Option 'foo' is not accepted"),
        (("hyper_parameters", "lr"), "fast", "its hyper-parameters are refused: lr: expected float"),
        (("hyper_parameters", "head"), {"class_path": "subprocess.Popen"}, "refused: head: expected str"),
        (("hyper_parameters", "head"), "sum", "(with the settings of checkpoint"),
        (("state_dict", WEIGHT), 5, f"{WEIGHT} is no tensor but int in the file"),
        (("state_dict", WEIGHT), torch.ones(2), f"{WEIGHT} is (2,) in the file"),
        (("state_dict", 7), torch.ones(1), "7 is (1,) in the file and absent"),
        (("state_dict",), {}, "is absent in the file"),
        (("state_dict", WEIGHT), bool, f"{WEIGHT} is torch.bool in the file and torch.float32"),
        (("state_dict", WEIGHT), torch.complex64, f"{WEIGHT} is torch.complex64 in the file"),
        (("state_dict", WEIGHT), float("nan"), f"{WEIGHT} holds values that are not finite"),
        (("optimizer_states",), [1], NOT_RESTORED),
        (("optimizer_states", 0, "param_groups"), [], NOT_RESTORED),
        (("optimizer_states", 0, "state", 0, "exp_avg"), torch.ones(3), "optimizer's exp_avg of parameter 0 has shape"),
        (("optimizer_states", 0, "state", 99), {}, "its optimizer's state is not that of"),
        (("lr_schedulers",), [{"x": 1}], NOT_RESTORED),
        (("loops",), 5, NOT_RESTORED),
        (("loops",), {}, NOT_RESTORED),
        (("callbacks",), 5, NOT_RESTORED),
        (("FishClips",), 5, NOT_RESTORED),
        (("pytorch-lightning_version",), 5, NOT_RESTORED),
    ],
)
def test_a_foreign_checkpoint_is_refused_in_one_line(
    trained: tuple[list[str], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    place: tuple[Any, ...],
    value: Any,
    told: str,
) -> None:
    options, content = trained
    content = copy.deepcopy(content)
    inner: Any = content
    for key in place[:-1]:
        inner = inner[key]
    if isinstance(value, float | type | torch.dtype):  # of the weight that is there
        kind = torch.bool if value is bool else value
        value = inner[place[-1]] * value if isinstance(value, float) else inner[place[-1]].to(kind)
    inner[place[-1]] = value
    path = tmp_path / "foreign.ckpt"
    torch.save(content, path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["fit", *options, "--trainer.max_epochs=2", f"--run_dir={tmp_path}", "--ckpt_path", str(path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert str(path) in lines[0]
    assert told in lines[0]
    assert not [p for p in tmp_path.rglob("*.ckpt") if p not in before]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_clips(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", config, "--model.l2=1e38"]) == 2
    error = capsys.readouterr().err
    assert "step 0: the loss is not a finite number" in error
    assert len(error.split("clips ")[1].split(", ")) == 8
    assert error.count("\n") == 1
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def test_tensorboard_is_served_while_the_run_lasts(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def ask(self: EpochLine, trainer: Any, module: Any) -> None:
        url = re.findall(r"TensorBoard: (\S+)", capsys.readouterr().out)
        if url:
            with urllib.request.urlopen(f"{url[0]}data/environment") as reply:
                asked.append(json.load(reply) | {"url": url[0]})

    monkeypatch.setattr(EpochLine, "on_train_epoch_end", ask)
    assert main(["--config", config, "--tensorboard"]) == 0
    assert asked[0]["data_location"] == "runs/tiny"
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(asked[0]["url"])


def test_another_logger_by_its_class(config: str, tmp_path: Path) -> None:
    logger = ["--trainer.logger=pytorch_lightning.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    assert main(["--config", config, *logger]) == 0
    assert "train/loss" in next((tmp_path / "logs").rglob("metrics.csv")).read_text()
    run = tmp_path / "runs/tiny/version_0"
    assert (run / "checkpoints/best.ckpt").is_file()
    assert not list(run.glob("events*"))


# -- what is told ------------------------------------------------------------------------------------------------------


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("fit", "test", "predict", *COMMANDS, "--n_gpus", "fish_serenity"):
        assert name in text
    assert all(len(line) <= 120 for line in text.splitlines())
    assert main(["fit", "--help"]) == 0
    assert "--save_every_minutes" in capsys.readouterr().out
    assert main(["fit", "--model.help=ClipClassification"]) == 0
    assert "hidden_channels" in capsys.readouterr().out
    assert main(["--version"]) == 0


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"main.py {name}" in capsys.readouterr().out


def test_print_config(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", config, "--model.lr=0.25", "--print_config"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["model"]["init_args"]["lr"] == 0.25
    assert content["data"]["init_args"]["batch_size"] == 8


def test_an_installed_package_finds_its_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convlstm_fish import cli_parser

    shutil.copytree(ROOT / "convlstm_fish", tmp_path / "convlstm_fish", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "convlstm_fish" / "configs")
    monkeypatch.setattr(cli_parser, "__file__", str(tmp_path / "convlstm_fish" / "cli_parser.py"))
    monkeypatch.chdir(tmp_path)
    assert cli_parser.find_config("quickstart") == str(tmp_path / "convlstm_fish/configs/quickstart.yaml")
    assert cli_parser.find_config("configs/quickstart.yaml") == str(tmp_path / "convlstm_fish/configs/quickstart.yaml")
