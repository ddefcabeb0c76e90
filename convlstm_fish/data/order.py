"""The order of a run as a pure function: the k-th sample of a run depends on (seed, k) and on nothing else.

No order here has a state of its own, no ``set_epoch`` and no random generator that lives between calls: where
a run stands is one number, held by whoever asks (see ``modules/base.py``). A run that is stopped and resumed, with
any number of processes and the same global batch, therefore sees the samples it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from convlstm_fish.errors import UserError


def permutation(seed: int, epoch: int, size: int) -> npt.NDArray[np.int64]:
    """The order of ``size`` samples in an epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(size)


def balanced_permutation(seed: int, epoch: int, classes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """An order in which all classes occur equally often.

    An epoch has as many samples as there are (less a remainder by the number of classes). A rare class repeats, each
    of its samples once before any comes again; of a common class another part is seen in each epoch.

    Args:
        seed, epoch: what the order depends on.
        classes: (size,) class of each sample.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    kinds = np.unique(classes)
    share = len(classes) // len(kinds)
    parts = []
    for kind in kinds:
        members = np.flatnonzero(classes == kind)
        rounds = -(-share // len(members))
        parts.append(np.concatenate([generator.permutation(members) for _ in range(rounds)])[:share])
    return generator.permutation(np.concatenate(parts))


def augmentation_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers for the augmentation of one sample in one epoch."""
    return np.random.Generator(np.random.PCG64([seed, epoch, index]))


class RunOrder:
    """Batch sampler of a training run: yields lists of (sample, epoch) from where the run stands to the end of a pass.

    Args:
        size: number of samples.
        batch_size: samples in the batch of one process.
        rank, world: this process and how many there are; together they cut each global batch.
        done: asked whenever an iterator starts, how many samples the whole run has seen so far.
        seed: of the order.
        classes: (size,) class of each sample for an order with equally frequent classes, or None.
        pass_batches: batches in one pass, an epoch as the training loop counts it, when that is less than all. The
            next pass goes on with the samples after them, so all are seen in the end.

    The last samples of an epoch that fill no global batch are left out; the next epoch has another order.

    Raises:
        UserError: when the samples do not fill one global batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        *,
        done: Callable[[], int] = lambda: 0,
        seed: int = 0,
        classes: npt.NDArray[np.int64] | None = None,
        pass_batches: int | None = None,
    ) -> None:
        self.size, self.batch_size, self.rank, self.world = size, batch_size, rank, world
        self.done, self.seed, self.classes = done, seed, classes
        self.global_batch = batch_size * world
        kinds = 1 if classes is None else len(np.unique(classes))
        self._batches = (size - size % kinds) // self.global_batch
        if self._batches == 0:
            raise UserError(f"batch_size: {batch_size} x {world} process(es) is more than the {size} training samples")
        self.pass_batches = min(len(self), pass_batches or len(self))
        if classes is not None and kinds < 2:
            raise UserError(f"balanced: all {size} training samples have the same label, so classes cannot be balanced")

    def __len__(self) -> int:
        return self._batches

    def epoch(self, number: int) -> npt.NDArray[np.int64]:
        """The samples of an epoch in their order, for all processes."""
        if self.classes is None:
            order = permutation(self.seed, number, self.size)
        else:
            order = balanced_permutation(self.seed, number, self.classes)
        return order[: len(self) * self.global_batch]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        per_epoch = len(self) * self.global_batch
        per_pass = self.pass_batches * self.global_batch
        done = self.done()
        if done % self.global_batch:
            raise UserError(
                f"batch_size: cannot resume after {done} samples, which is no multiple of the global batch "
                f"{self.global_batch} ({self.batch_size} x {self.world} process(es))"
            )
        epoch, order = -1, np.empty(0, np.int64)
        for position in range(done, done - done % per_pass + per_pass, self.global_batch):
            number, start = divmod(position, per_epoch)
            if number != epoch:
                epoch, order = number, self.epoch(number)
            start += self.rank * self.batch_size
            yield [(sample, epoch) for sample in order[start : start + self.batch_size].tolist()]


class EvaluationOrder:
    """Sampler for validation, test and prediction: every sample once, and equally many for every process.

    Process r gets samples r, r + world, ...; where they do not divide evenly, -1 stands for a sample that is not
    counted (``valid`` is False in the batch).
    """

    def __init__(self, size: int, rank: int = 0, world: int = 1) -> None:
        self.size, self.rank, self.world = size, rank, world

    def __len__(self) -> int:
        return -(-self.size // self.world)

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.size, self.world):
            sample = start + self.rank
            yield sample if sample < self.size else -1
