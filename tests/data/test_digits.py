"""Digits from IDX files, and the set that needs none."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from convlstm_fish.data.digits import drawn_digits, idx_digits, read_idx
from convlstm_fish.errors import UserError


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)


def write(path: Path, content: bytes, zipped: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


def test_mnist_itself(shared: Path) -> None:
    digits = idx_digits(shared / "mnist")
    assert {k: tuple(v.shape) for k, v in digits.images.items()} == {
        "train": (60000, 28, 28),
        "validation": (5000, 28, 28),
        "test": (5000, 28, 28),
    }
    assert digits.labels is None
    # published: the mean of MNIST's training pixels is 0.1307, their standard deviation 0.3081
    pixels = digits.images["train"].float() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    seen = {image.numpy().tobytes() for image in digits.images["train"]}
    assert not any(image.numpy().tobytes() in seen for image in digits.images["test"])


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["", "MNIST/raw"])
def test_every_layout(tmp_path: Path, images: np.ndarray, zipped: bool, layout: str) -> None:
    folder, end = tmp_path / layout, ".gz" if zipped else ""
    labels = np.arange(24, dtype=np.uint8) % 10
    write(folder / f"train-images-idx3-ubyte{end}", idx(images), zipped)
    write(folder / f"t10k-images-idx3-ubyte{end}", idx(images[::-1].copy()), zipped)
    write(folder / f"train-labels-idx1-ubyte{end}", idx(labels), zipped)
    write(folder / f"t10k-labels-idx1-ubyte{end}", idx(labels[::-1].copy()), zipped)
    digits = idx_digits(tmp_path)
    assert digits.labels is not None
    assert torch.equal(digits.images["train"], torch.from_numpy(images))
    assert torch.equal(digits.images["validation"], torch.from_numpy(images[:11:-1].copy()))
    assert torch.equal(digits.images["test"], torch.from_numpy(images[11::-1].copy()))
    assert digits.labels["test"].tolist() == labels[11::-1].tolist()
    assert str(tmp_path) in digits.source


def test_training_images_alone_are_cut_in_three(tmp_path: Path, images: np.ndarray) -> None:
    write(tmp_path / "train-images-idx3-ubyte", idx(images))
    digits = idx_digits(tmp_path)
    assert [len(digits.images[s]) for s in ("train", "validation", "test")] == [20, 2, 2]
    assert torch.equal(torch.cat(list(digits.images.values())), torch.from_numpy(images))


def test_files_that_cannot_be_used(tmp_path: Path, images: np.ndarray) -> None:
    good = idx(images)
    zipped = gzip.compress(good)
    bad = {
        "empty": b"",
        "html": b"<!DOCTYPE html><html>not found</html>",
        "short": good[:-1],
        "long": good + b"\0",
        "labels": idx(images[:, 0, 0].copy()),
        "floats": bytes((0, 0, 13, 3)) + good[4:],
        "gz-short": zipped[: len(zipped) // 2],
        "gz-bits": zipped[:2000] + bytes(50) + zipped[2050:],
        "gz-crc": zipped[:-8] + bytes(4) + zipped[-4:],
        "huge": bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**31, 2**31) + b"x",
    }
    for name, content in bad.items():
        with pytest.raises(UserError, match=name):
            read_idx(write(tmp_path / name, content), 3)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            read_idx(path, 3)


def test_sets_that_do_not_fit(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        idx_digits(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte", idx(images))
    write(tmp_path / "t10k-images-idx3-ubyte", idx(images[:, :20, :20].copy()))
    with pytest.raises(UserError, match=r"t10k.*\(20, 20\).*\(28, 28\)"):
        idx_digits(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    write(tmp_path / "train-labels-idx1-ubyte", idx(np.zeros(23, np.uint8)))
    with pytest.raises(UserError, match="23 labels for 24 images"):
        idx_digits(tmp_path)
    write(tmp_path / "train-images-idx3-ubyte", idx(images[:, :20].copy()))
    with pytest.raises(UserError, match="square"):
        idx_digits(tmp_path)


def test_drawn_digits_need_no_download() -> None:
    digits = drawn_digits()
    assert digits.labels is not None
    assert [len(v) for v in digits.images.values()] == [2500, 250, 250]
    seen: set[bytes] = set()
    for split, images in digits.images.items():
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (28, 28)
        assert (images.flatten(1).amax(1) > 200).all()
        assert images[:, [0, 27]].max() == images[:, :, [0, 27]].max() == 0  # nothing is cut off
        assert torch.bincount(digits.labels[split], minlength=10).min() >= 10
        mine = {image.numpy().tobytes() for image in images}
        assert len(mine) == len(images)
        assert not mine & seen
        seen |= mine
    again = drawn_digits()
    assert all(torch.equal(again.images[split], digits.images[split]) for split in digits.images)


def test_drawn_digits_can_be_told_apart() -> None:
    digits = drawn_digits(1200)
    assert digits.labels is not None
    train, test = digits.images["train"].flatten(1).float(), digits.images["test"].flatten(1).float()
    nearest = digits.labels["train"][torch.cdist(test, train).argmin(1)]
    assert (nearest == digits.labels["test"]).float().mean() > 0.9
