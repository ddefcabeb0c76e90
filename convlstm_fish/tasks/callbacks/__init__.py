"""Lightning callbacks shared by the tasks."""

from convlstm_fish.tasks.callbacks.clip_figures import ClipFigures
from convlstm_fish.tasks.callbacks.cuda_graphs import CudaGraphs
from convlstm_fish.tasks.callbacks.frame_grids import FrameGrids
from convlstm_fish.tasks.callbacks.graceful_stop import GracefulStop, SignalStop, StopRequested
from convlstm_fish.tasks.callbacks.monitor import EpochLine, TrainingMonitor
from convlstm_fish.tasks.callbacks.non_finite_guard import NonFiniteError, NonFiniteGuard
from convlstm_fish.tasks.callbacks.progress_bar import LateProgressBar
from convlstm_fish.tasks.callbacks.step_seed import StepSeed

__all__ = [
    "ClipFigures",
    "CudaGraphs",
    "EpochLine",
    "FrameGrids",
    "GracefulStop",
    "LateProgressBar",
    "NonFiniteError",
    "NonFiniteGuard",
    "SignalStop",
    "StepSeed",
    "StopRequested",
    "TrainingMonitor",
]
