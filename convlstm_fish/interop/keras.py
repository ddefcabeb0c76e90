"""Keras models in and out: published or own weights become a ClipClassifier, and a ClipClassifier a Keras file.

Reading needs h5py for HDF5 files and neither Keras nor TensorFlow; writing needs Keras (``pip install
convlstm_fish[keras]``). Example::

    imported = import_keras("checkpoints/visionary-serenity")
    probability = imported.network()(video).sigmoid()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_h5 import read_h5, read_keras_archive
from convlstm_fish.interop.keras_inference import Architecture, check_options, infer
from convlstm_fish.interop.keras_layers import chain
from convlstm_fish.interop.keras_network import Converted, convert
from convlstm_fish.interop.keras_npz import read_npz
from convlstm_fish.interop.keras_source import KerasSource, reading
from convlstm_fish.interop.savedmodel import read_savedmodel
from convlstm_fish.models import ClipClassifier

__all__ = ["AdamState", "KerasImport", "import_keras", "read_keras"]


@dataclass
class AdamState:
    """The optimizer that the model was compiled with, if that was Adam.

    Attributes:
        lr, betas, eps: its settings; Keras's eps is outside the bias correction, torch's inside.
        step: how many steps it has made.
        moments: (first, second) of each parameter by its name in the network; empty if the file has none.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    step: int = 0
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass
class KerasImport:
    """A Keras model in this package's terms.

    Attributes:
        path: where it came from.
        keras_version: that wrote it, or None.
        settings: keyword arguments of :class:`~convlstm_fish.models.ClipClassifier`.
        state_dict: for a network with these settings.
        input_shape: (T, C, H, W) of the clips, each None where the model leaves it open.
        loss: ``"bce"`` or ``"cross_entropy"``: what its outputs mean.
        l1, l2: its penalty on the ConvLSTM layers' kernels.
        optimizer: see :class:`AdamState`; None if it was not compiled with Adam.
        notes: what changed in translation, or was assumed, a sentence each.
    """

    path: Path
    keras_version: str | None
    settings: dict[str, Any]
    state_dict: dict[str, Tensor]
    input_shape: tuple[int | None, ...]
    loss: str
    l1: float = 0.0
    l2: float = 0.0
    optimizer: AdamState | None = None
    notes: list[str] = field(default_factory=list)

    def network(self, backend: str = "auto") -> ClipClassifier:
        """The network with its weights, ready to use.

        Args:
            backend: see :func:`convlstm_fish.ops.conv_lstm`.
        """
        network = ClipClassifier(**self.settings, backend=backend)
        network.load_state_dict(self.state_dict)
        return network.eval()


def read_keras(path: str | Path) -> KerasSource:
    """Layers, arrays and configuration of a Keras file, uninterpreted; nothing in it is run.

    Args:
        path: a SavedModel folder, or a ``.keras``, ``.h5``, ``.weights.h5`` or ``.npz`` file.

    Raises:
        UserError: if it is none of these or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir():
        if not (path / "saved_model.pb").is_file():
            raise UserError(f"{path}: is not a TensorFlow SavedModel folder, it holds no saved_model.pb")
        return read_savedmodel(path)
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return read_npz(path)
    if suffix not in (".keras", ".h5", ".hdf5"):
        raise UserError(
            f"{path}: is not a SavedModel folder or a file ending in .keras, .weights.h5, .h5, .hdf5 or .npz"
        )
    return read_keras_archive(path) if suffix == ".keras" else read_h5(path)


def import_keras(
    path: str | Path,
    *,
    padding: str | list[str] | None = None,
    recurrent_activation: str | None = None,
    pool_size: int | list[int] | None = None,
    head: str | None = None,
    image_size: tuple[int, int] | None = None,
) -> KerasImport:
    """A Keras model as a ClipClassifier, with the same outputs for the same clips.

    Args:
        path: a SavedModel folder, or a ``.keras``, ``.h5``, ``.weights.h5`` or ``.npz`` file.
        padding, recurrent_activation, pool_size, head, image_size: what weights without an architecture do not
            tell; see :class:`~convlstm_fish.interop.keras_inference.Architecture`. Refused for other files.

    Returns:
        The network's settings and state, and what else the file tells; video is (N, T, C, H, W), not Keras's
        (N, T, H, W, C).

    Raises:
        UserError: if the file cannot be read, or naming the layer that cannot be represented.
    """
    told = Architecture(padding, recurrent_activation, pool_size, head, image_size)
    check_options(told)
    source = read_keras(path)
    with reading(source.path, "Keras model"):
        notes: list[str] = []
        shape: list[int | None] | None
        if source.model_config is None:
            layers, shape, assumed = infer(source, told)
            notes += [f"assumed: {sentence}" for sentence in assumed]
        else:
            if told.given():
                options = ", ".join(f"--{name}" for name in told.given())
                raise UserError(f"{source.path}: holds its own architecture, so {options} cannot be given")
            with _naming(source.path):
                layers, shape = chain(source)
        with _naming(source.path):
            converted = convert(layers, shape, source.keras_major)
        steps, height, width, channels = shape or (None, None, None, None)
        state = {name: torch.from_numpy(placed.array.copy()) for name, placed in converted.placed.items()}
        for name in [name for name in state if name.endswith("running_mean")]:
            batches = torch.tensor(source.iterations, dtype=torch.long)
            state[name.replace("running_mean", "num_batches_tracked")] = batches
        return KerasImport(
            path=source.path,
            keras_version=source.keras_version,
            settings=converted.settings,
            state_dict=state,
            input_shape=(steps, channels or converted.settings["in_channels"], height, width),
            loss=converted.loss,
            l1=converted.l1,
            l2=converted.l2,
            optimizer=_adam(source, converted),
            notes=notes + converted.notes,
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Put the file's name before an error that names only a layer."""
    try:
        yield
    except UserError as error:
        told = str(error)
        raise UserError(told if told.startswith(f"{path}: ") else f"{path}: {told}") from error


def _adam(source: KerasSource, converted: Converted) -> AdamState | None:
    optimizer = source.optimizer
    if not isinstance(optimizer, dict) or str(optimizer.get("class_name")).split(">")[-1] != "Adam":
        return None
    config = optimizer.get("config", {})
    lr = config.get("learning_rate", 1e-3)
    if not isinstance(lr, float | int):
        converted.notes.append("the learning rate was a schedule, which is left out; Keras's default 0.001 is taken")
        lr = 1e-3
    state = AdamState(
        lr=_short(lr),
        betas=(_short(config.get("beta_1", 0.9)), _short(config.get("beta_2", 0.999))),
        eps=_short(config.get("epsilon", 1e-7)),
    )
    if config.get("amsgrad"):
        converted.notes.append("Adam was used with amsgrad, whose state is left out")
        return state
    for name, placed in converted.placed.items():
        if placed.moments is not None:
            first, second = placed.moments
            state.moments[name] = (torch.from_numpy(first.copy()), torch.from_numpy(second.copy()))
    state.step = source.iterations if state.moments else 0
    return state


def _short(value: float) -> float:
    """The number that was meant by one that went through float32: 7.999999797903001e-05 is 8e-05."""
    return float(str(np.float32(value)))
