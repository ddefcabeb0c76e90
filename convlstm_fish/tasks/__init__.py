"""LightningModules: what is trained, with which loss, and how it is scored."""

from convlstm_fish.tasks.clip_classification import ClipClassification
from convlstm_fish.tasks.frame_prediction import FramePrediction

__all__ = ["ClipClassification", "FramePrediction"]
