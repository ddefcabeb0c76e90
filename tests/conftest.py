"""What every test may use: the published files beside the checkout, and quiet, repeatable arithmetic."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Two test processes on two cores: one thread each, or they fight.
torch.set_num_threads(1)
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("OMP_NUM_THREADS", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ``../shared`` with the published experiment, MNIST and the zebrafish video.

    Skips where it is absent, and fails where ``CI=true`` and it is absent.
    """
    if not SHARED.is_dir():
        reason = "needs ../shared (published targets, weights and frames, MNIST, zebrafish video), which is absent"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return SHARED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def small_tank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 30 simulated seconds of 48x64 pixels, for tests that go through the command line."""
    from convlstm_fish.data.simulate import simulate

    path: Path = tmp_path_factory.mktemp("recordings") / "tank"
    simulate(path, minutes=0.5, size=(48, 64), seed=3)
    return path
