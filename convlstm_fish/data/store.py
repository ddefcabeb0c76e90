"""The bytes of a recording: one folder, written beside its name and renamed, read back with checks.

``frames.npy`` holds uint8 (T, H, W) behind a header of fixed length, so that it can be written as frames come
in; ``recording.json`` says what it holds, with a CRC32 for every chunk of frames and for every other array.
A writer works in a hidden sibling folder and holds a lock on it; a folder that nobody locks is a leftover.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import shutil
import stat
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data.clips import SPLITS, split_ranges
from convlstm_fish.errors import UserError

VERSION = 1
CHUNK_FRAMES = 256
HEADER_BYTES = 128
FRAMES_FILE = "frames.npy"
JSON_FILE = "recording.json"
_JSON_LIMIT = 256 * 2**20


def npy_header(shape: tuple[int, int, int]) -> bytes:
    """The npy header (format 1.0) of a uint8 array of ``shape``, always ``HEADER_BYTES`` long."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    body = text.ljust(HEADER_BYTES - 11).encode("latin1") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def reserve(file: IO[bytes], path: Path, shape: tuple[int, int, int]) -> None:
    """Take the disk space of the frames of the recording ``path`` now, where the system can.

    Raises:
        UserError: when there is no room.
    """
    total = HEADER_BYTES + math.prod(shape)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, total)
        except OSError as error:
            raise UserError(f"{path}: no room for {total / 1e9:.2f} GB of frames ({error.strerror})") from None


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[tuple[Path, int]]:
    """Make and lock a hidden folder beside ``target``; yields it and the descriptor that holds the lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    while True:
        folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another writer's sweep took it before it was locked
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                break
            os.close(descriptor)
    try:
        yield folder, descriptor
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def sweep(target: Path) -> None:
    """Remove what killed writers of ``target`` left."""
    restore(target)
    shutil.rmtree(_aside(target), ignore_errors=True)
    for leftover in target.parent.glob(f".{_glob_escape(target.name)}.*.tmp"):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
        except OSError:
            continue  # somebody is writing it
        finally:
            os.close(descriptor)


def restore(target: Path) -> None:
    """Put back a recording whose replacement was killed after it was set aside."""
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        os.rename(aside, target)


def publish(folder: Path, target: Path, overwrite: bool) -> None:
    """Give the finished ``folder`` its name. What stood there is replaced only if ``overwrite``."""
    sync(folder)
    if target.is_dir() and overwrite:
        aside = _aside(target)
        os.rename(target, aside)
        os.rename(folder, target)
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
        return
    try:
        os.rename(folder, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); is it in use by another run?") from None
    sync(target.parent)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise before any work is done when ``target`` must not be written."""
    if target.is_dir():
        if any(target.iterdir()) and not (overwrite and (target / JSON_FILE).is_file()):
            hint = "--overwrite replaces a recording" if not overwrite else "it is not a recording"
            raise UserError(f"{target}: exists and is not empty; name another folder ({hint})")
    elif target.exists():
        raise UserError(f"{target}: exists and is not a folder; name a folder for the recording")


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.replaced"


