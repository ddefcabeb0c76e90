"""The examples run as they stand."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *args: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"](list(args))


def test_sequence_classification(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy = run("sequence_classification.py", "--steps=4", "--clips=64", "--test_clips=32", "--device=cpu")
    assert 0 <= accuracy <= 1
    assert "step 4: loss" in capsys.readouterr().out


@pytest.mark.slow
def test_sequence_classification_learns() -> None:
    assert run("sequence_classification.py", "--steps=1000", "--device=cpu") > 0.3


def test_predict_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "prediction.gif"
    run("predict_frames.py", "--steps=3", "--batch_size=2", "--hidden=4", f"--out={out}", "--device=cpu")
    told = capsys.readouterr().out
    assert "step 2: squared error per frame" in told
    assert "copy of the last frame" in told
    with Image.open(out) as gif:
        assert gif.n_frames == 20
        assert gif.size == (3 * 66, 66)
