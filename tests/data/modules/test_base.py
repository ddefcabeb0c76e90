"""The position of a run: stop it anywhere, resume it with other workers or processes, see the same samples.

Every run here records the sample numbers and a hash of the pixels of each batch that reached the network.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.strategies import DDPStrategy

from convlstm_fish.data.modules import FishClips, RecordingFrames, ResumableDataModule
from convlstm_fish.data.modules.base import collate
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError

pytestmark = [
    pytest.mark.filterwarnings("ignore:predict returned None if it was on purpose"),
]
STEPS = 3 * 14  # three epochs of the 14 batches below


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(1, 1)

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        return self.linear(batch["video"].mean().view(1, 1)).mean()

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        self.seen(batch)

    test_step = predict_step = validation_step

    def seen(self, batch: dict[str, Any]) -> None:
        with open(Path(self.trainer.default_root_dir) / f"evaluated{self.global_rank}", "a") as file:
            for index, valid in zip(batch["index"].tolist(), batch["valid"].tolist()):
                file.write(f"{index} {int(valid)}\n")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recorder(pl.Callback):
    """Writes a line per sample and process, and ends the run as the test wants it."""

    def __init__(self, at: int | None = None, how: str = "stop") -> None:
        self.at, self.how = at, how

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        with open(Path(trainer.default_root_dir) / f"seen{trainer.global_rank}", "a") as file:
            for number, clip in zip(batch["index"].tolist(), batch["video"]):
                file.write(f"{trainer.global_step} {number} {hashlib.sha1(clip.numpy().tobytes()).hexdigest()}\n")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        if trainer.global_step == self.at:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "stopped.ckpt")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            trainer.should_stop = True


def clips(tank: Recording, **options: Any) -> FishClips:
    settings: dict[str, Any] = {
        "batch_size": 4,
        "clip_frames": 8,
        "horizon_seconds": 0.5,
        "image_size": (12, 16),
        "clip_stride": 4,
        "flips": "random",
        "noise": 0.1,
        "brightness": 0.2,
        "shift": 2,
    }
    return FishClips(str(tank.path), **{**settings, **options})


def trainer(root: Path, callback: Recorder, processes: int = 1, **options: Any) -> pl.Trainer:
    root.mkdir(exist_ok=True)
    strategy = "auto" if processes == 1 else DDPStrategy(process_group_backend="gloo", start_method="fork")
    settings: dict[str, Any] = {
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": processes,
        "strategy": strategy,
        "use_distributed_sampler": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": root,
        "callbacks": [callback],
    }
    return pl.Trainer(**{**settings, **options})


def seen(root: Path, processes: int = 1) -> list[str]:
    """What the network saw, step by step, each step's samples in the order of the global batch."""
    ranks = [(root / f"seen{rank}").read_text().splitlines() for rank in range(processes)]
    each = len(ranks[0]) // STEPS if processes > 1 else len(ranks[0])
    return [line for start in range(0, len(ranks[0]), each) for rank in ranks for line in rank[start : start + each]]


@pytest.fixture(scope="module")
def whole(tank: Recording, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("whole")
    trainer(root, Recorder()).fit(Net(), clips(tank))
    lines = seen(root)
    assert len(lines) == STEPS * 4
    assert len(set(lines)) == len(lines)
    return lines


def resumed(root: Path, tank: Recording, processes: int = 1, **options: Any) -> list[str]:
    later = root / "later"
    trainer(later, Recorder(), processes).fit(Net(), clips(tank, **options), ckpt_path=str(root / "stopped.ckpt"))
    return seen(later, processes)


@pytest.mark.parametrize("stop", [1, 5, 14, 20, 28])
def test_a_stopped_run_resumes_with_the_next_sample(
    tank: Recording, tmp_path: Path, whole: list[str], stop: int
) -> None:
    trainer(tmp_path, Recorder(stop)).fit(Net(), clips(tank))
    assert seen(tmp_path) == whole[: stop * 4]
    assert resumed(tmp_path, tank) == whole[stop * 4 :]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 0), (0, 2)])
def test_the_number_of_workers_does_not_matter(
    tank: Recording, tmp_path: Path, whole: list[str], before: int, after: int
) -> None:
    trainer(tmp_path, Recorder(20)).fit(Net(), clips(tank, num_workers=before))
    assert resumed(tmp_path, tank, num_workers=after) == whole[80:]


def test_a_killed_run_resumes_with_the_next_sample(tank: Recording, tmp_path: Path, whole: list[str]) -> None:
    child = os.fork()
    if child == 0:
        try:
            trainer(tmp_path, Recorder(20, "kill")).fit(Net(), clips(tank))
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert resumed(tmp_path, tank) == whole[80:]


