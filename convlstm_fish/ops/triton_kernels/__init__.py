"""The ConvLSTM in Triton: kernels of one step, of the gradients over all steps, and the operators made of them."""

from convlstm_fish.ops.triton_kernels.op import UnrollTriton, conv_lstm_triton, unsupported
from convlstm_fish.ops.triton_kernels.pooling import max_pool_triton, pool_unsupported

__all__ = ["UnrollTriton", "conv_lstm_triton", "max_pool_triton", "pool_unsupported", "unsupported"]
