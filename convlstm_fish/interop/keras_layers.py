"""A Keras model's configuration as a chain of layers, each checked for what it asks of the network.

Everything that a ClipClassifier cannot do the same way is refused here or in keras_network.py, with the layer's
name: a wrong probability is worse than none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_source import Arrays, KerasSource, Moments, config_layers

# The name under which build_keras_model() registers Keras 2's hard sigmoid, which Keras 3 no longer has.
HARD_SIGMOID_2 = "convlstm_fish>hard_sigmoid_keras2"

# Training only: they pass their input on when a model is used.
TRAINING_ONLY = (
    "ActivityRegularization",
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "SpatialDropout2D",
    "SpatialDropout3D",
)


@dataclass
class KerasLayer:
    """One layer of the chain.

    Attributes:
        name: the model's name for it, of the wrapper where it is wrapped.
        kind: Keras class name without the wrapper, such as ``MaxPooling2D``.
        config: of the layer itself, not of its wrapper.
        per_step: it is inside TimeDistributed.
        arrays, moments: see :class:`~convlstm_fish.interop.keras_source.NamedLayer`.
    """

    name: str
    kind: str
    config: dict[str, Any]
    per_step: bool = False
    arrays: Arrays = field(default_factory=dict)
    moments: Moments = field(default_factory=dict)

    def refuse(self, reason: str) -> UserError:
        """The error that names this layer."""
        return UserError(f"layer {self.name!r} ({self.kind}) {reason}")

    def expect(self, option: str, default: Any, *accepted: Any, why: str = "") -> None:
        """Refuse the layer unless its ``option`` is one of those accepted."""
        value = plain(self.config.get(option, default))
        if value not in accepted:
            wanted = " or ".join(map(repr, accepted))
            raise self.refuse(f"has {option}={value!r}, only {wanted} can be represented{why}")

    def expect_arrays(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse the layer unless it has exactly these arrays, in these shapes."""
        for role, shape in shapes.items():
            found = self.arrays.get(role)
            if found is None:
                raise self.refuse(f"has no {role} in the file")
            if found.shape != shape:
                raise self.refuse(
                    f"has a {role} of shape {list(found.shape)}, its place in the model needs {list(shape)}"
                )
        for role in self.arrays.keys() - shapes.keys():
            raise self.refuse(f"has a {role} in the file that its configuration has not")

    def ints(self, option: str, count: int, default: str = "") -> list[int]:
        """That many positive whole numbers; one stands for all, and absent ones for another option's."""
        value = self.config.get(option)
        value = plain(self.config.get(default) if value is None else value)
        value = [value] * count if isinstance(value, int) else value
        if not isinstance(value, list) or len(value) != count or not all(isinstance(n, int) and n > 0 for n in value):
            raise self.refuse(f"has {option}={value!r}, {count} positive numbers are needed")
        return value

    def pair(self, option: str, default: str = "") -> tuple[int, int]:
        """Two positive whole numbers, as :meth:`ints`."""
        first, second = self.ints(option, 2, default)
        return first, second


def plain(value: Any) -> Any:
    """Keras's ways of writing a tuple as one list; anything else as it is."""
    if isinstance(value, dict) and value.get("class_name") in ("__tuple__", "TensorShape"):
        return list(value["items"])
    return list(value) if isinstance(value, tuple) else value


def function_name(layer: KerasLayer, option: str, default: str) -> str:
    """The name of an activation; a Lambda or an unregistered function is refused, never decoded."""
    value = layer.config.get(option, default)
    if isinstance(value, dict):
        if value.get("registered_name") == HARD_SIGMOID_2:
            return HARD_SIGMOID_2
        if value.get("class_name") == "function" and value.get("module") in ("builtins", "keras.activations"):
            value = value.get("config")
        else:
            raise layer.refuse(f"has the custom {option} {value.get('class_name')!r}, which is code and is not run")
    if value is None:
        return "linear"
    if not isinstance(value, str):
        raise layer.refuse(f"has {option}={value!r}, which is not the name of a function")
    return value


