"""FishClips: the right frames, labels and counts, from every kind of split, and one line when something is off."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convlstm_fish.data import labels
from convlstm_fish.data.modules import FishClips
from convlstm_fish.data.modules.base import batch_of
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError


def clips(tank: Recording, **options: Any) -> FishClips:
    settings: dict[str, Any] = {"clip_frames": 8, "horizon_seconds": 0.5, "image_size": (12, 16), "flips": "none"}
    data = FishClips(str(tank.path), **{**settings, **options})
    data.prepare_data()
    return data


def batches(data: FishClips, split: str) -> list[dict[str, Any]]:
    data.setup({"train": "fit", "validation": "validate"}.get(split, split))
    loader = getattr(data, {"validation": "val"}.get(split, split) + "_dataloader")()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def whole(data: FishClips, split: str) -> dict[str, Any]:
    parts = batches(data, split)
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def test_a_clip_is_the_published_selection_of_pixels(shared: Path, tmp_path: Path) -> None:
    """Pixels as PIL's nearest neighbour, frames in groups of four: the clips of the published probabilities."""
    reference = json.loads((shared / "published/reference_probabilities.json").read_text())["clips"][0]
    images = [Image.open(shared / f"published/frames/{k:05d}.png") for k in reference["frame_indices"]]
    with RecordingWriter(tmp_path / "fish", (170, 240, 320), 30, splits=(1, 0, 0)) as writer:
        for image in images + images[:50]:
            writer.append(np.asarray(image))
        writer.finish()
    data = FishClips(str(tmp_path / "fish"), batch_size=1, flips="none")
    made = batch_of(data.samples("train"), [(0, 0)])["video"][0]
    small = np.stack([np.asarray(image.resize((160, 120), Image.Resampling.NEAREST)) for image in images])
    assert made.shape == data.input_shape == (30, 4, 120, 160)
    np.testing.assert_array_equal(made.numpy().reshape(120, 120, 160), small)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches(tank: Recording, workers: int) -> None:
    data = clips(tank, batch_size=7, num_workers=workers)
    assert data.input_shape == (2, 4, 12, 16)
    assert (data.fps, data.horizon, data.clip_frames) == (10, 5, 8)
    for split in ("validation", "test"):
        start, stop = tank.splits[split]
        ends = np.arange(start + 7, stop - 1 - 5)
        got = whole(data, split)
        assert got["index"].tolist() == ends.tolist() == data.frames(split).tolist()
        assert got["valid"].all()
        assert got["video"].dtype == torch.float32
        assert got["label"].dtype == torch.int64
        for end, video in zip(ends, got["video"]):
            expected = tank.frames[end - 7 : end + 1, 1::2, 1::2].reshape(2, 4, 12, 16) / np.float32(255)
            np.testing.assert_array_equal(video, expected)
        expected = labels.burst_labels(tank.motion[start:stop], 7, 5)[ends - start]
        assert got["label"].tolist() == expected.tolist()
        assert 0 < expected.mean() < 1


def test_single_channel(tank: Recording) -> None:
    data = clips(tank, input_form="single_channel")
    assert data.input_shape == (8, 1, 12, 16)
    grouped = whole(clips(tank), "test")["video"]
    torch.testing.assert_close(whole(data, "test")["video"].flatten(1, 2), grouped.flatten(1, 2), rtol=0, atol=0)
    # The length need not be a multiple of four frames.
    assert clips(tank, input_form="single_channel", clip_frames=7).input_shape == (7, 1, 12, 16)


def test_all_flips_are_one_epoch(tank: Recording) -> None:
    data = clips(tank, flips="all", batch_size=4)
    ends = data.frames("train")
    got = whole(data, "train")
    assert len(data.samples("train")) == 4 * len(ends) == len(got["index"])
    assert sorted(got["index"].tolist()) == np.repeat(ends, 4).tolist()
    end = int(ends[20])
    clip = torch.from_numpy(tank.frames[end - 7 : end + 1, 1::2, 1::2].reshape(2, 4, 12, 16) / np.float32(255))
    made = got["video"][got["index"] == end]
    for expected in (clip, clip.flip(-1), clip.flip(-2), clip.flip(-1, -2)):
        assert sum(torch.equal(expected, video) for video in made) == 1
    assert "augmentation" not in got


