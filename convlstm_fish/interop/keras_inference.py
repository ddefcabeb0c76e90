"""The layers behind a file that holds weights alone: from their shapes, and from options for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_layers import HARD_SIGMOID_2, KerasLayer
from convlstm_fish.interop.keras_source import KerasSource, NamedLayer

_HEADS = {"max": "GlobalMaxPooling2D", "avg": "GlobalAveragePooling2D", "flatten": "Flatten"}


@dataclass(frozen=True)
class Architecture:
    """What weights do not tell. None leaves it to what the file hints at or to Keras's default.

    Attributes:
        padding: ``"valid"`` or ``"same"``, of every ConvLSTM layer, or a list with one for each.
        recurrent_activation: ``"sigmoid"``, ``"hard_sigmoid"`` (Keras 2's) or ``"hard_sigmoid_v3"`` (Keras 3's).
        pool_size: of the max pool between every two ConvLSTM layers; 0 for none. A list sets it after each layer.
        head: ``"max"``, ``"avg"`` or ``"flatten"``.
        image_size: (H, W) of the clips, needed by the head ``"flatten"``.
    """

    padding: str | list[str] | None = None
    recurrent_activation: str | None = None
    pool_size: int | list[int] | None = None
    head: str | None = None
    image_size: tuple[int, int] | None = None

    def given(self) -> list[str]:
        """Names of the options that were given."""
        return [name for name, value in vars(self).items() if value is not None]


def infer(source: KerasSource, told: Architecture) -> tuple[list[KerasLayer], list[int | None], list[str]]:
    """A chain of layers for weights without a configuration.

    Returns:
        layers: as from :func:`~convlstm_fish.interop.keras_layers.chain`.
        input shape: (T, H, W, C) as far as it is known.
        assumed: a sentence for each thing that was not told.

    Raises:
        UserError: if the arrays cannot be those of such a model.
    """
    assumed: list[str] = []
    convs, norms, dense = _sort(source, assumed)
    padding = [told.padding] * len(convs) if isinstance(told.padding, str) else told.padding
    if padding is None:
        padding = ["valid"] * len(convs)
        assumed.append("padding 'valid' (Keras's default); --padding same for the other")
    if len(padding) != len(convs):
        raise UserError(f"--padding: {len(padding)} values for the {len(convs)} ConvLSTM layers in {source.path}")
    activation = told.recurrent_activation or _recurrent_activation(source, assumed)
    pools = _pools(source, told, len(convs), assumed)

    layers: list[KerasLayer] = []
    for index, conv in enumerate(convs):
        config = {
            "filters": conv.arrays["kernel"].shape[3] // 4,
            "kernel_size": list(conv.arrays["kernel"].shape[:2]),
            "padding": padding[index],
            "recurrent_activation": HARD_SIGMOID_2 if activation == "hard_sigmoid" else activation,
            "use_bias": "bias" in conv.arrays,
            "return_sequences": index < len(convs) - 1,
        }
        layers.append(_layer(conv, "ConvLSTM2D", config))
        per_step = index < len(convs) - 1
        if pools[index]:
            pool = {"pool_size": [pools[index]] * 2}
            layers.append(KerasLayer(f"pool after {conv.name}", "MaxPooling2D", pool, per_step))
        if norms[index] is not None:
            norm: Any = norms[index]
            config = {"scale": "gamma" in norm.arrays, "center": "beta" in norm.arrays}
            layers.append(_layer(norm, "BatchNormalization", config, per_step))
    if any(norms):
        assumed.append("batch norm after the pooling, with epsilon 0.001 and momentum 0.99 (Keras's defaults)")

    features = dense[0].arrays["kernel"].shape[0]
    head = told.head
    if head is None:
        head = "max" if features == convs[-1].arrays["kernel"].shape[3] // 4 else "flatten"
        if head == "max":
            assumed.append("global max pooling before the dense layer; --head avg for averages")
    if head == "flatten" and told.image_size is None:
        raise UserError(
            f"{source.path}: its dense layer takes {features} features, those of a flattened image: "
            "give the size of the clips' images with --image_size"
        )
    layers.append(KerasLayer(f"{head} head", _HEADS[head], {}))
    for index, layer in enumerate(dense):
        units = layer.arrays["kernel"].shape[1]
        last = "sigmoid" if units == 1 else "softmax"
        config = {
            "units": units,
            "use_bias": "bias" in layer.arrays,
            "activation": "relu" if index < len(dense) - 1 else last,
        }
        layers.append(_layer(layer, "Dense", config))
    if len(dense) > 1:
        assumed.append("relu between the dense layers")
    image = told.image_size or (None, None)
    return layers, [None, *image, convs[0].arrays["kernel"].shape[2]], assumed


def _layer(layer: NamedLayer, kind: str, config: dict[str, Any], per_step: bool = False) -> KerasLayer:
    return KerasLayer(layer.name, kind, config, per_step, layer.arrays, layer.moments)


def _sort(
    source: KerasSource, assumed: list[str]
) -> tuple[list[NamedLayer], list[NamedLayer | None], list[NamedLayer]]:
    """ConvLSTM layers in order, the batch norm after each or None, and the dense layers in order."""
    convs: list[NamedLayer] = []
    norms: list[NamedLayer | None] = []
    dense: list[NamedLayer] = []
    unplaced: list[NamedLayer] = []
    for layer in source.layers:
        ranks = {role: array.ndim for role, array in layer.arrays.items()}
        four_gates = ranks.get("kernel") == 4 and layer.arrays["kernel"].shape[3] % 4 == 0
        if four_gates and ranks.keys() <= {"kernel", "recurrent_kernel", "bias"}:
            convs.append(layer)
            norms.append(None)
        elif "moving_mean" in ranks and "moving_variance" in ranks and set(ranks.values()) == {1}:
            if not source.ordered:
                unplaced.append(layer)
            elif not norms or norms[-1] is not None or dense:
                raise UserError(f"{source.path}: batch norm {layer.name!r} does not follow a ConvLSTM layer")
            else:
                norms[-1] = layer
        elif ranks.get("kernel") == 2 and ranks.keys() <= {"kernel", "bias"}:
            dense.append(layer)
        else:
            shapes = {role: list(array.shape) for role, array in layer.arrays.items()}
            raise UserError(
                f"{source.path}: layer {layer.name!r} with the arrays {shapes} is none of ConvLSTM2D, "
                "BatchNormalization and Dense"
            )
    if not convs or not dense:
        raise UserError(f"{source.path}: a ConvLSTM2D and a Dense layer are needed, found {_names(convs, dense)}")
    _place_norms(source, convs, norms, unplaced, assumed)
    return convs, norms, dense


def _place_norms(
    source: KerasSource,
    convs: list[NamedLayer],
    norms: list[NamedLayer | None],
    unplaced: list[NamedLayer],
    assumed: list[str],
) -> None:
    """Put batch norms, of which only the order within their kind is known, after ConvLSTM layers of their width.

    Those inside TimeDistributed act on every step, so none of them follows the last ConvLSTM layer.
    """
    for wrapped in (True, False):
        at = 0
        for norm in unplaced:
            if norm.name.startswith("time_distributed") != wrapped:
                continue
            width = norm.arrays["moving_mean"].shape[0]
            fits = [
                index
                for index in range(at, len(convs) - wrapped)
                if norms[index] is None and convs[index].arrays["kernel"].shape[3] == 4 * width
            ]
            if not fits:
                raise UserError(
                    f"{source.path}: batch norm {norm.name!r} of width {width} fits after no ConvLSTM layer"
                )
            if len(fits) > 1:
                assumed.append(f"batch norm {norm.name!r} follows the first ConvLSTM layer of its width")
            norms[fits[0]] = norm
            at = fits[0] + 1


def _names(*groups: list[NamedLayer]) -> list[str]:
    return [layer.name for group in groups for layer in group]


def _recurrent_activation(source: KerasSource, assumed: list[str]) -> str:
    if source.keras_major == 3:
        assumed.append("recurrent activation 'sigmoid' (Keras 3's default); see --recurrent_activation")
        return "sigmoid"
    if source.keras_major == 2 or source.path.suffix == ".npz":
        assumed.append("recurrent activation 'hard_sigmoid' (Keras 2's default); see --recurrent_activation")
        return "hard_sigmoid"
    raise UserError(
        f"{source.path}: holds weights alone, and neither they nor the file tell the recurrent activation: give "
        "--recurrent_activation sigmoid, hard_sigmoid (Keras 2) or hard_sigmoid_v3 (Keras 3)"
    )


def _pools(source: KerasSource, told: Architecture, layers: int, assumed: list[str]) -> list[int]:
    """The max pool's size after each ConvLSTM layer, 0 for none."""
    if isinstance(told.pool_size, list):
        if len(told.pool_size) != layers:
            raise UserError(
                f"--pool_size: {len(told.pool_size)} values for the {layers} ConvLSTM layers in {source.path}"
            )
        return told.pool_size
    if told.pool_size is not None:
        return [told.pool_size] * (layers - 1) + [0]
    if source.pooling is None:
        if layers > 1:
            assumed.append("a 2x2 max pool between the ConvLSTM layers; --pool_size 0 for none")
        return [2] * (layers - 1) + [0]
    if source.pooling not in (0, layers - 1, layers):
        raise UserError(
            f"{source.path}: lists {source.pooling} pooling layers for {layers} ConvLSTM layers: tell which of them "
            "are followed by one with --pool_size, one value for each (0 for none)"
        )
    if source.pooling:
        assumed.append("max pools of 2x2 (Keras's default); see --pool_size")
    return [2 if index < source.pooling else 0 for index in range(layers)]


def check_options(told: Architecture) -> None:
    """Refuse option values that no model can have.

    Raises:
        UserError: naming the option and its value.
    """
    choices = {
        "padding": ("valid", "same"),
        "recurrent_activation": ("sigmoid", "hard_sigmoid", "hard_sigmoid_v3"),
        "head": tuple(_HEADS),
    }
    for name, allowed in choices.items():
        value = getattr(told, name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one not in allowed:
                raise UserError(f"--{name} must be one of {', '.join(allowed)}, got {one!r}")
    sizes = told.pool_size if isinstance(told.pool_size, list) else [told.pool_size or 0]
    if any(size < 0 for size in sizes):
        raise UserError(f"--pool_size must be 0 or more, got {told.pool_size}")
    if told.image_size is not None and (len(told.image_size) != 2 or math.prod(told.image_size) < 1):
        raise UserError(f"--image_size must be the height and width in pixels, got {told.image_size}")
