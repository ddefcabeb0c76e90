"""Clips gathered on the device are the clips that are cut from the memory map, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convlstm_fish.data.modules.fish_clips import FishClips
from convlstm_fish.data.modules.resident import ResidentFrames
from convlstm_fish.data.recording import Recording


def batches(tank: Recording, pixels_on: str, split: str, width: int = 16, **options: Any) -> list[dict[str, Any]]:
    data = FishClips(
        str(tank.path),
        batch_size=7,
        clip_frames=8,
        frames_per_step=2,
        image_size=(11, width),
        horizon_seconds=0.5,
        pixels_on=pixels_on,
        brightness=0.2,
        shift=2,
        noise=0.01,
        **options,
    )
    data.setup({"train": "fit", "test": "test", "predict": "predict"}[split])
    loader = {"train": data.train_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}[split]()
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


@pytest.mark.parametrize(
    ("split", "width", "flips"),
    [
        ("train", 16, "all"),  # gathered first, flipped then
        ("test", 16, "all"),
        ("predict", 16, "all"),
        ("train", 15, "all"),
        ("train", 16, "random"),
        ("train", 16, "none"),
    ],
)
def test_device_and_host_give_the_same_batches(tank: Recording, split: str, width: int, flips: str) -> None:
    host, device = (batches(tank, where, split, width, flips=flips) for where in ("host", "device"))
    assert len(host) == len(device) > 1
    for ours, theirs in zip(device, host):
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("flips", ["all", "random"])
def test_flipped_frames_give_the_same_batches(tank: Recording, flips: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = batches(tank, "host", "train", flips=flips)
    monkeypatch.setattr(ResidentFrames, "fits", lambda *args: True)
    device = batches(tank, "device", "train", flips=flips)
    assert all(torch.equal(ours["video"], theirs["video"]) for ours, theirs in zip(device, host))


def test_single_channel(tank: Recording) -> None:
    host = batches(tank, "host", "test", input_form="single_channel")
    device = batches(tank, "device", "test", input_form="single_channel")
    assert host[0]["video"].shape == (7, 8, 1, 11, 16)
    assert torch.equal(host[0]["video"], device[0]["video"])


def test_nothing_travels_and_auto_stays_on_the_host_without_a_gpu(tank: Recording) -> None:
    data = FishClips(str(tank.path), clip_frames=8, horizon_seconds=0.5, image_size=(24, 32), pixels_on="device")
    data.setup("test")
    assert "video" not in next(iter(data.test_dataloader()))
    assert not ResidentFrames.fits(1, (24, 32), torch.device("cpu"))


@pytest.mark.gpu
def test_auto_gathers_on_a_gpu_that_has_room() -> None:
    gpu = torch.device("cuda")
    assert ResidentFrames.fits(1000, (24, 32), gpu)
    assert not ResidentFrames.fits(1 << 40, (24, 32), gpu)
