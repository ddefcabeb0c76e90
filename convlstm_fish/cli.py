"""The command line: fit, validate, test and predict by LightningCLI, and this project's own commands."""

from __future__ import annotations

import importlib
import sys
import textwrap
import warnings
from collections.abc import Sequence

from convlstm_fish.commands import COMMANDS
from convlstm_fish.errors import UserError

USAGE = """\
usage: main.py [fit] [--config FILE] [options]       train; without a config, the quick start
       main.py validate|test|predict [--ckpt_path RUN] [options]
       main.py COMMAND [options]

Train and use:
  fit           Train a network. A run folder, runs/NAME/version_K, gets checkpoints, config and TensorBoard files.
  validate      Score a checkpoint on the validation split.
  test          Score a checkpoint on the test split: table, report.html, metrics.json, test_predictions.csv.
  predict       Probability for every frame of a recording: predictions.csv; or the next frames: predictions.npz.

Options of all four (fit --help lists every one, fit --model.help=CLASS and --data.help=CLASS those of a class):
  --config FILE          an experiment: a file, or one of the shipped ones below
  --ckpt_path RUN        a run folder, a checkpoint, last or best; fit goes on from it exactly
  --n_gpus N             0 for the CPU; more than 1 trains on all of them
  --use_amp [BOOL]       mixed precision
  --batch_size N         per process
  --run_dir DIR          where the runs of this experiment go
  --tensorboard [BOOL]   serve TensorBoard while the run lasts
  --model.lr 1e-3        any option of the model, the data (--data.) or the Trainer (--trainer.)

Commands:
{commands}

Shipped configs:
{configs}
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: without the program's name; by default those of this process.

    Returns:
        The exit code: 0; 2 after an error told in one line; 128 plus a signal's number where one ended the training.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    as_before, warnings.formatwarning = warnings.formatwarning, _format_warning
    try:
        if arguments and arguments[0] in ("-h", "--help"):
            print(_help())
        elif arguments and arguments[0] == "--version":
            print(_version())
        elif arguments and arguments[0] in COMMANDS:
            _run_command(arguments[0], arguments[1:])
        else:
            with warnings.catch_warnings():
                from convlstm_fish.cli_run import run_trainer

                run_trainer(arguments)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "convlstm_fish":
            raise
        return _fail(
            f"{error.name}: is not installed for {sys.executable}; `source .venv/bin/activate` takes the environment "
            "that make train has made, pip install . makes one of your own"
        )
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        warnings.formatwarning = as_before
    return 0


def _run_command(name: str, args: list[str]) -> None:
    from convlstm_fish.cli_errors import CommandParser

    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = CommandParser(prog=f"main.py {name}", description=command.help)
    module.add_arguments(parser)
    module.run(parser.parse_args(args))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """In one line; the line of code that warns helps nobody who runs an experiment."""
    return f"warning: {' '.join(str(message).split())}\n"


def _fail(message: str) -> int:
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return 2


def _help() -> str:
    from convlstm_fish.cli_configs import shipped_configs

    commands = "\n".join(f"  {name:13s} {command.help}" for name, command in COMMANDS.items())
    configs = textwrap.fill(", ".join(shipped_configs()), 100, initial_indent="  ", subsequent_indent="  ")
    return USAGE.format(commands=commands, configs=configs)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("convlstm-fish")
    except PackageNotFoundError:
        return "not installed: run from a checkout"
