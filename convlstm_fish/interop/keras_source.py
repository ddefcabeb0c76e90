"""What a Keras file holds before anything is made of it, and the limits under which foreign files are read."""

from __future__ import annotations

import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convlstm_fish.errors import UserError

# A ConvLSTM of a billion bytes does not exist; a file that says it does is broken or hostile.
MAX_ARRAY_BYTES = 2**30
MAX_JSON_BYTES = 2**26

Arrays = dict[str, np.ndarray]
Moments = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass
class NamedLayer:
    """The arrays of one Keras layer.

    Attributes:
        name: the layer's name, or its place in the file where names are not kept (``conv_lstm2d_1``).
        arrays: by role: ``kernel``, ``recurrent_kernel``, ``bias``, ``gamma``, ``beta``, ``moving_mean``,
            ``moving_variance``; in Keras layout.
        moments: Adam's first and second moments of the trainable ones, by role; may be empty.
    """

    name: str
    arrays: Arrays
    moments: Moments = field(default_factory=dict)


@dataclass
class KerasSource:
    """A Keras model as its file tells it.

    Attributes:
        path: the file or folder.
        keras_version: ``"2.4.0"``, or None where the file does not say.
        model_config: ``{"class_name": ..., "config": ...}``, or None for weights alone.
        loss, optimizer: what the model was compiled with (``{"class_name": ..., "config": ...}`` or a name).
        layers: the layers with arrays. In the model's order if ``ordered``; else layers of one kind are in
            order among themselves.
        pooling: how many pooling layers the file lists although it holds no architecture; None if unknown.
        iterations: Adam's step count, 0 where no optimizer state was kept.
    """

    path: Path
    keras_version: str | None = None
    model_config: dict[str, Any] | None = None
    loss: Any = None
    optimizer: Any = None
    layers: list[NamedLayer] = field(default_factory=list)
    ordered: bool = True
    pooling: int | None = None
    iterations: int = 0

    @property
    def keras_major(self) -> int | None:
        """2 or 3, or None where the file does not say."""
        if self.keras_version is None:
            return None
        major = self.keras_version.split(".")[0].split("-")[0]
        if major not in ("2", "3"):
            raise UserError(f"{self.path}: Keras version {self.keras_version!r} is not known, only 2 and 3 are")
        return int(major)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Tell whatever goes wrong while a foreign file is taken apart as one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except (
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        reason = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {reason[0][:200]}" if reason else type(error).__name__
        raise UserError(f"{path}: not a readable {what} ({told})") from error


def parse_json(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object of reasonable size."""
    if len(text) > MAX_JSON_BYTES:
        raise UserError(f"{path}: {what} has {len(text)} bytes, more than the {MAX_JSON_BYTES} that are read")
    value = json.loads(text)
    if not isinstance(value, dict):
        raise UserError(f"{path}: {what} is a {type(value).__name__}, not a JSON object")
    return value


def config_layers(model_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The layers of a Sequential or functional model's configuration."""
    config = model_config["config"]
    layers = config if isinstance(config, list) else config["layers"]  # Sequential was a list before 2.2.3
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise ValueError("the configuration's layers are not a list of objects")
    return layers


class Budget:
    """How many bytes of arrays may still be read from one file: none is asked for before it is known to fit.

    Args:
        path: the file, for the message.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.left = MAX_ARRAY_BYTES

    def spend(self, name: str, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes of an array of that shape, taken off the budget."""
        if len(shape) > 8 or any(size < 0 for size in shape):
            raise UserError(f"{self.path}: array {name!r} has the impossible shape {list(shape)[:9]}")
        size = math.prod(shape) * itemsize
        if size > self.left:
            raise UserError(
                f"{self.path}: with array {name!r} of shape {list(shape)} it would take more than the "
                f"{MAX_ARRAY_BYTES} bytes that are read"
            )
        self.left -= size
        return size


def zip_member(path: Path, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """The bytes of one member, by exact name, never more than ``limit``: a zip's own word is not taken."""
    if name not in archive.namelist():
        raise UserError(f"{path}: holds no {name}, so it is not a Keras model file")
    with archive.open(name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path}: {name} unpacks to more than the {limit} bytes that are read")
    return data


def checked(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """The array as float32 (a scalar, such as a step count, as float64), refused if it is not finite numbers."""
    if array.dtype.kind not in "fiu":
        raise UserError(f"{path}: array {name!r} has type {array.dtype}, weights must be numbers")
    array = array.astype(np.float32 if array.ndim else np.float64, order="C")
    if not np.isfinite(array).all():
        raise UserError(f"{path}: array {name!r} holds values that are not finite")
    return array


def attach_moments(source: KerasSource, trainable: list[tuple[int, str]], variables: list[np.ndarray]) -> None:
    """Give Adam's moments, saved as one list behind its step count, to the arrays they belong to.

    Keras saves m and v of each variable in turn (since 2.11) or all m and then all v (before). Where the list is not
    that of an Adam over these variables, nothing is taken from it.

    Args:
        source: whose layers and ``iterations`` are to be filled.
        trainable: (index of layer, role) in the order of the model's trainable variables.
        variables: all of the optimizer's.
    """
    n = len(trainable)
    flat = [array for array in variables if array.ndim]
    if n == 0 or len(flat) != 2 * n or variables[0].ndim:
        return
    targets = [(source.layers[index], role) for index, role in trainable]
    for pairs in (list(zip(flat[0::2], flat[1::2])), list(zip(flat[:n], flat[n:]))):
        if all(
            m.shape == v.shape == layer.arrays[role].shape and (v >= 0).all()
            for (layer, role), (m, v) in zip(targets, pairs)
        ):
            for (layer, role), pair in zip(targets, pairs):
                layer.moments[role] = pair
            source.iterations = int(variables[0])
            return
