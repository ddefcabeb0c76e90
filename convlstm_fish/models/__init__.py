"""Networks without Lightning: ClipClassifier and the two published ones made of it; three that predict frames."""

from convlstm_fish.models.clip_classifier import ClipClassifier
from convlstm_fish.models.encoder_forecaster import EncoderForecaster
from convlstm_fish.models.frame_predictor import FramePredictor
from convlstm_fish.models.published import upbeat_snowflake, visionary_serenity
from convlstm_fish.models.stacked_predictor import StackedPredictor

__all__ = [
    "ClipClassifier",
    "EncoderForecaster",
    "FramePredictor",
    "StackedPredictor",
    "upbeat_snowflake",
    "visionary_serenity",
]
