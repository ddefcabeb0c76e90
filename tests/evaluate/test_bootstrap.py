"""Block-bootstrap intervals: the arithmetic against slow versions, and that blocks matter."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from convlstm_fish.evaluate.bootstrap import block_weights, bootstrap_auc, percentile_interval


@pytest.mark.parametrize("block", [1, 4, 7, 20])
def test_weights_are_those_of_blocks_laid_out_one_by_one(block: int) -> None:
    frames = np.array([5, 6, 7, 8, 12, 13, 19, 20, 21, 24])
    span = 20
    found = block_weights(frames, block, 50, np.random.default_rng(3))
    starts = np.random.default_rng(3).integers(0, span, size=(50, -(-span // block)))
    for r in range(50):
        drawn = np.concatenate([(start + np.arange(block)) % span for start in starts[r]])
        expected = [(drawn == frame - 5).sum() for frame in frames]
        np.testing.assert_array_equal(found[r], expected)


def test_resampled_auc_is_the_weighted_auc() -> None:
    rng = np.random.default_rng(0)
    frames = np.arange(100, 400)
    labels = rng.random(300) < 0.3
    scores = [np.round(rng.random(300) + 0.2 * labels, 1), rng.normal(size=300), np.zeros(300)]
    found = bootstrap_auc(frames, scores, labels, block_frames=30, resamples=40, seed=5)
    weights = block_weights(frames, 30, 40, np.random.default_rng(5))
    for s, one in enumerate(scores):
        expected = [roc_auc_score(labels, one, sample_weight=w) for w in weights]
        np.testing.assert_allclose(found[s], expected, atol=1e-12)


def test_seeds_decide_and_chunks_do_not(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    frames, labels = np.arange(300), rng.random(300) < 0.3
    scores = [rng.random(300)]
    options = {"block_frames": 20, "resamples": 25}
    whole = bootstrap_auc(frames, scores, labels, seed=1, **options)
    np.testing.assert_array_equal(whole, bootstrap_auc(frames, scores, labels, seed=1, **options))
    assert not np.array_equal(whole, bootstrap_auc(frames, scores, labels, seed=2, **options))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("convlstm_fish.evaluate.bootstrap._CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr("convlstm_fish.evaluate.bootstrap._MANY_ELEMENTS", 0)
    np.testing.assert_array_equal(whole, bootstrap_auc(frames, scores, labels, seed=1, **options))
    assert "Resampling for the intervals" in capsys.readouterr().err


def test_a_resample_without_a_class_is_nan_and_an_interval_of_few_is_none() -> None:
    labels = np.zeros(100, bool)
    labels[50] = True
    found = bootstrap_auc(np.arange(100), [np.arange(100.0)], labels, block_frames=10, resamples=200, seed=0)
    assert 20 < np.isnan(found).sum() < 180
    assert percentile_interval(np.array([np.nan, np.nan, np.nan, 1.0]), 0.95) is None
    assert percentile_interval(np.array([]), 0.95) is None
    interval = percentile_interval(np.arange(101.0), 0.9)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((5.0, 95.0))


def test_blocks_widen_the_interval_of_a_slow_series() -> None:
    """Frames in a row tell the same story; resampling them one by one would promise too much."""
    rng = np.random.default_rng(0)
    slow = np.repeat(rng.normal(size=60), 50)
    labels = np.repeat(rng.random(60) < 0.4, 50)
    scores = slow + labels
    width = {}
    for block in (1, 100):
        values = bootstrap_auc(np.arange(3000), [scores], labels, block_frames=block, resamples=300, seed=0)
        interval = percentile_interval(values[0], 0.95)
        assert interval is not None
        width[block] = interval.high - interval.low
    assert width[100] > 3 * width[1]


def test_intervals_cover_the_truth() -> None:
    """Independent frames, so the true AUC is known: 95 % intervals hold it about that often."""
    truth = 0.7602499389065233  # of two unit normals one apart: Phi(1 / sqrt 2)
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        labels = rng.random(400) < 0.4
        values = bootstrap_auc(
            np.arange(400), [rng.normal(size=400) + labels], labels, block_frames=5, resamples=200, seed=seed
        )
        interval = percentile_interval(values[0], 0.95)
        assert interval is not None
        held += interval.low <= truth <= interval.high
    assert 52 <= held <= 60
