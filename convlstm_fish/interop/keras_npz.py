"""Reads ``.npz`` files of Keras weights, such as the published ones, without unpickling anything."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_source import (
    MAX_ARRAY_BYTES,
    Budget,
    KerasSource,
    NamedLayer,
    checked,
    reading,
    zip_member,
)


def read_npz(path: Path) -> KerasSource:
    """Arrays named ``<layer>_<role>`` in Keras layout, such as ``convLSTM_1_recurrent_kernel``, in model order.

    Raises:
        UserError: if it is not such a file; pickled objects are refused unread.
    """
    layers: dict[str, NamedLayer] = {}
    budget = Budget(path)
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            match = re.fullmatch(r"(.+?)_(recurrent_kernel|kernel|bias|gamma|beta|moving_mean|moving_variance)", name)
            if match is None:
                raise UserError(
                    f"{path}: array {name!r} is not named <layer>_<role>, "
                    "such as convLSTM_1_recurrent_kernel, batchnorm_1_moving_mean or dense_bias"
                )
            layer = layers.setdefault(match[1], NamedLayer(match[1], {}))
            if match[2] in layer.arrays:
                raise UserError(f"{path}: array {name!r} is in the file twice")
            data = zip_member(path, archive, info.filename, MAX_ARRAY_BYTES)
            layer.arrays[match[2]] = checked(path, name, _npy(budget, name, data))
        return KerasSource(path, layers=list(layers.values()))


def _npy(budget: Budget, name: str, data: bytes) -> np.ndarray:
    """An array from the bytes of a .npy file, whose header must agree with their number."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in header:
        raise ValueError(f"{name}: .npy version {version} is not read")
    shape, _, dtype = header[version](file)
    if dtype.hasobject:
        raise UserError(f"{budget.path}: array {name!r} holds pickled Python objects, which are not loaded")
    if budget.spend(name, shape, dtype.itemsize) != len(data) - file.tell():
        raise ValueError(f"{name}: shape {list(shape)} does not fit the {len(data)} bytes of the array")
    file.seek(0)
    return np.load(file, allow_pickle=False)