def test_two_processes_see_what_one_sees_and_resume_as_one(tank: Recording, tmp_path: Path, whole: list[str]) -> None:
    trainer(tmp_path / "two", Recorder(), 2).fit(Net(), clips(tank, batch_size=2))
    assert seen(tmp_path / "two", 2) == whole
    trainer(tmp_path, Recorder(20), 2).fit(Net(), clips(tank, batch_size=2))
    assert resumed(tmp_path, tank) == whole[80:]


def test_one_process_resumes_as_two(tank: Recording, tmp_path: Path, whole: list[str]) -> None:
    trainer(tmp_path, Recorder(14)).fit(Net(), clips(tank))
    trainer(tmp_path / "later", Recorder(), 2).fit(
        Net(), clips(tank, batch_size=2), ckpt_path=str(tmp_path / "stopped.ckpt")
    )
    ranks = [(tmp_path / f"later/seen{rank}").read_text().splitlines() for rank in range(2)]
    merged = [line for k in range(0, len(ranks[0]), 2) for rank in ranks for line in rank[k : k + 2]]
    assert merged == whole[56:]


def test_epoch_checkpoint_validation_and_accumulation_do_not_disturb_the_order(
    tank: Recording, tmp_path: Path, whole: list[str]
) -> None:
    options = {"val_check_interval": 3, "accumulate_grad_batches": 2}
    first = trainer(tmp_path, Recorder(), max_epochs=2, **options)
    first.fit(Net(), clips(tank))
    first.save_checkpoint(tmp_path / "epoch.ckpt")
    trainer(tmp_path / "later", Recorder(), **options).fit(Net(), clips(tank), ckpt_path=str(tmp_path / "epoch.ckpt"))
    strip = lambda lines: [line.split(" ", 1)[1] for line in lines]  # noqa: E731  (global_step counts half)
    assert strip(seen(tmp_path) + seen(tmp_path / "later")) == strip(whole)


def test_limited_epochs_go_through_all_samples_with_validation_each(
    tank: Recording, tmp_path: Path, whole: list[str]
) -> None:
    trainer(tmp_path, Recorder(), max_epochs=7, limit_train_batches=6).fit(Net(), clips(tank))
    assert seen(tmp_path) == whole
    assert len((tmp_path / "evaluated0").read_text().splitlines()) == 7 * len(clips(tank).frames("validation"))


def test_overfit_batches_repeats_its_batches(tank: Recording, tmp_path: Path, whole: list[str]) -> None:
    trainer(tmp_path, Recorder(), overfit_batches=2, limit_val_batches=0).fit(Net(), clips(tank))
    numbers = [line.split()[1:] for line in seen(tmp_path)]
    assert numbers == [line.split()[1:] for line in whole[:8]] * 3


def test_a_new_fit_starts_at_the_beginning(tank: Recording, tmp_path: Path, whole: list[str]) -> None:
    trainer(tmp_path, Recorder(5)).fit(Net(), clips(tank))
    data = clips(tank)
    trainer(tmp_path / "a", Recorder()).fit(Net(), data, ckpt_path=str(tmp_path / "stopped.ckpt"))
    trainer(tmp_path / "b", Recorder(), max_steps=3).fit(Net(), data)
    assert seen(tmp_path / "b") == whole[:12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, r"written with a global batch of 4 \(batch_size x processes\), this run has a .* of 2"),
        ({"seed": 1}, "written with seed 0, this run has seed 1"),
        ({"clip_stride": 2}, "written with 57 training samples, this run has 114 training samples"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    tank: Recording, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    trainer(tmp_path, Recorder(5)).fit(Net(), clips(tank))
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "later", Recorder()).fit(
            Net(), clips(tank, **options), ckpt_path=str(tmp_path / "stopped.ckpt")
        )
    # Scoring other data with the same checkpoint is nothing unusual.
    trainer(tmp_path, Recorder()).validate(
        Net(), clips(tank, **options), ckpt_path=str(tmp_path / "stopped.ckpt"), verbose=False
    )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_evaluation_sees_every_clip_once(tank: Recording, tmp_path: Path, function: str, processes: int) -> None:
    data = clips(tank, batch_size=8, eval_stride=2, predict_split="test")
    run: Callable[..., Any] = getattr(trainer(tmp_path, Recorder(), processes), function)
    run(Net(), data, **({} if function == "predict" else {"verbose": False}))
    lines = [(tmp_path / f"evaluated{rank}").read_text().splitlines() for rank in range(processes)]
    assert len({len(rank) for rank in lines}) == 1
    counted = [int(line.split()[0]) for rank in lines for line in rank if line.endswith("1")]
    split = {"validate": "validation", "test": "test", "predict": "predict"}[function]
    assert sorted(counted) == data.frames(split).tolist()
    padded = sum(line.endswith("0") for rank in lines for line in rank)
    assert padded == -len(counted) % processes


