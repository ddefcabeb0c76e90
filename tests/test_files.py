"""Text files that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from convlstm_fish.errors import UserError
from convlstm_fish.files import write_text


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"metrics\.json: cannot be written: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    blocked = tmp_path / "metrics.json" / "below"
    with pytest.raises(UserError, match="cannot be written"):
        write_text(blocked, "x")
