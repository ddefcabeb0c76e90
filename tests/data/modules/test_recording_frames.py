"""RecordingFrames: which frames a sequence holds, splits, folders of recordings, flips, and what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from convlstm_fish.data.clips import nearest
from convlstm_fish.data.modules.base import batch_of
from convlstm_fish.data.modules.recording_frames import RecordingFrames, open_recordings
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError
from convlstm_fish.tasks import FramePrediction


def write(path: Path, frames: int, seed: int = 0, size: tuple[int, int] = (9, 12)) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, *size), dtype=np.uint8)
    with RecordingWriter(path, pixels.shape, 30, splits=(0.5, 0.25, 0.25)) as writer:
        writer.append(pixels)
        writer.finish()
    return pixels


def cut(data: RecordingFrames, split: str, count: int | None = None) -> list[dict[str, Any]]:
    """Samples, through what the device does to a batch of one."""
    samples = data.samples(split)
    items = []
    for k in range(len(samples) if count is None else count):
        items.append(data.on_after_batch_transfer(batch_of(samples, [(k, 0)]), 0))
    return items


def test_sequences_hold_the_frames_they_should(tmp_path: Path) -> None:
    pixels = write(tmp_path / "tank", 80)
    data = RecordingFrames(
        str(tmp_path / "tank"),
        context_frames=3,
        future_frames=2,
        frame_step=4,
        image_size=(5, 6),
        stride=3,
        eval_stride=2,
    )
    small = pixels[:, nearest(9, 5)][:, :, nearest(12, 6)] / np.float32(255)
    for split, (first, stop), stride in (("train", (0, 40), 3), ("validation", (40, 60), 2), ("test", (60, 80), 2)):
        starts = list(range(first, stop - 16, stride))
        items = cut(data, split)
        assert [int(item["index"]) for item in items] == starts
        for start, item in zip(starts, items):
            whole = torch.cat([item["video"], item["future"]], 1)[0, :, 0].numpy()
            np.testing.assert_allclose(whole, small[start : start + 17 : 4], rtol=1e-6)
            assert item["video"].shape == (1, *data.input_shape)


def test_prediction_reaches_the_last_frame_and_needs_no_future(tmp_path: Path) -> None:
    pixels = write(tmp_path / "tank", 41)
    data = RecordingFrames(
        str(tmp_path / "tank"), context_frames=3, future_frames=7, frame_step=2, image_size=(9, 12), eval_stride=10
    )
    items = cut(data, "predict")
    assert [int(item["index"]) for item in items] == [6, 16, 26, 36]
    np.testing.assert_allclose(items[-1]["video"][0, :, 0].numpy(), pixels[36:41:2] / np.float32(255), rtol=1e-6)
    assert [(item["future_frames"], "future" in item) for item in items] == [(7, False)] * 4
    task = FramePrediction("stacked", hidden_channels=[2], kernel_size=3, patch_size=3)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    said = trainer.predict(task, data)
    assert said is not None
    assert torch.cat([part["index"] for part in said]).tolist() == [6, 16, 26, 36]
    assert said[0]["frames"].shape == (4, 7, 1, 9, 12)
    with pytest.raises(UserError, match=r"predict has at most 41 frames .* needs 59"):
        RecordingFrames(str(tmp_path / "tank"), context_frames=30, frame_step=2).setup("predict")


def test_flips_are_the_same_for_what_is_given_and_what_follows(tmp_path: Path) -> None:
    pixels = write(tmp_path / "tank", 40)
    data = RecordingFrames(
        str(tmp_path / "tank"), context_frames=2, future_frames=1, image_size=(9, 12), flips="all", stride=5
    )
    items = cut(data, "train", 8)
    for k, item in enumerate(items):
        start = int(item["index"])
        assert start == 5 * (k // 4)
        whole = torch.cat([item["video"], item["future"]], 1)[0, :, 0].numpy()
        expected = pixels[start : start + 3][:, :: -1 if k & 1 else 1, :: -1 if k & 2 else 1]
        np.testing.assert_allclose(whole, expected / np.float32(255), rtol=1e-6)
    assert all("augmentation" not in item for item in cut(data, "validation"))


def test_a_folder_of_recordings_and_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "all"
    write(folder / "a", 40, size=(16, 24))
    second = write(folder / "c", 60, seed=1)
    writer = cv2.VideoWriter(str(folder / "b.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 20, (32, 20))
    for t in range(50):
        writer.write(np.full((20, 32, 3), 4 * t, np.uint8))
    writer.release()
    (folder / "notes.txt").write_text("no recording")
    (folder / "._b.avi").write_text("what a Mac leaves beside a file")
    write(folder / ".a.replaced", 40)  # and a killed writer
    assert [r.name for r in open_recordings(folder)] == ["a", "b", "c"]
    data = RecordingFrames(
        str(folder),
        context_frames=2,
        future_frames=2,
        image_size=(9, 12),
        splits=(0.5, 0.25, 0.25),
        stride=1,
        simulate={"minutes": 1},  # as fish_frames.yaml has it
    )
    data.prepare_data()
    train = cut(data, "train")
    starts = [int(item["index"]) for item in train]
    assert starts == [*range(17), *range(40, 62), *range(90, 117)]
    assert train[17]["future"][0, 0].mean().item() * 255 == pytest.approx(4 * 2, abs=3)
    np.testing.assert_allclose(train[-1]["video"][0, 0, 0].numpy(), second[26] / np.float32(255), rtol=1e-6)


def test_a_recording_is_simulated_on_first_use(tmp_path: Path) -> None:
    path = tmp_path / "tank"
    data = RecordingFrames(
        str(path), simulate={"minutes": 0.05, "seed": 1}, image_size=(12, 16), splits=(0.5, 0.3, 0.2)
    )
    data.prepare_data()
    data.setup("fit")
    item = cut(data, "train", 1)[0]
    assert item["video"].shape == (1, 10, 1, 12, 16)
    assert 0.1 < item["video"].max() <= 1
    with pytest.warns(UserWarning, match=r"is there already, with size \(240, 320\); simulate.size \[48, 64\] is not"):
        RecordingFrames(str(path), simulate={"minutes": 0.05, "size": [48, 64]}).prepare_data()
    with pytest.raises(UserError, match="simulate: 'minuts' is not an option of the simulator"):
        RecordingFrames(str(path), simulate={"minuts": 1})


def test_what_does_not_fit_is_told(tmp_path: Path) -> None:
    write(tmp_path / "tank", 40)
    with pytest.raises(UserError, match=r"validation has at most 10 frames .* 8 frames with frame_step 2 needs 15"):
        RecordingFrames(str(tmp_path / "tank"), context_frames=4, future_frames=4, frame_step=2).setup("fit")
    with pytest.raises(UserError, match="absent"):
        RecordingFrames(str(tmp_path / "absent")).setup("fit")
    for options in (
        {"context_frames": 0},
        {"frame_step": 0},
        {"eval_stride": 0},
        {"image_size": (5,)},
        {"flips": "up"},
    ):
        with pytest.raises(UserError, match=next(iter(options))):
            RecordingFrames("x", **options)  # type: ignore[arg-type]
