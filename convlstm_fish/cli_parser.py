"""What the command line is turned into before it is parsed: one order of precedence, one way to write each option.

``main.py --n_gpus 2`` means ``main.py fit --config quickstart.yaml --n_gpus 2``; config files come before the options,
so that an option beats a file wherever it stands; a run folder stands for its checkpoint and its config.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytorch_lightning import LightningDataModule

from convlstm_fish.cli_configs import find_config, read_config
from convlstm_fish.cli_errors import did_you_mean
from convlstm_fish.commands import COMMANDS
from convlstm_fish.errors import UserError
from convlstm_fish.tasks.checkpoint_io import check_checkpoint, hyper_parameters, load_checkpoint, newest_good

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
SWITCHES = ("--use_amp", "--tensorboard", "--test_after_fit", "--cuda_graphs")
"""Options that may stand without a value."""
FIT_ONLY = ("--weights", "--test_after_fit", "--save_every_minutes", "--cuda_graphs")
"""Options that a config may hold for every subcommand, but that only ``fit`` looks at."""

DEFAULT_CONFIG = "quickstart"
CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
_LISTS = re.compile(r"--(model|data)\.")
_NUMBERS = re.compile(r"^(--\S+?=)?(-?[\d.]+(?:e-?\d+)?(?:,-?[\d.]+(?:e-?\d+)?)+)$")
_VERSION = re.compile(r"version_(\d+)$")


# -- run folders -------------------------------------------------------------------------------------------------------


def versions(run_dir: Path) -> list[Path]:
    """The runs below a folder that hold checkpoints, newest first."""
    found = [(int(m[1]), p) for p in run_dir.glob("version_*") if (m := _VERSION.search(p.name))]
    return [path for _, path in sorted(found, reverse=True) if any((path / CHECKPOINTS).glob("*.ckpt"))]


def run_of(checkpoint: str | Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    folder = Path(checkpoint).parent
    folder = folder if folder.name else folder.resolve()
    return folder.parent if folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file() else None


def find_checkpoint(value: str, run_dir: Path, subcommand: str) -> Path:
    """The file that ``--ckpt_path`` means.

    Args:
        value: a file; a run folder; "last", the newest good checkpoint of the newest run below ``run_dir``;
            "best", that run's checkpoint of the lowest validation loss.
        run_dir: where the runs of this experiment lie.
        subcommand: of a run folder, ``fit`` takes the newest good checkpoint and the others take the best one.

    Raises:
        UserError: when there is none, or it is damaged.
    """
    if value in ("last", "best"):
        runs = versions(run_dir)
        if not runs:
            raise UserError(
                f"--ckpt_path {value}: no run with a checkpoint below {run_dir}; train first, or name a checkpoint"
            )
        folder, want_best = runs[0] / CHECKPOINTS, value == "best"
    elif Path(value).is_dir():
        run = Path(value)
        inner = [run / CHECKPOINTS, *(v / CHECKPOINTS for v in versions(run)), run]
        folder = next((f for f in inner if any(f.glob("*.ckpt"))), run)
        want_best = subcommand != "fit"
    else:
        check_checkpoint(value)
        return Path(value)
    if want_best and (folder / "best.ckpt").is_file():
        check_checkpoint(folder / "best.ckpt")
        return folder / "best.ckpt"
    found, problems = newest_good(folder)
    for problem in problems:
        print(f"passed over: {problem}", file=sys.stderr)
    if found is None:
        raise UserError(f"--ckpt_path {value}: no good checkpoint in {folder}")
    return found


# -- the command line --------------------------------------------------------------------------------------------------


def option(args: Sequence[str], *names: str) -> str | None:
    """The last value of an option, written ``--x v`` or ``--x=v``; None where it is absent."""
    value = None
    for position, token in enumerate(args):
        for name in names:
            if token == name and position + 1 < len(args):
                value = args[position + 1]
            elif token.startswith(f"{name}="):
                value = token.split("=", 1)[1]
    return value


def _take(args: Iterable[str], *names: str) -> tuple[list[str], list[str]]:
    """The values of a repeatable option, and the other arguments."""
    values, rest = [], []
    tokens = iter(args)
    for token in tokens:
        name, equals, value = token.partition("=")
        if name not in names:
            rest.append(token)
        elif equals:
            values.append(value)
        else:
            following = next(tokens, None)
            if following is None:
                raise UserError(f"{token}: needs a value")
            values.append(following)
    return values, rest


def _spell_out(args: Sequence[str]) -> list[str]:
    """A switch without a value gets ``=true``; several numbers for the model or the data are a list."""
    spelled = []
    args = [
        _NUMBERS.sub(r"\1[\2]", token) if _LISTS.match(token if "=" in token else before) else token
        for before, token in zip(["", *args], args)
    ]
    for position, token in enumerate(args):
        alone = position + 1 == len(args) or args[position + 1].startswith("-")
        spelled.append(f"{token}=true" if token in SWITCHES and alone else token)
    return spelled


@dataclass(frozen=True)
class Request:
    """What was asked for, in the one form that is parsed."""

    subcommand: str
    arguments: list[str]
    """Config files first, so that every option beats them."""
    run_dir: Path
    """The folder below which the experiment's runs lie."""
    checkpoint: Path | None
    named_configs: list[str]
    """Those of the command line."""


