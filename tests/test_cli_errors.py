"""What is wrong on the command line or in a checkpoint is told in one line, and main() gives 2."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from convlstm_fish.cli import main
from convlstm_fish.tasks.checkpoint_io import load_checkpoint


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--n_gpus", "64"], "--n_gpus 64: this machine has"),
        (["--n_gpus=-1"], "n_gpus"),
        (["--n_gpu=0"], "unrecognized arguments: --n_gpu=0; did you mean --n_gpus? (see --help)"),
        (["--batch_sise=3"], "unrecognized arguments: --batch_sise=3; did you mean --batch_size?"),
        (["--batch_size=0"], "batch_size"),
        (["--batch_size=abc"], "batch_size"),
        (["--use_amp=maybe"], "use_amp: expected bool. Got value: maybe"),
        (["--use_amp=1"], "use_amp: expected bool"),
        (["--model.lr=fast"], "lr: expected float. Got value: fast"),
        (["--model.lr=-1"], "lr: -1.0 is not a number above 0"),
        (["--traner.max_epochs", "3"], "did you mean --trainer.max_epochs?"),
        (["--model.width=3"], "Option 'width' is not accepted (see --help)"),
        (["--model.hidden_channel=3"], "Option 'hidden_channel' is not accepted; did you mean hidden_channels?"),
        (["--model.head=tail"], "head must be one of"),
        (["--model.in_channels=3"], "in_channels"),
        (["--data.flips=sideways"], "'sideways' is not one of all, random, none"),
        (["--data.path=nowhere"], "nowhere"),
        (["--data.clip_frames=4000"], "frames"),
        (["--trainer.precision=7"], "trainer.precision"),
        (["--trainer.accelerator=abacus"], "abacus"),
        (["--trainer.accelerator=gpu"], "gpu"),
        (["--model=Perceptron"], "model: no class Perceptron is known"),
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
    assert not list(tmp_path.glob("runs/**/version_*")), "a refused run leaves a folder"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["train"], "train: no such command (see --help)"),
        (["predit"], "predit: no such command; did you mean predict?"),
        (["simulate", "--out", "x", "--minute=3"], "--minute=3; did you mean --minutes?"),
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


def test_a_warning_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*_: Any) -> None:
        warnings.showwarning("mind\nthe gap", UserWarning, "module.py", 3, sys.stdout)

    monkeypatch.setattr("convlstm_fish.cli._run_command", command)
    # as Python does it, not as pytest, which keeps warnings
    monkeypatch.setattr(warnings, "showwarning", lambda *args: sys.stdout.write(warnings.formatwarning(*args[:4])))
    before = warnings.formatwarning
    assert main(["prepare"]) == 0
    assert capsys.readouterr().out == "warning: mind the gap\n"
    assert warnings.formatwarning is before
