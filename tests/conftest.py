"""What every test may use: published files, a small recording, a short training, and quiet, repeatable arithmetic."""

from __future__ import annotations

import os
from collections.abc import Callable
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
    """Begin with the longest tests, so that no process is left alone with one; skip the GPU tests without a GPU."""
    items.sort(key=lambda item: item.get_closest_marker("early") is None)
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


@pytest.fixture
def config(tmp_path: Path, small_tank: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config that trains in a second, in a folder of its own."""
    import yaml

    monkeypatch.chdir(tmp_path)
    content = {
        "model": {
            "class_path": "ClipClassification",
            "init_args": {"hidden_channels": [3], "dropout": 0.2, "lr": 0.01},
        },
        "data": {
            "class_path": "FishClips",
            "init_args": {
                "path": str(small_tank),
                "splits": [0.6, 0.2, 0.2],
                "batch_size": 8,
                "clip_frames": 8,
                "image_size": [12, 16],
                "clip_stride": 12,
                "eval_stride": 8,
                "flips": "random",
                "noise": 0.01,
            },
        },
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


@pytest.fixture
def weights() -> Callable[[Path], dict[str, torch.Tensor]]:
    """``weights(path)``: the parameters and buffers in a checkpoint."""
    from convlstm_fish.tasks.checkpoint_io import load_checkpoint

    def of_checkpoint(path: Path) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = load_checkpoint(path)["state_dict"]
        return state

    return of_checkpoint


@pytest.fixture
def losses() -> Callable[[Path], dict[int, float]]:
    """``losses(run)``: the training loss at each step that a run folder's event files tell of."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def of_run(run: Path) -> dict[int, float]:
        events = EventAccumulator(str(run)).Reload()
        return {event.step: event.value for event in events.Scalars("train/loss")}

    return of_run
