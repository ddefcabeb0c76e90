"""The LSTM on the motion series: it learns, sees the past only, and repeats itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.metrics import rank_auc
from convlstm_fish.evaluate.motion_lstm import MotionLSTMConfig, train_motion_lstm

SMALL = MotionLSTMConfig(hidden_size=6, epochs=4, batch_size=4, segment_seconds=4, lr=0.02)


def rhythm(frames: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Motion that peaks every 20 frames, and labels just before each peak: only a memory can tell."""
    rng = np.random.default_rng(seed)
    phase = (np.arange(frames) + int(rng.integers(20))) % 20
    motion = 1e-3 + 1e-3 * (phase == 0) + 5e-5 * rng.random(frames)
    return motion, phase >= 15


def test_learns_what_needs_a_memory() -> None:
    motion, labels = rhythm(3000, 0)
    state = torch.get_rng_state()
    network = train_motion_lstm(motion, labels, np.ones(3000, bool), fps=10, config=SMALL)
    assert torch.equal(state, torch.get_rng_state())
    other, truth = rhythm(500, 1)
    probability = network.predict(other)
    assert probability.shape == (500,)
    assert rank_auc(probability[40:], truth[40:][None])[0] > 0.98
    assert rank_auc(-other[39:-1], truth[40:][None])[0] < 0.8
    again = train_motion_lstm(motion, labels, np.ones(3000, bool), fps=10, config=SMALL)
    np.testing.assert_array_equal(probability, again.predict(other))


def test_sees_only_the_past() -> None:
    motion, labels = rhythm(600, 0)
    network = train_motion_lstm(motion, labels, np.ones(600, bool), fps=10, config=SMALL)
    changed = motion.copy()
    changed[300:] += 1
    before, after = network.predict(motion), network.predict(changed)
    # The probability at frame t may depend on y[t-1], the difference of frames t-1 and t, and on nothing later.
    np.testing.assert_array_equal(before[:301], after[:301])
    assert before[301] != after[301]


def test_frames_without_a_label_teach_nothing() -> None:
    motion, labels = rhythm(800, 0)
    labelled = np.arange(800) < 400
    wrong = np.where(labelled, labels, ~labels)
    one = train_motion_lstm(motion, labels, labelled, fps=10, config=SMALL)
    two = train_motion_lstm(motion, wrong, labelled, fps=10, config=SMALL)
    # Class weights follow the label, so only frames of weight 0 can be free of it.
    np.testing.assert_array_equal(one.predict(motion), two.predict(motion))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": 0.5, "num_layers": 1}, "dropout 0.5 acts between layers"),
        ({"class_weights": [1.0]}, "class_weights must be two positive numbers"),
        ({"validation_fraction": -0.1}, r"validation_fraction must be in \[0, 1\)"),
    ],
)
def test_config_is_checked(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MotionLSTMConfig(**options)  # type: ignore[arg-type]


def test_too_little_to_learn_from() -> None:
    motion, labels = rhythm(90, 0)
    with pytest.raises(UserError, match="90 frames, too few for two segments of 40"):
        train_motion_lstm(motion, labels, np.ones(90, bool), fps=10, config=SMALL)
    with pytest.raises(UserError, match="one class only"):
        train_motion_lstm(np.ones(400), np.zeros(400, bool), np.ones(400, bool), fps=10, config=SMALL)


def test_a_constant_series_trains_without_dividing_by_zero() -> None:
    network = train_motion_lstm(
        np.zeros(400), np.arange(400) % 2 == 0, np.ones(400, bool), fps=10, config=MotionLSTMConfig(epochs=1)
    )
    assert np.isfinite(network.predict(np.zeros(50))).all()
