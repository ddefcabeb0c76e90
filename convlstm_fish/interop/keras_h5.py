"""Reads ``.keras``, ``.h5`` and ``.weights.h5`` files without Keras or TensorFlow.

The configuration is JSON and stays data: no class is looked up by its name, no Lambda is decoded, nothing is
unpacked onto the disk.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from convlstm_fish.errors import UserError
from convlstm_fish.interop.hdf5 import Group, read_hdf5
from convlstm_fish.interop.keras_source import (
    MAX_ARRAY_BYTES,
    MAX_JSON_BYTES,
    KerasSource,
    NamedLayer,
    attach_moments,
    checked,
    config_layers,
    parse_json,
    reading,
    zip_member,
)

# Layers with arrays by the name of their group in a weights file: roles, in the order Keras keeps them.
_ROLES = {
    "conv_lstm2d": ("kernel", "recurrent_kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}
TRAINABLE = ("kernel", "recurrent_kernel", "bias", "gamma", "beta")


def read_keras_archive(path: Path) -> KerasSource:
    """A ``.keras`` file of Keras 3 or of Keras 2.12 and later: a zip of config, metadata and weights.

    Raises:
        UserError: if it is not one, is damaged, or is larger than any such model.
    """
    with reading(path, ".keras file"), zipfile.ZipFile(path) as archive:
        source = KerasSource(path)
        metadata = parse_json(path, zip_member(path, archive, "metadata.json", MAX_JSON_BYTES), "metadata.json")
        source.keras_version = str(metadata.get("keras_version", "")) or None
        config = parse_json(path, zip_member(path, archive, "config.json", MAX_JSON_BYTES), "config.json")
        source.model_config = {"class_name": config.get("class_name"), "config": config["config"]}
        compiled = config.get("compile_config") or {}
        source.loss, source.optimizer = compiled.get("loss"), compiled.get("optimizer")
        weights = zip_member(path, archive, "model.weights.h5", MAX_ARRAY_BYTES)
        _read_vars(path, read_hdf5(path, weights), source)
        return source


def read_h5(path: Path) -> KerasSource:
    """A ``.weights.h5`` file (weights alone) or an ``.h5`` file of either kind, as Keras 1 to 3 wrote it.

    Raises:
        UserError: if it is not one or is damaged.
    """
    with reading(path, "Keras HDF5 file"):
        if path.stat().st_size > 2 * MAX_ARRAY_BYTES:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, more than any such model")
        file = read_hdf5(path, path.read_bytes())
        source = KerasSource(path)
        if "layer_names" in file.attributes or "model_weights" in file.members:
            _read_legacy(path, file, source)
        else:
            _read_vars(path, file, source)
        return source


def _layer_arrays(path: Path, group: Group) -> list[np.ndarray]:
    """The arrays in the one ``vars`` group that a layer and its wrapped layer or cell have, in order."""
    found: list[np.ndarray] = []
    for name, child in group.groups().items():
        if name == "vars":
            here = [checked(path, name, child.array(str(index))) for index in range(len(child.members))]
        elif name == "seed_generator":
            continue
        else:
            here = _layer_arrays(path, child)
        if found and here:
            raise UserError(f"{path}: a layer has weights in several places, which is not supported")
        found = found or here
    return found


def _roles(path: Path, name: str, kind: str, config: dict[str, Any] | None, count: int) -> tuple[str, ...]:
    """Which arrays a layer keeps, from its config or, without one, from their number."""
    roles = _ROLES[kind]
    if config is not None:
        absent = {
            "bias": not config.get("use_bias", True),
            "gamma": not config.get("scale", True),
            "beta": not config.get("center", True),
        }
        kept = tuple(role for role in roles if not absent.get(role, False))
    elif kind == "batch_normalization":
        kept = roles if count == 4 else roles[2:]
    else:
        kept = roles[:count]
    if len(kept) != count:
        raise UserError(f"{path}: layer {name!r} should have the arrays {list(kept)}, the file has {count}")
    return kept


def snake_case(name: str) -> str:
    """The name that Keras gives a class in a weights file."""
    name = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", re.sub(r"\W+", "", name))
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def _read_vars(path: Path, file: Group, source: KerasSource) -> None:
    """Weights in the layout of Keras 2.12 and later: by class and number of the layer, not by its name."""
    holder = "layers" if "layers" in file.members else "_layer_checkpoint_dependencies"
    if holder not in file.members:
        raise UserError(f"{path}: holds no layers, so it is not a Keras weights file")
    groups = file.group(holder).groups()
    found = {name: _layer_arrays(path, group) for name, group in groups.items()}
    trainable: list[tuple[int, str]] = []
    if source.model_config is not None:
        counts: dict[str, int] = {}
        for layer in config_layers(source.model_config):
            kind = snake_case(str(layer["class_name"]))
            number = counts[kind] = counts.get(kind, -1) + 1
            arrays = found.pop(f"{kind}_{number}" if number else kind, [])
            if not arrays:
                continue
            config = layer["config"]
            inner = config["layer"] if kind == "time_distributed" else layer
            name, kind = str(config["name"]), snake_case(str(inner["class_name"]))
            if kind not in _ROLES:
                raise UserError(f"{path}: layer {name!r} is a {inner['class_name']}, which cannot be represented")
            roles = _roles(path, name, kind, inner["config"], len(arrays))
            source.layers.append(NamedLayer(name, dict(zip(roles, arrays))))
            if config.get("trainable", True):
                trainable += [(len(source.layers) - 1, role) for role in roles if role in TRAINABLE]
    else:
        source.ordered = False
        source.pooling = _pooling_groups(groups, found)
        for name in sorted((name for name in found if found[name]), key=_group_order):
            kind = _group_kind(path, name, found[name])
            roles = _roles(path, name, kind, None, len(found[name]))
            source.layers.append(NamedLayer(name, dict(zip(roles, found[name]))))
    if "optimizer" in file.members and trainable:
        attach_moments(source, trainable, _layer_arrays(path, file.group("optimizer")))


def _group_order(name: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*?)(?:_(\d+))?", name)
    return (match[1], int(match[2] or 0)) if match else (name, 0)


def _group_kind(path: Path, name: str, arrays: list[np.ndarray]) -> str:
    kind = _group_order(name)[0]
    if kind == "time_distributed":  # of a batch norm, the only one with vectors alone
        kind = "batch_normalization" if all(array.ndim == 1 for array in arrays) else kind
    if kind not in _ROLES:
        raise UserError(
            f"{path}: layer {name!r} is none of ConvLSTM2D, BatchNormalization and Dense, which cannot be represented"
        )
    return kind


def _pooling_groups(groups: dict[str, Group], arrays: dict[str, list[np.ndarray]]) -> int | None:
    """How many max pooling layers a weights file lists; None where a wrapper does not say what it wraps."""
    count = 0
    for name, group in groups.items():
        kind = _group_order(name)[0]
        if kind == "time_distributed" and not arrays[name]:
            kind = str(group.group("layer").group("vars").attributes.get("name", ""))
            if not kind.startswith("max_pooling"):  # Keras's own name for it; it may have another, or be unnamed
                return None
        count += kind.startswith("max_pooling")
    return count


def _read_legacy(path: Path, file: Group, source: KerasSource) -> None:
    """Weights in the layout of Keras 2's HDF5 files: by the layers' and the variables' names."""
    weights = file.group("model_weights") if "model_weights" in file.members else file
    source.keras_version = weights.attributes.get("keras_version", file.attributes.get("keras_version"))
    if "model_config" in file.attributes:
        config = parse_json(path, file.attributes["model_config"], "the model's configuration")
        source.model_config = {"class_name": config.get("class_name"), "config": config["config"]}
    if "training_config" in file.attributes:
        training = parse_json(path, file.attributes["training_config"], "the training configuration")
        source.loss, source.optimizer = training.get("loss"), training.get("optimizer_config")
    frozen = set()
    if source.model_config is not None:
        layers = [layer["config"] for layer in config_layers(source.model_config)]
        frozen = {layer.get("name") for layer in layers if not layer.get("trainable", True)}
    trainable: list[tuple[int, str]] = []
    for name in weights.attributes["layer_names"]:
        group = weights.group(name)
        keys = group.attributes["weight_names"]
        arrays = {key.split("/")[-1].removesuffix(":0"): checked(path, key, group.array(key)) for key in keys}
        if len(arrays) != len(keys):
            raise UserError(f"{path}: layer {name!r} has several arrays of one name: {keys}")
        if arrays:
            source.layers.append(NamedLayer(name, arrays))
            if name not in frozen:
                trainable += [(len(source.layers) - 1, role) for role in arrays if role in TRAINABLE]
    if "optimizer_weights" in file.members and trainable:
        optimizer = file.group("optimizer_weights")
        keys = optimizer.attributes.get("weight_names", [])
        attach_moments(source, trainable, [checked(path, key, optimizer.array(key)) for key in keys])