def normalise(args: Sequence[str]) -> Request:
    """Bring the arguments of fit, validate, test or predict into one form.

    Without ``--config`` it is the config of the run that the checkpoint lies in, or the quick start; validate, test
    and predict take the best checkpoint of the newest run where none is named. A checkpoint's hyper-parameters become
    a config of their own, after the files and before the options.

    Raises:
        UserError: for an unknown command, config or checkpoint.
    """
    args = list(args)
    subcommand = "fit"
    if args and not args[0].startswith("-"):
        subcommand = args.pop(0)
        if subcommand not in TRAINER_COMMANDS:
            near = did_you_mean(subcommand, [*TRAINER_COMMANDS, *COMMANDS])
            raise UserError(f"{subcommand}: no such command{near} (see --help)")
    named, rest = _take(_spell_out(args), "--config", "-c")
    for name in FIT_ONLY if subcommand != "fit" else ():
        if option(rest, name) is not None:
            raise UserError(f"{name}: is an option of fit, not of {subcommand}")
    configs = named_configs = [find_config(name) for name in named]
    names_classes = option(rest, "--model", "--model.class_path", "--data", "--data.class_path") is not None
    fallback = [] if names_classes else [find_config(DEFAULT_CONFIG)]
    run_dir = _run_dir(rest, configs or fallback)

    asked = option(rest, "--ckpt_path")
    informs = any(a in ("-h", "--help") or a.startswith(("--print_", "--model.help", "--data.help")) for a in rest)
    if asked is None and subcommand != "fit" and not informs:
        asked = "best"
    checkpoint = find_checkpoint(asked, run_dir, subcommand) if asked else None
    saved = load_checkpoint(checkpoint) if checkpoint else {}
    if not configs:
        source = checkpoint or option(rest, "--weights")
        run = run_of(source) if source else None
        configs = fallback if run is None else [str(run / CONFIG)]
        if run is not None and option(rest, "--run_dir") is None:
            run_dir = run.parent
        if source and run is None and not names_classes and not informs:
            clips = (saved or load_checkpoint(source)).get(LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY)
            if not isinstance(clips, dict) or not clips:
                raise UserError(
                    f"{source}: neither a {CONFIG} beside it nor the file tells which clips it is for; give --config"
                )
            # The quick start's other options are for its own recording.
            configs = [*configs, json.dumps({"data": {"init_args": {"eval_stride": 1, "simulate": None, **clips}}})]
    arguments = [part for path in configs for part in ("--config", path)]
    if checkpoint is not None and (known := hyper_parameters(checkpoint, saved)):
        arguments += ["--config", json.dumps({"model": {"init_args": known}})]
    return Request(subcommand, arguments + rest, run_dir, checkpoint, named_configs)


def _run_dir(args: Sequence[str], configs: Sequence[str]) -> Path:
    """``--run_dir``, or what a config says, or a folder with the last config's name."""
    said = [option(args, "--run_dir"), *(read_config(path).get("run_dir") for path in reversed(configs))]
    default = f"runs/{Path(configs[-1]).stem}" if configs else "runs/unnamed"
    return Path(next((str(folder) for folder in said if folder), default))
