"""GracefulStop: a signal ends training after the current step, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerFn

from convlstm_fish.tasks.callbacks.late import Late

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequested(SystemExit):
    """A signal ended the training. The exit code is 128 plus its number, as a shell has it.

    It is 0 in every process but the first: Lightning kills all when one of them exits otherwise.
    """


class GracefulStop(pl.Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save ``last.ckpt``, leave; several processes after one more
    step, together.

    The file lies beside those of the Trainer's first ModelCheckpoint; without one nothing is saved.

    Lightning's own handling saves nothing in one process, and hangs until the time-out in several. A second Ctrl-C
    interrupts at once. A signal during validation waits for its end and one more step.
    """

    def __init__(self) -> None:
        self._asked = 0
        self._reduced: Late | None = None
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers, which it has set just before."""
        self._asked, self._reduced = signal.SIGTERM if trainer.received_sigterm else 0, None
        self._previous = _listen(self._ask)
        if self._previous:
            # With its handlers gone this has nothing to tell the other processes, and waits for the GPU in each step.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._asked:
            raise KeyboardInterrupt
        self._asked = number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave here if any process was asked to, unless half-accumulated gradients would be lost."""
        if trainer.fit_loop._should_accumulate():
            return
        asked = self._asked
        if trainer.world_size > 1:
            before, most = self._reduced, torch.full((), asked, device=pl_module.device)
            # Not the strategy's reduce(), before which Lightning has all processes wait for each other.
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            self._reduced = Late(most)
            # Of the step before, so that nobody waits; it is the same in all processes.
            asked = 0 if before is None else int(before.read())
        if not asked:
            return
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder is not None:
            path = os.path.join(folder, "last.ckpt")
            trainer.save_checkpoint(path)
            _tell(trainer, f"stopped by {signal.Signals(asked).name}; go on with --ckpt_path {path}")
        trainer._logger_connector.update_train_step_metrics()  # comes after this hook: this step's would be missing
        # Setting should_stop instead would run a validation first and save another, later state.
        raise StopRequested(128 + asked if trainer.is_global_zero else 0)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back the handlers that were there before."""
        _put_back(self._previous)
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)  # the class's own is back


class SignalStop(pl.Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: validate, test or predict, also a test after training, ends at once and says so.

    Lightning's own handling ends a test with exit code 0, and a prediction not at all.
    """

    def __init__(self) -> None:
        self._rank_zero = True
        self._previous: dict[int, Any] = {}

    def _start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            return  # the validations of a training are GracefulStop's
        self._rank_zero = trainer.is_global_zero
        self._previous = _listen(self._stop)

    on_validation_start = on_test_start = on_predict_start = _start

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._rank_zero:
            print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
        raise StopRequested(128 + number if self._rank_zero else 0)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put back the handlers that were there before."""
        _put_back(self._previous)


def _listen(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have the signals that stop a run handled; the handlers that were there before."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # Python delivers signals to the main thread only
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    return {number: signal.signal(number, handler) for number in numbers}


def _put_back(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
    handlers.clear()


def _tell(trainer: pl.Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, file=sys.stderr)