def _glob_escape(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def regular_file(path: Path) -> os.stat_result:
    """Stat of ``path``, which must be a regular file: opening a FIFO would wait for ever."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: is not a regular file")
    return found


def save_array(folder: Path, name: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """Write ``name``.npy and return its entry for the header."""
    values = np.ascontiguousarray(values)
    with open(folder / f"{name}.npy", "wb") as file:
        np.save(file, values, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {"shape": list(values.shape), "dtype": values.dtype.str, "crc32": zlib.crc32(values.data)}


def load_array(folder: Path, name: str, entry: Mapping[str, Any]) -> npt.NDArray[Any]:
    """Read ``name``.npy and compare it with its entry, CRC included."""
    path = folder / f"{name}.npy"
    regular_file(path)
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: is not a readable array ({error})") from None
    if list(values.shape) != entry["shape"] or values.dtype.str != entry["dtype"]:
        raise UserError(
            f"{path}: holds {values.dtype.str} {list(values.shape)}, {JSON_FILE} says "
            f"{entry['dtype']} {entry['shape']}; prepare the recording again"
        )
    if zlib.crc32(np.ascontiguousarray(values).data) != entry["crc32"]:
        raise UserError(f"{path}: fails its CRC32, the file has changed; prepare the recording again")
    return values


def save_json(folder: Path, header: Mapping[str, Any]) -> None:
    """Write the header file of a recording."""
    with open(folder / JSON_FILE, "w", encoding="utf-8") as file:
        json.dump(header, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def load_json(folder: Path) -> dict[str, Any]:
    """Read and check the header file of a recording."""
    path = folder / JSON_FILE
    if regular_file(path).st_size > _JSON_LIMIT:
        raise UserError(f"{path}: is larger than {_JSON_LIMIT >> 20} MiB, so it is not a recording's header")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(header, dict) or not isinstance(header.get("version"), int):
        raise UserError(f"{path}: is not the header of a recording (no version)")
    if header["version"] != VERSION:
        raise UserError(f"{path}: has version {header['version']}, this program reads version {VERSION}")
    _check_header(path, header)
    return header


def _check_header(path: Path, header: dict[str, Any]) -> None:
    def bad(key: str, expected: str) -> UserError:
        return UserError(f"{path}: {key} is {json.dumps(header.get(key))[:80]}, expected {expected}")

    shape = header.get("shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)):
        raise bad("shape", "three positive whole numbers")
    if header.get("dtype") != "uint8":
        raise bad("dtype", '"uint8"')
    fps = header.get("fps")
    if not (isinstance(fps, (int, float)) and math.isfinite(fps) and fps > 0):
        raise bad("fps", "a positive number")
    if not isinstance(header.get("name"), str):
        raise bad("name", "text")
    if not isinstance(header.get("splits"), dict):
        raise bad("splits", '{"train": [first, stop], ...}')
    header["splits"] = check_splits(header["splits"], shape[0], f"{path}: splits")
    chunk, crc = header.get("chunk_frames"), header.get("crc32")
    if not (type(chunk) is int and chunk > 0):
        raise bad("chunk_frames", "a positive whole number")
    if not (isinstance(crc, list) and len(crc) == -(-shape[0] // chunk)):
        raise bad("crc32", f"one number for each {chunk} frames")
    arrays = header.get("arrays")
    if not (isinstance(arrays, dict) and all(_is_entry(n, e) for n, e in arrays.items())):
        raise bad("arrays", "shape, dtype and crc32 of each array")
    if not isinstance(header.get("metadata"), dict):
        raise bad("metadata", "an object")
    rule = header.get("labels")
    if not (isinstance(rule, dict) and _is_rule(rule)):
        raise bad("labels", "the burst rule's first and horizon in frames, b and c")


def plain_name(name: str) -> bool:
    """Whether an array may have this name: letters, digits and underscores, so that it is a file beside the frames."""
    return name.replace("_", "a").isalnum() and name.isascii()


def _is_rule(rule: dict[str, Any]) -> bool:
    frames = all(type(rule.get(key)) is int and rule[key] >= 0 for key in ("first", "horizon"))
    return frames and all(isinstance(rule.get(key), (int, float)) and rule[key] >= 0 for key in ("b", "c"))


def _is_entry(name: str, entry: object) -> bool:
    return plain_name(name) and isinstance(entry, dict) and {"shape", "dtype", "crc32"} <= entry.keys()


def check_splits(splits: Mapping[str, Any], frames: int, where: str) -> dict[str, tuple[int, int]]:
    """Splits as half-open ranges of frames inside the recording, disjoint and in order of their start.

    Raises:
        UserError: starting with ``where``, for unknown names and ranges that overlap or leave the recording.
    """
    out: dict[str, tuple[int, int]] = {}
    for name, limits in splits.items():
        if name not in SPLITS:
            raise UserError(f"{where}: unknown split {name!r}; they are train, validation and test")
        if not (len(limits) == 2 and all(isinstance(n, (int, np.integer)) for n in limits)):
            raise UserError(f"{where}: {name} is {limits!r}, expected [first frame, frame after the last]")
        start, stop = int(limits[0]), int(limits[1])
        if not 0 <= start < stop <= frames:
            raise UserError(f"{where}: {name} is {start}..{stop}, outside the {frames} frames or empty")
        out[name] = (start, stop)
    out = dict(sorted(out.items(), key=lambda item: item[1]))
    ranges = list(out.items())
    for (first, (_, stop)), (second, (start, _)) in itertools.pairwise(ranges):
        if start < stop:
            raise UserError(f"{where}: {first} and {second} overlap at frame {start}")
    return out


def choose_splits(splits: Mapping[str, Any] | Sequence[float], frames: int) -> dict[str, tuple[int, int]]:
    """Ranges of frames by name, checked; three shares for train, validation and test are cut into ranges.

    Raises:
        UserError: for ranges or shares that cannot be used.
    """
    return check_splits(splits, frames, "splits") if isinstance(splits, Mapping) else split_ranges(frames, splits)


def map_frames(folder: Path, header: Mapping[str, Any]) -> tuple[npt.NDArray[np.uint8], int]:
    """Map ``frames.npy`` read-only after comparing its size and header with ``recording.json``.

    Returns:
        The frames, and a descriptor of the same file, also where another has taken its name; open while they are held.
    """
    path, shape = folder / FRAMES_FILE, tuple(header["shape"])
    expected = HEADER_BYTES + math.prod(shape)
    regular_file(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected:
            raise UserError(
                f"{path}: has {size} bytes, {shape[0]} frames of {shape[1]}x{shape[2]} need {expected}; "
                "the copy is incomplete or not of this recording"
            )
        if file.read(HEADER_BYTES) != npy_header(shape):
            raise UserError(f"{path}: its header does not say uint8 {shape} as {JSON_FILE} does")
        frames = np.memmap(file, dtype=np.uint8, mode="r", offset=HEADER_BYTES, shape=shape)
        descriptor = os.dup(file.fileno())
    weakref.finalize(frames, os.close, descriptor)
    return frames, descriptor
