"""Checkpoints that are complete or absent, checked when they are read, and never able to run code.

Lightning's own saving is not atomic where the temporary folder is another file system, and torch.load does not notice
a flipped bit. A ``.ckpt`` file is a zip archive with a CRC32 per record, so the check needs no new format.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from convlstm_fish.errors import UserError

_LITTER = re.compile(r"\.ckpt\.(\d+)\.tmp$")


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Read a checkpoint through and compare every record with its CRC32.

    Raises:
        UserError: not a local file, not a readable archive, or a record that is damaged.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"checkpoint {text}: only local files are read; download it and look where it comes from")
    if not os.path.isfile(text):
        raise UserError(f"checkpoint {text}: no such file")
    try:
        with zipfile.ZipFile(text) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds for damaged headers
        raise UserError(f"checkpoint {text}: not a readable checkpoint ({error})") from None
    if damaged:
        raise UserError(f"checkpoint {text}: damaged, record {damaged} fails its checksum")


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """A checked checkpoint as a dictionary; only tensors and plain values are unpickled.

    Raises:
        UserError: see :func:`check_checkpoint`; or a file that holds anything else than plain values, such as code.
    """
    check_checkpoint(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UserError(
            f"checkpoint {path}: refused, it holds more than weights and plain values "
            f"({type(error).__name__}: {first[:120]})"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"checkpoint {path}: holds no state_dict, so it is no Lightning checkpoint")
    return content


def newest_good(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest ``*.ckpt`` of a folder that passes :func:`check_checkpoint`.

    Returns:
        The file, or None where there is none; and what was wrong with each newer one.
    """
    problems = []
    found = sorted(Path(folder).glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns, reverse=True)
    for file in found:
        try:
            check_checkpoint(file)
        except UserError as error:
            problems.append(str(error))
        else:
            return file, problems
    return None, problems


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written."""
    for file in folder.glob("*.tmp"):
        match = _LITTER.search(file.name)
        if match and not _alive(int(match[1])):
            file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs and renames; checks and restricts what it reads.

    A process killed at any moment, or a full disk, leaves the previous checkpoint as it was.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``, completely or not at all."""
        if storage_options is not None:
            raise TypeError("SafeCheckpointIO writes local files and takes no storage_options")
        target = Path(os.path.abspath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        half = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        try:
            with open(half, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(half, target)
        except (OSError, RuntimeError) as error:
            # torch.save reports a full disk as a RuntimeError of its zip writer.
            raise UserError(
                f"checkpoint {target}: cannot be written ({error}); earlier checkpoints are intact"
            ) from error
        finally:
            half.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checked checkpoint. ``weights_only=False``, which would run code from the file, is refused."""
        if weights_only is False:
            raise UserError(f"checkpoint {path}: weights_only=False would run code from the file and is refused")
        return load_checkpoint(path, map_location)
