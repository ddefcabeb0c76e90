"""fit, validate, test and predict: from parsed options to a finished run folder."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import warnings
from contextlib import ExitStack, redirect_stderr
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.io import CheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from convlstm_fish.cli_checkpoint import check_resumed, resumable, tell_of_other_settings, while_restoring
from convlstm_fish.cli_configs import class_options
from convlstm_fish.cli_errors import OneLineErrors, told_shortly
from convlstm_fish.cli_parser import CHECKPOINTS, TRAINER_COMMANDS, Request, normalise, option, run_of
from convlstm_fish.cli_results import write_predictions, write_test
from convlstm_fish.cli_run_folder import RunFolder, next_version
from convlstm_fish.data.modules import FishClips
from convlstm_fish.errors import UserError
from convlstm_fish.tasks import ClipClassification, FramePrediction
from convlstm_fish.tasks.callbacks import (
    ClipFigures,
    CudaGraphs,
    EpochLine,
    GracefulStop,
    LateProgressBar,
    NonFiniteGuard,
    SignalStop,
    StepSeed,
    TrainingMonitor,
)
from convlstm_fish.tasks.checkpoint_io import (
    SafeCheckpointIO,
    check_moments,
    check_weights,
    load_checkpoint,
)
from convlstm_fish.tensorboard_server import TensorBoardServer

_TRAINER_DEFAULTS = {
    "devices": 1,
    "use_distributed_sampler": False,  # the DataModules divide the samples among processes themselves
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "log_every_n_steps": 10,
}
# Nothing in these helps whoever runs an experiment; what does is said by this package itself.
_NOISE = (
    r".*does not have many workers.*",
    r".*smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*ended before the epoch ended and your dataloader is not resumable.*",  # it is, see ResumableDataModule
    r".*tensorboardX.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*pkg_resources is deprecated.*",
    r".*The dirpath has changed from.*",
    r".*`weights_only` was not set.*",
    r"(?s).*JSONARGPARSE_DEPRECATION_WARNINGS.*",  # Lightning's calls, which jsonargparse is about to rename
    r"(?s).*instantiate_classes.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*The AccumulateGrad node's stream does not match.*",  # Lightning makes DDP in a stream of its own, on purpose
    r".*could not find the monitored key.*",  # a run that ended before its first validation has no best.ckpt
)


class TrainerParser(OneLineErrors, LightningArgumentParser):
    """The parser of fit, validate, test and predict."""


class FishCLI(LightningCLI):
    """LightningCLI with one order of precedence: short options, then long ones, then the config, then defaults."""

    def __init__(self, request: Request) -> None:
        self.arguments, self.run_dir, self.checkpoint = request.arguments, request.run_dir, request.checkpoint
        self.subcommand_asked, self.named_configs = request.subcommand, request.named_configs
        self.saved: dict[str, Any] = load_checkpoint(self.checkpoint) if self.checkpoint else {}
        self.source = self.checkpoint
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            save_config_callback=None,
            trainer_defaults=_TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=TrainerParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=[request.subcommand, *request.arguments],
            run=True,
        )

    # -- parsing -------------------------------------------------------------------------------------------------------

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, and the arguments of the Trainer's methods that are none of their options."""
        hidden = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        hidden |= {"verbose", "return_predictions", "weights_only"}
        return dict.fromkeys(TRAINER_COMMANDS, hidden)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The short options, and those about the run as a whole."""
        parser.add_argument(
            "--n_gpus", type=NonNegativeInt, help="GPUs; 0 is the CPU, more than 1 trains on all of them"
        )
        parser.add_argument(
            "--use_amp", type=bool, help="mixed precision: bfloat16 where the device has it, or float16"
        )
        parser.add_argument("--batch_size", type=PositiveInt, help="short for --data.batch_size, which it beats")
        parser.add_argument("--run_dir", type=str, help="folder of the runs; default runs/NAME-OF-THE-CONFIG")
        parser.add_argument("--tensorboard", type=bool, default=False, help="serve TensorBoard while the run lasts")
        parser.add_argument("--weights", type=str, help="fit: start a new run from the weights of this checkpoint")
        parser.add_argument(
            "--test_after_fit", type=bool, default=False, help="fit: test the best checkpoint at the end"
        )
        parser.add_argument(
            "--save_every_minutes",
            type=PositiveFloat,
            default=10.0,
            help="fit: renew last.ckpt this often, besides after each epoch",
        )
        parser.add_argument(
            "--cuda_graphs",
            type=bool | None,
            default=None,
            help="fit: on a GPU, replay forward and backward as CUDA graphs, which small batches gain by; on "
            "unless the task is your own",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; LightningCLI would warn that a program may have arguments of its own.

        A checkpoint's hyper-parameters are a config without a file name: where they alone are wrong, it is told.
        """
        told = io.StringIO()
        try:
            with redirect_stderr(told):
                self.config = parser.parse_args(args)
        except SystemExit as stop:
            if stop.code and self._parses_without_checkpoint(parser):
                reason = told.getvalue().strip().removeprefix("error: ").removesuffix(" (see --help)")
                raise UserError(f"checkpoint {self.checkpoint}: its hyper-parameters are refused: {reason}") from None
            sys.stderr.write(told.getvalue())
            raise
        sys.stderr.write(told.getvalue())

    def _parses_without_checkpoint(self, parser: LightningArgumentParser) -> bool:
        pairs = list(zip(self.arguments, [*self.arguments[1:], ""]))
        at = next((k for k, (a, b) in enumerate(pairs) if a == "--config" and b.startswith("{")), None)
        if at is None or self.checkpoint is None:
            return False
        try:
            with redirect_stderr(io.StringIO()):
                parser.parse_args([self.subcommand_asked, *self.arguments[:at], *self.arguments[at + 2 :]])
        except SystemExit:
            return False
        return True

    def _parse_ckpt_path(self) -> None:
        # LightningCLI lets a checkpoint's hyper-parameters beat the command line; here they are a config before it.
        pass

    def before_instantiate_classes(self) -> None:
        """Turn the short options into the long ones, so that the saved config holds only those."""
        config = self.config[self.subcommand]
        self._check_resumed(config)
        if config.n_gpus is not None:
            gpus, there = int(config.n_gpus), torch.cuda.device_count()
            if gpus > there:
                raise UserError(f"--n_gpus {gpus}: this machine has {there} GPU(s); --n_gpus 0 runs on the CPU")
            config.trainer.accelerator, config.trainer.devices = ("gpu", gpus) if gpus else ("cpu", 1)
            config.trainer.strategy = "ddp" if gpus > 1 else "auto"
        if config.use_amp is not None:
            config.trainer.precision = _mixed(config.trainer.accelerator) if config.use_amp else "32-true"
        if config.batch_size is not None:
            config.data.init_args.batch_size = int(config.batch_size)
        if not self._names_data_seed() and "seed" in config.data.init_args:
            config.data.init_args.seed = int(config.seed_everything)
        self._simulate_no_misspelt_path(config)
        if config.weights:
            self.saved, self.source = load_checkpoint(config.weights), Path(config.weights)
        told = ("tensorboard", "test_after_fit", "save_every_minutes", "cuda_graphs")
        self.short = {name: config[name] for name in told}
        config.n_gpus = config.use_amp = config.batch_size = config.weights = config.ckpt_path = None
        config.tensorboard = False
        config.run_dir = str(self.run_dir)

    def _check_resumed(self, config: Any) -> None:
        if self.subcommand != "fit" or self.checkpoint is None or not resumable(self.saved):
            return
        if config.weights:
            raise UserError("--weights: starts a new run, and --ckpt_path goes on with an old one; give one of them")
        check_resumed(self.checkpoint, self.saved, config.model.init_args)

    def _simulate_no_misspelt_path(self, config: Any) -> None:
        """A config's recording is simulated where it is absent, one that the command line names only if told there."""
        typed = option(self.arguments, "--data.path", "--data.init_args.path")
        told = any(a.startswith(("--data.simulate", "--data.init_args.simulate")) for a in self.arguments)
        if typed is None or told or typed in (options.get("path") for options in self._data_options_of_configs()):
            return
        data = config.data.init_args
        if "simulate" in data and not Path(data.path).exists():
            data.simulate = None

    def _names_data_seed(self) -> bool:
        if option(self.arguments, "--data.seed", "--data.init_args.seed") is not None:
            return True
        return any("seed" in options for options in self._data_options_of_configs())

    def _data_options_of_configs(self) -> list[dict[str, Any]]:
        files = [a for a, b in zip(self.arguments[1:], self.arguments) if b == "--config" and not a.startswith("{")]
        return [class_options(path, "data") for path in files]

    # -- building ------------------------------------------------------------------------------------------------------

    def instantiate_classes(self) -> None:
        """Build; an option that its class refuses is the user's, whoever checks it."""
        try:
            super().instantiate_classes()
        except (ValueError, MisconfigurationException) as error:
            settings = f" (with the settings of checkpoint {self.checkpoint})" if self.checkpoint else ""
            raise UserError(f"{told_shortly(error)}{settings}") from error
        self._check_clips()
        self._check_weights()

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[pl.Callback]) -> pl.Trainer:
        options = self.config[self.subcommand]
        folder = run_of(self.checkpoint) if self.checkpoint else None
        elsewhere = folder is not None and folder.parent.resolve() != self.run_dir.resolve()
        if folder is None or elsewhere or (self.subcommand == "fit" and not resumable(self.saved)):
            folder = next_version(self.run_dir)
        self.folder = RunFolder(folder, self.parser_of_run().dump(options, skip_unset=False))
        if config["logger"] is True or config["logger"] is None:
            config["logger"] = self.folder.logger() if self.subcommand != "predict" else False
        callbacks = [*callbacks, self.folder, *self._callbacks(config, options.seed_everything)]
        plugins = config["plugins"] or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(SafeCheckpointIO())
        config["plugins"] = plugins
        try:
            trainer: pl.Trainer = super()._instantiate_trainer(config, callbacks)
        except (ValueError, RuntimeError, MisconfigurationException) as error:
            raise UserError(f"--trainer: {error}") from error
        return trainer

    def _callbacks(self, trainer: dict[str, Any], seed: int) -> list[pl.Callback]:
        callbacks: list[pl.Callback] = []
        wants_bar = trainer["enable_progress_bar"] is not False
        if wants_bar and os.isatty(1):
            callbacks.append(LateProgressBar())
        elif wants_bar:
            trainer["enable_progress_bar"] = False  # a log file gets a line an epoch instead
        callbacks.append(SignalStop())
        if self.subcommand != "fit":
            return callbacks
        callbacks += [StepSeed(seed), NonFiniteGuard(), GracefulStop(), TrainingMonitor(), EpochLine()]
        if isinstance(self.model, ClipClassification):
            callbacks.append(ClipFigures())
        asked = self.short["cuda_graphs"]
        ours = isinstance(self.model, ClipClassification | FramePrediction)  # tested to get the same weights
        if ours if asked is None else asked:
            callbacks.append(CudaGraphs())
        if trainer["enable_checkpointing"] is not False:
            plain: dict[str, Any] = {"enable_version_counter": False, "auto_insert_metric_name": False}
            interval = timedelta(minutes=float(self.short["save_every_minutes"]))
            callbacks += [
                ModelCheckpoint(filename="best", monitor="val/loss", **plain),
                ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **plain),
                ModelCheckpoint(filename="last", train_time_interval=interval, **plain),
            ]
        return callbacks

    def parser_of_run(self) -> LightningArgumentParser:
        """The parser of this subcommand."""
        return self._parser(self.subcommand)

    def _check_clips(self) -> None:
        """Whether the network and the clips are made for each other, which a convolution would tell less kindly."""
        if not (isinstance(self.model, ClipClassification) and isinstance(self.datamodule, FishClips)):
            return
        channels, size = self.model.hparams["in_channels"], self.model.hparams["image_size"]
        if channels != self.datamodule.step_frames:
            raise UserError(
                f"--model.in_channels {channels}: the clips have {self.datamodule.step_frames} channels "
                f"(--data.frames_per_step, --data.input_form)"
            )
        if size is not None and tuple(size) != self.datamodule.image_size:
            raise UserError(f"--model.image_size {size}: --data.image_size is {list(self.datamodule.image_size)}")

    def _check_weights(self) -> None:
        state = self.saved.get("state_dict")
        if state is None:
            return
        source = self.source or ""
        check_weights(source, state, self.model.state_dict(), type(self.model).__name__)
        if self.subcommand == "fit" and self.checkpoint:
            check_moments(source, self.saved.get("optimizer_states"), list(self.model.parameters()))

    # -- running -------------------------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        with ExitStack() as stack:
            if self.trainer.is_global_zero:
                stack.callback(self.folder.discard)
                if self.checkpoint is not None:
                    tell_of_other_settings(self.checkpoint, self.saved, self.named_configs)
            if self.short["tensorboard"] and self.trainer.is_global_zero:
                server = stack.enter_context(TensorBoardServer(self.folder.path.parent))
                print(f"TensorBoard: {server.url}", flush=True)
            try:
                {
                    "fit": self.run_fit,
                    "validate": self.run_validate,
                    "test": self.run_test,
                    "predict": self.run_predict,
                }[subcommand]()
            except torch.OutOfMemoryError as error:
                text = str(error).splitlines()[0]
                raise UserError(f"out of GPU memory ({text}); try a smaller --batch_size or --use_amp") from None
            except MisconfigurationException as error:
                raise UserError(str(error)) from error
            except Exception as error:
                if self.checkpoint is None or not while_restoring(error):
                    raise
                anew = f"; --weights {self.checkpoint} starts anew from its weights" if subcommand == "fit" else ""
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"checkpoint {self.checkpoint}: its state cannot be restored ({reason}){anew}"
                ) from error

    def run_fit(self) -> None:
        """Train, and test the best checkpoint where the config asks for it."""
        resumed = self.checkpoint if resumable(self.saved) else None
        if self.saved and resumed is None:
            self.model.load_state_dict(self.saved["state_dict"])
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=resumed)
        if (
            resumed is not None
            and self.trainer.global_step == self.saved["global_step"]
            and not self.trainer.should_stop
        ):
            print(
                f"nothing was left to train: {resumed} has done {self.trainer.current_epoch} epochs and "
                f"{self.trainer.global_step} steps; a larger --trainer.max_epochs goes on"
            )
        if self.short["test_after_fit"] and not self.config.fit.trainer.fast_dev_run:
            checkpoints = self.folder.path / CHECKPOINTS
            best = checkpoints / "best.ckpt"
            self._test(best if best.is_file() else checkpoints / "last.ckpt")

    def run_validate(self) -> None:
        """Score the validation split and print the figures."""
        figures = self.trainer.validate(
            self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint, verbose=False
        )
        if self.trainer.is_global_zero:
            print(json.dumps(figures[0], indent=2))

    def run_test(self) -> None:
        """Score the test split: table, report, metrics and predictions."""
        self._test(self.checkpoint)

    def _test(self, checkpoint: Path | None) -> None:
        figures = self.trainer.test(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False)
        if self.trainer.is_global_zero:
            settings = json.loads(self.parser_of_run().dump(self.config[self.subcommand], format="json"))
            settings["checkpoint"] = os.fspath(checkpoint) if checkpoint else None
            write_test(self.model, self.datamodule, figures[0], self.folder.path, settings)

    def run_predict(self) -> None:
        """Probability for every frame."""
        parts = self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=self.checkpoint, return_predictions=True
        )
        write_predictions(self.trainer, self.datamodule, parts or [], self.folder.path)


def _mixed(accelerator: str) -> str:
    on_gpu = accelerator != "cpu" and torch.cuda.is_available()
    return "16-mixed" if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16-mixed"


def run_trainer(args: list[str]) -> None:
    """Parse and run fit, validate, test or predict.

    Raises:
        UserError: for whatever is wrong with the options or the data.
        SystemExit: after ``--help`` and its like, after a parser's error, and when a signal ended the training.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    FishCLI(normalise(args))
