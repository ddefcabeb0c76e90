"""MovingMNIST and DigitClips through a Trainer: batches, splits, exact resume, files that are absent."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from convlstm_fish.data.digits import drawn_digits
from convlstm_fish.data.modules.base import batch_of
from convlstm_fish.data.modules.digit_clips import DigitClips
from convlstm_fish.data.modules.moving_mnist import MovingMNIST, StoredSequences
from convlstm_fish.errors import UserError

# Lightning 2.6.6 asks torch's pytree in a way that torch 2.14 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Recorder(pl.LightningModule):
    """Keeps what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[dict[str, Any]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight**2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.seen.append(batch)

    test_step = validation_step

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
            "limit_val_batches": 0,
            "use_distributed_sampler": False,
            **options,
        }
    )


def small(path: str | None = None, **options: Any) -> MovingMNIST:
    sizes = {"train_size": 12, "validation_size": 5, "test_size": 7}
    return MovingMNIST(path, 4, **{"context_frames": 3, "future_frames": 2, **sizes, **options})


def test_batches_and_splits(tmp_path: Path) -> None:
    data = small()
    fit = Recorder()
    trainer(tmp_path, max_epochs=2, limit_val_batches=1.0, num_sanity_val_steps=0).fit(fit, data)
    assert len(fit.seen) == 2 * (3 + 2)
    train = [b for b in fit.seen if "valid" not in b]
    for batch in fit.seen:
        assert set(batch) - {"valid"} == {"video", "future", "index"}
        assert batch["video"].shape[1:] == (3, 1, 64, 64)
        assert batch["future"].shape[1:] == (2, 1, 64, 64)
        assert batch["video"].dtype == torch.float32
        assert batch["video"].min() >= 0
        assert 0.5 < batch["video"].max() <= 1
    # no sequence comes twice, not even in the next epoch
    assert len({clip.numpy().tobytes() for b in train for clip in b["video"]}) == 24
    assert sorted(torch.cat([b["index"] for b in train[:3]]).tolist()) == list(range(12))
    expected = data.sequences("train", 12 + train[3]["index"])[:, :3, None] / 255
    torch.testing.assert_close(train[3]["video"], expected)
    # the held-out sets are the same in every run, whatever the seed
    validation = [b for b in fit.seen if "valid" in b][:2]
    again = Recorder()
    trainer(tmp_path).test(again, small(seed=8), verbose=False)
    test = again.seen
    assert torch.cat([b["index"] for b in test]).tolist() == list(range(7))
    other = Recorder()
    trainer(tmp_path, limit_val_batches=1.0).validate(other, small(seed=8), verbose=False)
    for first, second in zip(validation, other.seen):
        assert torch.equal(first["video"], second["video"])
        assert torch.equal(first["future"], second["future"])
    assert not torch.equal(validation[0]["video"], test[0]["video"])
    predicted = trainer(tmp_path).predict(Recorder(), small())
    assert torch.equal(predicted[0]["video"], test[0]["video"])