def test_an_epoch_of_the_published_training_recording(tmp_path: Path) -> None:
    class Frames:
        shape = (53916, 240, 320)

        def __len__(self) -> int:
            return self.shape[0]

    data = FishClips("unused")
    splits = {"train": (0, 44956), "validation": (44956, 48549), "test": (48549, 53916)}
    data._recording = Recording(tmp_path, Frames(), 30, splits, motion=np.zeros(53916))
    assert len(data.samples("train")) == 4 * 44791
    assert data.frames("test")[[0, -1]].tolist() == [48549 + 119, 53916 - 2 - 45]


def test_strides_and_splits(tank: Recording) -> None:
    data = clips(tank, clip_stride=3, eval_stride=5, splits=(0.5, 0.25, 0.25))
    assert data.frames("train").tolist() == list(range(7, 200 - 6, 3))
    assert data.frames("validation").tolist() == list(range(207, 300 - 6, 5))
    assert whole(data, "test")["index"].tolist() == list(range(307, 400 - 6, 5))


def test_seconds(tank: Recording) -> None:
    data = clips(tank, clip_frames=None, clip_seconds=1.9, horizon_seconds=0.72)
    assert (data.clip_frames, data.horizon) == (20, 7)


def test_chase_labels_and_threshold(tank: Recording) -> None:
    data = clips(tank, label="chase")
    got = whole(data, "test")
    starts = set(range(20, 400, 37))
    assert got["label"].tolist() == [int(any(t + k in starts for k in range(1, 6))) for t in got["index"].tolist()]
    few = clips(tank, threshold=0.05)
    assert few.labels.sum() < clips(tank).labels.sum()


def test_balanced_epochs(tank: Recording) -> None:
    got = whole(clips(tank, balanced=True, flips="all", batch_size=2), "train")
    assert got["label"].float().mean() == 0.5
    assert whole(clips(tank, flips="all"), "train")["label"].float().mean() != 0.5


def test_prediction_reaches_the_last_frame(tank: Recording) -> None:
    got = whole(clips(tank, batch_size=64), "predict")
    assert got["index"].tolist() == list(range(7, 400))
    labelled = got["label"] >= 0
    train, test = tank.splits["train"], tank.splits["test"]
    assert not labelled[got["index"] >= 400 - 6].any()
    assert labelled[got["index"] == test[1] - 7].all()
    assert not labelled[got["index"] == train[1] - 6].any()
    scored = whole(clips(tank), "test")
    both = torch.isin(got["index"], scored["index"])
    assert torch.equal(got["label"][both], scored["label"])
    assert whole(clips(tank, predict_split="validation"), "predict")["index"].tolist() == list(range(247, 320))


def test_samples_pickle_without_their_frames(tank: Recording) -> None:
    samples = clips(tank).samples("train")
    again = pickle.loads(pickle.dumps(samples))
    assert len(pickle.dumps(samples)) < 10_000
    assert torch.equal(batch_of(again, [3])["video"], batch_of(samples, [3])["video"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_recording(tmp_path: Path) -> None:
    frames = np.zeros((100, 240, 320), np.uint8)
    with RecordingWriter(tmp_path / "long", (3000, 240, 320), 30, splits=(1, 0, 0)) as writer:
        for _ in range(30):
            writer.append(frames)
        writer.finish()
    data = FishClips(str(tmp_path / "long"), clip_frames=20, clip_stride=20, flips="none")

    def resident() -> int:
        return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0])

    loader = data.train_dataloader()
    next(iter(loader))
    before = resident()
    assert sum(1 for _ in loader) == 36
    assert resident() - before < 30_000  # kB, of 230,400


