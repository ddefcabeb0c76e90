"""Every shipped config trains through main(), only smaller: fewer frames, fewer channels, one batch."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from convlstm_fish.cli import main
from convlstm_fish.cli_configs import config_folder

CONFIGS = sorted(config_folder().glob("*.yaml"))

_CLIPS = ["--data.image_size=[24,32]", "--data.clip_stride=50", "--data.eval_stride=40"]
_TANK = [*_CLIPS, "--batch_size=2", "--data.path={tank}", "--data.simulate=null", "--data.splits=[0.4,0.3,0.3]"]
_SECOND = ["--data.clip_seconds=1", "--data.horizon_seconds=0.5"]
_DIGITS = ["--data.train_size=2", "--data.validation_size=2", "--data.test_size=2", "--batch_size=1"]

# What makes each config small enough for a test; everything else in it stays.
SMALLER = {
    "quickstart": _TANK,
    "fish_serenity": [*_TANK, *_SECOND],
    "fish_snowflake": [*_TANK, *_SECOND],
    "fish_chase": [*_TANK, *_SECOND, "--data.clip_stride=3", "--data.splits=[0.8,0.1,0.1]"],
    "fish_zebrafish": _TANK,
    "ablation_base": [*_TANK, *_SECOND],
    "fish_frames": [
        *("--data.path={tank}", "--data.simulate=null", "--model.hidden_channels=[2,2]", "--batch_size=1"),
        *("--data.context_frames=3", "--data.future_frames=2", "--data.image_size=[24,32]"),
    ],
    "moving_mnist": [*_DIGITS, "--model.hidden_channels=[2,2]", "--data.image_size=32"],
    "moving_mnist_shi": [*_DIGITS, "--model.hidden_channels=[2,2,2]"],
    "openstl_convlstm_s": [*_DIGITS, "--model.hidden_channels=[2,2]", "--data.image_size=32"],
    "sequence_classification": _DIGITS,
}


def test_every_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS} == set(SMALLER)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_tank: Path) -> None:
    monkeypatch.chdir(tmp_path)
    content = yaml.safe_load(path.read_text())
    assert {"model", "data", "trainer", "seed_everything"} <= set(content)
    smaller = [option.format(tank=small_tank) for option in SMALLER[path.stem]]
    once = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    once += ["--trainer.check_val_every_n_epoch=1", "--trainer.val_check_interval=1"]
    once += ["--trainer.limit_test_batches=1", "--test_after_fit=false", "--n_gpus=0", "--use_amp=false"]
    assert main(["fit", "--config", str(path), *smaller, *once]) == 0
    run = tmp_path / "runs" / path.stem / "version_0"
    assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (run / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_start_learns_within_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    assert main(["--n_gpus=0"]) == 0
    assert time.monotonic() - started < 300
    (metrics,) = tmp_path.rglob("metrics.json")
    (row,) = [row for row in json.loads(metrics.read_text())["rows"] if row["name"] == "quickstart"]
    assert row["auc"] > 0.75


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_the_chase_network_beats_every_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--config", "fish_chase", "--n_gpus=1", "--use_amp=True"]) == 0
    (path,) = tmp_path.rglob("metrics.json")
    metrics = json.loads(path.read_text())
    assert [row["name"] for row in metrics["rows"] if row["undefined"]] == []
    assert len(metrics["auc_differences"]) == 5
    assert all(difference["interval"][0] > 0 for difference in metrics["auc_differences"])
    assert "beats every baseline of the panel" in metrics["verdicts"]["fish_chase"]
