"""HDF5 files that ask for too much, lead elsewhere or break the library are refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from convlstm_fish.interop import hdf5

pytestmark = pytest.mark.usefixtures("hdf5_read_once")

KERNEL = "layers/conv_lstm2d/cell/vars/0"


@pytest.fixture
def weights(keras_models: Path, tmp_path: Path) -> Path:
    """A file of weights alone, to be spoilt."""
    return Path(shutil.copy(keras_models / "3.15.1" / "functional.weights.h5", tmp_path / "model.weights.h5"))


@pytest.fixture
def spoilt(refusal: Callable[..., str]) -> Callable[..., str]:
    """``spoilt(path, spoil)``: the one line with which a file is refused once ``spoil`` has made another kernel."""

    def refused(path: Path, spoil: Callable[[h5py.File], Any]) -> str:
        with h5py.File(path, "a") as file:
            del file[KERNEL]
            spoil(file)
        return refusal(path, recurrent_activation="sigmoid")

    return refused


def test_h5_that_asks_for_absurd_memory(weights: Path, spoilt: Callable[..., str]) -> None:
    assert "more than the" in spoilt(weights, lambda f: f.create_dataset(KERNEL, (2**20, 2**20), "f4", chunks=(1, 1)))


def test_h5_without_the_data_it_tells_of(weights: Path, spoilt: Callable[..., str]) -> None:
    assert "has only 0 bytes" in spoilt(weights, lambda f: f.create_dataset(KERNEL, (64, 64), "f4", chunks=(8, 8)))


def test_h5_that_reads_other_files(weights: Path, tmp_path: Path, spoilt: Callable[..., str]) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    external = [(str(secret), 0, 1152)]
    assert "outside the file" in spoilt(
        weights, lambda f: f.create_dataset(KERNEL, (3, 3, 2, 16), "f4", external=external)
    )


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("other.h5", "/a"), h5py.SoftLink("/layers"), h5py.SoftLink("/absent")]
)
def test_h5_with_links(weights: Path, tmp_path: Path, link: Any, spoilt: Callable[..., str]) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = np.zeros((3, 3, 2, 16), np.float32)
    assert "is a link, Keras files have none" in spoilt(weights, lambda f: f.__setitem__(KERNEL, link))


def test_h5_with_a_virtual_dataset(weights: Path, tmp_path: Path, spoilt: Callable[..., str]) -> None:
    layout = h5py.VirtualLayout((3, 3, 2, 16), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", (3, 3, 2, 16))
    assert "outside the file" in spoilt(weights, lambda f: f.create_virtual_dataset(KERNEL, layout))


def test_h5_with_odd_contents(weights: Path, spoilt: Callable[..., str]) -> None:
    zeros = np.zeros((3, 3, 2, 16), np.float32)
    cases: list[tuple[Callable[[h5py.File], Any], str]] = [
        (lambda f: f.create_dataset(KERNEL, data=zeros, compression="gzip"), "is compressed"),
        (lambda f: f.create_dataset(KERNEL, data=["text"]), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, data=np.full_like(zeros, np.inf)), "not finite"),
        (lambda f: f.create_dataset(KERNEL, data=zeros[..., :15]), "layer 'conv_lstm2d' with the arrays"),
        (
            lambda f: f.create_dataset(KERNEL, data=zeros[:2, ..., :8]),
            "layer 'conv_lstm2d' (ConvLSTM2D) has a recurrent",
        ),
        (lambda f: f.create_dataset(KERNEL, data=zeros.astype(complex)), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, data=zeros > 1), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, data=np.zeros(2, [("a", "f4"), ("b", "i4")])), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, (2,), h5py.ref_dtype), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, (2,), h5py.vlen_dtype(np.float32)), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, (2,), h5py.opaque_dtype(np.dtype("M8[s]"))), "weights must be numbers"),
        (lambda f: f.create_dataset(KERNEL, (2,), np.dtype(("f4", (3,)))), "weights must be numbers"),
        (lambda f: f.__setitem__(KERNEL, h5py.Empty("f4")), "neither a group nor an array"),
        (lambda f: f.create_group(KERNEL), "'0' is not an array"),
        (lambda f: f.__setitem__(KERNEL, np.dtype("f4")), "neither a group nor an array"),
        (lambda f: f.__setitem__("layers/conv_lstm2d/cell/again", f["layers"]), "more than 16 groups deep"),
    ]
    clean = weights.read_bytes()
    for spoil, message in cases:
        weights.write_bytes(clean)
        assert message in spoilt(weights, spoil)


def test_h5_that_repeats_one_array(weights: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]) -> None:
    with h5py.File(weights, "a") as file:
        for index in range(2, 60):
            file[f"layers/conv_lstm2d_{index}/cell/vars/0"] = file[KERNEL]
    monkeypatch.setattr(hdf5, "MAX_ARRAY_BYTES", 20_000)
    assert "more than the 20000 bytes" in refusal(weights, recurrent_activation="sigmoid")


def test_h5_on_which_the_library_never_ends(
    keras_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    """HDF5 1.14 loops over a heap of strings in which a block became zeros, as blocks of broken disks do."""
    data = (keras_models / "2.15.0" / "sequential.h5").read_bytes()
    at = data.index(b"batch_normalization_1/gamma:0") - 16
    path = tmp_path / "model.h5"
    path.write_bytes(data[:at] + bytes(56) + data[at + 56 :])
    monkeypatch.setattr(hdf5, "TIME_LIMIT", 2.0)
    refusal(path)


@pytest.mark.parametrize("ending", ["raise SystemExit('no memory')", "import os; os.kill(os.getpid(), 11)"])
def test_h5_on_which_the_library_crashes(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, refusal: Callable[..., str]
) -> None:
    weights.write_bytes(weights.read_bytes() + b"unlike any file read before")
    program = tmp_path / "hdf5_worker.py"
    program.write_text(ending)
    monkeypatch.setattr(hdf5, "WORKER", program)
    assert "not a readable HDF5 file (" in refusal(weights, recurrent_activation="sigmoid")


def test_h5_without_h5py(weights: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]) -> None:
    weights.write_bytes(weights.read_bytes() + b"unlike any file read before either")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'convlstm_fish[keras]'" in refusal(weights)
