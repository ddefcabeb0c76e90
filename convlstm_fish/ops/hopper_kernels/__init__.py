"""CUDA kernels for layers of few channels on Hopper GPUs, which the Triton operators call where they cover a layer.

Triton moves the nine patches of a 3x3 convolution through shared memory one by one, which is what the time of a narrow
layer goes into; here all nine are read where the image lies. Compiled when first used, by NVRTC, which comes with
torch.
"""
