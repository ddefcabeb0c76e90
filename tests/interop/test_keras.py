"""Files as Keras 2.15, 3.0 and 3.15 wrote them give the same outputs here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras import KerasImport, import_keras, read_keras

pytestmark = pytest.mark.usefixtures("hdf5_read_once")

WHOLE = [".keras", ".h5"]
VERSIONS = ["2.15.0", "3.0.5", "3.15.1"]
# What weights alone do not tell.
TOLD = {
    "functional": {"padding": ["same", "valid"]},
    "sequential": {
        "padding": ["valid", "same"],
        "recurrent_activation": "sigmoid",
        "image_size": (9, 10),
        "pool_size": 2,
    },
}
HARD_SIGMOID = {"2": "hard_sigmoid", "3": "hard_sigmoid_v3"}


def outputs(imported: KerasImport, clips: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = imported.network("reference")(torch.from_numpy(clips).permute(0, 1, 4, 2, 3))
    return (logits.sigmoid() if imported.loss == "bce" else logits.softmax(1)).numpy()


def assert_same_outputs(imported: KerasImport, folder: Path, name: str) -> None:
    with np.load(folder / f"{name}_outputs.npz") as expected:
        np.testing.assert_allclose(outputs(imported, expected["clips"]), expected["outputs"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["functional", "sequential"])
@pytest.mark.parametrize("version", VERSIONS)
def test_whole_models(keras_models: Path, version: str, name: str) -> None:
    endings = [*WHOLE, "_savedmodel"] if version.startswith("2") else WHOLE
    imports = [import_keras(keras_models / version / f"{name}{ending}") for ending in endings]
    for imported in imports:
        assert imported.keras_version == version
        assert imported.input_shape == (3, 2, 9, 10)
        assert imported.settings == imports[0].settings
        assert_same_outputs(imported, keras_models / version, name)
        assert imported.state_dict.keys() == imports[0].state_dict.keys()
        for key, value in imported.state_dict.items():
            assert torch.equal(value, imports[0].state_dict[key]), key


def test_settings_of_the_functional_model(keras_models: Path) -> None:
    for version in VERSIONS:
        assert import_keras(keras_models / version / "functional.keras").settings == {
            "in_channels": 2,
            "hidden_channels": [2, 3],
            "kernel_size": 3,
            "num_classes": 1,
            "padding": ["same", "valid"],
            "bias": True,
            "recurrent_activation": HARD_SIGMOID[version[0]],
            "pool_size": 2,
            "batch_norm": True,
            "batch_norm_eps": 0.001,
            "batch_norm_momentum": 0.01,
            "batch_norm_affine": False,
            "dropout": 0.0,
            "recurrent_dropout": 0.0,
            "head": "max",
            "dense_features": [],
        }


@pytest.mark.parametrize("version", VERSIONS)
def test_adam_comes_along(keras_models: Path, version: str) -> None:
    endings = [*WHOLE, "_savedmodel"] if version.startswith("2") else WHOLE
    states = [import_keras(keras_models / version / f"functional{ending}") for ending in endings]
    first = states[0].optimizer
    assert first is not None
    assert (first.lr, first.betas, first.eps, first.step) == (8e-5, (0.9, 0.999), 1e-7, 2)
    parameters = dict(states[0].network().named_parameters())
    assert first.moments.keys() == parameters.keys()
    for name, (m, v) in first.moments.items():
        assert m.shape == v.shape == parameters[name].shape
        assert (v >= 0).all()
        # After two steps m = 0.09 g1 + 0.1 g2 and v = 0.000999 g1^2 + 0.001 g2^2, so that |m| <= 4.254 sqrt(v).
        assert (m.abs() <= 4.26 * v.sqrt() + 1e-12).all(), name
    for other in states[1:]:
        assert other.optimizer is not None
        for name, pair in other.optimizer.moments.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, first.moments[name])), name


def test_what_was_left_out_is_said(keras_models: Path) -> None:
    notes = import_keras(keras_models / "3.15.1" / "sequential.keras").notes
    assert [note.split(")")[0] for note in notes] == [
        "layer 'max_pooling3d' (MaxPooling3D",
        "layer 'dropout' (Dropout",
    ]
    assert "changes places with 'batch_normalization_1'" in notes[0]
    assert "each step by itself" in import_keras(keras_models / "3.15.1" / "functional.keras").notes[0]
    assert import_keras(keras_models / "2.15.0" / "functional.keras").notes == []


@pytest.mark.parametrize("name", ["functional", "sequential"])
@pytest.mark.parametrize("version", VERSIONS)
def test_weights_alone(keras_models: Path, version: str, name: str) -> None:
    told = {"recurrent_activation": HARD_SIGMOID[version[0]], **TOLD[name]}
    endings = [".weights.h5", "_weights.h5" if version.startswith("2") else "_savedmodel"]
    whole = import_keras(keras_models / version / f"{name}.keras")
    for ending in endings:
        imported = import_keras(keras_models / version / f"{name}{ending}", **told)
        assert_same_outputs(imported, keras_models / version, name)
        assert imported.settings == whole.settings
        assert any("batch norm after the pooling" in note for note in imported.notes)


def test_weights_alone_say_what_they_lack(keras_models: Path) -> None:
    folder = keras_models / "3.15.1"
    with pytest.raises(UserError, match="give --recurrent_activation sigmoid, hard_sigmoid"):
        import_keras(folder / "functional.weights.h5")
    with pytest.raises(UserError, match="--image_size"):
        import_keras(folder / "sequential.weights.h5", recurrent_activation="sigmoid")
    with pytest.raises(UserError, match="3 values for the 2 ConvLSTM layers"):
        import_keras(folder / "functional.weights.h5", recurrent_activation="sigmoid", pool_size=[2, 2, 2])
    with pytest.raises(UserError, match=r"layer 'dense'.*kernel of shape"):
        import_keras(folder / "sequential.weights.h5", recurrent_activation="sigmoid", image_size=(30, 40))
    with pytest.raises(UserError, match="--padding must be one of valid, same, got 'full'"):
        import_keras(folder / "functional.weights.h5", padding="full")
    with pytest.raises(UserError, match="holds its own architecture, so --padding, --head cannot be given"):
        import_keras(folder / "functional.keras", padding="same", head="max")


def test_defaults_follow_the_version_in_the_file(keras_models: Path) -> None:
    notes = import_keras(keras_models / "2.15.0" / "functional_weights.h5").notes
    assert any("'hard_sigmoid' (Keras 2's default)" in note for note in notes)
    assert any("padding 'valid'" in note for note in notes)


def test_npz_round_trip_of_any_layer_names(keras_models: Path, tmp_path: Path) -> None:
    source = read_keras(keras_models / "3.15.1" / "functional.keras")
    arrays = {f"{layer.name}_{role}": array for layer in source.layers for role, array in layer.arrays.items()}
    np.savez(tmp_path / "weights.npz", **arrays)
    imported = import_keras(tmp_path / "weights.npz", recurrent_activation="hard_sigmoid_v3", **TOLD["functional"])
    assert_same_outputs(imported, keras_models / "3.15.1", "functional")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        import_keras(tmp_path / "absent.keras")
    with pytest.raises(UserError, match=r"holds no saved_model\.pb"):
        import_keras(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"ending in \.keras"):
        import_keras(tmp_path / "model.pt")


def test_layer_missing_from_the_weights(keras_models: Path, tmp_path: Path) -> None:
    path = shutil.copy(keras_models / "2.15.0" / "functional.h5", tmp_path / "model.h5")
    with h5py.File(path, "a") as file:
        names = [name for name in file["model_weights"].attrs["layer_names"] if name != "second"]
        file["model_weights"].attrs["layer_names"] = names
    with pytest.raises(UserError, match=r"layer 'second'.*has no kernel in the file"):
        import_keras(path)


def test_neither_keras_nor_tensorflow_is_loaded(keras_models: Path) -> None:
    program = (
        "import sys; from convlstm_fish.interop.keras import import_keras\n"
        f"import_keras({str(keras_models / '2.15.0' / 'functional_savedmodel')!r}); assert 'h5py' not in sys.modules\n"
        f"import_keras({str(keras_models / '3.15.1' / 'functional.keras')!r})\n"
        "assert not {'keras', 'tensorflow', 'pytorch_lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
