"""Forward and backward of the network as one CUDA graph each, so that a small batch does not wait for launches."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

# Steps before a shape is captured: kernels compile and choose their algorithms in them.
WARM_UP = 3


class _Body(nn.Module):
    """A network under another ``forward``, so that capturing leaves the network's own untouched."""

    def __init__(self, network: nn.Module, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network
        self._run = forward
        self.train(network.training)

    def forward(self, video: Tensor) -> Tensor:
        return self._run(video)


class GraphedForward:
    """Stands in for the ``forward`` of a network and replays a CUDA graph where it can.

    One shape is captured, the first that comes :data:`WARM_UP` times in a row; every other call (the last, short batch
    of an epoch, validation, clips of several lengths) runs as before. Parameters, gradients and buffers are the
    network's own, so optimizers, gradient clipping, gradient scaling and DDP see no difference.

    Args:
        network: takes a video (N, T, C, H, W) on a GPU.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.eager: Callable[..., Tensor] = network.forward
        self.key: Hashable = None
        self.count = 0
        self.graphed: Callable[[Tensor], Tensor] | None = None

    def __call__(self, video: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = all(value is None for value in (*args, *kwargs.values()))
        if not (plain and self.network.training and torch.is_grad_enabled() and video.is_cuda):
            return self.eager(video, *args, **kwargs)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (tuple(video.shape), video.dtype, video.device, dtype)
        if self.graphed is not None:
            if key == self.key:
                # The graph's output is overwritten by the next replay; a caller may keep it.
                return self.graphed(video).clone()
            return self.eager(video)
        self.key, self.count = key, self.count + 1 if key == self.key else 1
        if self.count <= WARM_UP:
            return self.eager(video)
        self.graphed = self._capture(video)
        return self.graphed(video).clone()

    def _capture(self, video: Tensor) -> Callable[[Tensor], Tensor]:
        body = _Body(self.network, self.eager)
        # Capturing runs the network; batch norm must not count those runs.
        before = [buffer.detach().clone() for buffer in self.network.buffers()]
        random = torch.cuda.get_rng_state(video.device)
        graphed: Any = torch.cuda.make_graphed_callables(body, (video.detach().clone(),))
        with torch.no_grad():
            for buffer, value in zip(self.network.buffers(), before):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, video.device)
        replay: Callable[[Tensor], Tensor] = graphed
        return replay


class CudaGraphs(pl.Callback):
    """Trains with the network's forward and backward captured as CUDA graphs.

    Does nothing on a CPU. It needs a task whose ``network`` takes a video and gives one tensor. The result is the
    same, bit for bit; what is saved is the time in which the processor launches kernels, which is most of a
    step at small batches.
    """

    def __init__(self) -> None:
        self._forward: GraphedForward | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the graphed forward in place."""
        network = getattr(pl_module, "network", None)
        if pl_module.device.type == "cuda" and isinstance(network, nn.Module):
            self._forward = GraphedForward(network)
            network.forward = self._forward

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take it away again; the memory of the graphs is free."""
        if self._forward is not None:
            del self._forward.network.forward  # the class's own is back
            self._forward = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end of training."""
        self.on_train_end(trainer, pl_module)
