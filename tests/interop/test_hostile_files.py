"""Damaged, foreign and hostile files get one line, load nothing and run nothing."""

from __future__ import annotations

import base64
import io
import json
import marshal
import pickle
import random
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from convlstm_fish.commands import import_keras as command
from convlstm_fish.commands.export_keras import load_classifier
from convlstm_fish.errors import UserError
from convlstm_fish.interop import hdf5, keras_h5, keras_npz
from convlstm_fish.interop.keras import import_keras

pytestmark = pytest.mark.usefixtures("hdf5_read_once")


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists only if a payload ran; it is shown that the payload would run if it were unpickled."""
    path = tmp_path / "payload-ran"
    pickle.loads(pickle.dumps(Payload(path)))
    assert path.exists()
    path.unlink()
    return path


def refusal(path: Path, **options: Any) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(UserError) as refused:
        import_keras(path, **options)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 700
    assert path.name in message
    return message


def with_header(shape: tuple[int, ...], descr: Any = "<f4", data: bytes = b"") -> bytes:
    """A .npy file whose header says what it likes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


# -- .npz --------------------------------------------------------------------------------------------------------------


def test_npz_with_a_pickle(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, a_kernel=np.array([Payload(marker)], dtype=object))
    assert "pickled Python objects, which are not loaded" in refusal(path)
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(Payload(marker)))
    refusal(tmp_path / "renamed.npz")
    zipped(tmp_path / "inner.npz", **{"a_kernel.npy": pickle.dumps(Payload(marker))})
    refusal(tmp_path / "inner.npz")
    assert not marker.exists()


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (-1,), (3, 3), (1,) * 40])
def test_npz_with_an_absurd_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refusal(zipped(tmp_path / "weights.npz", **{"a_kernel.npy": with_header(shape, data=b"1234")}))


def test_npz_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", video=np.zeros(3))
    assert "'video' is not named <layer>_<role>" in refusal(tmp_path / "data.npz")
    np.savez(tmp_path / "names.npz", a_kernel=np.array(["x"]))
    assert "weights must be numbers" in refusal(tmp_path / "names.npz")
    np.savez(tmp_path / "nan.npz", a_kernel=np.array([np.nan]))
    assert "not finite" in refusal(tmp_path / "nan.npz")
    np.savez(tmp_path / "dense.npz", dense_kernel=np.zeros((2, 1)))
    assert "a ConvLSTM2D and a Dense layer are needed" in refusal(tmp_path / "dense.npz")
    np.savez(tmp_path / "empty.npz")
    refusal(tmp_path / "empty.npz")


def test_npz_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "bomb.npz", **{"a_kernel.npy": with_header((2**20,), data=bytes(2**22))})
    assert path.stat().st_size < 2**13
    monkeypatch.setattr(keras_npz, "MAX_ARRAY_BYTES", 2**20)
    assert "unpacks to more than the 1048576 bytes" in refusal(path)


# -- .keras ------------------------------------------------------------------------------------------------------------


def test_keras_file_with_code(edited: Callable[..., Path], marker: Path) -> None:
    program = compile(f"__import__('pathlib').Path({str(marker)!r}).touch()", "payload", "exec")
    code = base64.b64encode(marshal.dumps(program)).decode()
    payload = {"class_name": "__lambda__", "config": {"value": code, "defaults": None, "closure": None}}

    def activation(config: dict[str, Any]) -> None:
        config["config"]["layers"][1]["config"]["recurrent_activation"] = payload

    def layer(config: dict[str, Any]) -> None:
        config["config"]["layers"][5].update(module="keras.layers", class_name="Lambda", config={"function": payload})
        config["config"]["layers"][5]["config"]["name"] = "global_max_pooling2d"

    def module(config: dict[str, Any]) -> None:
        config.update(module="os", class_name="system", registered_name=f"touch {marker}")

    def branch(config: dict[str, Any]) -> None:
        layers = config["config"]["layers"]
        extra = {**layers[5], "module": "keras.layers", "class_name": "Lambda", "name": "extra"}
        layers.append({**extra, "config": {"name": "extra", "function": payload}})

    def wrapped(config: dict[str, Any]) -> None:
        inner = {"module": "keras.layers", "class_name": "Lambda", "config": {"function": payload}}
        config["config"]["layers"][5].update(class_name="TimeDistributed")
        config["config"]["layers"][5]["config"]["layer"] = inner

    for change in (activation, layer, module, branch, wrapped):
        refusal(edited("functional", change))
    assert not marker.exists()


