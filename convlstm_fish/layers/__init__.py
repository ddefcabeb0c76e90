"""Layers to build networks from, and batches of clips of any length."""

from convlstm_fish.layers.conv_lstm import ConvLSTM
from convlstm_fish.layers.conv_lstm_cell import ConvLSTMCell
from convlstm_fish.layers.lengths import collate_clips, pad_clips
from convlstm_fish.layers.max_pool import MaxPool2d
from convlstm_fish.layers.time_distributed import TimeDistributed

__all__ = ["ConvLSTM", "ConvLSTMCell", "MaxPool2d", "TimeDistributed", "collate_clips", "pad_clips"]
