"""Checkpoints that are complete or absent, checked when they are read, and never able to run code.

Lightning's own saving is not atomic where the temporary folder is another file system, and torch.load does not notice
a flipped bit. A ``.ckpt`` file is a zip archive with a CRC32 per record, so the check needs no new format.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

from convlstm_fish.errors import UserError

_GLOBAL = re.compile(r"GLOBAL (\S+)")
_LITTER = re.compile(r"\.ckpt\.(\d+)\.tmp$")


def check_checkpoint(path: str | os.PathLike[str]) -> None:
    """Read a checkpoint through and compare every record with its CRC32.

    Raises:
        UserError: not a local file, not a readable archive, or a record that is damaged or, as torch never does,
            compressed: what is read is never larger than the file.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(f"checkpoint {text}: only local files are read; download it and look where it comes from")
    if os.path.isdir(text):
        raise UserError(f"checkpoint {text}: is a folder; name a .ckpt file, as those in a run's checkpoints/")
    if not os.path.isfile(text):
        raise UserError(f"checkpoint {text}: no such file")
    try:
        with zipfile.ZipFile(text) as archive:
            packed = [record.filename for record in archive.infolist() if record.compress_type != zipfile.ZIP_STORED]
            damaged = None if packed else archive.testzip()
    except Exception as error:  # zipfile raises a dozen kinds for damaged headers
        reason = "incomplete, or no checkpoint at all" if isinstance(error, zipfile.BadZipFile) else error
        raise UserError(f"checkpoint {text}: not a readable checkpoint ({reason})") from None
    if packed:
        raise UserError(f"checkpoint {text}: not a readable checkpoint (record {packed[0]} is compressed)")
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
        named = _GLOBAL.search(str(error))
        # torch's first paragraph is advice to load the file with its code.
        lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        reason = f"{named[1]}, which is not run" if named else f"{type(error).__name__}: {lines[0] if lines else ''}"
        raise UserError(
            f"checkpoint {path}: refused, it holds more than weights and plain values ({reason[:120]})"
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"checkpoint {path}: holds no state_dict, so it is no Lightning checkpoint")
    return content


def hyper_parameters(source: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters in a checkpoint, empty where it has none.

    Args:
        source: the file, for the message.
        checkpoint: its content.

    Raises:
        UserError: where they are no mapping of names to plain values.
    """
    found = checkpoint.get("hyper_parameters")
    if found is None:
        return {}
    if not isinstance(found, dict) or not _is_plain(found):
        raise UserError(
            f"checkpoint {source}: its hyper-parameters are not names with numbers, texts and lists of these"
        )
    return dict(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_weights(
    source: str | os.PathLike[str], state: Mapping[Any, Any], own: Mapping[str, Any], model: str, named: str = ""
) -> None:
    """Whether the weights in a file are those of a model: the same names, shapes and kinds of number, all finite.

    Args:
        source: the file, for the message.
        state: its weights.
        own: the model's ``state_dict()``.
        model: how the message calls it.
        named: what stands before the names in the message.

    Raises:
        UserError: naming the first that does not fit.
    """
    for name in [*own, *state]:
        mine, given = own.get(name), state.get(name)
        shapes = [tuple(value.shape) if isinstance(value, torch.Tensor) else None for value in (mine, given)]
        told = f"checkpoint {source}: does not fit {model}: {named}{name} is"
        if shapes[0] != shapes[1]:
            absent = "absent" if given is None else f"no tensor but {type(given).__name__}"
            raise UserError(
                f"{told} {shapes[1] or absent} in the file and {shapes[0] or 'absent'} in the model asked for"
            )
        if not (isinstance(mine, torch.Tensor) and isinstance(given, torch.Tensor)):
            continue
        if (mine.is_floating_point(), mine.is_complex()) != (given.is_floating_point(), given.is_complex()):
            raise UserError(f"{told} {given.dtype} in the file and {mine.dtype} in the model asked for")
        if given.is_floating_point() and not given.isfinite().all():
            raise UserError(f"checkpoint {source}: {named}{name} holds values that are not finite numbers")


def check_moments(source: str | os.PathLike[str], optimizer_states: Any, parameters: Sequence[torch.Tensor]) -> None:
    """Whether what an optimizer keeps of each parameter has that parameter's shape.

    Args:
        source: the file, for the message.
        optimizer_states: of the checkpoint; of any other form it is left to the optimizer to refuse.
        parameters: of the model, in order.

    Raises:
        UserError: where it has not.
    """
    for state in optimizer_states if isinstance(optimizer_states, list) else []:
        kept = state.get("state") if isinstance(state, dict) else None
        for index, values in kept.items() if isinstance(kept, dict) else ():
            if not (isinstance(index, int) and 0 <= index < len(parameters) and isinstance(values, dict)):
                raise UserError(
                    f"checkpoint {source}: its optimizer's state is not that of {len(parameters)} parameters"
                )
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[index].shape:
                    raise UserError(
                        f"checkpoint {source}: its optimizer's {name} of parameter {index} has shape "
                        f"{tuple(value.shape)}, the parameter has {tuple(parameters[index].shape)}"
                    )


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
