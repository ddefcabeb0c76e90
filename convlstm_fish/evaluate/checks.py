"""Arrays of strangers, checked at the door: each function returns what is sound or raises a UserError."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.baselines import Scorer
from convlstm_fish.evaluate.metrics import Bools, Floats


def positive_number(what: str, value: float) -> float:
    """``value`` as a positive, finite float, or a UserError that names ``what``."""
    if not (np.isfinite(value) and value > 0):
        raise UserError(f"{what}: must be a positive number, got {value}")
    return float(value)


def number_series(what: str, values: npt.ArrayLike) -> Floats:
    """One finite number per frame, float64 (T,); a single column, as Keras returns one, is taken as a series."""
    given = np.asarray(values)
    if not (np.issubdtype(given.dtype, np.bool_) or np.issubdtype(given.dtype, np.number)) or np.iscomplexobj(given):
        raise UserError(f"{what}: must be an array of numbers, got {given.dtype}")
    out = given.astype(np.float64)
    if out.ndim == 2 and out.shape[1] == 1:
        out = out[:, 0]
    if out.ndim != 1 or not len(out):
        raise UserError(f"{what}: must be a non-empty series of one value per frame, got shape {out.shape}")
    bad = np.flatnonzero(~np.isfinite(out))
    if len(bad):
        raise UserError(f"{what}: {len(bad)} values are not finite, the first is {out[bad[0]]} at index {bad[0]}")
    return out


def motion_series(what: str, values: npt.ArrayLike) -> Floats:
    """Motion (T,), which cannot be negative."""
    out = number_series(what, values)
    if out.min() < 0:
        raise UserError(f"{what}: a mean absolute difference cannot be negative, got {out.min():g}")
    return out


def label_series(what: str, values: npt.ArrayLike, length: int, beside: str) -> Bools:
    """Labels (T,) of 0 and 1 as booleans, as long as the series called ``beside``."""
    out = number_series(what, values)
    if len(out) != length:
        raise UserError(f"{what}: has {len(out)} values and {beside} has {length}; they must be equally long")
    wrong = out[(out != 0) & (out != 1)]
    if len(wrong):
        raise UserError(f"{what}: must be 0 or 1 at every frame, got {wrong[0]:g}")
    return out == 1


def frame_indices(values: npt.ArrayLike, length: int) -> npt.NDArray[np.int64]:
    """Ascending whole numbers in [1, length - 1]."""
    series = number_series("frames", values)
    if series.min() < 1 or series.max() >= length:
        raise UserError(
            f"frames: must lie in [1, {length - 1}] for {length} frames of motion, since the first frame has no past; "
            f"got {series.min():g} to {series.max():g}"
        )
    out = series.astype(np.int64)
    if (out != series).any():
        raise UserError(f"frames: must be whole numbers, got {series[out != series][0]:g}")
    if (np.diff(out) <= 0).any():
        raise UserError("frames: must be ascending without repeats")
    return out


def model_scorers(probabilities: npt.ArrayLike | Mapping[str, npt.ArrayLike], name: str, length: int) -> list[Scorer]:
    """Each model's probabilities in [0, 1], one for each of ``length`` scored frames."""
    given = dict(probabilities) if isinstance(probabilities, Mapping) else {name: probabilities}
    if not given:
        raise UserError("probabilities: give at least one model's")
    models = []
    for key, values in given.items():
        series = number_series(f"probabilities of {key}", values)
        if len(series) != length:
            raise UserError(f"probabilities of {key}: has {len(series)} values for {length} scored frames")
        if series.min() < 0 or series.max() > 1:
            raise UserError(
                f"probabilities of {key}: must lie in [0, 1], got {series.min():g} to {series.max():g}; "
                f"pass logits through a sigmoid first"
            )
        models.append(Scorer(key, "the probabilities given", True, series, True))
    return models
