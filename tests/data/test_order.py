"""The order of a run: a pure function of seed and position, for any number of processes."""

from __future__ import annotations

import numpy as np
import pytest

from convlstm_fish.data.order import EvaluationOrder, RunOrder, augmentation_generator, balanced_permutation
from convlstm_fish.errors import UserError


def run(order: RunOrder, epochs: int, start: int = 0) -> list[tuple[int, int]]:
    """All samples of one process from position ``start`` to the end of epoch ``epochs``."""
    seen: list[tuple[int, int]] = []
    position = start
    order.done = lambda: position
    while position < epochs * len(order) * order.global_batch:
        for batch in order:
            seen += batch
            position += order.global_batch
    return seen


def test_an_epoch_is_a_permutation_and_each_is_another() -> None:
    seen = run(RunOrder(20, 4, seed=3), 3)
    epochs = [[s for s, e in seen if e == epoch] for epoch in range(3)]
    for samples in epochs:
        assert sorted(samples) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert seen == run(RunOrder(20, 4, seed=3), 3)
    assert seen != run(RunOrder(20, 4, seed=4), 3)


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("stopped", range(0, 31, 5))
def test_every_position_resumes_exactly(stopped: int, balanced: bool) -> None:
    classes = (np.arange(23) % 5 == 0).astype(np.int64) if balanced else None
    whole = run(RunOrder(23, 5, classes=classes), 3)
    assert run(RunOrder(23, 5, classes=classes), 3, stopped) == whole[stopped:]


@pytest.mark.parametrize("balanced", [False, True])
def test_two_processes_see_what_one_sees(balanced: bool) -> None:
    classes = (np.arange(23) % 5 == 0).astype(np.int64) if balanced else None
    one = run(RunOrder(23, 6, classes=classes), 2)
    ranks = [run(RunOrder(23, 3, rank, 2, classes=classes), 2) for rank in range(2)]
    merged = [s for a in range(0, len(ranks[0]), 3) for rank in ranks for s in rank[a : a + 3]]
    assert merged == one
    # A run of two processes goes on with one.
    assert run(RunOrder(23, 6, classes=classes), 2, start=12) == one[12:]


def test_a_shorter_pass_goes_on_where_the_last_one_ended() -> None:
    whole = run(RunOrder(20, 4), 3)
    short = RunOrder(20, 4, pass_batches=2)
    position = 0
    short.done = lambda: position
    seen = []
    for _ in range(7):
        batches = list(short)
        assert len(batches) == 2
        seen += [s for batch in batches for s in batch]
        position += 8
    assert seen == whole[:56]
    position = 4
    assert len(list(short)) == 1
    assert RunOrder(20, 4, pass_batches=9).pass_batches == len(short) == 5


def test_balanced_classes() -> None:
    classes = np.repeat([0, 1, 2], [90, 4, 7]).astype(np.int64)
    first, second = (balanced_permutation(0, epoch, classes) for epoch in range(2))
    for order in (first, second):
        assert np.bincount(classes[order]).tolist() == [33, 33, 33]
        # Each rare sample comes 8 or 9 times, no common one twice.
        assert set(np.bincount(order, minlength=101)[90:94].tolist()) == {8, 9}
        assert np.bincount(order)[:90].max() == 1
    assert set(first[classes[first] == 0]) != set(second[classes[second] == 0])
    # Not sorted by class.
    assert len(set(classes[first[:20]].tolist())) == 3


def test_positions_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="cannot resume after 3 samples, which is no multiple of the global batch 4"):
        list(RunOrder(20, 2, 0, 2, done=lambda: 3))
    with pytest.raises(UserError, match=r"4 x 3 process\(es\) is more than the 10"):
        RunOrder(10, 4, 0, 3)
    with pytest.raises(UserError, match="all 10 training samples have the same label"):
        RunOrder(10, 4, classes=np.zeros(10, np.int64))


@pytest.mark.parametrize(("size", "world"), [(10, 1), (10, 2), (11, 2), (10, 3), (1, 4)])
def test_evaluation_covers_every_sample_once_and_evenly(size: int, world: int) -> None:
    ranks = [list(EvaluationOrder(size, rank, world)) for rank in range(world)]
    assert {len(r) for r in ranks} == {len(EvaluationOrder(size, 0, world))} == {-(-size // world)}
    merged = [s for r in ranks for s in r if s >= 0]
    assert sorted(merged) == list(range(size))


def test_augmentation_depends_on_each_number() -> None:
    draws = {tuple(augmentation_generator(*key).integers(1 << 30, size=4)) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(draws) == 3
    assert augmentation_generator(1, 2, 3).random() == augmentation_generator(1, 2, 3).random()