def test_keras_file_with_paths_that_lead_out(keras_models: Path, tmp_path: Path) -> None:
    path = tmp_path / "inner" / "model.keras"
    path.parent.mkdir()
    shutil.copy(keras_models / "3.15.1" / "functional.keras", path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../evil.txt", b"x")
        archive.writestr("/tmp/evil-of-convlstm-fish.txt", b"x")
    import_keras(path)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["inner", "model.keras"]
    assert not Path("/tmp/evil-of-convlstm-fish.txt").exists()


def test_keras_file_that_is_a_bomb(keras_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.keras"
    with zipfile.ZipFile(keras_models / "3.15.1" / "functional.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    zipped(path, **{**members, "config.json": b" " * 2**22})
    monkeypatch.setattr(keras_h5, "MAX_JSON_BYTES", 2**20)
    assert "config.json unpacks to more than the 1048576 bytes" in refusal(path)
    zipped(path, **{**members, "model.weights.h5": bytes(2**22)})
    monkeypatch.setattr(keras_h5, "MAX_ARRAY_BYTES", 2**20)
    assert "model.weights.h5 unpacks to more" in refusal(path)


@pytest.mark.parametrize(
    "config",
    [
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b"[" * 200_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"config": 5}',
        b'{"class_name": "Sequential", "config": {"layers": 3}}',
        b'{"class_name": "Sequential", "config": {"layers": [3]}}',
        b'{"class_name": "Sequential", "config": {"layers": [{"class_name": "Dense"}]}}',
        b'{"class_name": "Functional", "config": {"layers": []}}',
        b'{"class_name": ["Functional"], "config": {"layers": []}}',
    ],
)
def test_keras_file_with_a_broken_config(keras_models: Path, tmp_path: Path, config: bytes) -> None:
    with zipfile.ZipFile(keras_models / "3.15.1" / "functional.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    refusal(zipped(tmp_path / "model.keras", **{**members, "config.json": config}))


def test_keras_file_that_lacks_a_part(keras_models: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(keras_models / "3.15.1" / "functional.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    for name in members:
        path = zipped(tmp_path / "model.keras", **{key: data for key, data in members.items() if key != name})
        assert f"holds no {name}" in refusal(path)
    (tmp_path / "model.keras").write_bytes(b"not a zip")
    assert "not a readable .keras file" in refusal(tmp_path / "model.keras")


# -- HDF5 --------------------------------------------------------------------------------------------------------------

KERNEL = "layers/conv_lstm2d/cell/vars/0"


@pytest.fixture
def weights(keras_models: Path, tmp_path: Path) -> Path:
    """A file of weights alone, to be spoilt."""
    return Path(shutil.copy(keras_models / "3.15.1" / "functional.weights.h5", tmp_path / "model.weights.h5"))


def spoilt(path: Path, spoil: Callable[[h5py.File], Any]) -> str:
    with h5py.File(path, "a") as file:
        del file[KERNEL]
        spoil(file)
    return refusal(path, recurrent_activation="sigmoid")


def test_h5_that_asks_for_absurd_memory(weights: Path) -> None:
    assert "more than the" in spoilt(weights, lambda f: f.create_dataset(KERNEL, (2**20, 2**20), "f4", chunks=(1, 1)))


def test_h5_without_the_data_it_tells_of(weights: Path) -> None:
    assert "has only 0 bytes" in spoilt(weights, lambda f: f.create_dataset(KERNEL, (64, 64), "f4", chunks=(8, 8)))


def test_h5_that_reads_other_files(weights: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    external = [(str(secret), 0, 1152)]
    assert "outside the file" in spoilt(
        weights, lambda f: f.create_dataset(KERNEL, (3, 3, 2, 16), "f4", external=external)
    )


@pytest.mark.parametrize(
    "link", [h5py.ExternalLink("other.h5", "/a"), h5py.SoftLink("/layers"), h5py.SoftLink("/absent")]
)
def test_h5_with_links(weights: Path, tmp_path: Path, link: Any) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["a"] = np.zeros((3, 3, 2, 16), np.float32)
    assert "is a link, Keras files have none" in spoilt(weights, lambda f: f.__setitem__(KERNEL, link))


def test_h5_with_a_virtual_dataset(weights: Path, tmp_path: Path) -> None:
    layout = h5py.VirtualLayout((3, 3, 2, 16), "f4")
    layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", (3, 3, 2, 16))
    assert "outside the file" in spoilt(weights, lambda f: f.create_virtual_dataset(KERNEL, layout))


def test_h5_with_odd_contents(weights: Path) -> None:
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


def test_h5_that_repeats_one_array(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File(weights, "a") as file:
        for index in range(2, 60):
            file[f"layers/conv_lstm2d_{index}/cell/vars/0"] = file[KERNEL]
    monkeypatch.setattr(hdf5, "MAX_ARRAY_BYTES", 20_000)
    assert "more than the 20000 bytes" in refusal(weights, recurrent_activation="sigmoid")


def test_h5_on_which_the_library_never_ends(
    keras_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    weights.write_bytes(weights.read_bytes() + b"unlike any file read before")
    program = tmp_path / "hdf5_worker.py"
    program.write_text(ending)
    monkeypatch.setattr(hdf5, "WORKER", program)
    assert "not a readable HDF5 file (" in refusal(weights, recurrent_activation="sigmoid")


def test_h5_without_h5py(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights.write_bytes(weights.read_bytes() + b"unlike any file read before either")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'convlstm_fish[keras]'" in refusal(weights)


# -- SavedModel --------------------------------------------------------------------------------------------------------


@pytest.fixture
def savedmodel(keras_models: Path, tmp_path: Path) -> Path:
    """A folder to be spoilt."""
    return Path(shutil.copytree(keras_models / "2.15.0" / "functional_savedmodel", tmp_path / "model"))


def test_savedmodel_that_lacks_a_part(savedmodel: Path) -> None:
    for name in ("variables.index", "variables.data-00000-of-00001"):
        path = savedmodel / "variables" / name
        data = path.read_bytes()
        path.unlink()
        refusal(savedmodel)
        path.write_bytes(data[: len(data) // 2])
        refusal(savedmodel)
        path.write_bytes(data)
    import_keras(savedmodel)


def test_savedmodel_whose_weights_were_touched(savedmodel: Path) -> None:
    """Each byte of every variable that is read is under a checksum."""
    path = savedmodel / "variables" / "variables.index"
    index = path.read_bytes()
    for at in range(0, len(index) - 48, 97):
        path.write_bytes(index[:at] + bytes([index[at] ^ 1]) + index[at + 1 :])
        refusal(savedmodel)
    path.write_bytes(index)
    expected = import_keras(savedmodel)
    path = savedmodel / "variables" / "variables.data-00000-of-00001"
    data = path.read_bytes()
    refused = 0
    for at in range(0, len(data), 997):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            found = import_keras(savedmodel)
        except UserError as error:
            refused += 1
            assert "checksum" in str(error)  # noqa: PT017
        else:
            assert all(torch.equal(value, expected.state_dict[key]) for key, value in found.state_dict.items())
    assert refused > 5


def test_savedmodel_of_something_else(savedmodel: Path) -> None:
    metadata = savedmodel / "keras_metadata.pb"
    whole = metadata.read_bytes()
    metadata.write_bytes(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
    assert "lie outside" in refusal(savedmodel)
    metadata.write_bytes(b"\xff" * 20)
    refusal(savedmodel)
    metadata.write_bytes(whole.replace(b"_tf_keras_network", b"_tf_keras_model\x00\x00", 1))
    refusal(savedmodel)
    metadata.unlink()  # leaves weights alone
    assert "neither they nor the file tell" in refusal(savedmodel)


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["functional.keras", "functional_savedmodel", "npz"])
def test_random_damage(keras_models: Path, tmp_path: Path, kind: str) -> None:
    """Whatever is changed, a file is read or refused: no other exception comes out."""
    target = tmp_path / ("model.npz" if kind == "npz" else kind)
    if kind == "npz":
        np.savez(target, a_kernel=np.zeros((3, 3, 1, 8)), a_recurrent_kernel=np.zeros((3, 3, 2, 8)), b_kernel=np.eye(2))
    elif kind.endswith("savedmodel"):
        shutil.copytree(keras_models / "2.15.0" / kind, target)
    else:
        shutil.copy(keras_models / "2.15.0" / kind, target)
    parts = [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else [target]
    chance = random.Random(0)
    refused = 0
    for _ in range(40):
        part = chance.choice(parts)
        data = part.read_bytes()
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 8, 64])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        part.write_bytes(damaged[: chance.choice([len(data), chance.randrange(len(data))])])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile's on damaged members
                import_keras(target)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)  # noqa: PT017
        part.write_bytes(data)
    assert refused > 10
    if kind != "npz":
        import_keras(target)


def test_checkpoint_with_a_pickle(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"in_channels": Payload(marker)}}, path)
    with pytest.raises(UserError, match="refused"):
        load_classifier(path)
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_classifier(path)
    assert not marker.exists()


def test_checkpoint_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"in_channels": 1}}, path)
    with pytest.raises(UserError, match="does not fit ClipClassification: network"):
        load_classifier(path)


def test_a_refused_import_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"PK")
    parser = __import__("argparse").ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(UserError):
        command.run(parser.parse_args([str(tmp_path / "bad.npz"), "--out", str(tmp_path / "model.ckpt")]))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_json_is_only_data(edited: Callable[..., Path]) -> None:
    """A metadata file that is no object, or has odd types in it, is refused as well."""

    def odd(metadata: dict[str, Any]) -> None:
        metadata["keras_version"] = {"class_name": "__import__"}

    assert "is not known" in refusal(edited("functional", odd, "metadata.json"))
    assert json.loads("1e999") == float("inf")
    refusal(edited("functional", lambda c: c["config"]["layers"][1]["config"].update(filters=float("inf"))))
