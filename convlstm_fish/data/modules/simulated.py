"""The option ``simulate`` of the DataModules: a recording that is made where it is absent."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn

from convlstm_fish.data import store
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.simulate import simulate
from convlstm_fish.errors import require


def simulator_options(options: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A copy of the options of :func:`convlstm_fish.data.simulate.simulate`.

    Raises:
        UserError: for one that it has not.
    """
    known = tuple(inspect.signature(simulate).parameters)[1:]
    for option in options or ():
        require("simulate", option, option in known, f"an option of the simulator ({', '.join(known)})")
    return None if options is None else dict(options)


def simulate_where_absent(path: str, options: Mapping[str, Any] | None) -> None:
    """Simulate the recording, or warn of options that one that is there was made without; nothing without options."""
    if options is None:
        return
    if not Path(path).exists():
        simulate(path, **options)
        return
    if not (Path(path) / store.JSON_FILE).exists():
        return  # a film, or a folder of them
    there = Recording.open(path)
    made = {**there.metadata, "size": there.size, "fps": there.fps}
    for option, value in options.items():
        wanted = tuple(value) if isinstance(value, list) else value
        if option in made and made[option] != wanted:
            rank_zero_warn(
                f"{path} is there already, with {option} {made[option]}; simulate.{option} {value} is not used"
            )
