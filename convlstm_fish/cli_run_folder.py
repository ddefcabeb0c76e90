"""The folder of a run: which one it is, and what is written there before training starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from convlstm_fish.cli_parser import CHECKPOINTS, CONFIG
from convlstm_fish.files import write_text

# Scalars that the table of hyper-parameters shows beside each run.
_OUTCOMES = ("val/loss", "val/auroc", "val/average_precision", "test/loss", "test/auroc", "test/average_precision")


def next_version(run_dir: Path) -> Path:
    """``run_dir/version_k`` with the first k above all that exist."""
    taken = [int(m[1]) for p in run_dir.glob("version_*") if (m := re.fullmatch(r"version_(\d+)", p.name))]
    return run_dir / f"version_{max(taken, default=-1) + 1}"


class RunFolder(pl.Callback):
    """Makes all processes use one folder, and writes the config and TensorBoard's hyper-parameters into it.

    Args:
        path: the folder; where processes differ, the first one's counts.
        config: the whole configuration of the run as YAML.
    """

    def __init__(self, path: Path, config: str) -> None:
        self.path, self.config = path, config

    def logger(self) -> TensorBoardLogger:
        """A logger that writes into this folder."""
        return TensorBoardLogger(self.path.parent, name="", version=self.path.name, default_hp_metric=False)

    def discard(self) -> None:
        """Remove what a run leaves that was refused before its setup: an empty file of TensorBoard's."""
        left = list(self.path.glob("*"))
        if not left or any(not path.name.startswith("events.out.tfevents") for path in left):
            return
        for path in left:
            path.unlink()
        self.path.rmdir()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Agree on the folder, before the checkpoint callbacks ask for theirs."""
        self.path = Path(trainer.strategy.broadcast(os.fspath(self.path)))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = os.path.abspath(self.path / CHECKPOINTS)
        if trainer.is_global_zero and not (self.path / CONFIG).exists():
            write_text(self.path / CONFIG, self.config)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what starts, and where; hand the settings to TensorBoard."""
        if not trainer.is_global_zero:
            return
        weights = sum(p.numel() for p in pl_module.parameters())
        print(
            f"{type(pl_module).__name__}: {weights:,} weights, on {pl_module.device}; run folder {self.path}",
            flush=True,
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                settings = flat(yaml.safe_load(self.config))
                writer = logger.experiment
                writer.add_text("config", f"```yaml\n{self.config}\n```")
                # log_hyperparams would need the metrics' final values, and write them as their first ones.
                for summary in hparams(settings, dict.fromkeys(_OUTCOMES, 0.0)):
                    writer._get_file_writer().add_summary(summary)


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of model and data, and the seed, as one level of plain values."""
    settings: dict[str, Any] = {"seed": config["seed_everything"]}
    for part in ("model", "data"):
        for name, value in (config[part].get("init_args") or {}).items():
            settings[f"{part}.{name}"] = value if isinstance(value, int | float | bool | str) else str(value)
    return settings
