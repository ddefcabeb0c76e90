"""Adds models as the installed Keras writes them to keras_models.tar.xz, with clips and the outputs it gives for them.

Run once with each Keras: python tests/interop/make_keras_models.py. The archive holds those of Keras 2.15.0, and of
Keras 3.0.5 and 3.15.1 on TensorFlow.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

OLD = keras.__version__.startswith("2.")


def models() -> Iterator[tuple[str, Any, str]]:
    """Name, model and loss."""
    clip = layers.Input((3, 9, 10, 2))
    x = layers.ConvLSTM2D(2, 3, padding="same", return_sequences=True, recurrent_activation="hard_sigmoid")(clip)
    x = layers.TimeDistributed(layers.MaxPooling2D(2))(x)
    x = layers.TimeDistributed(layers.BatchNormalization(center=False, scale=False))(x)
    x = layers.ConvLSTM2D(3, 3, recurrent_activation="hard_sigmoid", name="second")(x)
    x = layers.GlobalMaxPooling2D()(x)
    yield "functional", keras.Model(clip, layers.Dense(1, activation="sigmoid")(x)), "binary_crossentropy"
    stack = [
        layers.Input((3, 9, 10, 2)),
        layers.ConvLSTM2D(2, (3, 5), return_sequences=True, use_bias=False, recurrent_activation="sigmoid"),
        layers.BatchNormalization(),
        layers.MaxPooling3D((1, 2, 2)),
        layers.ConvLSTM2D(3, 2, padding="same", recurrent_activation="sigmoid"),
        layers.BatchNormalization(epsilon=1e-3),
        layers.Flatten(),
        layers.Dropout(0.2),
        layers.Dense(4, activation="relu"),
        layers.Dense(3),
        layers.Activation("softmax"),
    ]
    yield "sequential", keras.Sequential(stack), "categorical_crossentropy"


def main() -> None:
    keras.utils.set_random_seed(0)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "now"
        out.mkdir()
        for name, model, loss in models():
            model.compile(optimizer=keras.optimizers.Adam(8e-5), loss=loss)
            clips = random.random((4, *model.input_shape[1:])).astype(np.float32)
            target = random.random((4, *model.output_shape[1:])).astype(np.float32)
            model.fit(clips, target, epochs=2, verbose=0)
            np.savez(out / f"{name}_outputs.npz", clips=clips, outputs=model.predict(clips, verbose=0))
            model.save(out / f"{name}.keras")
            model.save(out / f"{name}.h5")
            model.save_weights(out / f"{name}.weights.h5")
            if OLD:
                model.save(out / f"{name}_savedmodel", save_format="tf")
                model.save_weights(out / f"{name}_weights.h5")
            else:
                model.export(out / f"{name}_savedmodel")
        archive = Path(__file__).with_name("keras_models.tar.xz")
        everything = Path(folder) / "everything"
        if archive.exists():
            with tarfile.open(archive) as tar:
                tar.extractall(everything, filter="data")
        shutil.copytree(out, everything / keras.__version__)
        with tarfile.open(archive, "w:xz") as tar:
            tar.add(everything, ".")


if __name__ == "__main__":
    main()
