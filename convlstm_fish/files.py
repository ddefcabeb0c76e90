"""Text files that are complete or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from convlstm_fish.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is complete or absent: beside, to the disk, renamed.

    Raises:
        UserError: where that is not possible.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
