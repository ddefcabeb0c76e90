"""The published test set, and an evaluation of it that several files look at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from convlstm_fish.evaluate import Evaluation, evaluate


class Published:
    """The arrays of one published split, and the frames that the publication scores."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.motion = self.load("Y_tilde")
        self.labels = self.load("Y_label")
        self.frames = np.arange(119, len(self.motion) - 2 - 10 + 1)

    def load(self, name: str) -> npt.NDArray[np.float64]:
        return np.load(self.folder / f"{name}.npy").astype(np.float64).reshape(-1)


@pytest.fixture(scope="session")
def published(shared: Path) -> Published:
    return Published(shared / "published/targets/test")


@pytest.fixture(scope="session")
def published_train(shared: Path) -> Published:
    return Published(shared / "published/targets/train")


@pytest.fixture(scope="session")
def published_result(published: Published) -> Evaluation:
    """Both networks and, as a third model, the file with the published baseline; without the LSTM."""
    return evaluate(
        published.frames,
        published.labels,
        {
            "upbeat-snowflake-91": published.load("Y_pred"),
            "visionary-serenity": published.load("Y_pred_visionary_serenity"),
            "the baseline's file": published.load("Y_pred_baseline")[published.frames],
        },
        published.motion,
        fps=30,
    )
