"""From a chain of Keras layers to a ClipClassifier: its settings, and every array in its place and layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_layers import HARD_SIGMOID_2, TRAINING_ONLY, KerasLayer, function_name, plain
from convlstm_fish.interop.keras_layout import Layout, dense_from_keras, flattened_from_keras, gates_from_keras


@dataclass
class Placed:
    """An array in this package's layout, with Adam's moments where the file has them."""

    array: np.ndarray
    moments: tuple[np.ndarray, np.ndarray] | None = None


@dataclass
class Converted:
    """What :func:`convert` found.

    Attributes:
        settings: keyword arguments of :class:`convlstm_fish.models.ClipClassifier`.
        placed: its state_dict's entries by name, without batch norm's ``num_batches_tracked``.
        loss: ``"bce"`` or ``"cross_entropy"``, after the last activation, which the logits leave out.
        l1, l2: penalty on the ConvLSTM layers' kernels.
        notes: what a person should know about the translation, a sentence each.
    """

    settings: dict[str, Any]
    placed: dict[str, Placed] = field(default_factory=dict)
    loss: str = "bce"
    l1: float = 0.0
    l2: float = 0.0
    notes: list[str] = field(default_factory=list)


@dataclass
class _Block:
    """A ConvLSTM layer and what stands between it and the next."""

    layer: KerasLayer
    pool: int = 0
    norm: KerasLayer | None = None


def convert(layers: list[KerasLayer], input_shape: list[int | None] | None, keras_major: int | None) -> Converted:
    """The ClipClassifier that gives the same logits as the chain of Keras layers.

    Args:
        layers: from :func:`~convlstm_fish.interop.keras_layers.chain` or ``infer``.
        input_shape: (T, H, W, C) or None.
        keras_major: 2 or 3: which of the two hard sigmoids is meant by ``hard_sigmoid``.

    Raises:
        UserError: naming the layer that cannot be represented.
    """
    return _Conversion(layers, input_shape, keras_major).run()


class _Conversion:
    def __init__(self, layers: list[KerasLayer], input_shape: list[int | None] | None, major: int | None) -> None:
        self.layers = layers
        self.major = major
        self.blocks: list[_Block] = []
        self.head: KerasLayer | None = None
        self.dense: list[tuple[KerasLayer, str]] = []  # with the activations
        self.image = (input_shape[1], input_shape[2]) if input_shape else (None, None)
        self.input_image = self.image
        self.result = Converted({})

    def run(self) -> Converted:
        handlers: dict[str, Callable[[KerasLayer], None]] = {
            "ConvLSTM2D": self._conv_lstm,
            "MaxPooling2D": self._max_pooling_2d,
            "MaxPooling3D": self._max_pooling_3d,
            "BatchNormalization": self._batch_normalization,
            "GlobalMaxPooling2D": self._set_head,
            "GlobalAveragePooling2D": self._set_head,
            "Flatten": self._flatten,
            "Dense": self._dense,
            "Activation": self._activation,
            "ReLU": self._relu,
            "Softmax": self._softmax,
        }
        for layer in self.layers:
            if layer.kind in TRAINING_ONLY:
                self.note(layer, "acts in training only and is left out")
                continue
            if layer.kind not in handlers:
                raise layer.refuse("cannot be represented")
            if layer.per_step and layer.kind not in ("MaxPooling2D", "BatchNormalization", "Activation"):
                raise layer.refuse("cannot be represented inside TimeDistributed")
            if layer.arrays and not layer.config.get("trainable", True):
                self.note(layer, "was frozen, here it trains")
            handlers[layer.kind](layer)
        if not self.blocks:
            raise UserError("the model has no ConvLSTM2D layer")
        if self.head is None or not self.dense:
            raise self.blocks[-1].layer.refuse("is not followed by a global pooling or Flatten layer and a Dense layer")
        self._settings()
        self._place()
        return self.result

    def note(self, layer: KerasLayer, text: str) -> None:
        self.result.notes.append(f"layer {layer.name!r} ({layer.kind}) {text}")

    # One method for each Keras class.

    def _conv_lstm(self, layer: KerasLayer) -> None:
        if self.head is not None:
            raise layer.refuse("comes after a global pooling or Flatten layer")
        if self.blocks and not self.blocks[-1].layer.config.get("return_sequences", False):
            raise self.blocks[-1].layer.refuse(f"has return_sequences=False, but {layer.name!r} follows it")
        layer.expect("activation", "tanh", "tanh")
        layer.expect("strides", [1, 1], [1, 1], 1)
        layer.expect("dilation_rate", [1, 1], [1, 1], 1)
        layer.expect("data_format", "channels_last", "channels_last")
        layer.expect("padding", "valid", "valid", "same")
        for option in ("go_backwards", "stateful", "return_state", "time_major"):
            layer.expect(option, False, False)
        filters = int(layer.config["filters"])
        kernel = layer.pair("kernel_size")
        channels = self._channels(layer)
        shapes = {"kernel": (*kernel, channels, 4 * filters), "recurrent_kernel": (*kernel, filters, 4 * filters)}
        bias = {"bias": (4 * filters,)} if layer.config.get("use_bias", True) else {}
        layer.expect_arrays({**shapes, **bias})
        if layer.config.get("padding", "valid") == "valid":
            self.image = tuple(n if n is None else n - k + 1 for n, k in zip(self.image, kernel))  # type: ignore[assignment]
            if any(n is not None and n < 1 for n in self.image):
                raise layer.refuse(f"leaves no pixel of the model's {self.input_image} image")
        self.blocks.append(_Block(layer))

    def _channels(self, layer: KerasLayer) -> int:
        if self.blocks:
            return int(self.blocks[-1].layer.config["filters"])
        kernel = layer.arrays.get("kernel")
        if kernel is None or kernel.ndim != 4:
            raise layer.refuse("has no kernel of four dimensions in the file")
        return int(kernel.shape[2])

    def _block(self, layer: KerasLayer, of_one_step: bool) -> _Block:
        """The ConvLSTM block that a pooling or norm layer belongs to."""
        if not self.blocks:
            raise layer.refuse("comes before the first ConvLSTM2D layer")
        if self.head is not None:
            raise layer.refuse("comes after a global pooling or Flatten layer")
        block = self.blocks[-1]
        if of_one_step and block.layer.config.get("return_sequences", False):
            raise layer.refuse(f"is not wrapped in TimeDistributed, but {block.layer.name!r} hands on all steps")
        return block

    def _max_pooling_2d(self, layer: KerasLayer) -> None:
        layer.expect("data_format", "channels_last", "channels_last")
        self._pool(layer, layer.pair("pool_size"), layer.pair("strides", "pool_size"), not layer.per_step)

    def _max_pooling_3d(self, layer: KerasLayer) -> None:
        layer.expect("data_format", "channels_last", "channels_last")
        time, *size = layer.ints("pool_size", 3)
        time_stride, *stride = layer.ints("strides", 3, "pool_size")
        if time != 1 or time_stride != 1:
            raise layer.refuse(
                f"pools over time (pool_size={[time, *size]}), only pools of one step can be represented"
            )
        self._pool(layer, (size[0], size[1]), (stride[0], stride[1]), False)

    def _pool(self, layer: KerasLayer, size: tuple[int, int], stride: tuple[int, int], of_one_step: bool) -> None:
        block = self._block(layer, of_one_step)
        if block.pool:
            raise layer.refuse(f"is the second pooling layer after {block.layer.name!r}")
        if size[0] != size[1] or stride != size:
            raise layer.refuse(
                f"has pool_size={list(size)}, strides={list(stride)}, only equal ones can be represented"
            )
        layer.expect("padding", "valid", "valid", "same")
        if layer.config.get("padding") == "same" and any(n is None or n % size[0] for n in self.image):
            raise layer.refuse(f"has padding='same' on {self.image} images, which {size[0]} does not divide")
        norm = block.norm
        if norm is not None:
            # A max pool picks the same pixels before and after a scale that is not negative.
            if (norm.arrays.get("gamma", np.ones(1)) < 0).any():
                raise layer.refuse(
                    f"comes after {norm.name!r}, whose scale is negative in places, so they cannot be swapped"
                )
            self.note(
                layer, f"changes places with {norm.name!r}: the same outputs, but its statistics in training differ"
            )
        block.pool = size[0]
        self.image = tuple(n if n is None else n // size[0] for n in self.image)  # type: ignore[assignment]
        if any(n == 0 for n in self.image):
            raise layer.refuse(f"leaves no pixel of the model's {self.input_image} image")

    def _batch_normalization(self, layer: KerasLayer) -> None:
        sequence = bool(self.blocks) and self.blocks[-1].layer.config.get("return_sequences", False)
        block = self._block(layer, layer.per_step and not sequence)
        if block.norm is not None:
            raise layer.refuse(f"is the second batch norm after {block.layer.name!r}")
        axis = plain(layer.config.get("axis", -1))
        axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
        if axis not in (-1, 4 if sequence and not layer.per_step else 3):
            raise layer.refuse(f"has axis={axis!r}, only the channels (-1) can be represented")
        layer.expect("renorm", False, False)
        roles = ["moving_mean", "moving_variance"]
        roles += [role for role, option in (("gamma", "scale"), ("beta", "center")) if layer.config.get(option, True)]
        layer.expect_arrays(dict.fromkeys(roles, (int(block.layer.config["filters"]),)))
        if (layer.arrays["moving_variance"] < 0).any():
            raise layer.refuse("has a negative variance")
        if layer.per_step and self.major == 3:
            self.note(layer, "is applied by Keras 3 to each step by itself in training, here to all steps together")
        block.norm = layer

    def _flatten(self, layer: KerasLayer) -> None:
        if self.head is None:
            self._set_head(layer)  # and after a global pooling it changes nothing

    def _set_head(self, layer: KerasLayer) -> None:
        block = self._block(layer, False)
        if block.layer.config.get("return_sequences", False):
            raise block.layer.refuse(
                f"has return_sequences=True before {layer.name!r}, only its last step can be represented"
            )
        layer.expect("data_format", "channels_last", "channels_last", None)
        if layer.kind == "Flatten" and None in self.image:
            raise layer.refuse("needs the size of the images, which the model's input leaves open")
        self.head = layer

    def _dense(self, layer: KerasLayer) -> None:
        if self.head is None:
            raise layer.refuse("comes before the global pooling or Flatten layer")
        if self.dense and self.dense[-1][1] != "relu":
            before, activation = self.dense[-1]
            raise before.refuse(f"has activation {activation!r}, hidden Dense layers can only have 'relu'")
        if self.dense:
            features = int(self.dense[-1][0].config["units"])
        else:
            features = int(self.blocks[-1].layer.config["filters"])
            if self.head.kind == "Flatten":
                features *= (self.image[0] or 1) * (self.image[1] or 1)
        units = int(layer.config["units"])
        bias = {"bias": (units,)} if layer.config.get("use_bias", True) else {}
        layer.expect_arrays({"kernel": (features, units), **bias})
        self.dense.append((layer, function_name(layer, "activation", "linear")))

    def _activation(self, layer: KerasLayer) -> None:
        self._activate(layer, function_name(layer, "activation", "linear"))

    def _relu(self, layer: KerasLayer) -> None:
        layer.expect("max_value", None, None)
        for option in ("negative_slope", "threshold"):
            layer.expect(option, 0.0, 0.0, None)
        self._activate(layer, "relu")

    def _softmax(self, layer: KerasLayer) -> None:
        layer.expect("axis", -1, -1, 1)
        self._activate(layer, "softmax")

    def _activate(self, layer: KerasLayer, activation: str) -> None:
        if activation == "linear":
            return
        if not self.dense or self.dense[-1][1] != "linear":
            raise layer.refuse("is only understood after a Dense layer without an activation")
        self.dense[-1] = (self.dense[-1][0], activation)

    # What the layers amount to.

    def _settings(self) -> None:
        convs = [block.layer for block in self.blocks]
        norms = [block.norm for block in self.blocks if block.norm is not None]
        head = self.head
        settings = self.result.settings
        settings.update(
            in_channels=int(convs[0].arrays["kernel"].shape[2]),
            hidden_channels=[int(layer.config["filters"]) for layer in convs],
            kernel_size=_one([_side(layer.pair("kernel_size")) for layer in convs]),
            num_classes=int(self.dense[-1][0].config["units"]),
            padding=_one([str(layer.config.get("padding", "valid")) for layer in convs]),
            bias=_one([bool(layer.config.get("use_bias", True)) for layer in convs]),
            recurrent_activation=self._recurrent_activation(convs),
            pool_size=_between([block.pool for block in self.blocks]),
            batch_norm=_between([block.norm is not None for block in self.blocks]),
            head={"GlobalMaxPooling2D": "max", "GlobalAveragePooling2D": "avg"}.get(
                head.kind if head else "", "flatten"
            ),
            dense_features=[int(layer.config["units"]) for layer, _ in self.dense[:-1]],
        )
        if settings["head"] == "flatten":
            settings["image_size"] = [int(n or 0) for n in self.input_image]
        if norms:
            settings["batch_norm_eps"] = float(_same(norms, "epsilon", 1e-3))
            settings["batch_norm_momentum"] = round(1.0 - float(_same(norms, "momentum", 0.99)), 12)
            settings["batch_norm_affine"] = any({"gamma", "beta"} & set(norm.arrays) for norm in norms)
        for option in ("dropout", "recurrent_dropout"):
            values = {float(layer.config.get(option) or 0.0) for layer in convs}
            settings[option] = min(values) if len(values) == 1 else 0.0
            if len(values) > 1:
                self.note(convs[0], f"and others have different {option}, which acts in training only and is left at 0")
        self._regularization(convs)
        self._output()

    def _recurrent_activation(self, convs: list[KerasLayer]) -> str:
        names = {function_name(layer, "recurrent_activation", "sigmoid"): layer for layer in convs}
        if len(names) > 1:
            raise convs[-1].refuse(f"has another recurrent_activation than the layers before it: {sorted(names)}")
        name, layer = names.popitem()
        if name == "sigmoid" or name == "hard_sigmoid_v3":
            return name
        if name == HARD_SIGMOID_2:
            return "hard_sigmoid"
        if name != "hard_sigmoid":
            raise layer.refuse(f"has recurrent_activation={name!r}, only sigmoid and hard_sigmoid can be represented")
        if self.major is None:
            raise layer.refuse("has a hard_sigmoid, and the file does not say whether Keras 2's or Keras 3's")
        return "hard_sigmoid" if self.major == 2 else "hard_sigmoid_v3"

    def _regularization(self, convs: list[KerasLayer]) -> None:
        """L1 and L2, which act here on both kernels of all ConvLSTM layers alike or not at all."""
        penalties = {_penalty(layer, f"{kernel}_regularizer") for layer in convs for kernel in ("kernel", "recurrent")}
        if len(penalties) == 1 and None not in penalties:
            self.result.l1, self.result.l2 = penalties.pop() or (0.0, 0.0)
        else:
            self.note(convs[0], "or another has regularizers that are not the same for all kernels; they are left out")
        for layer in [*convs, *(dense for dense, _ in self.dense)]:
            kernel = () if layer.kind == "ConvLSTM2D" else ("kernel",)
            if any(_penalty(layer, f"{name}_regularizer") != (0.0, 0.0) for name in (*kernel, "bias", "activity")):
                self.note(layer, "has regularizers that are left out")
            if any(layer.config.get(f"{name}_constraint") for name in ("kernel", "recurrent", "bias")):
                self.note(layer, "has constraints that are left out")

    def _output(self) -> None:
        layer, activation = self.dense[-1]
        classes = self.result.settings["num_classes"]
        allowed = ("sigmoid", "linear") if classes == 1 else ("softmax", "linear")
        if activation not in allowed:
            raise layer.refuse(
                f"has {classes} outputs with activation {activation!r}, only {allowed[0]} can be represented"
            )
        if activation == "linear":
            self.note(layer, f"has no activation: its outputs are taken as logits of a {allowed[0]}")
        self.result.loss = "bce" if classes == 1 else "cross_entropy"

    def _place(self) -> None:
        for index, block in enumerate(self.blocks):
            cell = f"layers.{index}.cells.0"
            self._put(f"{cell}.weight_ih", block.layer, "kernel", gates_from_keras)
            self._put(f"{cell}.weight_hh", block.layer, "recurrent_kernel", gates_from_keras)
            if block.layer.config.get("use_bias", True):
                self._put(f"{cell}.bias", block.layer, "bias")
            if block.norm is not None:
                self._put_norm(f"norms.{index}", block.norm)
        for index, (layer, _) in enumerate(self.dense):
            name = "classifier" if index == len(self.dense) - 1 else f"dense.{2 * index}"
            flattened = index == 0 and self.result.settings["head"] == "flatten"
            layout = flattened_from_keras(self.image[0] or 1, self.image[1] or 1) if flattened else dense_from_keras
            self._put(f"{name}.weight", layer, "kernel", layout)
            if layer.config.get("use_bias", True):
                self._put(f"{name}.bias", layer, "bias")
            else:
                self.result.placed[f"{name}.bias"] = Placed(np.zeros(int(layer.config["units"]), np.float32))
                self.note(layer, "has no bias; here it has one, of zeros, which training would change")

    def _put(self, name: str, layer: KerasLayer, role: str, layout: Layout = np.asarray) -> None:
        moments = layer.moments.get(role)
        self.result.placed[name] = Placed(
            np.ascontiguousarray(layout(layer.arrays[role])),
            None if moments is None else tuple(np.ascontiguousarray(layout(m)) for m in moments),  # type: ignore[arg-type]
        )

    def _put_norm(self, name: str, norm: KerasLayer) -> None:
        self._put(f"{name}.running_mean", norm, "moving_mean")
        self._put(f"{name}.running_var", norm, "moving_variance")
        if not self.result.settings["batch_norm_affine"]:
            return
        for role, ours, value in (("gamma", "weight", 1.0), ("beta", "bias", 0.0)):
            if role in norm.arrays:
                self._put(f"{name}.{ours}", norm, role)
            else:
                self.result.placed[f"{name}.{ours}"] = Placed(np.full_like(norm.arrays["moving_mean"], value))
                self.note(norm, f"has no {role}; here it has one, of {value:g}, which training would change")


def _one(values: list[Any]) -> Any:
    """One value for all layers where they agree, as ClipClassifier takes it; lists stay apart from one another."""
    agree = all(value == values[0] for value in values) and not isinstance(values[0], list)
    return values[0] if agree else values


def _between(values: list[Any]) -> Any:
    """One value where it stands between all layers and not after the last, as ClipClassifier takes it."""
    *before, last = values
    return before[0] if before and not last and all(value == before[0] for value in before) else values


def _penalty(layer: KerasLayer, option: str) -> tuple[float, float] | None:
    """(L1, L2) of a regularizer, None for any other kind."""
    regularizer = layer.config.get(option)
    if not regularizer:
        return (0.0, 0.0)
    if not isinstance(regularizer, dict) or regularizer.get("class_name") not in ("L1", "L2", "L1L2"):
        return None
    config = regularizer["config"]
    return (float(config.get("l1") or 0.0), float(config.get("l2") or 0.0))


def _side(kernel: tuple[int, int]) -> int | list[int]:
    return kernel[0] if kernel[0] == kernel[1] else list(kernel)


def _same(norms: list[KerasLayer], option: str, default: float) -> float:
    values = [float(norm.config.get(option, default)) for norm in norms]
    if len(set(values)) > 1:
        raise norms[-1].refuse(f"has another {option} than the batch norms before it: {values}")
    return values[0]
