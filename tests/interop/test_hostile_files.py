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

import numpy as np
import pytest
import torch

from convlstm_fish.commands import import_keras as command
from convlstm_fish.commands.export_keras import load_classifier
from convlstm_fish.errors import UserError
from convlstm_fish.interop import keras_h5, keras_npz
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


def test_npz_with_a_pickle(tmp_path: Path, marker: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "weights.npz"
    np.savez(path, a_kernel=np.array([Payload(marker)], dtype=object))
    assert "pickled Python objects, which are not loaded" in refusal(path)
    (tmp_path / "renamed.npz").write_bytes(pickle.dumps(Payload(marker)))
    refusal(tmp_path / "renamed.npz")
    zipped(tmp_path / "inner.npz", **{"a_kernel.npy": pickle.dumps(Payload(marker))})
    refusal(tmp_path / "inner.npz")
    assert not marker.exists()


@pytest.mark.parametrize("shape", [(2**40,), (2**31, 2**31), (-1,), (3, 3), (1,) * 40])
def test_npz_with_an_absurd_shape(tmp_path: Path, shape: tuple[int, ...], refusal: Callable[..., str]) -> None:
    refusal(zipped(tmp_path / "weights.npz", **{"a_kernel.npy": with_header(shape, data=b"1234")}))


def test_npz_of_something_else(tmp_path: Path, refusal: Callable[..., str]) -> None:
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


def test_npz_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]) -> None:
    path = zipped(tmp_path / "bomb.npz", **{"a_kernel.npy": with_header((2**20,), data=bytes(2**22))})
    assert path.stat().st_size < 2**13
    monkeypatch.setattr(keras_npz, "MAX_ARRAY_BYTES", 2**20)
    assert "unpacks to more than the 1048576 bytes" in refusal(path)


# -- .keras ------------------------------------------------------------------------------------------------------------


def test_keras_file_with_code(edited: Callable[..., Path], marker: Path, refusal: Callable[..., str]) -> None:
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


def test_keras_file_that_is_a_bomb(
    keras_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
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
def test_keras_file_with_a_broken_config(
    keras_models: Path, tmp_path: Path, config: bytes, refusal: Callable[..., str]
) -> None:
    with zipfile.ZipFile(keras_models / "3.15.1" / "functional.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    refusal(zipped(tmp_path / "model.keras", **{**members, "config.json": config}))


def test_keras_file_that_lacks_a_part(keras_models: Path, tmp_path: Path, refusal: Callable[..., str]) -> None:
    with zipfile.ZipFile(keras_models / "3.15.1" / "functional.keras") as old:
        members = {name: old.read(name) for name in old.namelist()}
    for name in members:
        path = zipped(tmp_path / "model.keras", **{key: data for key, data in members.items() if key != name})
        assert f"holds no {name}" in refusal(path)
    (tmp_path / "model.keras").write_bytes(b"not a zip")
    assert "not a readable .keras file" in refusal(tmp_path / "model.keras")


# -- SavedModel --------------------------------------------------------------------------------------------------------


@pytest.fixture
def savedmodel(keras_models: Path, tmp_path: Path) -> Path:
    """A folder to be spoilt."""
    return Path(shutil.copytree(keras_models / "2.15.0" / "functional_savedmodel", tmp_path / "model"))


def test_savedmodel_that_lacks_a_part(savedmodel: Path, refusal: Callable[..., str]) -> None:
    for name in ("variables.index", "variables.data-00000-of-00001"):
        path = savedmodel / "variables" / name
        data = path.read_bytes()
        path.unlink()
        refusal(savedmodel)
        path.write_bytes(data[: len(data) // 2])
        refusal(savedmodel)
        path.write_bytes(data)
    import_keras(savedmodel)


def test_savedmodel_whose_weights_were_touched(savedmodel: Path, refusal: Callable[..., str]) -> None:
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


def test_savedmodel_of_something_else(savedmodel: Path, refusal: Callable[..., str]) -> None:
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


def test_json_is_only_data(edited: Callable[..., Path], refusal: Callable[..., str]) -> None:
    """A metadata file that is no object, or has odd types in it, is refused as well."""

    def odd(metadata: dict[str, Any]) -> None:
        metadata["keras_version"] = {"class_name": "__import__"}

    assert "is not known" in refusal(edited("functional", odd, "metadata.json"))
    assert json.loads("1e999") == float("inf")
    refusal(edited("functional", lambda c: c["config"]["layers"][1]["config"].update(filters=float("inf"))))
