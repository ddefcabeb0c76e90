"""The simulated tank: the same bytes from the same seed, fish inside the walls, chases told, motion as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convlstm_fish.data import labels as rules
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.simulate import simulate
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.tank import chase_skill, compare, unbroken_motion

SMALL: dict[str, Any] = {"minutes": 0.5, "seed": 3, "size": (60, 80)}


@pytest.fixture(scope="module")
def tank(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """Three minutes at a quarter of the published size."""
    return simulate(tmp_path_factory.mktemp("simulated") / "tank", minutes=3, seed=5, size=(60, 80))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}


def test_same_seed_same_bytes_with_any_number_of_workers(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("three", 3)):
        simulate(tmp_path / name, **SMALL, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert set(files(tmp_path / "one")) >= {"frames.npy", "motion.npy", "labels.npy", "positions.npy", "chases.npy"}
    simulate(tmp_path / "other", **(SMALL | {"seed": 4}))
    assert files(tmp_path / "other")["frames.npy"] != files(tmp_path / "one")["frames.npy"]


def test_fish_are_bright_and_inside(tank: Recording) -> None:
    positions = tank.array("positions")
    assert positions.shape == (len(tank), 6, 3)
    x, y, heading = np.moveaxis(positions, -1, 0)
    assert x.min() > 0
    assert x.max() < 80
    assert y.min() > 0
    assert y.max() < 60
    assert np.abs(heading).max() <= np.pi + 1e-6
    # They move, and no faster than fish do.
    steps = np.hypot(np.diff(x, axis=0), np.diff(y, axis=0))
    assert 0 < np.median(steps) < 2
    assert steps.max() < 10
    # Bright where the fish are, black elsewhere.
    for t in (0, 1000, 5000):
        frame = tank.frames[t]
        assert np.median(frame) < 30
        at_fish = [frame[int(b) - 1 : int(b) + 2, int(a) - 1 : int(a) + 2].max() for a, b in zip(x[t], y[t])]
        assert min(at_fish) > 60


def test_chases_are_told_and_make_the_chase_labels(tank: Recording) -> None:
    chases = tank.array("chases")
    start, end, chaser, chased = chases.T
    assert len(chases) >= 5
    assert (end > start).all()
    assert (chaser != chased).all()
    assert set(np.concatenate([chaser, chased])) <= set(range(6))
    assert (start[1:] >= end[:-1]).all()
    positions = tank.array("positions")
    for a, _, i, j in chases:  # a chase begins between fish that are close
        gap = np.hypot(*(positions[a, i, :2] - positions[a, j, :2]))
        assert gap < 20
    labels = tank.labels("chase")
    low, high = tank.splits["train"]
    truth = rules.chase_labels(start[(start >= low) & (start < high)] - low, high - low, 45)
    assert np.array_equal(labels[low + 200 : high - 200], truth[200:-200])


def test_number_size_rate_and_refusals(tmp_path: Path) -> None:
    made = simulate(tmp_path / "two", minutes=0.1, seed=0, n_fish=2, size=(48, 64), fps=20)
    assert made.frames.shape == (120, 48, 64)
    assert made.fps == 20
    assert made.array("positions").shape == (120, 2, 3)
    with pytest.raises(UserError, match="two"):
        simulate(tmp_path / "two", minutes=0.1)
    simulate(tmp_path / "two", minutes=0.1, size=(48, 64), overwrite=True)
    assert len(Recording.open(tmp_path / "two")) == 180
    for wrong in ({"minutes": 0}, {"n_fish": 0}, {"fps": -1}, {"size": (0, 5)}, {"seed": -1}):
        with pytest.raises(UserError):
            simulate(tmp_path / "wrong", **({"minutes": 0.1} | wrong))
    assert not (tmp_path / "wrong").exists()


def test_three_minutes_are_roughly_as_published(tank: Recording, shared: Path) -> None:
    published = np.load(shared / "published" / "targets" / "train" / "Y_tilde.npy")
    rows = {row.name: row for row in compare(unbroken_motion(tank), published)}
    assert rows["mean"].ours == pytest.approx(rows["mean"].published, rel=0.5)
    assert rows["autocorrelation, lag 1"].ours == pytest.approx(0.91, abs=0.1)
    assert rows["autocorrelation, lag 15"].ours == pytest.approx(0.43, abs=0.25)
    assert 0.05 < rows["burst labels, share"].ours < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_25_minutes_meet_every_goal(seed: int, tmp_path: Path, shared: Path) -> None:
    made = simulate(tmp_path / "tank", minutes=25, seed=seed)
    published = np.load(shared / "published" / "targets" / "train" / "Y_tilde.npy")
    rows = [*compare(unbroken_motion(made), published), *chase_skill(made)]
    missed = [(row.name, row.ours, row.low, row.high) for row in rows if not row.met]
    assert not missed
