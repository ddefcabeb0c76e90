"""Layers to build networks from, and batches of clips of any length."""

from convlstm_fish.layers.batch_norm import BatchNorm2d
from convlstm_fish.layers.conv_lstm import ConvLSTM
from convlstm_fish.layers.conv_lstm_cell import ConvLSTMCell
from convlstm_fish.layers.lengths import collate_clips, pad_clips
from convlstm_fish.layers.max_pool import MaxPool2d
from convlstm_fish.layers.time_distributed import TimeDistributed

__all__ = [
    "BatchNorm2d",
    "ConvLSTM",
    "ConvLSTMCell",
    "MaxPool2d",
    "TimeDistributed",
    "collate_clips",
    "pad_clips",
]
