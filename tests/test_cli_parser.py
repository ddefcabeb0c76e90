"""The one form that every command line is brought into before it is parsed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch

from convlstm_fish.cli_configs import config_folder, find_config, read_config, shipped_configs
from convlstm_fish.cli_errors import told_shortly
from convlstm_fish.cli_parser import find_checkpoint, normalise, option, run_of, versions
from convlstm_fish.errors import UserError

QUICKSTART = str(config_folder() / "quickstart.yaml")


def save(path: Path, age: float = 0.0, **content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, **content}, path)
    os.utime(path, (time.time() - age,) * 2)
    return path


def make_run(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for age, name in enumerate(names):
        save(folder / "checkpoints" / f"{name}.ckpt", age=100 * age)
    (folder / "config.yaml").write_text("model: {}\n")
    return folder


@pytest.mark.parametrize(
    ("args", "subcommand", "rest"),
    [
        ([], "fit", []),
        (["fit"], "fit", []),
        (["--n_gpus", "2"], "fit", ["--n_gpus", "2"]),
        (["--n_gpus=2", "--use_amp=True"], "fit", ["--n_gpus=2", "--use_amp=True"]),
        (["--use_amp", "--n_gpus", "2"], "fit", ["--use_amp=true", "--n_gpus", "2"]),
        (["--use_amp", "False"], "fit", ["--use_amp", "False"]),
        (["fit", "--tensorboard"], "fit", ["--tensorboard=true"]),
    ],
)
def test_without_a_config_it_is_the_quick_start(args: list[str], subcommand: str, rest: list[str]) -> None:
    request = normalise(args)
    assert request.subcommand == subcommand
    assert request.arguments == ["--config", QUICKSTART, *rest]
    assert request.run_dir == Path("runs/quickstart")
    assert request.checkpoint is None


def test_configs_come_first_so_that_options_beat_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("run_dir: from/a\n")
    (tmp_path / "b.yaml").write_text("{}")
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")
    request = normalise(["--model.lr=1", "--config", a, "--batch_size", "3", f"-c={b}"])
    assert request.arguments == ["--config", a, "--config", b, "--model.lr=1", "--batch_size", "3"]
    assert request.run_dir == Path("from/a")
    assert normalise(["--config", b]).run_dir == Path("runs/b")
    assert normalise(["--config", a, "--run_dir=mine"]).run_dir == Path("mine")


def test_naming_the_classes_does_without_the_quick_start() -> None:
    args = ["--model=FramePrediction", "--data", "MovingMNIST"]
    assert normalise(args).arguments == args


def test_config_names() -> None:
    assert Path(find_config("quickstart")).is_file()
    assert "fish_serenity" in shipped_configs()
    with pytest.raises(UserError, match=r"--config nothing: no such file.*quickstart"):
        find_config("nothing")


def test_config_files_that_are_none(tmp_path: Path) -> None:
    for text, told in (("a: [", "not a YAML file"), ("- 1", "must hold keys"), ("\xff", "must hold keys")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(UserError, match=told):
            read_config(str(tmp_path / "c.yaml"))
    with pytest.raises(UserError, match="Is a directory"):
        read_config(str(tmp_path))


def test_unknown_commands_and_options_of_fit() -> None:
    with pytest.raises(UserError, match="train: no such command"):
        normalise(["train"])
    with pytest.raises(UserError, match="--weights: is an option of fit"):
        normalise(["test", "--weights", "x"])
    with pytest.raises(UserError, match="--config: needs a value"):
        normalise(["fit", "--config"])


def test_option_takes_the_last_value() -> None:
    assert option(["--a", "1", "--a=2"], "--a") == "2"
    assert option(["--ab=1"], "--a") is None


def test_versions_are_newest_first_and_have_checkpoints(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        make_run(tmp_path / f"version_{number}", "last")
    (tmp_path / "version_11" / "checkpoints").mkdir(parents=True)
    assert [v.name for v in versions(tmp_path)] == ["version_10", "version_2", "version_0"]


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    old, new = make_run(tmp_path / "version_0", "last", "best"), make_run(tmp_path / "version_1", "last", "best")
    last, best = new / "checkpoints" / "last.ckpt", new / "checkpoints" / "best.ckpt"
    assert find_checkpoint("last", tmp_path, "fit") == last
    assert find_checkpoint("best", tmp_path, "fit") == best
    assert find_checkpoint(str(new), tmp_path, "fit") == last
    assert find_checkpoint(str(new), tmp_path, "test") == best
    assert find_checkpoint(str(tmp_path), Path("elsewhere"), "test") == best
    assert find_checkpoint(str(old), tmp_path, "test") == old / "checkpoints" / "best.ckpt"
    assert find_checkpoint(str(last), tmp_path, "test") == last
    assert run_of(last) == new
    assert run_of(save(tmp_path / "model.ckpt")) is None


def test_resuming_passes_over_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "version_0", "last", "best")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-20])
    assert find_checkpoint("last", tmp_path, "fit") == run / "checkpoints" / "best.ckpt"
    assert "passed over" in capsys.readouterr().err
    with pytest.raises(UserError, match="not a readable checkpoint"):
        find_checkpoint(str(last), tmp_path, "fit")
    (run / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(UserError, match="no good checkpoint"):
        find_checkpoint(str(run), tmp_path, "fit")
    with pytest.raises(UserError, match="no run with a checkpoint below"):
        find_checkpoint("last", tmp_path / "empty", "fit")


def test_a_run_folder_brings_its_config_and_its_hyper_parameters(tmp_path: Path) -> None:
    run = make_run(tmp_path / "version_3")
    checkpoint = save(run / "checkpoints" / "best.ckpt", hyper_parameters={"lr": 0.5, "hidden_channels": [3]})
    request = normalise(["test", "--ckpt_path", str(run), "--model.lr=2"])
    known = json.dumps({"model": {"init_args": {"lr": 0.5, "hidden_channels": [3]}}})
    assert request.arguments == [
        *("--config", str(run / "config.yaml"), "--config", known, "--ckpt_path", str(run), "--model.lr=2")
    ]
    assert (request.checkpoint, request.run_dir) == (checkpoint, tmp_path)
    named = normalise(["test", "--ckpt_path", str(run), "--config", "quickstart"])
    assert named.arguments[:2] == ["--config", find_config("quickstart")]
    assert named.run_dir == Path("runs/quickstart")


def test_a_checkpoint_without_a_config_beside_it_needs_one(tmp_path: Path) -> None:
    alone = str(save(tmp_path / "alone.ckpt"))
    for args in (["test", "--ckpt_path", alone], ["fit", "--ckpt_path", alone], ["fit", "--weights", alone]):
        with pytest.raises(UserError, match=r"alone.ckpt: neither a config.yaml beside .* give --config"):
            normalise(args)
    assert normalise(["test", "--ckpt_path", alone, "--config", "fish_serenity"]).checkpoint == Path(alone)
    told = str(save(tmp_path / "told.ckpt", datamodule_hyper_parameters={"clip_frames": 120}))
    clips = json.dumps({"data": {"init_args": {"eval_stride": 1, "simulate": None, "clip_frames": 120}}})
    assert normalise(["test", "--ckpt_path", told]).arguments[2:4] == ["--config", clips]


def test_numbers_for_the_model_or_the_data_are_a_list() -> None:
    args = ["--data.splits", "0.6,0.2,0.2", "--model.hidden_channels=8,16", "--run_dir=1,2", "--trainer.devices", "0,1"]
    wanted = ["--data.splits", "[0.6,0.2,0.2]", "--model.hidden_channels=[8,16]", *args[3:]]
    assert normalise(["fit", *args]).arguments[-len(args) :] == wanted


def test_messages_of_the_parser_in_one_line() -> None:
    union = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal[64, 32], <class 'NoneType'>]
  Errors:
    - Expected a typing.Literal[64, 32]
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: 7"""
    assert told_shortly(union) == "trainer.precision: expected Literal[64, 32]. Got value: 7"
    nested = """Parser key "model":
  Errors:
    - Problem with given class_path 'convlstm_fish.tasks.ClipClassification':
        Parser key "lr":
          Expected a <class 'float'>. Got value: x
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: NestedArg"""
    assert told_shortly(nested).startswith("lr: ClipClassification: expected float. Got value: x")
