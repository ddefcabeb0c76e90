"""Handwritten digits to move about: MNIST's IDX files from any folder, or drawn ones that need no download."""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from convlstm_fish.errors import UserError

_UINT8 = 0x08  # the IDX type code of unsigned bytes
_MAX_BYTES = 1 << 30
_SIDE = 28  # of MNIST's digits


@dataclass(frozen=True)
class DigitSet:
    """Digits of the three splits, no digit in two of them.

    Attributes:
        images: split -> (K, 28, 28) uint8.
        labels: split -> (K,) int64, or None where the source has no labels.
        source: where they come from, in words.
    """

    images: dict[str, Tensor]
    labels: dict[str, Tensor] | None
    source: str


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """An array of unsigned bytes from an IDX file, plain or gzipped.

    The format (Yann LeCun's MNIST page): two zero bytes, the type code, the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values.

    Args:
        path: the file.
        ndim: how many dimensions it must have (3 for images, 1 for labels).

    Raises:
        UserError: not there, truncated, of another type or of another size than it says.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            gzipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if gzipped else path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as an IDX file: {error}") from error
    header = 4 + 4 * ndim
    if len(data) < header or data[:4] != bytes((0, 0, _UINT8, ndim)):
        raise UserError(
            f"{path}: starts with {data[:4].hex(' ') or 'nothing'}, an IDX file of unsigned bytes with {ndim} "
            f"dimension(s) starts with 00 00 08 {ndim:02x}"
        )
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", ndim, offset=4))
    if math.prod(shape) != len(data) - header:
        raise UserError(
            f"{path}: the header promises {shape}, {math.prod(shape)} bytes, the file holds {len(data) - header}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy()


def _find(folder: Path, name: str) -> Path | None:
    for base in (folder, folder / "MNIST" / "raw"):
        for candidate in (base / name, base / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    return None


def _images(path: Path) -> Tensor:
    images = torch.from_numpy(read_idx(path, 3))
    if len(images) < 10 or images.shape[1] != images.shape[2] or images.shape[1] == 0:
        raise UserError(f"{path}: {tuple(images.shape)} is not a set of at least 10 square images")
    return images


def _split(images: Tensor, labels: Tensor | None, source: str) -> DigitSet:
    """One set cut in three: the first 5/6 to train on, 1/12 to validate, 1/12 to test."""
    a, b = len(images) * 10 // 12, len(images) * 11 // 12
    ranges = {"train": slice(0, a), "validation": slice(a, b), "test": slice(b, None)}
    return DigitSet(
        {name: images[cut] for name, cut in ranges.items()},
        None if labels is None else {name: labels[cut] for name, cut in ranges.items()},
        source,
    )


def has_idx_labels(folder: Path) -> bool:
    """Whether there are labels to all the images that `idx_digits` finds."""
    kinds = [kind for kind in ("train", "t10k") if _find(folder, f"{kind}-images-idx3-ubyte")]
    return bool(kinds) and all(_find(folder, f"{kind}-labels-idx1-ubyte") for kind in kinds)


def idx_digits(folder: str | Path) -> DigitSet:
    """MNIST (or Fashion-MNIST, or any set in its form) from the IDX files in ``folder``.

    Training uses all of ``train-images-idx3-ubyte``; validation the first and test the second half of
    ``t10k-images-idx3-ubyte``. Without a ``t10k`` file the training images are cut in three. Files may be gzipped and
    may lie in ``MNIST/raw``, where torchvision puts them. Labels are read where their files are.

    Raises:
        UserError: no such files, or files that are not what they say.
    """
    folder = Path(folder)
    train = _find(folder, "train-images-idx3-ubyte")
    if train is None:
        raise UserError(f"{folder}: no train-images-idx3-ubyte(.gz) in it: give the folder with MNIST's IDX files")
    held_out = _find(folder, "t10k-images-idx3-ubyte")
    train_labels = _find(folder, "train-labels-idx1-ubyte")
    held_out_labels = _find(folder, "t10k-labels-idx1-ubyte")

    def labels(path: Path | None, images: Tensor) -> Tensor | None:
        if path is None:
            return None
        values = torch.from_numpy(read_idx(path, 1)).long()
        if len(values) != len(images):
            raise UserError(f"{path}: {len(values)} labels for {len(images)} images")
        return values

    images = _images(train)
    known = labels(train_labels, images)
    if held_out is None:
        return _split(images, known, f"IDX files in {folder}")
    others = _images(held_out)
    if others.shape[1:] != images.shape[1:]:
        raise UserError(f"{held_out}: images of {tuple(others.shape[1:])}, {train.name} has {tuple(images.shape[1:])}")
    others_known = labels(held_out_labels, others)
    half = len(others) // 2
    return DigitSet(
        {"train": images, "validation": others[:half], "test": others[half:]},
        None
        if known is None or others_known is None
        else {"train": known, "validation": others_known[:half], "test": others_known[half:]},
        f"IDX files in {folder}",
    )


@functools.cache
def drawn_digits(count: int = 3000, seed: int = 0) -> DigitSet:
    """Labelled digits drawn from a font, each with its own size, slant, turn, stroke and place: no download needed.

    Far more alike than handwriting: enough to see a network learn, not to compare results.

    Args:
        count: how many, in all three splits.
        seed: of their shapes.
    """
    fine = 2  # drawn larger and averaged down, for soft edges
    side = _SIDE * fine
    glyphs = {}
    font = ImageFont.load_default(size=22 * fine)
    for stroke in range(3):
        for digit in range(10):
            canvas = Image.new("L", (side, side))
            ImageDraw.Draw(canvas).text(
                (side / 2, side / 2), str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke
            )
            glyphs[digit, stroke] = canvas
    generator = np.random.Generator(np.random.PCG64(seed))
    labels = generator.permutation(np.arange(count) % 10)
    images = np.empty((count, _SIDE, _SIDE), np.uint8)
    for k, digit in enumerate(labels.tolist()):
        turn, slant = generator.uniform(-0.2, 0.2, 2)
        wide, high = generator.uniform(0.9, 1.2, 2)
        move = generator.uniform(-1, 1, 2) * fine
        cosine, sine = math.cos(turn), math.sin(turn)
        # Where each pixel of the result comes from: turned, slanted and scaled about the middle, then moved.
        matrix = np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[wide, slant], [0.0, high]])
        origin = side / 2 - matrix @ np.array([side / 2, side / 2]) + move
        terms = (*matrix[0], origin[0], *matrix[1], origin[1])
        glyph = glyphs[digit, int(generator.integers(3))]
        drawn = glyph.transform((side, side), Image.Transform.AFFINE, terms, Image.Resampling.BILINEAR)
        images[k] = np.asarray(drawn.resize((_SIDE, _SIDE), Image.Resampling.BOX))
    return _split(torch.from_numpy(images), torch.from_numpy(labels).long(), f"{count} digits drawn from a font")
