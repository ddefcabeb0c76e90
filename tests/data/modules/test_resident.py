"""Clips gathered on the device are the clips that are cut from the memory map, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from convlstm_fish.data.modules.fish_clips import FishClips
from convlstm_fish.data.modules.resident import PinnedFrames, ResidentFrames, available_memory
from convlstm_fish.data.recording import Recording

CPU = torch.device("cpu")


def batches(
    tank: Recording, pixels_on: str, split: str, width: int = 16, device: torch.device = CPU, **options: Any
) -> list[dict[str, Any]]:
    data = FishClips(
        str(tank.path),
        batch_size=7,
        clip_frames=8,
        frames_per_step=2,
        image_size=(11, width),
        horizon_seconds=0.5,
        pixels_on=pixels_on,
        **{"brightness": 0.2, "shift": 2, "noise": 0.01, **options},
    )
    data.setup({"train": "fit", "test": "test", "predict": "predict"}[split])
    loader = {"train": data.train_dataloader, "test": data.test_dataloader, "predict": data.predict_dataloader}[split]()
    moved = (data.transfer_batch_to_device(batch, device, 0) for batch in loader)
    return [data.on_after_batch_transfer(batch, 0) for batch in moved]


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


@pytest.mark.parametrize("pixels_on", ["pinned", "device"])
def test_without_a_gpu_the_recording_lies_in_memory(tank: Recording, pixels_on: str) -> None:
    data = FishClips(str(tank.path), clip_frames=8, horizon_seconds=0.5, image_size=(24, 32), pixels_on=pixels_on)
    data._on_cuda = lambda: False  # type: ignore[method-assign]
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    assert "video" not in batch
    assert data.on_after_batch_transfer(batch, 0)["video"].shape == (4, 2, 4, 24, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels_on", ["pinned", "host", "device"])
@pytest.mark.parametrize("split", ["train", "predict"])
def test_a_gpu_gets_the_same_batches(tank: Recording, pixels_on: str, split: str) -> None:
    options = {"flips": "all", "noise": 0.0}  # whose numbers another device draws otherwise
    ours = batches(tank, pixels_on, split, device=torch.device("cuda"), **options)
    for batch, theirs in zip(ours, batches(tank, "host", split, **options), strict=True):
        assert batch["video"].is_cuda
        torch.testing.assert_close({k: v.cpu() for k, v in batch.items()}, theirs, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("pixels_on", ["pinned", "host"])
def test_pixels_that_travel_beside_a_long_step_are_whole(
    tank: Recording, pixels_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convlstm_fish.data.modules.base._LARGE", 0)  # these frames are small
    data = FishClips(
        str(tank.path), 8, clip_frames=8, horizon_seconds=0.5, image_size=tank.size, pixels_on=pixels_on, flips="none"
    )
    data.setup("test")
    gpu, spent = torch.device("cuda"), torch.ones(4096, 4096, device="cuda")
    sums, expected = [], []
    for batch in data.test_dataloader():
        expected += [int(tank.cut(slice(end - 7, end + 1)).astype(int).sum()) for end in batch["index"]]
        video = data.transfer_batch_to_device(batch, gpu, 0)["video"]
        for _ in range(20):
            spent = spent @ spent * 1e-4
        sums += list(video.flatten(1).long().sum(1))  # when the next batches have long begun to travel
        del video
    assert [int(s) for s in sums] == expected


def test_single_channel(tank: Recording) -> None:
    host = batches(tank, "host", "test", input_form="single_channel")
    device = batches(tank, "device", "test", input_form="single_channel")
    assert host[0]["video"].shape == (7, 8, 1, 11, 16)
    assert torch.equal(host[0]["video"], device[0]["video"])


def test_nothing_travels_and_auto_stays_on_the_host_without_a_gpu(tank: Recording) -> None:
    data = FishClips(str(tank.path), clip_frames=8, horizon_seconds=0.5, image_size=(24, 32), pixels_on="device")
    data.setup("test")
    assert "video" not in next(iter(data.test_dataloader()))
    assert not ResidentFrames.fits(1, (24, 32), CPU)


def test_memory_that_the_host_or_its_container_can_spare(tmp_path: Path) -> None:
    assert available_memory(tmp_path, tmp_path) == 0  # not known, so nothing is kept there
    (tmp_path / "meminfo").write_text("MemTotal:       32000 kB\nMemAvailable:   20000 kB\n")
    assert available_memory(tmp_path, tmp_path) == 20000 * 1024
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/\n")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("7000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 3000000\n")
    assert available_memory(tmp_path, tmp_path) == 20000 * 1024
    (tmp_path / "memory.max").write_text("10000000\n")
    assert available_memory(tmp_path, tmp_path) == 6000000


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/slurm/job_7/step_0", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpuset,memory:/slurm/job_7/step_0",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_the_limit_of_a_job_may_stand_above_its_own_group(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text("MemAvailable:   20000 kB\n")
    (tmp_path / "self/cgroup").write_text(f"12:pids:/other\n{line}\n")
    limits = {"slurm": 9 << 60, "slurm/job_7": 10_000_000, "slurm/job_7/step_0": 9 << 60}
    for group, limit in limits.items():
        place = tmp_path / folder / group
        place.mkdir(parents=True, exist_ok=True)
        for name, value in zip(names[:2], (limit, 7_000_000)):
            (place / name).write_text(f"{value}\n")
        (place / "memory.stat").write_text(f"{names[2]} 3000000\n")
    assert available_memory(tmp_path, tmp_path) == 6_000_000


def test_auto_keeps_to_its_first_answer(tank: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FishClips(str(tank.path), clip_frames=8, horizon_seconds=0.5)
    data._on_cuda = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(ResidentFrames, "fits", lambda *args: False)
    room = iter([True, False])  # once other processes have taken theirs
    monkeypatch.setattr(PinnedFrames, "fits", lambda *args: next(room))
    data.setup("test")
    assert data._split("test").pixels is None
    assert data._pixels_lie_on() == "pinned"


def test_a_recording_is_pinned_where_every_process_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convlstm_fish.data.modules.resident.available_memory", lambda: 4 * 2 * 1000 * 24 * 32)
    assert PinnedFrames.fits(1000, (24, 32), 2)
    assert not PinnedFrames.fits(1000, (24, 32), 3)


@pytest.mark.gpu
def test_auto_takes_what_has_room(tank: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    for where, device, pinned in (("device", True, True), ("pinned", False, True), ("host", False, False)):
        monkeypatch.setattr(ResidentFrames, "fits", lambda *args, room=device: room)
        monkeypatch.setattr(PinnedFrames, "fits", lambda *args, room=pinned: room)
        assert FishClips(str(tank.path))._pixels_lie_on() == where
    monkeypatch.undo()
    assert ResidentFrames.fits(1000, (24, 32), gpu)
    assert not ResidentFrames.fits(1 << 40, (24, 32), gpu)
