"""What the DataModules share: one loader factory, an exact position in the run, and pixels that become float late."""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate, get_worker_info

from convlstm_fish.data.modules.sending import Sender
from convlstm_fish.data.order import EvaluationOrder, RunOrder
from convlstm_fish.errors import UserError, require

Batch = dict[str, Any]
Key = int | tuple[int, int]
_LARGE = 1 << 20  # bytes that are worth a stream of their own


@dataclass(frozen=True)
class Pixels:
    """The pixels of samples, which are read side by side, in threads, each to where the batch has them.

    Attributes:
        key: their name in the batch.
        shape: of one sample's; uint8.
        read: reads a sample's, by number, to where it is told.
    """

    key: str
    shape: tuple[int, ...]
    read: Callable[[int, npt.NDArray[np.uint8]], None]


class Samples(Protocol):
    """What a DataModule provides for each split: samples by number. Workers get a copy, so it has to pickle."""

    @property
    def pixels(self) -> Pixels | None:
        """How pixels are read, or None for samples that have none."""
        ...

    def __len__(self) -> int: ...

    def sample(self, index: int, epoch: int) -> Batch:
        """Sample ``index`` as tensors, but for its pixels; ``epoch`` is for what differs from epoch to epoch.

        A key that ends in ``_seed`` holds a Python int; in the batch it stays a list of ints on the CPU.
        """
        ...


def batch_of(
    samples: Samples, keys: Sequence[Key], pinned: bool = False, apply: Callable[..., Iterable[None]] = map
) -> Batch:
    """A batch.

    Args:
        samples: of which.
        keys: (sample, epoch) as in training; or sample, or -1 for padding, as in evaluation, which adds ``valid``.
        pinned: put the pixels into pinned memory, from which a GPU can fetch them.
        apply: reads the pixels of the samples; ``map``, or that of an executor whose threads share the work.
    """

    pairs = [key if isinstance(key, tuple) else (max(key, 0), 0) for key in keys]
    batch = collate([samples.sample(*pair) for pair in pairs])
    if not isinstance(keys[0], tuple):
        batch["valid"] = torch.tensor([key >= 0 for key in keys])  # type: ignore[operator]
    pixels = samples.pixels
    if pixels is not None:
        together = torch.empty(len(keys), *pixels.shape, dtype=torch.uint8, pin_memory=pinned)
        list(apply(pixels.read, [index for index, _ in pairs], together.numpy()))  # raises what a thread has raised
        batch[pixels.key] = together
    return batch


class _KeyedDataset(Dataset[Batch]):
    """Makes batches of the keys of the two orders; outside of loader processes pixels are read by threads."""

    def __init__(self, samples: Samples, pinned: bool, threads: int) -> None:
        self.samples, self.pinned, self.threads = samples, pinned, threads

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def _readers(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads)

    def __getitems__(self, keys: list[Key]) -> Batch | Exception:
        if get_worker_info() is not None:
            try:
                return batch_of(self.samples, keys)
            except (UserError, OSError) as error:
                return error  # torch would send its traceback as its text; the loader raises it
        return batch_of(self.samples, keys, self.pinned, self._readers.map)


def collate(items: list[Batch]) -> Batch:
    """Stack samples into a batch; seeds stay a list, so that a GPU never has to be asked for them."""
    seeds = {key: [item.pop(key) for item in items] for key in tuple(items[0]) if key.endswith("_seed")}
    return {**default_collate(items), **seeds}


def _processors() -> int:
    """That this process may use; torch's number of threads would be 1 once a loader of its has pinned memory."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _raised(batches: Iterator[Batch | Exception]) -> Iterator[Batch]:
    """Batches, until one is an error of the loader process that should have made it."""
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


_STOPS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def _leave_the_group(worker: int) -> None:
    """In a loader process: a signal to the whole group must not kill what the parent needs to end in order."""
    os.setpgid(0, 0)
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)  # also what has come while it was held back
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)


class _Loader(DataLoader[Batch]):
    """A loader whose processes hear of no signal, not even while they start."""

    def __iter__(self) -> Any:
        if not self.num_workers:
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            return _raised(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _TrainLoader(_Loader):
    """The training loader; its position is the DataModule's.

    Lightning warns, wrongly here, that a run cannot be resumed within an epoch unless its loader has these methods.
    """

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing to restore: the order asks the DataModule where the run stands."""


