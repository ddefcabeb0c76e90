"""Tensor functions: the ConvLSTM over a whole sequence, in plain PyTorch and as a Triton kernel."""

from convlstm_fish.ops.backend import BACKENDS, batch_norm, conv_lstm, max_pool, unroll, unroll_stack
from convlstm_fish.ops.checks import ACTIVATIONS, check_arguments
from convlstm_fish.ops.equations import Norm
from convlstm_fish.ops.geometry import Geometry, geometry
from convlstm_fish.ops.reference import conv_lstm_reference

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Geometry",
    "Norm",
    "batch_norm",
    "check_arguments",
    "conv_lstm",
    "conv_lstm_reference",
    "geometry",
    "max_pool",
    "unroll",
    "unroll_stack",
]