def test_a_film_as_it_was_taken_gets_a_warning(tank: Recording, tmp_path: Path) -> None:
    options: dict[str, Any] = {"clip_frames": 8, "horizon_seconds": 0.5}
    FishClips(str(tank.path), **options).setup("test")  # in these tests a warning would be an error
    with RecordingWriter(tmp_path / "raw", tank.frames.shape, 10, clip_frames=8, horizon=5) as writer:
        writer.append(255 - np.asarray(tank.frames))
        writer.finish()
    with pytest.warns(UserWarning, match=r"raw: its first frame is bright \(median 255 of 255\).*main.py prepare"):
        FishClips(str(tmp_path / "raw"), **options).setup("test")


def test_an_absent_recording_is_simulated_once(tmp_path: Path) -> None:
    path = str(tmp_path / "tank")
    options = {"minutes": 0.05, "seed": 3, "size": [48, 64], "quiet": True}
    data = FishClips(path, simulate=options)
    data.prepare_data()
    stamp = (tmp_path / "tank/frames.npy").stat().st_mtime_ns
    data.prepare_data()
    assert (tmp_path / "tank/frames.npy").stat().st_mtime_ns == stamp
    assert (len(data.recording), data.recording.size) == (90, (48, 64))
    with pytest.warns(UserWarning, match=r"is there already, with seed 3; simulate.seed 4 is not used"):
        FishClips(path, simulate={**options, "seed": 4}).prepare_data()
    with pytest.raises(UserError, match=r"simulate: 'minuts' is not an option of the simulator \(minutes, seed"):
        FishClips(path, simulate={"minuts": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_form": "rgb"}, "input_form: 'rgb' is not one of time_channels, single_channel"),
        ({"frames_per_step": 0}, "frames_per_step: 0 is not 1 or more"),
        ({"clip_frames": 9}, "clip_frames: 9 is not a positive multiple of frames_per_step 4"),
        ({"clip_seconds": 0}, "clip_seconds: 0 is not a positive number"),
        ({"horizon_seconds": -1}, "horizon_seconds: -1 is not a positive number"),
        ({"image_size": (0, 5)}, r"image_size: \[0, 5\] is not height, width in pixels"),
        ({"image_size": (5,)}, "image_size"),
        ({"threshold": 0}, "threshold: 0 is not a positive amount of motion"),
        ({"clip_stride": 0}, "clip_stride: 0"),
        ({"eval_stride": 0}, "eval_stride: 0"),
        ({"predict_split": "tests"}, "predict_split: 'tests' is not one of train, validation, test, all"),
        ({"flips": "both"}, "flips: 'both'"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_wrong_options(tank: Recording, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clips(tank, **options)


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"splits": (1, 0, 0)}, "fit", "has no validation split .it has: train.; name shares"),
        ({"splits": (0, 0, 1)}, "fit", "has no train split"),
        ({"clip_frames": 76}, "fit", r"test has 80 frames, but clips of 76 frames .* need 82 .* what fits: splits"),
        ({"clip_frames": 76}, "test", "validation has 80 frames and test has 80 frames"),
        ({"clip_frames": 404}, "predict", "400 frames to predict hold no clip of 404 frames; clip_seconds 40 fits"),
        ({"label": "chases"}, "fit", "label: chases of .* is not one 0 or 1 for each"),
        ({"splits": (1, 2)}, "fit", "are not three shares"),
        ({"batch_size": 1000}, "fit", "1000 x 1 process.es. is more than the 227 training samples"),
        ({"balanced": True, "threshold": 9.0}, "fit", "have the same label, so classes cannot be balanced"),
    ],
)
def test_a_recording_that_does_not_fit_is_one_line(
    tank: Recording, options: dict[str, Any], stage: str, message: str
) -> None:
    data = clips(tank, **options)
    with pytest.raises(UserError, match=message) as caught:
        batches(data, {"fit": "train"}.get(stage, stage))
    assert "\n" not in str(caught.value)


def test_a_missing_recording_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such recording"):
        FishClips(str(tmp_path / "nothing")).setup("fit")
