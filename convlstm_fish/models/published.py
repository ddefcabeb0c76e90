"""The two networks of *Predicting Fish Movement with Convolutional LSTMs*, as published.

Both look at 30 steps of 4 consecutive frames of 120x160 pixels, (N, 30, 4, 120, 160) in [0, 1]; the sigmoid of their
logit is the probability that a burst of motion starts within the next 1.5 s.
"""

from __future__ import annotations

from convlstm_fish.models.clip_classifier import ClipClassifier


def visionary_serenity(backend: str = "auto") -> ClipClassifier:
    """ConvLSTM 16, max pool, batch norm, ConvLSTM 32, global max pool, one logit."""
    return ClipClassifier(
        4, (16, 32), 3, padding="valid", bias=False, recurrent_activation="hard_sigmoid", backend=backend
    )


def upbeat_snowflake(backend: str = "auto") -> ClipClassifier:
    """upbeat-snowflake-91: ConvLSTM 16, batch norm, global max pool, one logit."""
    return ClipClassifier(
        4,
        (16,),
        3,
        padding="valid",
        bias=False,
        recurrent_activation="hard_sigmoid",
        batch_norm=[True],
        backend=backend,
    )
