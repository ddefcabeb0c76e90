"""ClipClassifiers out to Keras: the matching Keras model, with the same weights, and its files.

Needs Keras 3 (``pip install convlstm_fish[keras]``); any backend serves, PyTorch is chosen where none was.
Importing this module registers :func:`hard_sigmoid_keras2`, so that Keras can load ``.keras`` files that use it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_layout import dense_from_keras, flattened_to_keras, gates_to_keras
from convlstm_fish.models import ClipClassifier

if "keras" not in sys.modules:
    os.environ.setdefault("KERAS_BACKEND", "torch")
try:
    import keras
except ImportError as error:
    raise UserError(f"writing Keras files needs Keras: pip install 'convlstm_fish[keras]' ({error})") from error

# Of the published clips. Keras wants to know height and width.
CLIP_SHAPE: tuple[int | None, int, int] = (None, 120, 160)

__all__ = ["build_keras_model", "export_keras", "hard_sigmoid_keras2"]


@keras.saving.register_keras_serializable("convlstm_fish", "hard_sigmoid_keras2")
def hard_sigmoid_keras2(x: Any) -> Any:
    """Keras 2's hard sigmoid, clip(0.2 x + 0.5, 0, 1); what Keras 3 calls so is clip(x / 6 + 0.5, 0, 1)."""
    return keras.ops.clip(0.2 * x + 0.5, 0.0, 1.0)


def build_keras_model(
    network: ClipClassifier, clip_shape: Sequence[int | None] = CLIP_SHAPE, *, probabilities: bool = True
) -> Any:
    """The functional Keras model that computes what ``network`` does in eval mode, with its weights.

    Args:
        network: the network; without stem and peepholes, which Keras's ConvLSTM2D does not have.
        clip_shape: (T, H, W) of the clips; T may be None, to stay open. The model takes (N, T, H, W, C).
        probabilities: end with sigmoid (one class) or softmax, as Keras models usually do; or with the logits.

    Returns:
        A ``keras.Model``.

    Raises:
        UserError: naming what Keras cannot represent.
    """
    if network.stem is not None:
        raise UserError("the network has a stem (stem_channels), which is not exported to Keras")
    if len(clip_shape) != 3 or any(size is None or size < 1 for size in clip_shape[1:]):
        raise UserError(f"clip_shape must be (T, H, W) with H and W known, got {tuple(clip_shape)}")
    flatten = network.head == "flatten"
    cells: list[Any] = [layer.cells[0] for layer in network.layers]  # type: ignore[index]
    inputs = keras.Input((*clip_shape, cells[0].in_channels), name="clip")
    x = inputs
    filled: list[tuple[Any, list[np.ndarray]]] = []
    last = len(cells) - 1
    for index, (cell, pool, norm) in enumerate(zip(cells, network.pools, network.norms)):
        recurrent = _conv_lstm(cell, index, return_sequences=index < last)
        x = recurrent(x)
        filled.append((recurrent, _cell_arrays(cell)))
        if not isinstance(pool, nn.Identity):
            made = keras.layers.MaxPooling2D(pool.kernel_size, name=f"pool_{index + 1}")
            x = (keras.layers.TimeDistributed(made, name=f"each_{made.name}") if index < last else made)(x)
        if isinstance(norm, nn.BatchNorm2d):
            # Not in TimeDistributed, where Keras 3 normalises each step by itself; Keras 2 took all steps together.
            made = _norm(norm, index)
            x = made(x)
            filled.append((made, _norm_arrays(norm)))
    image = x.shape[1:3]
    linears = [module for module in [*network.dense, network.classifier] if isinstance(module, nn.Linear)]
    if flatten:
        if linears[0].in_features != image[0] * image[1] * cells[-1].hidden_channels:
            raise UserError(f"clip_shape {tuple(clip_shape)} is not that of the network with the head 'flatten'")
        x = keras.layers.Flatten(name="head")(x)
    else:
        pooling = keras.layers.GlobalMaxPooling2D if network.head == "max" else keras.layers.GlobalAveragePooling2D
        x = pooling(name="head")(x)
    for index, linear in enumerate(linears):
        activation: str | None = "relu"
        if index == len(linears) - 1:
            activation = None if not probabilities else "sigmoid" if linear.out_features == 1 else "softmax"
        dense = keras.layers.Dense(linear.out_features, activation=activation, name=f"dense_{index + 1}")
        x = dense(x)
        layout = flattened_to_keras(*image) if index == 0 and flatten else dense_from_keras
        filled.append((dense, [layout(_array(linear.weight)), _array(linear.bias)]))
    model = keras.Model(inputs, x, name="clip_classifier")
    for made, arrays in filled:
        made.set_weights(arrays)
    return model


def export_keras(network: ClipClassifier, path: str | Path, clip_shape: Sequence[int | None] = CLIP_SHAPE) -> Path:
    """Write the network's weights, or the whole model, for Keras. The file is complete or absent.

    Args:
        network: see :func:`build_keras_model`.
        path: ending in ``.weights.h5`` (weights, for ``build_keras_model(...).load_weights``) or ``.keras``.
        clip_shape: (T, H, W) of the clips. Weights depend on it with the head ``"flatten"`` only.

    Returns:
        The path written.

    Raises:
        UserError: for another ending, or naming what Keras cannot represent.
    """
    path = Path(path)
    endings = (".weights.h5", ".keras")
    ending = next((ending for ending in endings if path.name.endswith(ending)), None)
    if ending is None:
        raise UserError(f"{path}: must end in {' or '.join(endings)}")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}")
    model = build_keras_model(network, clip_shape)
    beside = path.with_name(f".{path.name}.{os.getpid()}{ending}")
    try:
        (model.save if ending == ".keras" else model.save_weights)(beside)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def _conv_lstm(cell: Any, index: int, return_sequences: bool) -> Any:
    if cell.peephole is not None:
        raise UserError("the network has peepholes, which Keras's ConvLSTM2D does not have")
    if cell.padding not in ("same", "valid"):
        raise UserError(f"the network has padding={cell.padding!r}, Keras's ConvLSTM2D has only 'same' and 'valid'")
    activations = {"sigmoid": "sigmoid", "hard_sigmoid": hard_sigmoid_keras2, "hard_sigmoid_v3": "hard_sigmoid"}
    return keras.layers.ConvLSTM2D(
        cell.hidden_channels,
        cell.kernel_size,
        padding=cell.padding,
        recurrent_activation=activations[cell.recurrent_activation],
        use_bias=cell.bias is not None,
        return_sequences=return_sequences,
        name=f"conv_lstm_{index + 1}",
    )


def _cell_arrays(cell: Any) -> list[np.ndarray]:
    arrays = [gates_to_keras(_array(kernel)) for kernel in (cell.weight_ih, cell.weight_hh)]
    return arrays if cell.bias is None else [*arrays, _array(cell.bias)]


def _norm(norm: nn.BatchNorm2d, index: int) -> Any:
    return keras.layers.BatchNormalization(
        momentum=1.0 - float(norm.momentum or 0.0),
        epsilon=norm.eps,
        center=norm.affine,
        scale=norm.affine,
        name=f"batch_norm_{index + 1}",
    )


def _norm_arrays(norm: nn.BatchNorm2d) -> list[np.ndarray]:
    """In Keras's order: gamma, beta, moving mean, moving variance."""
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [_array(tensor) for tensor in tensors if tensor is not None]
