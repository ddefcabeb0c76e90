"""The ConvLSTM in Triton: kernels of one step, of the gradients over all steps, and the operators made of them.

Narrow layers on Hopper GPUs go on to the CUDA kernels of :mod:`convlstm_fish.ops.hopper_kernels`.
"""

from convlstm_fish.ops.triton_kernels.batch_norm import batch_norm_triton, scale_triton
from convlstm_fish.ops.triton_kernels.op import UnrollTriton, conv_lstm_triton, unsupported
from convlstm_fish.ops.triton_kernels.pooling import frames_unsupported, max_pool_triton

__all__ = [
    "UnrollTriton",
    "batch_norm_triton",
    "conv_lstm_triton",
    "frames_unsupported",
    "max_pool_triton",
    "scale_triton",
    "unsupported",
]
