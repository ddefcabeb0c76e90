"""The command line as a person uses it: every call goes through main()."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
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
from convlstm_fish.tasks.callbacks import EpochLine

ROOT = Path(__file__).resolve().parents[1]


# -- the whole way -----------------------------------------------------------------------------------------------------


def test_fit_test_validate_predict(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", config, "--test_after_fit"]) == 0
    run = tmp_path / "runs" / "tiny" / "version_0"
    written = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}
    assert {
        *("config.yaml", "metrics.json", "test_predictions.csv", "report.html"),
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
    with open(run / "test_predictions.csv", newline="") as file:
        assert "label" in next(csv.reader(file)), "what the test wrote is still there"
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["frame", "time_s", "probability"]
    assert rows[0]["frame"] == str(540 + 7)
    assert float(rows[0]["time_s"]) == pytest.approx(547 / 30, abs=1e-4)
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    assert [p.name for p in run.parent.iterdir()] == ["version_0"]
    # The predictions of another film do not take their place.
    capsys.readouterr()
    before = (run / "predictions.csv").read_bytes()
    assert main(["predict", "--config", config, "--data.predict_split=test"]) == 0
    assert "predictions_2.csv" in capsys.readouterr().out
    assert (run / "predictions.csv").read_bytes() == before
    assert (run / "predictions_2.csv").read_bytes() != before


def test_the_saved_config_repeats_the_run(
    config: str, tmp_path: Path, weights: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
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


def test_the_seed_reaches_data_and_weights(
    config: str, tmp_path: Path, losses: Callable[[Path], dict[int, float]]
) -> None:
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


# -- TensorBoard and other loggers -------------------------------------------------------------------------------------


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


def test_a_misspelt_recording_is_not_simulated(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulating = tmp_path / "simulating.yaml"
    content = yaml.safe_load(Path(config).read_text())
    content["data"]["init_args"] |= {"path": "tank", "simulate": {"minutes": 0.5, "size": [24, 32]}}
    simulating.write_text(yaml.safe_dump(content))
    fit = ["fit", "--config", str(simulating), "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    assert main([*fit, "--data.path=tnak"]) == 2
    assert "error: tnak: no such recording" in capsys.readouterr().err
    assert main([*fit, "--data.path=tank"]) == 0  # the config's own
    assert (tmp_path / "tank").is_dir()
    assert not (tmp_path / "tnak").exists()


def test_a_package_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "convlstm_fish.cli_errors", raising=False)
    assert main(["simulate", "--out", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: jsonargparse: is not installed for ")
    assert error.count("\n") == 1


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
    from convlstm_fish import cli_configs

    shutil.copytree(ROOT / "convlstm_fish", tmp_path / "convlstm_fish", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", tmp_path / "convlstm_fish" / "configs")
    monkeypatch.setattr(cli_configs, "__file__", str(tmp_path / "convlstm_fish" / "cli_configs.py"))
    monkeypatch.chdir(tmp_path)
    assert cli_configs.find_config("quickstart") == str(tmp_path / "convlstm_fish/configs/quickstart.yaml")
    assert cli_configs.find_config("configs/quickstart.yaml") == str(tmp_path / "convlstm_fish/configs/quickstart.yaml")
