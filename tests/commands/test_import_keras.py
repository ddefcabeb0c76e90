"""import-keras and export-keras on the command line, and what the other commands do with the checkpoint."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlstm_fish.cli import main
from convlstm_fish.commands.import_keras import clip_settings
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.simulate import simulate
from convlstm_fish.interop.keras import import_keras
from convlstm_fish.models import visionary_serenity
from convlstm_fish.tasks.clip_classification import ClipClassification

pytestmark = [
    # Keras's own, on its torch backend with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """visionary-serenity, from its SavedModel."""
    path = tmp_path_factory.mktemp("import") / "model.ckpt"
    source = shared / "published" / "checkpoints" / "visionary-serenity"
    assert main(["import-keras", str(source), "--out", str(path), "--class_weights", "0.133", "0.866"]) == 0
    return path


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of a few seconds."""
    path = tmp_path_factory.mktemp("tank") / "tank"
    simulate(path, minutes=0.25, seed=1, size=(24, 32))
    return path


def options(tank: Path, runs: Path) -> list[str]:
    """A quick run on the recording."""
    return [
        f"--data.path={tank}",
        "--data.simulate=null",
        "--data.clip_frames=16",
        "--data.image_size=[24,32]",
        "--data.splits=[0.6,0.2,0.2]",
        "--data.eval_stride=20",
        "--batch_size=2",
        "--n_gpus=0",
        f"--run_dir={runs}",
        "--model.backend=reference",
    ]


