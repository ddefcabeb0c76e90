"""Calibration against scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from convlstm_fish.evaluate.calibration import calibrate


def test_agrees_with_sklearn_and_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(900) ** 2
    labels = rng.random(900) < p**1.5
    c = calibrate(p, labels)
    observed, predicted = calibration_curve(labels, p, n_bins=10)
    np.testing.assert_allclose(c.predicted, predicted)
    np.testing.assert_allclose(c.observed, observed)
    assert sum(c.count) == 900
    assert c.brier == pytest.approx(brier_score_loss(labels, p))
    base = np.full(900, labels.mean())
    assert c.brier_skill == pytest.approx(1 - c.brier / brier_score_loss(labels, base))
    expected = binary_calibration_error(torch.from_numpy(p), torch.from_numpy(labels.astype(int)), n_bins=10, norm="l1")
    assert c.ece == pytest.approx(float(expected), abs=1e-6)


def test_edges_and_one_class() -> None:
    c = calibrate(np.array([0.0, 0.0, 1.0]), np.array([False, False, True]))
    assert (c.lower, c.count, c.ece, c.brier, c.brier_skill) == ((0.0, 0.9), (2, 1), 0.0, 0.0, 1.0)
    assert calibrate(np.array([0.5, 0.5]), np.array([True, True])).brier_skill is None
