"""The figures of one row against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as judge

from convlstm_fish.evaluate.metrics import compute_metrics, rank_auc


def cases() -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    labels = rng.random(700) < 0.2
    noise = rng.normal(size=700)
    return [
        ("probabilities", 1 / (1 + np.exp(-noise - labels)), labels),
        ("many ties", np.round(rng.random(700) + 0.3 * labels, 1), labels),
        ("tiny and negative", -1e-3 - 1e-9 * (noise - labels), labels),
        ("far outside [0, 1]", 1e6 * (noise + labels), labels),
        ("constant", np.full(700, 0.25), labels),
        ("one positive", noise, np.arange(700) == 17),
        ("one negative", noise, np.arange(700) != 17),
        ("perfect", labels + 0.1 * rng.random(700), labels),
        ("two frames", np.array([0.2, 0.1]), np.array([True, False])),
    ]


@pytest.mark.parametrize(("scores", "labels"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_agrees_with_sklearn(scores: np.ndarray, labels: np.ndarray) -> None:
    m = compute_metrics(scores.astype(np.float64), labels)
    assert m.auc == pytest.approx(judge.roc_auc_score(labels, scores), abs=1e-6)
    assert m.average_precision == pytest.approx(judge.average_precision_score(labels, scores), abs=1e-6)
    assert rank_auc(scores, labels[None])[0] == pytest.approx(judge.roc_auc_score(labels, scores), abs=1e-12)
    fpr, tpr, thresholds = judge.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_array_equal(m.curve.thresholds, thresholds)
    np.testing.assert_allclose(m.curve.fpr, fpr, atol=1e-12)
    np.testing.assert_allclose(m.curve.tpr, tpr, atol=1e-12)


@pytest.mark.parametrize(("scores", "labels"), [c[1:] for c in cases()], ids=[c[0] for c in cases()])
def test_best_points_are_best_and_true_at_their_threshold(scores: np.ndarray, labels: np.ndarray) -> None:
    m = compute_metrics(scores.astype(np.float64), labels)
    thresholds = [np.inf, *np.unique(scores)]
    accuracy = [judge.accuracy_score(labels, scores >= t) for t in thresholds]
    j = [(scores[labels] >= t).mean() - (scores[~labels] >= t).mean() for t in thresholds]
    assert m.best_accuracy.value == pytest.approx(max(accuracy))
    assert m.best_j.value == pytest.approx(max(j))
    for point in (m.best_accuracy, m.best_j):
        called = scores >= point.threshold
        assert point.tpr == pytest.approx(called[labels].mean())
        assert point.fpr == pytest.approx(called[~labels].mean())
    assert judge.accuracy_score(labels, scores >= m.best_accuracy.threshold) == pytest.approx(m.best_accuracy.value)


def test_rank_auc_of_many_labellings() -> None:
    rng = np.random.default_rng(1)
    scores = np.round(rng.random(300), 2)
    labels = rng.random((4, 300)) < 0.3
    labels[2] = False
    found = rank_auc(scores, labels)
    assert np.isnan(found[2])
    for i in (0, 1, 3):
        assert found[i] == pytest.approx(judge.roc_auc_score(labels[i], scores), abs=1e-12)
