"""Option values that are more than one number: read from text or a file, refused in one line that names the option."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.errors import UserError


def numbers(option: str, text: str | None) -> list[float] | None:
    """Numbers separated by commas or spaces; None where the option is absent."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a list of numbers, such as 0.8,0.1,0.1") from None


def rectangle(option: str, text: str | None) -> tuple[int, int, int, int] | None:
    """``x,y,width,height`` as four whole numbers; None where the option is absent."""
    if text is None:
        return None
    try:
        x, y, width, height = (int(part) for part in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f"{option}: {text!r} is not x,y,width,height, such as 0,0,640,480") from None
    return x, y, width, height


def frame_size(option: str, text: str) -> tuple[int, int]:
    """``HxW`` as (height, width)."""
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise UserError(f"{option}: {text!r} is not HEIGHTxWIDTH, such as 240x320") from None
    return height, width


def number_or_word(text: str) -> float | str:
    """A number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def load_series(option: str, path: str) -> npt.NDArray[Any]:
    """The array in a ``.npy`` file, without executing anything that it may hold.

    Raises:
        UserError: naming the option and the file.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{option}: {path} does not exist") from None
    except (OSError, ValueError, EOFError):
        raise UserError(f"{option}: {path} is not a whole .npy file of plain numbers") from None
    if not isinstance(values, np.ndarray):
        values.close()
        raise UserError(f"{option}: {path} holds several arrays; give a .npy file with one")
    # Keras returns probabilities as one column.
    return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
