"""ConvLSTM networks that forecast what a fish group does next, and the frames of a video.

``from convlstm_fish import ConvLSTM`` gives the layer; nothing heavier than torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convlstm_fish.layers import ConvLSTM, ConvLSTMCell, TimeDistributed
    from convlstm_fish.models import ClipClassifier, FramePredictor
    from convlstm_fish.ops import conv_lstm

_HOMES = {
    "ConvLSTM": "convlstm_fish.layers",
    "ConvLSTMCell": "convlstm_fish.layers",
    "TimeDistributed": "convlstm_fish.layers",
    "conv_lstm": "convlstm_fish.ops",
    "ClipClassifier": "convlstm_fish.models",
    "FramePredictor": "convlstm_fish.models",
}

__all__ = ["ClipClassifier", "ConvLSTM", "ConvLSTMCell", "FramePredictor", "TimeDistributed", "conv_lstm"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