def test_lightnings_own_sampler_is_refused(tank: Recording, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="use_distributed_sampler must be False"):
        trainer(tmp_path, Recorder(), 2, use_distributed_sampler=True).fit(Net(), clips(tank))


def test_loaders_work_without_a_trainer(tank: Recording) -> None:
    data = clips(tank)
    first, second = list(data.train_dataloader()), list(data.train_dataloader())
    assert len(first) == 14
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(first, second))
    state = data.state_dict()
    assert state == {"samples_done": 0, "steps": 0, "seed": 0, "global_batch": 4, "train_size": 57}
    data.load_state_dict({**state, "samples_done": 8})
    third = list(data.train_dataloader())
    assert [b["index"].tolist() for b in third] == [b["index"].tolist() for b in first[2:]]
    # The order does not touch the global generator.
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_pixels_follow_the_precision_of_the_network(tank: Recording, tmp_path: Path) -> None:
    class Asks(Recorder):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
            assert batch["video"].dtype == torch.float64
            self.asked = True

    callback = Asks()
    trainer(tmp_path, callback, precision="64-true", max_steps=1).fit(Net(), clips(tank))
    assert callback.asked


def test_seeds_stay_plain_numbers() -> None:
    batch = collate([{"index": torch.tensor(k), "noise_seed": k + 2**61} for k in range(3)])
    assert batch["noise_seed"] == [2**61, 2**61 + 1, 2**61 + 2]
    assert batch["index"].tolist() == [0, 1, 2]


def test_threads_leave_a_batch_as_it_is(tank: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 5):
        monkeypatch.setattr("convlstm_fish.data.modules.base._processors", lambda threads=threads: threads)
        data = clips(tank, batch_size=13)
        data.setup("fit")
        found.append([batch for batch, _ in zip(data.train_dataloader(), range(3))])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][0]["video"].dtype == torch.uint8


def test_a_frame_that_cannot_be_read_is_told_from_a_thread(tank: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise UserError("00007.png: is not a readable image")

    monkeypatch.setattr("convlstm_fish.data.modules.base._processors", lambda: 3)
    data = clips(tank)
    data.setup("fit")
    monkeypatch.setattr(Recording, "cut", cut)
    with pytest.raises(UserError, match=r"^00007\.png: is not a readable image$"):
        next(iter(data.train_dataloader()))


def test_a_frame_that_cannot_be_read_is_told_from_a_loader_process_in_one_line(tmp_path: Path) -> None:
    for t in range(30):
        Image.fromarray(np.full((12, 16), t, np.uint8)).save(tmp_path / f"{t:05d}.png")
    (tmp_path / "00005.png").write_bytes((tmp_path / "00005.png").read_bytes()[:50])
    data = RecordingFrames(
        str(tmp_path), 4, context_frames=2, future_frames=1, image_size=(12, 16), splits=(0.6, 0.2, 0.2), num_workers=1
    )
    data.setup("fit")
    with pytest.raises(UserError, match=r"^frame 5, \S+00005\.png: cannot be decoded; the file is damaged") as error:
        list(data.train_dataloader())
    assert "Traceback" not in str(error.value)


@pytest.mark.gpu
def test_the_training_process_puts_pixels_together_in_pinned_memory(tank: Recording) -> None:
    found = []
    for workers in (0, 1):
        data = clips(tank, pixels_on="host", image_size=(120, 160), num_workers=workers)
        data.setup("fit")
        found.append(next(iter(data.train_dataloader())))
    assert found[0]["video"].is_pinned()
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is not 1 or more"),
        ({"num_workers": -1}, "num_workers: -1 is not 0 or more"),
        ({"seed": -1}, "seed: -1 is not 0 or more"),
    ],
)
def test_wrong_options(tank: Recording, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        clips(tank, **options)


def test_a_module_without_samples_is_told_when_it_is_made() -> None:
    class Forgetful(ResumableDataModule):
        pass

    with pytest.raises(TypeError, match=r"abstract method '?samples"):
        Forgetful(1)  # type: ignore[abstract]
