"""Folders of numbered images, and the published layout, as recordings that decode what is asked for."""

from __future__ import annotations

import itertools
import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import labels, store
from convlstm_fish.data.clips import SPLITS, split_ranges
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.video import MAX_PIXELS, decode_image
from convlstm_fish.errors import UserError

FPS = 30.0
_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_MAX_BYTES = 2**28
_NUMBERED = re.compile(r"(.*?)(\d+)", re.DOTALL)
_PNG_GREY, _PNG_COLOUR, _PNG_PALETTE = 0, 2, 3


class ImageFrames:
    """Frames of numbered image files, uint8 (T, H, W); indexing decodes the frames that are asked for.

    Accepts a number, a slice or an array of numbers, as a (T, H, W) array does on its first axis.

    Args:
        files: the images in order.
        root: the folder that they must not lead out of.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, files: Sequence[Path], root: Path) -> None:
        self._files, self._root = list(files), os.path.realpath(root)
        self._size: tuple[int, int] | None = None
        first = self._decode(0)
        self._size = (first.shape[0], first.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W)."""
        if self._size is None:
            raise ValueError("no image has been read yet")
        return (len(self._files), *self._size)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int | slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        if isinstance(index, (int, np.integer)):
            return self._decode(range(len(self))[int(index)])
        numbers = np.arange(len(self))[index]
        out = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        for k, number in enumerate(numbers.tolist()):
            out[k] = self._decode(number)
        return out

    def _decode(self, number: int) -> npt.NDArray[np.uint8]:
        path = self._files[number]
        where = f"frame {number}, {path}"
        image = decode_image(read_image_file(path, self._root), where)
        if self._size is not None and image.shape != self._size:
            height, width = self._size
            raise UserError(f"{where}: is {image.shape[0]}x{image.shape[1]}, the first image is {height}x{width}")
        return image


def read_image_file(path: Path, root: str) -> bytes:
    """Bytes of a PNG or JPEG file whose header says that it can be decoded as it is.

    Raises:
        UserError: naming the file, when it leads out of ``root``, is no regular file, is too large, is another
            format than its name says, has 16-bit samples or transparency, or is cut off.
    """
    real = os.path.realpath(path)
    if os.path.commonpath([real, root]) != root:
        raise UserError(f"{path}: leads out of the folder {root}; copy the file instead of linking it")
    size = store.regular_file(path).st_size
    if size > _MAX_BYTES:
        raise UserError(f"{path}: has {size} bytes, the limit for an image is {_MAX_BYTES}")
    data = Path(real).read_bytes()
    if _KINDS[path.suffix.lower()] == "PNG":
        height, width = _check_png(data, path)
    else:
        height, width = _check_jpeg(data, path)
    if not 0 < height * width <= MAX_PIXELS:
        raise UserError(f"{path}: is {height}x{width}, the limit is {MAX_PIXELS} pixels")
    return data


def _check_png(data: bytes, path: Path) -> tuple[int, int]:
    if len(data) < 33 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise UserError(f"{path}: is not a PNG file, whatever its name says")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if depth == 16:
        raise UserError(f"{path}: has 16-bit samples; convert the images to 8 bits, with one scale for all of them")
    if colour not in (_PNG_GREY, _PNG_COLOUR, _PNG_PALETTE):
        raise UserError(f"{path}: has an alpha channel; export it without transparency")
    return height, width


def _check_jpeg(data: bytes, path: Path) -> tuple[int, int]:
    if data[:3] != b"\xff\xd8\xff":
        raise UserError(f"{path}: is not a JPEG file, whatever its name says")
    if b"\xff\xd9" not in data[-64:]:
        raise UserError(f"{path}: is cut off (no end marker)")
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])[0]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return height, width
        at += 2 + length
    raise UserError(f"{path}: is not a JPEG file that can be read (no frame header)")


def numbered_files(folder: Path) -> list[Path]:
    """The images of ``folder`` in the order of their numbers, which must be without a gap.

    Files that are not images, and hidden ones, do not matter.

    Raises:
        UserError: for gaps, numbers that occur twice, names without a number and several series or formats.
    """
    found: dict[int, Path] = {}
    series: set[tuple[str, str]] = set()
    for path in sorted(folder.iterdir()):
        kind = _KINDS.get(path.suffix.lower())
        if kind is None or path.name.startswith("."):
            continue
        try:
            path.name.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{os.fsencode(path)!r}: the name is not valid UTF-8; rename the file") from None
        match = _NUMBERED.fullmatch(path.stem)
        if match is None:
            raise UserError(f"{path}: its name does not end with a number, so its place in the order is unknown")
        series.add((match[1], kind))
        number = int(match[2])
        if number in found:
            raise UserError(f"{folder}: {found[number].name} and {path.name} are both number {number}")
        found[number] = path
    if not found:
        raise UserError(f"{folder}: holds no images named by number, such as 00000.png")
    if len(series) > 1:
        names = ", ".join(sorted(f"{prefix}* ({kind})" for prefix, kind in series))
        raise UserError(f"{folder}: holds several series of images: {names}; keep one in a folder")
    numbers = sorted(found)
    for previous, number in itertools.pairwise(numbers):
        if number != previous + 1:
            raise UserError(
                f"{folder}: image number {previous + 1} is missing (between {found[previous].name} and "
                f"{found[number].name})"
            )
    return [found[number] for number in numbers]


def open_folder(folder: Path) -> Recording:
    """Open the published layout or a folder of numbered images. Images do not tell a frame rate: it is taken as 30."""
    if any((folder / split).is_dir() for split in SPLITS):
        return _open_published(folder)
    frames = ImageFrames(numbered_files(folder), folder)
    return Recording(folder, frames, FPS, split_ranges(len(frames)), metadata={"source": folder.name})


def _open_published(folder: Path) -> Recording:
    files: list[Path] = []
    splits: dict[str, tuple[int, int]] = {}
    for split in SPLITS:
        if (folder / split).is_dir():
            part = numbered_files(folder / split)
            splits[split] = (len(files), len(files) + len(part))
            files += part
    frames = ImageFrames(files, folder)
    return Recording(
        folder, frames, FPS, splits, motion=_published_motion(folder, splits, frames), metadata={"source": folder.name}
    )


def _published_motion(folder: Path, splits: dict[str, tuple[int, int]], frames: Any) -> npt.NDArray[np.float64] | None:
    """Motion from ``targets/*/Y_tilde.npy``, so that a recording need not be decoded to be labelled; None without."""
    out = np.zeros(len(frames))
    for split, (start, stop) in splits.items():
        path = folder / "targets" / split / "Y_tilde.npy"
        if not path.exists():
            return None
        store.regular_file(path)
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{path}: is not a readable array ({error})") from None
        if values.shape != (stop - start,) or values.dtype.kind != "f" or not np.isfinite(values).all():
            raise UserError(
                f"{path}: holds {values.dtype} {values.shape}, expected a number for each of the "
                f"{stop - start} frames of {split}"
            )
        out[start:stop] = values
        if stop < len(frames):  # Y_tilde ends with 0; the frame after it is there
            pair = frames[np.array([stop - 1, stop])]
            out[stop - 1] = labels.frame_differences(pair[:1], pair[1:])[0]
    return out
