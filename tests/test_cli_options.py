"""No option is accepted and ignored: each option of fit, of the task and of the data changes something."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml

from convlstm_fish import cli_run
from convlstm_fish.cli_parser import normalise
from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.callbacks import CudaGraphs

# main() silences what Lightning says about options that no experiment would have; here its inside is called.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def config(tmp_path: Path, small_tank: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    content = {
        "model": {"class_path": "ClipClassification", "init_args": {"hidden_channels": [3, 3]}},
        "data": {"class_path": "FishClips", "init_args": {"path": str(small_tank)}},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "tiny.yaml")


def built(monkeypatch: pytest.MonkeyPatch, config: str, *args: str) -> tuple[dict[str, Any], Any]:
    """What the Trainer is made with, and the CLI, after parsing and building; nothing is run."""
    monkeypatch.setattr(cli_run.FishCLI, "_run_subcommand", lambda self, subcommand: None)
    cli = cli_run.FishCLI(normalise(["fit", "--config", config, *args]))
    return vars(cli.config.fit.trainer), cli


# -- the Trainer -------------------------------------------------------------------------------------------------------

# A value for each option of Lightning's Trainer that differs from the default.
TRAINER = {
    "accelerator": "cpu",
    "strategy": "ddp",
    "devices": "3",
    "num_nodes": "2",
    "precision": "bf16-mixed",
    "logger": "false",
    "callbacks": "[pytorch_lightning.callbacks.DeviceStatsMonitor]",
    "fast_dev_run": "true",
    "max_epochs": "3",
    "min_epochs": "2",
    "max_steps": "3",
    "min_steps": "2",
    "max_time": "00:01:00:00",
    "limit_train_batches": "3",
    "limit_val_batches": "3",
    "limit_test_batches": "3",
    "limit_predict_batches": "3",
    "overfit_batches": "3",
    "val_check_interval": "3",
    "check_val_every_n_epoch": "3",
    "num_sanity_val_steps": "3",
    "log_every_n_steps": "3",
    "enable_checkpointing": "false",
    "enable_progress_bar": "false",
    "enable_model_summary": "true",
    "accumulate_grad_batches": "3",
    "gradient_clip_val": "0.5",
    "gradient_clip_algorithm": "value",
    "deterministic": "true",
    "benchmark": "true",
    "inference_mode": "false",
    "use_distributed_sampler": "true",
    "profiler": "simple",
    "detect_anomaly": "true",
    "barebones": "true",
    "plugins": "[pytorch_lightning.plugins.io.TorchCheckpointIO]",
    "sync_batchnorm": "true",
    "reload_dataloaders_every_n_epochs": "3",
    "default_root_dir": "elsewhere",
    "enable_autolog_hparams": "false",
    "model_registry": "a/b",
}


def test_every_trainer_option_reaches_the_trainer(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def record(**options: Any) -> pl.Trainer:
        given.update(options)
        raise Stop

    names = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    assert names == set(TRAINER), "an option of the Trainer is not tested"

    def trainer_options(*args: str) -> dict[str, Any]:
        given.clear()
        with pytest.raises(Stop):
            built(monkeypatch, config, *args)
        return dict(given)

    monkeypatch.setattr(
        cli_run.LightningCLI, "_instantiate_trainer", lambda self, options, callbacks: record(**options)
    )
    monkeypatch.setattr(cli_run.os, "isatty", lambda descriptor: True)  # or there is no bar to turn off
    plain = trainer_options("--trainer.accelerator=auto")
    changed = trainer_options(*(f"--trainer.{name}={value}" for name, value in TRAINER.items()))
    for name in TRAINER:
        assert str(changed[name]) != str(plain[name]), name
    assert "DeviceStatsMonitor" in str(changed["callbacks"])
    assert "TorchCheckpointIO" in str(changed["plugins"])


# -- the short options and those of the run ----------------------------------------------------------------------------

OWN = {
    "n_gpus": ("0", lambda c, cli: c["devices"] == 1 and c["accelerator"] == "cpu"),
    "use_amp": ("true", lambda c, cli: c["precision"] == "bf16-mixed"),
    "batch_size": ("7", lambda c, cli: cli.datamodule.batch_size == 7),
    "run_dir": ("there", lambda c, cli: cli.folder.path == Path("there/version_0")),
    "tensorboard": ("true", lambda c, cli: cli.short["tensorboard"] is True),
    "test_after_fit": ("true", lambda c, cli: cli.short["test_after_fit"] is True),
    "save_every_minutes": ("3", lambda c, cli: any(_minutes(b) == 3 for b in cli.trainer.checkpoint_callbacks)),
    "cuda_graphs": ("false", lambda c, cli: not any(isinstance(b, CudaGraphs) for b in cli.trainer.callbacks)),
    "seed_everything": ("5", lambda c, cli: cli.datamodule.seed == 5),
}


def _minutes(callback: Any) -> float | None:
    interval = callback._train_time_interval
    return None if interval is None else interval.total_seconds() / 60


@pytest.mark.parametrize("name", sorted(OWN))
def test_options_of_the_run(name: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, seen = OWN[name]
    if name != "n_gpus":  # whose effect is the config's already
        assert not seen(*built(monkeypatch, config))
    assert seen(*built(monkeypatch, config, f"--{name}={value}"))


@pytest.mark.parametrize("config", ["moving_mnist", "fish_serenity"])
def test_cuda_graphs_are_the_default(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = built(monkeypatch, config, "--n_gpus=0")[1]
    assert any(isinstance(b, CudaGraphs) for b in cli.trainer.callbacks)


def test_no_option_of_fit_is_left_out(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parser = built(monkeypatch, config)[1].parser_of_run()
    known = {action.dest for action in parser._actions}
    roots = {dest for dest in known if "." not in dest} - {"help", "config", "trainer", "model", "data", "print_config"}
    # ckpt_path and weights: test_cli_resume.py. trainer.*: above. model.* and data.*: below and in tests/data/modules.
    assert roots == {*OWN, "ckpt_path", "weights"}
    assert {
        dest.removeprefix("trainer.") for dest in known if dest.startswith("trainer.") and not dest.endswith(".help")
    } == set(TRAINER)


# -- the task ----------------------------------------------------------------------------------------------------------

SIZE = (20, 24)
BASE: dict[str, Any] = {"in_channels": 2, "hidden_channels": [3, 4]}
# option: (value, other options that both sides get)
TASK: dict[str, tuple[Any, dict[str, Any]]] = {
    "in_channels": (3, {}),
    "hidden_channels": ([3, 5], {}),
    "kernel_size": (5, {}),
    "num_classes": (3, {}),
    "padding": ("valid", {}),
    "bias": (False, {}),
    "peephole": ("channel", {}),
    "recurrent_activation": ("hard_sigmoid", {}),
    "pool_size": (3, {}),
    "batch_norm": (False, {}),
    "batch_norm_eps": (0.5, {}),
    "batch_norm_momentum": (0.5, {}),
    "batch_norm_affine": (True, {}),
    "dropout": (0.5, {}),
    "recurrent_dropout": (0.5, {}),
    "head": ("avg", {}),
    "dense_features": ([5], {}),
    "stem_channels": ([5], {}),
    "image_size": ([20, 30], {"head": "flatten", "image_size": list(SIZE)}),
    "checkpoint_every": (2, {}),
    "backend": ("triton", {}),
    "class_weights": ([0.2, 0.8], {}),
    "l1": (0.1, {}),
    "l2": (0.1, {}),
    "lr": (0.1, {}),
    "betas": ([0.5, 0.5], {}),
    "eps": (0.1, {}),
    "weight_decay": (0.1, {}),
    "lr_schedule": ("cosine", {}),
    "warmup_steps": (3, {}),
}


def trace(options: dict[str, Any]) -> list[Any]:
    """Everything that two training steps and a validation of a task give: shapes, loss, weights, schedule, memory."""
    torch.manual_seed(0)
    try:
        task = ClipClassification(**options)
        size = options.get("image_size") or SIZE
        rng = torch.Generator().manual_seed(0)
        batch = {
            "video": torch.rand(4, 5, options["in_channels"], *size, generator=rng),
            "label": torch.tensor([0, 1, 0, 1]),
        }
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            trainer = pl.Trainer(
                max_steps=2,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                accelerator="cpu",
                devices=1,
            )
            data = torch.utils.data.DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
            trainer.fit(task, data, data)
        state = [(n, tuple(v.shape), v.double().sum().item()) for n, v in task.state_dict().items()]
        return [state, sum(saved)]
    except (RuntimeError, ValueError) as error:  # the kernels cannot run here: also a difference
        return [str(error)]


def test_every_option_of_the_task_changes_something() -> None:
    names = set(inspect.signature(ClipClassification.__init__).parameters) - {"self"}
    assert names == set(TASK), "an option of the task is not tested"
    plain: dict[str, list[Any]] = {}
    for name, (value, context) in TASK.items():
        if str(context) not in plain:
            plain[str(context)] = trace(BASE | context)
            assert trace(BASE | context) == plain[str(context)], "not repeatable, so nothing would be shown"
        assert trace(BASE | context | {name: value}) != plain[str(context)], f"{name}={value} changes nothing"
