"""Background, polarity, noise floor and contrast on scenes whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from convlstm_fish.data.background import Appearance, study, temporal_median
from convlstm_fish.errors import UserError


def scene(dark: bool, noise: float = 2.0, depth: int = 60, flicker: int = 0, count: int = 60) -> np.ndarray:
    """A lit tank with a gradient, a fixed spot, and three fish that go round, ``depth`` from the tank's grey."""
    rng = np.random.default_rng(0)
    tank = np.linspace(100, 170, 64)[None] + np.zeros((48, 1))
    tank[5:8, 5:8] = 20 if dark else 240
    frames = np.empty((count, 48, 64), np.uint8)
    for t in range(count):
        frame = tank + rng.normal(0, noise, tank.shape) + flicker * (t % 2)
        for k in range(3):
            frame[fish(t, k)] += -depth if dark else depth
        frames[t] = np.clip(np.rint(frame), 0, 255)
    return frames


def fish(t: int, k: int) -> tuple[slice, slice]:
    column = (7 * t + 20 * k) % 56
    return slice(14 + 10 * k, 17 + 10 * k), slice(column, column + 8)


@pytest.mark.parametrize("dark", [True, False])
@pytest.mark.parametrize("flicker", [0, 25])
def test_fish_become_bright_on_black(dark: bool, flicker: int) -> None:
    frames = scene(dark, flicker=flicker)
    look = study(frames)
    assert look.dark_fish == dark
    assert look.background is not None
    for t in (3, 30):
        made = look.apply(frames[t])
        inside = np.zeros(made.shape, bool)
        for k in range(3):
            inside[fish(t, k)] = True
        assert made[inside].min() > 80
        assert 100 < np.median(made[inside]) < 200
        assert np.percentile(made[~inside], 99) == 0
        assert made[5:8, 5:8].max() == 0  # the fixed spot is background


def test_explicit_choices_are_obeyed() -> None:
    frames = scene(dark=True)
    wrong = study(frames, invert="no")
    assert not wrong.dark_fish
    assert wrong.apply(frames[3])[fish(3, 0)].max() == 0
    assert study(frames, contrast="none").gain == 1
    assert study(frames, contrast=3.0).gain == 3
    plain = study(frames, invert="yes", background="none", contrast="none")
    np.testing.assert_array_equal(plain.apply(frames[3]), 255 - frames[3])
    assert study(frames, background="none").dark_fish
    same = study(frames, invert="no", background="none", contrast="none")
    np.testing.assert_array_equal(same.apply(frames[3]), frames[3])


def test_frames_that_are_right_already_stay_as_they_are() -> None:
    frames = np.zeros((20, 48, 64), np.uint8)
    for t in range(20):
        frames[t][fish(t, 1)] = 170
    look = study(frames)
    assert look == Appearance(None, False, 0.0, 1.0)
    frame = frames[3]
    assert look.apply(frame) is frame
    assert study(frames, background="median").background is not None


def test_nothing_that_moves_cannot_be_judged() -> None:
    still = np.full((10, 48, 64), 120, np.uint8)
    with pytest.raises(UserError, match="invert auto: nothing stands out"):
        study(still)
    assert study(still, invert="yes").dark_fish


def test_temporal_median() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (9, 30, 20), dtype=np.uint8)
    np.testing.assert_array_equal(temporal_median(frames), np.median(frames, axis=0).astype(np.uint8))