def test_checkpoint_is_an_ordinary_one(checkpoint: Path, shared: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    assert content["hyper_parameters"] == {
        "in_channels": 4,
        "hidden_channels": [16, 32],
        "kernel_size": 3,
        "num_classes": 1,
        "padding": "valid",
        "bias": False,
        "recurrent_activation": "hard_sigmoid",
        "pool_size": 2,
        "batch_norm": True,
        "batch_norm_eps": 1e-3,
        "batch_norm_momentum": 0.01,
        "batch_norm_affine": False,
        "dropout": 0.0,
        "recurrent_dropout": 0.0,
        "head": "max",
        "dense_features": [],
        "stem_channels": [],
        "peephole": None,
        "image_size": None,
        "l1": 0.0,
        "l2": 0.0,
        "lr": 8e-5,
        "betas": [0.9, 0.999],
        "eps": 1e-7,
        "class_weights": [0.133, 0.866],
    }
    assert (content["epoch"], content["global_step"]) == (0, 0)
    assert content.keys() >= {"pytorch-lightning_version", "loops", "callbacks", "optimizer_states", "lr_schedulers"}

    task = ClipClassification.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    expected = import_keras(shared / "published" / "checkpoints" / "visionary-serenity")
    for name, value in expected.state_dict.items():
        assert torch.equal(task.network.state_dict()[name], value), name
    optimizer = task.configure_optimizers()
    optimizer.load_state_dict(content["optimizer_states"][0])
    assert expected.optimizer is not None
    for name, parameter in task.network.named_parameters():
        state = optimizer.state[parameter]
        assert int(state["step"]) == 179152
        assert torch.equal(state["exp_avg"], expected.optimizer.moments[name][0]), name
        assert torch.equal(state["exp_avg_sq"], expected.optimizer.moments[name][1]), name


def test_it_tells_of_its_clips(checkpoint: Path) -> None:
    told = torch.load(checkpoint, weights_only=True)["datamodule_hyper_parameters"]
    published = {"input_form": "time_channels", "frames_per_step": 4, "clip_frames": 120, "image_size": [120, 160]}
    assert told == published
    assert clip_settings((None, 1, 20, None)) == {"input_form": "single_channel"}
    assert clip_settings((7, 1, 20, 30)) == {"input_form": "single_channel", "clip_frames": 7, "image_size": [20, 30]}


def test_predict_and_test_go_on_from_it(checkpoint: Path, tank: Path, tmp_path: Path) -> None:
    common = ["--ckpt_path", str(checkpoint), *options(tank, tmp_path / "runs")]
    assert main(["predict", *common]) == 0
    (table,) = (tmp_path / "runs").rglob("predictions.csv")
    with table.open() as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    frames = Recording.open(tank).frames
    network = visionary_serenity("reference").eval()
    network.load_state_dict(
        {key.removeprefix("network."): value for key, value in state_of(checkpoint).items() if "network." in key}
    )
    for row in rows[:: len(rows) // 3]:
        last = int(row["frame"])
        clip = np.asarray(frames[last - 15 : last + 1], np.float32) / 255
        with torch.no_grad():
            expected = network(torch.from_numpy(clip).reshape(1, 4, 4, 24, 32)).sigmoid().item()
        assert row["probability"] == pytest.approx(expected, abs=1e-5)

    assert main(["test", *common]) == 0
    assert list((tmp_path / "runs").rglob("report.html"))


def test_fit_goes_on_from_it(checkpoint: Path, tank: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    steps = [
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=1",
        "--trainer.max_epochs=1",
        "--test_after_fit=false",
    ]
    assert main(["fit", "--ckpt_path", str(checkpoint), *options(tank, runs), *steps]) == 0
    (last,) = runs.rglob("last.ckpt")
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 2
    before = state_of(checkpoint)
    for index, state in content["optimizer_states"][0]["state"].items():
        assert int(state["step"]) == 179154, index
    for name, value in content["state_dict"].items():
        if name.endswith(("weight_ih", "weight_hh")):
            moved = (value - before[name]).abs()
            # With these betas Adam moves a weight by at most 3.17 and then 4.25 learning rates, after a long quiet.
            assert 0 < moved.max() < (3.17 + 4.25) * 8e-5, name
            # An Adam that starts anew moves nearly every weight by the learning rate in each step: this one went on.
            assert moved.median() < 0.5 * 8e-5, name


def state_of(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state


def test_out_to_keras_and_back(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("keras")
    for name, extra in (("model.weights.h5", ["--recurrent_activation", "hard_sigmoid"]), ("model.keras", [])):
        file, back = tmp_path / name, tmp_path / f"{name}.ckpt"
        assert main(["export-keras", str(checkpoint), "--out", str(file)]) == 0
        assert main(["import-keras", str(file), "--out", str(back), *extra]) == 0
        for key, value in state_of(checkpoint).items():
            if not key.endswith("num_batches_tracked"):
                assert torch.equal(state_of(back)[key], value), key
    assert "66,849 weights, for clips of 30 steps, 4 channels, 120 x 160 pixels" in capsys.readouterr().out


def test_npz_says_what_was_assumed(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(shared / "published" / "weights" / "upbeat-snowflake-91.npz")
    assert main(["import-keras", source, "--out", str(tmp_path / "a.ckpt")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: assumed:")]
    assert len(notes) == 4
    assert main(["import-keras", source, "--out", str(tmp_path / "b.ckpt"), "--padding", "same", "--head", "avg"]) == 0
    settings = torch.load(tmp_path / "b.ckpt", weights_only=True)["hyper_parameters"]
    assert (settings["padding"], settings["head"]) == ("same", "avg")
    assert "class_weights" not in settings
    assert "lr" not in settings


def test_errors_are_one_line_and_write_nothing(
    checkpoint: Path, shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(shared / "published" / "weights" / "visionary-serenity.npz")
    before = checkpoint.read_bytes()
    out = str(tmp_path / "model.ckpt")
    capsys.readouterr()
    cases: list[tuple[list[str], str]] = [
        (["import-keras", source, "--out", str(checkpoint)], "exists already; --overwrite replaces it"),
        (["import-keras", str(tmp_path), "--out", out], "holds no saved_model.pb"),
        (["import-keras", source, "--out", out, "--padding", "wide"], "--padding must be one of valid, same"),
        (["import-keras", source, "--out", out, "--pool_size", "2", "2", "2"], "3 values for the 2 ConvLSTM layers"),
        (["import-keras", source, "--out", out, "--class_weights", "1"], "are not 2 numbers"),
        (["export-keras", source, "--out", str(tmp_path / "m.keras")], "refused, it holds more than weights"),
        (["export-keras", str(checkpoint), "--out", str(tmp_path / "m.h5")], "must end in .weights.h5 or .keras"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert checkpoint.read_bytes() == before
    assert main(["import-keras", source, "--out", str(checkpoint), "--overwrite"]) == 0
    checkpoint.write_bytes(before)
