"""``prepare`` as a command: options reach the function, results are told in lines, errors are one line."""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import numpy as np
import pytest
from PIL import Image

from convlstm_fish.commands import prepare as command
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Thirty frames of a dark fish in a bright tank."""
    folder = tmp_path / "images"
    folder.mkdir()
    for t in range(30):
        frame = np.full((40, 60), 170, np.uint8)
        frame[18:22, 2 * t % 50 : 2 * t % 50 + 8] = 80
        Image.fromarray(frame).save(folder / f"{t}.png")
    return folder


def run(*arguments: object) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_defaults(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, "--out", tmp_path / "tank")
    out = capsys.readouterr().out.splitlines()
    assert (
        out[0]
        == f"{tmp_path}/tank: 30 frames of 240x320 at 30 per second (1.0 s); splits train 25, validation 2, test 3"
    )
    assert "30 per second is assumed" in out[1]
    assert out[2].startswith("dark fish, inverted; background: temporal median; noise floor")
    assert "clips of 120 frames (4.00 s), horizon 45 frames (1.50 s)" in out[3]
    assert "need 166 frames in every split" in out[-1]


def test_every_option_reaches_the_recording(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tank"
    out.mkdir()
    options = "--roi 4,2,50,36 --invert yes --background none --contrast 1.5 --size 18x25 --fps 10 --resample 5"
    more = "--splits 0.5,0.3,0.2 --threshold 0.002 --clip_seconds 0.8 --horizon_seconds 0.2"
    run(images, "--out", out, *options.split(), *more.split())
    made = Recording.open(out)
    assert (made.frames.shape, made.fps) == ((15, 18, 25), 5)
    assert made.metadata == {
        "source": "images",
        "resampled_from_fps": 10.0,
        "roi": [4, 2, 50, 36],
        "polarity": "dark fish, inverted",
        "background": "none",
        "noise_floor": 0.0,
        "gain": 1.5,
    }
    assert made.splits == {"train": (0, 8), "validation": (8, 12), "test": (12, 15)}
    assert made.label_rule == {"kind": "burst", "first": 3, "horizon": 1, "b": 0.1, "c": 0.002}
    assert np.median(made.frames) == round((255 - 170) * 1.5)
    with pytest.raises(UserError, match="exists and is not empty"):
        run(images, "--out", out)
    run(images, "--out", out, "--overwrite", "--threshold", "0.003")
    assert Recording.open(out).label_rule["c"] == 0.003
    capsys.readouterr()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--roi", "1,2,3", "is not x,y,width,height"),
        ("--size", "240", "is not HEIGHTxWIDTH"),
        ("--splits", "a,b", "is not a list of numbers"),
        ("--threshold", "low", "threshold: 'low' is not auto or a positive"),
        ("--contrast", "high", "contrast: 'high' is not auto, none or a positive"),
        ("--invert", "maybe", "invert: 'maybe' is not auto, yes or no"),
        ("--background", "mean", "background: 'mean' is not"),
    ],
)
def test_wrong_values_name_the_option(images: Path, tmp_path: Path, option: str, value: str, message: str) -> None:
    with pytest.raises((jsonargparse.ArgumentError, UserError), match=message):
        run(images, "--out", tmp_path / "tank", option, value)
    assert not (tmp_path / "tank").exists()