class ResumableDataModule(pl.LightningDataModule, ABC):
    """Base of the DataModules: a subclass provides :meth:`samples`.

    The order of training is a function of (seed, position), and the position is part of this DataModule's state in a
    checkpoint. A run that resumes in the middle of an epoch sees the samples it would have seen, with any
    number of workers, and with any number of processes as long as batch size times processes is the same.
    Lightning would put its own sampler over this one in a run with several processes; the Trainer needs
    ``use_distributed_sampler=False``.

    Args:
        batch_size: samples per batch and process.
        num_workers: processes that load; 0 loads in the training process, by threads, which copy less.
        seed: of order and augmentation.

    Raises:
        UserError: for numbers that make no sense.
    """

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        require("batch_size", batch_size, batch_size >= 1, "1 or more")
        require("num_workers", num_workers, num_workers >= 0, "0 or more")
        require("seed", seed, seed >= 0, "0 or more")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._base_samples = 0
        self._base_steps = 0
        self._restored: dict[str, int] | None = None
        self._train_size = 0
        self._cache: dict[str, Samples] = {}
        self._senders: dict[torch.device, Sender] = {}

    # -- for subclasses ------------------------------------------------------------------------------------------

    @abstractmethod
    def samples(self, split: str) -> Samples:
        """The samples of "train", "validation", "test" or "predict"."""

    def classes(self) -> npt.NDArray[np.int64] | None:
        """Class of every training sample where the order has to be balanced, or None."""
        return None

    # -- position ------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """A new ``fit`` starts at its trainer's count; a checkpoint, restored after this, may move it."""
        if stage == "fit":
            self._base_samples = self._base_steps = 0
            self._restored = None

    def _steps(self) -> int:
        if self.trainer is None:
            return 0
        # Counts a batch after its optimizer step, so a checkpoint written by an exception is right as well.
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def samples_done(self) -> int:
        """Samples that all processes of the run have trained on so far."""
        return self._base_samples + max(0, self._steps() - self._base_steps) * self.batch_size * self._world()

    def state_dict(self) -> dict[str, int]:
        """The position of the run, and what the order depends on."""
        return {
            "samples_done": self.samples_done(),
            "steps": self._steps(),
            "seed": self.seed,
            "global_batch": self.batch_size * self._world(),
            "train_size": self._train_size,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue at a position. Whether it fits this run is checked when training asks for its loader."""
        self._restored = dict(state_dict)
        self._base_samples = state_dict["samples_done"]
        self._base_steps = state_dict["steps"]

    def _check_restored(self, size: int) -> None:
        if self._restored is None:
            return
        now = {"seed": self.seed, "global_batch": self.batch_size * self._world(), "train_size": size}
        told = {
            "seed": "seed {}",
            "global_batch": "a global batch of {} (batch_size x processes)",
            "train_size": "{} training samples",
        }
        for key, text in told.items():
            before = self._restored[key]
            if before != now[key]:
                raise UserError(
                    f"cannot resume: the checkpoint was written with {text.format(before)}, this run has "
                    f"{text.format(now[key])}; use the same, or load only the weights of the checkpoint"
                )

    # -- loaders -------------------------------------------------------------------------------------------------

    def _world(self) -> int:
        return 1 if self.trainer is None else int(self.trainer.world_size)

    def _rank(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_rank)

    def _local_processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.num_devices

    def _on_cuda(self) -> bool:
        return torch.cuda.is_available() and (self.trainer is None or self.trainer.strategy.root_device.type == "cuda")

    def _split(self, split: str) -> Samples:
        if split not in self._cache:
            self._cache[split] = self.samples(split)
        return self._cache[split]

    def _loader(self, split: str) -> DataLoader[Batch]:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self._world() > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError(
                "Trainer: use_distributed_sampler must be False, this DataModule divides the samples itself"
            )
        samples = self._split(split)
        # The threads of several processes' talk may hold locks just when a loader process is forked, for good.
        apart = self.num_workers > 0 and self._world() > 1
        common: dict[str, Any] = {
            "dataset": _KeyedDataset(samples, self._on_cuda(), max(1, _processors() // self._local_processes())),
            "num_workers": self.num_workers,
            "pin_memory": self._on_cuda(),
            "persistent_workers": self.num_workers > 0,
            "collate_fn": _as_it_is,
            "worker_init_fn": _leave_the_group,
            "multiprocessing_context": "spawn" if apart else None,
            # Without its own generator every epoch would draw from the global one, and resuming would shift it.
            "generator": torch.Generator().manual_seed(self.seed),
        }
        if split == "train":
            self._check_restored(len(samples))
            self._train_size = len(samples)
            return _TrainLoader(batch_sampler=self._train_order(len(samples)), **common)
        sampler = EvaluationOrder(len(samples), self._rank(), self._world())
        if split == "predict":  # here Lightning takes the sampler over and drops a batch sampler
            return _Loader(sampler=sampler, batch_size=self.batch_size, **common)
        # and here, to overfit a few batches, it would replace a sampler that is not torch's own
        batches = BatchSampler(sampler, self.batch_size, drop_last=False)
        return _Loader(batch_sampler=batches, **common)

    def _train_order(self, size: int) -> RunOrder:
        order = RunOrder(
            size,
            self.batch_size,
            self._rank(),
            self._world(),
            done=self.samples_done,
            seed=self.seed,
            classes=self.classes(),
        )
        if self.trainer is not None:
            limit = self.trainer.limit_train_batches
            order.pass_batches = max(1, min(len(order), limit if isinstance(limit, int) else int(len(order) * limit)))
            if getattr(self.trainer, "overfit_batches", 0):
                per_pass = order.pass_batches * order.global_batch
                order.done = lambda: self.samples_done() % per_pass
        return order

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training batches from where the run stands."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches, with ``valid``."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches, with ``valid``."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Batches to predict, with ``valid``."""
        return self._loader("predict")

    # -- on the device -------------------------------------------------------------------------------------------

    def _dtype(self) -> torch.dtype:
        module: Any = None if self.trainer is None else self.trainer.lightning_module
        dtype: torch.dtype = torch.float32 if module is None else module.dtype
        return dtype

    def _sender(self, device: torch.device) -> Sender:
        if device not in self._senders:
            self._senders[device] = Sender(device)
        return self._senders[device]

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Bring a batch to the device; to a GPU, its pixels beside the step before."""
        sent = {}
        if device.type == "cuda":
            large = {k: t for k, t in batch.items() if isinstance(t, Tensor) and t.is_pinned() and t.nbytes >= _LARGE}
            sent = {key: self._sender(device).send([pixels])[0] for key, pixels in large.items()}
        rest = {key: value for key, value in batch.items() if key not in sent}
        return {**super().transfer_batch_to_device(rest, device, dataloader_idx), **sent}

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Turn uint8 pixels into numbers from 0 to 1, on the device where the batch is."""
        for key in ("video", "future"):
            if key in batch and batch[key].dtype == torch.uint8:
                batch[key] = to_unit(batch[key], self._dtype())
        return batch


def by_words(pixels: Tensor) -> Tensor:
    """The same uint8 pixels eight at a time, where rows are made of eights: an eighth of the numbers to move."""
    whole = pixels.is_contiguous() and pixels.shape[-1] % 8 == 0 and pixels.data_ptr() % 8 == 0
    return pixels.view(torch.int64) if whole else pixels


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels divided by 255, in ``dtype``."""
    return pixels / torch.tensor(255, dtype=dtype)  # one pass over the pixels
