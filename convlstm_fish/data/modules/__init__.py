"""DataModules: what a training run reads, with an exact position in the run."""

from convlstm_fish.data.modules.base import ResumableDataModule
from convlstm_fish.data.modules.digit_clips import DigitClips
from convlstm_fish.data.modules.fish_clips import FishClips
from convlstm_fish.data.modules.moving_mnist import MovingMNIST
from convlstm_fish.data.modules.recording_frames import RecordingFrames

__all__ = ["DigitClips", "FishClips", "MovingMNIST", "RecordingFrames", "ResumableDataModule"]
