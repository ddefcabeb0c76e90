"""Keras models as Keras wrote them, a way to change what they say, and the line with which a file is refused."""

from __future__ import annotations

import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convlstm_fish.errors import UserError
from convlstm_fish.interop import keras_h5
from convlstm_fish.interop.hdf5 import read_hdf5
from convlstm_fish.interop.keras import import_keras


@pytest.fixture(scope="session")
def keras_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each Keras version; see make_keras_models.py."""
    folder = tmp_path_factory.mktemp("keras")
    with tarfile.open(Path(__file__).with_name("keras_models.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def hdf5_read_once() -> Iterator[None]:
    """Each HDF5 file is taken apart once, for tests that differ in what they make of it."""
    with pytest.MonkeyPatch.context() as patch:
        known: dict[bytes, Any] = {}

        def read(path: Path, data: bytes) -> Any:
            if data not in known:
                known[data] = read_hdf5(path, data)
            return known[data]

        patch.setattr(keras_h5, "read_hdf5", read)
        yield


@pytest.fixture
def edited(keras_models: Path, tmp_path: Path) -> Callable[..., Path]:
    """``edited(name, change)``: a copy of a Keras 3.15 ``.keras`` file whose config ``change`` has altered."""

    def edit(name: str, change: Callable[[dict[str, Any]], Any], member: str = "config.json") -> Path:
        target = tmp_path / "edited.keras"
        with zipfile.ZipFile(keras_models / "3.15.1" / f"{name}.keras") as old, zipfile.ZipFile(target, "w") as new:
            for item in old.namelist():
                data = old.read(item)
                if item == member:
                    content = json.loads(data)
                    change(content)
                    data = json.dumps(content).encode()
                new.writestr(item, data)
        return target

    return edit


@pytest.fixture
def refusal() -> Callable[..., str]:
    """``refusal(path, **options)``: the one line with which a file is refused."""

    def of_file(path: Path, **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            import_keras(path, **options)
        message = str(refused.value)
        assert "\n" not in message
        assert len(message) < 700
        assert path.name in message
        return message

    return of_file
