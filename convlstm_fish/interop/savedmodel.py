"""Reads a Keras model from a TensorFlow SavedModel folder without TensorFlow.

Keras 2 writes the model's configuration as JSON: up to TensorFlow 2.4 into the object graph of
``saved_model.pb``, from 2.5 into ``keras_metadata.pb``. The variables are found by name through the object
graph that the checkpoint in ``variables/`` holds, which also lists them in the model's order. The graphs and
functions in ``saved_model.pb`` are passed over unread. A model exported by Keras 3 has no configuration; its
variables are still named by layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_source import KerasSource, NamedLayer, checked, parse_json, reading
from convlstm_fish.interop.tensor_bundle import TensorBundle, integer, messages, proto_fields, text

# Fields of tensorflow/core/protobuf: saved_model.proto, meta_graph.proto, saved_object_graph.proto,
# trackable_object_graph.proto; and of keras/protobuf/saved_metadata.proto.
_META_GRAPHS, _OBJECT_GRAPH, _NODES, _USER_OBJECT = 2, 7, 1, 4
_USER_IDENTIFIER, _USER_METADATA = 1, 3
_SAVED_NODES, _SAVED_IDENTIFIER, _SAVED_METADATA = 1, 4, 5
_CHILDREN, _ATTRIBUTES, _SLOTS = 1, 2, 3
_CHILD_NODE, _CHILD_NAME, _FULL_NAME, _CHECKPOINT_KEY = 1, 2, 2, 3
_SLOT_OF, _SLOT_NAME, _SLOT_NODE = 1, 2, 3

_ROLES = ("kernel", "recurrent_kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
_MODELS = ("_tf_keras_network", "_tf_keras_sequential", "_tf_keras_model")


def read_savedmodel(folder: Path) -> KerasSource:
    """What the SavedModel in ``folder`` holds.

    Raises:
        UserError: if it is not one, is damaged, or was not written by Keras.
    """
    with reading(folder, "SavedModel folder"):
        source = KerasSource(folder)
        metadata = _model_metadata(folder)
        if metadata is not None:
            source.keras_version = str(metadata.get("keras_version", "")) or None
            source.model_config = {"class_name": metadata.get("class_name"), "config": metadata["config"]}
            training = metadata.get("training_config") or {}
            source.loss, source.optimizer = training.get("loss"), training.get("optimizer_config")
        _read_variables(folder, source)
        return source


def _model_metadata(folder: Path) -> dict[str, Any] | None:
    graph = (folder / "saved_model.pb").read_bytes()
    metadata_file = folder / "keras_metadata.pb"
    if metadata_file.exists():
        objects = [
            (text(node, _SAVED_IDENTIFIER), messages(node, _SAVED_METADATA))
            for node in map(proto_fields, messages(proto_fields(metadata_file.read_bytes()), _SAVED_NODES))
        ]
    else:
        objects = [
            (text(user, _USER_IDENTIFIER), messages(user, _USER_METADATA))
            for meta in messages(proto_fields(graph), _META_GRAPHS)
            for objects_graph in messages(proto_fields(meta), _OBJECT_GRAPH)
            for node in messages(proto_fields(objects_graph), _NODES)
            for user in map(proto_fields, messages(proto_fields(node), _USER_OBJECT))
        ]
    for identifier, metadata in objects:
        if identifier in _MODELS and metadata:  # the first is the whole model, any other is nested in it
            described = parse_json(folder, metadata[-1], "the model's description")
            if identifier == "_tf_keras_model" or "config" not in described:
                raise UserError(
                    f"{folder}: the model is a subclass of keras.Model, its layers are in code that is not in the "
                    "file; save it as .weights.h5 and import that"
                )
            return described
    return None


def _read_variables(folder: Path, source: KerasSource) -> None:
    bundle = TensorBundle(folder / "variables" / "variables")
    graph = proto_fields(bundle.string("_CHECKPOINTABLE_OBJECT_GRAPH"))
    nodes = [proto_fields(node) for node in messages(graph, _NODES)]
    keys: dict[int, tuple[str, str]] = {}
    for index, node in enumerate(nodes):
        for attribute in map(proto_fields, messages(node, _ATTRIBUTES)):
            keys[index] = (text(attribute, _FULL_NAME), text(attribute, _CHECKPOINT_KEY))
    key_of: dict[str, str] = {}
    for name, key in keys.values():
        key_of.setdefault(name, key)

    # The names of a layer's variables begin with the layer's name and end with their role. The optimizer's
    # slots repeat them behind a name of their own ("Adam/m/dense/kernel") or with "/m" at the end.
    slots = {
        (integer(slot, _SLOT_OF), text(slot, _SLOT_NAME)): integer(slot, _SLOT_NODE)
        for node in nodes
        for slot in map(proto_fields, messages(node, _SLOTS))
    }
    optimizer = next((name.split("/")[0] for name in key_of if name.split("/")[1:2] == ["m"]), None)
    layers: dict[str, NamedLayer] = {}
    seen: set[str] = set()
    place = {index: position for position, index in enumerate(_children(nodes, _children(nodes, [0], "variables")))}
    for index, (name, key) in sorted(keys.items(), key=lambda item: (place.get(item[0], len(nodes)), item[0])):
        layer_name, _, role = name.rpartition("/")
        if source.model_config is not None:  # which knows its layers by their outer name
            layer_name = layer_name.split("/")[0]
        if role not in _ROLES or name.split("/")[0] == optimizer or name in seen or ".OPTIMIZER_SLOT" in key:
            continue
        seen.add(name)
        layer = layers.setdefault(layer_name, NamedLayer(layer_name, {}))
        if role in layer.arrays:
            raise UserError(f"{folder}: layer {layer_name!r} has several variables named {role!r}")
        layer.arrays[role] = checked(folder, name, bundle.number(key))
        moments = [
            keys[slots[index, slot]][1] if (index, slot) in slots else key_of.get(f"{optimizer}/{slot}/{name}")
            for slot in ("m", "v")
        ]
        first, second = moments
        if first is not None and second is not None:
            layer.moments[role] = (
                checked(folder, f"{name}/m", bundle.number(first)),
                checked(folder, f"{name}/v", bundle.number(second)),
            )
    for name in ("Adam/iter", "iteration"):
        if name in key_of:
            source.iterations = int(bundle.number(key_of[name]))
    source.layers = list(layers.values())
    source.ordered = bool(place)


def _children(nodes: list[dict[int, list[int | bytes]]], parents: list[int], name: str | None = None) -> list[int]:
    """Nodes below the parents: the one of that name, or those of a list in order."""
    found = [child for parent in parents for child in map(proto_fields, messages(nodes[parent], _CHILDREN))]
    if name is None:
        found = sorted((c for c in found if text(c, _CHILD_NAME).isdigit()), key=lambda c: int(text(c, _CHILD_NAME)))
    else:
        found = [child for child in found if text(child, _CHILD_NAME) == name]
    return [integer(child, _CHILD_NODE) for child in found]