def chain(source: KerasSource) -> tuple[list[KerasLayer], list[int | None] | None]:
    """The layers in the order in which the data pass them, with their arrays, and the input's shape.

    Returns:
        layers: without the InputLayer.
        input shape: (T, H, W, C), each None where the model leaves it open; None where it does not say at all.

    Raises:
        UserError: if the model is not one chain, or holds layers within layers.
    """
    if source.model_config is None:
        raise ValueError("source has no configuration")
    kind = source.model_config["class_name"]
    entries = config_layers(source.model_config)
    if kind in ("Functional", "Model"):
        entries = _in_data_order(entries)
    elif kind != "Sequential":
        raise UserError(f"{source.path}: the model is a {kind!r}, only Sequential and functional models can be read")

    named = {layer.name: layer for layer in source.layers}
    layers: list[KerasLayer] = []
    shape: list[int | None] | None = None
    for entry in entries:
        config = entry["config"]
        shape = shape or plain(config.get("batch_shape") or config.get("batch_input_shape"))
        if entry["class_name"] == "InputLayer":
            continue
        name, inner = str(config.get("name", entry.get("name"))), entry
        per_step = entry["class_name"] == "TimeDistributed"
        if per_step:
            inner = config["layer"]
        layer = KerasLayer(name, str(inner["class_name"]), inner["config"], per_step)
        if name in named:
            found = named.pop(name)
            layer.arrays, layer.moments = found.arrays, found.moments
        layers.append(layer)
    if named:
        raise UserError(f"{source.path}: holds weights of {sorted(named)}, layers that its configuration does not have")
    if shape is None and isinstance(source.model_config["config"], dict):
        shape = plain(source.model_config["config"].get("build_input_shape"))
    if shape is not None:
        if len(shape) != 5 or not all(size is None or (isinstance(size, int) and size > 0) for size in shape):
            raise UserError(
                f"{source.path}: the model's input has shape {shape}, clips have (batch, time, height, width, channels)"
            )
        shape = shape[1:]
    return layers, shape


def _in_data_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The layers of a functional model from its input to its output; anything but one chain is refused."""
    by_source: dict[str | None, dict[str, Any]] = {}
    for entry in entries:
        name = entry.get("name") or entry["config"].get("name")
        sources = _inbound(entry.get("inbound_nodes", []))
        if len(sources) > 1 or (entry["class_name"] == "InputLayer") != (not sources):
            raise UserError(
                f"layer {name!r} ({entry['class_name']}) has {len(sources)} inputs or is used more than once, "
                "only models that are one chain of layers can be represented"
            )
        before = sources[0] if sources else None
        if before in by_source:
            other = by_source[before]["config"].get("name")
            raise UserError(
                f"layers {other!r} and {name!r} have the same input, only models that are one chain of layers "
                "can be represented"
            )
        by_source[before] = entry
    ordered: list[dict[str, Any]] = []
    at: str | None = None
    while at in by_source:
        entry = by_source.pop(at)
        ordered.append(entry)
        at = entry.get("name") or entry["config"].get("name")
    if by_source:
        name = next(iter(by_source.values()))["config"].get("name")
        raise UserError(f"layer {name!r} is not on the way from the model's input to its output")
    return ordered


def _inbound(nodes: Any) -> list[str]:
    """Names of all layers whose output goes into this one, in the forms of Keras 2 (lists) and 3 (objects)."""
    names: list[str] = []
    stack = list(nodes)
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if item.get("class_name") == "__keras_tensor__":
                names.append(str(item["config"]["keras_history"][0]))
            else:
                stack += list(item.values())
        elif isinstance(item, list):
            if len(item) >= 3 and isinstance(item[0], str) and all(isinstance(place, int) for place in item[1:3]):
                names.append(item[0])
                stack += item[3:]
            else:
                stack += item
    return names
