"""A checkpoint beside the options of a run: what it is good for, and which settings of the two count."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from convlstm_fish.cli_configs import class_options
from convlstm_fish.errors import UserError
from convlstm_fish.tasks.checkpoint_io import hyper_parameters


def resumable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds the state of a training run, and not only weights."""
    return bool(checkpoint.get("optimizer_states")) and "loops" in checkpoint


def _differing(known: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the hyper-parameters of a checkpoint those that are otherwise in the options: name -> (there, known)."""
    return {
        name: (options[name], value)
        for name, value in known.items()
        if name != "backend" and name in options and _plain(options[name]) != _plain(value)
    }


def _plain(value: Any) -> Any:
    """A hyper-parameter without the difference between tuples and lists, or 8e-5 as YAML reads it, which is text."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def check_resumed(checkpoint: Path, saved: dict[str, Any], options: Mapping[str, Any]) -> None:
    """A resumed run keeps its settings.

    Args:
        checkpoint: that it goes on from.
        saved: its content.
        options: of the model, as they were parsed.

    Raises:
        UserError: naming the option that would change one.
    """
    for name, (now, before) in _differing(hyper_parameters(checkpoint, saved), options).items():
        raise UserError(
            f"--model.{name} {now}: the checkpoint was trained with {before}, and a resumed run keeps its settings; "
            f"leave the option out, or start anew from the weights: --weights {checkpoint}"
        )


def tell_of_other_settings(checkpoint: Path, saved: dict[str, Any], configs: Iterable[str]) -> None:
    """Print which settings of configs named beside a checkpoint are not used, for its own beat them."""
    known = hyper_parameters(checkpoint, saved)
    for path in configs:
        if other := _differing(known, class_options(path, "model")):
            told = ", ".join(f"{name} {now} (there {before})" for name, (now, before) in other.items())
            print(
                f"--config {path}: the network and its settings are those of checkpoint {checkpoint}; not used: {told}"
            )


def while_restoring(error: Exception) -> bool:
    """Whether an error was raised while Lightning put a checkpoint's content where it belongs."""
    if isinstance(error, UserError):
        return False
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "pytorch_lightning.trainer.connectors.checkpoint_connector" in names