def test_video_and_future_are_one_sequence(shared: Path, tmp_path: Path) -> None:
    data = small(str(shared / "mnist"))
    recorder = Recorder()
    trainer(tmp_path).test(recorder, data, verbose=False)
    batch = recorder.seen[1]
    whole = torch.cat([batch["video"], batch["future"]], dim=1)
    assert torch.equal((whole[:, :, 0] * 255).to(torch.uint8), data.sequences("test", torch.tensor([4, 5, 6])))


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")  # the DataModule is
@pytest.mark.parametrize("make", [small, lambda: DigitClips(batch_size=4, train_size=12, frames=(2, 4))])
def test_a_stopped_run_goes_on_where_it_was(make: Any, tmp_path: Path) -> None:
    whole, first, second = Recorder(), Recorder(), Recorder()
    trainer(tmp_path, max_steps=7).fit(whole, make())
    start = trainer(tmp_path, max_steps=4)
    start.fit(first, make())
    start.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_steps=7).fit(second, make(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert len(first.seen) == 4
    assert len(second.seen) == 3
    for a, b in zip(whole.seen, first.seen + second.seen):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_standard_test_set(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 9, 64, 64), dtype=np.uint8)
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", frames)
    write_digits(tmp_path)
    recorder = Recorder()
    trainer(tmp_path).test(recorder, small(str(tmp_path), test_set="standard"), verbose=False)
    seen = torch.cat([torch.cat([b["video"], b["future"]], 1) for b in recorder.seen])
    np.testing.assert_array_equal((seen[:, :, 0] * 255).round().numpy(), frames[:5, :7].swapaxes(0, 1))
    stored = StoredSequences(tmp_path / "MovingMNIST" / "mnist_test_seq.npy", 9)
    pickled = pickle.dumps(stored)
    assert len(pickled) < 1000
    assert torch.equal(batch_of(pickle.loads(pickled), [8])["frames"], batch_of(stored, [8])["frames"])
    with pytest.raises(UserError, match=r"test_size: .* has 9 sequences, not 10"):
        small(str(tmp_path), test_set="standard", test_size=10).samples("test")
    for name, content in (("absent", None), ("text", b"hello"), ("short", frames.tobytes()[:100])):
        (tmp_path / name).mkdir()
        if content is not None:
            (tmp_path / name / "mnist_test_seq.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"mnist_test_seq.npy: cannot be read"):
            small(str(tmp_path / name), test_set="standard").samples("test")
    np.save(tmp_path / "mnist_test_seq.npy", frames[:19])
    with pytest.raises(UserError, match=r"\(19, 9, 64, 64\)"):
        StoredSequences(tmp_path / "mnist_test_seq.npy", 3)


def test_the_standard_test_set_needs_no_digits(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (20, 7, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", frames)
    recorder = Recorder()
    trainer(tmp_path).test(recorder, small(str(tmp_path), test_set="standard"), verbose=False)
    assert sum(len(batch["video"]) for batch in recorder.seen) == 7
    assert len(small(str(tmp_path), test_set="standard", test_size=None).samples("test")) == 7
    with pytest.raises(UserError, match="no train-images-idx3-ubyte"):
        small(str(tmp_path), test_set="standard").setup("fit")
    (tmp_path / "mnist_test_seq.npy").unlink()
    with pytest.raises(UserError, match=r"mnist_test_seq.npy: cannot be read"):
        small(str(tmp_path), test_set="standard").setup("test")


def write_digits(folder: Path, labels: bool = False) -> None:
    images = np.random.default_rng(1).integers(1, 256, (24, 28, 28), dtype=np.uint8)
    header = bytes((0, 0, 8, 3, 0, 0, 0, 24, 0, 0, 0, 28, 0, 0, 0, 28))
    (folder / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    if labels:
        values = (np.arange(24) % 10).astype(np.uint8)
        (folder / "train-labels-idx1-ubyte").write_bytes(bytes((0, 0, 8, 1, 0, 0, 0, 24)) + values.tobytes())


def test_digits_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = small()
    data.setup("fit")
    assert "drawn from a font" in data.digits.source
    told = capsys.readouterr().out
    assert "--data.path" in told
    assert "12/5/7 sequences" in told
    assert MovingMNIST().sizes == {"train": 480, "validation": 48, "test": 240}
    assert len(MovingMNIST(train_size=7).samples("train")) == 7
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    write_digits(tmp_path / "data" / "mnist")
    assert small().digits.source == "IDX files in data/mnist"
    assert MovingMNIST().sizes == MovingMNIST("elsewhere").sizes
    assert len(MovingMNIST().samples("test")) == 10_000
    with pytest.raises(UserError, match="elsewhere"):
        small("elsewhere").setup("fit")


def test_clips_to_classify(tmp_path: Path) -> None:
    data = DigitClips(batch_size=5, train_size=40, test_size=200, frames=(3, 6), still=2, digit_size=28, image_size=40)
    recorder = Recorder()
    trainer(tmp_path).test(recorder, data, verbose=False)
    video, lengths, label = (torch.cat([b[key] for b in recorder.seen]) for key in ("video", "lengths", "label"))
    assert video.shape == (200, 6, 1, 40, 40)
    assert sorted(set(lengths.tolist())) == [3, 4, 5, 6]
    assert sorted(set(label.tolist())) == list(range(10))
    for clip, length in zip(video, lengths.tolist()):
        assert (clip[length:] == 0).all()
        assert (clip[:length].flatten(1).amax(1) > 0).all()
    # the label is the one of the digit that moves: with no others about, the frames show it alone
    alone = DigitClips(test_size=50, frames=(2, 2), still=0, digit_size=14, image_size=14)
    alone.setup("test")
    frames, _, labels = alone.clips("test", torch.arange(50))
    images, truth = alone.placed_digits("test", torch.device("cpu"))
    assert truth is not None
    whole = drawn_digits().images["test"].float().unflatten(1, (14, 2)).unflatten(3, (14, 2)).mean((2, 4))
    assert (images - whole).abs().max() <= 0.5
    for frame, wanted in zip(frames[:, 0], labels.tolist()):
        match = (images == frame).flatten(1).all(1).nonzero()
        assert wanted in truth[match[:, 0]].tolist()


def test_digits_without_labels_on_disk_do_not_stand_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/mnist"
    folder.mkdir(parents=True)
    write_digits(folder)
    data = DigitClips()
    data.setup("fit")
    assert data.digits.labels is not None
    assert "No labelled digits on disk: using 3000 digits drawn from a font" in capsys.readouterr().out
    write_digits(folder, labels=True)
    data = DigitClips()
    data.setup("fit")
    assert data.digits.source == "IDX files in data/mnist"


def test_labels_are_needed_to_classify(tmp_path: Path) -> None:
    write_digits(tmp_path)
    with pytest.raises(UserError, match="without labels"):
        DigitClips(str(tmp_path)).setup("fit")
    write_digits(tmp_path, labels=True)
    data = DigitClips(str(tmp_path))
    data.setup("fit")
    assert data.digits.labels["train"].tolist() == [k % 10 for k in range(20)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: small(context_frames=0), "context_frames: 0"),
        (lambda: small(future_frames=0), "future_frames: 0"),
        (lambda: small(train_size=0), "train_size: 0"),
        (lambda: small(test_set="real"), "test_set: 'real'"),
        (lambda: small(step_length=1.0), "step_length: 1.0"),
        (lambda: small(digits_per_clip=0), "digits_per_clip: 0"),
        (lambda: small(evaluation_seed=-1), "evaluation_seed: -1"),
        (lambda: small(test_set="standard", image_size=32), "64x64"),
        (lambda: small(test_set="standard", future_frames=18), r"3 \+ 18"),
        (lambda: small(image_size=20).setup("fit"), "image_size: 20"),
        (lambda: DigitClips(frames=(5,)), r"frames: \[5\]"),
        (lambda: DigitClips(frames=(5, 4)), r"frames: \[5, 4\]"),
        (lambda: DigitClips(still=-1), "still: -1"),
        (lambda: DigitClips(digit_size=29).setup("fit"), "digit_size: 29"),
        (lambda: DigitClips(step_length=0.0), "step_length: 0.0"),
    ],
)
def test_options_that_make_no_sense(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make()
