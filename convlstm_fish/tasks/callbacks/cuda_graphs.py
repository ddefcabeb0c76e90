"""Forward and backward of the network as one CUDA graph each, so that a small batch does not wait for launches."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from convlstm_fish.errors import UserError

# Steps before a shape is captured: kernels compile and choose their algorithms in them.
WARM_UP = 3
# Arguments whose values the host looks at, which a graph cannot repeat.
_READ_BY_HOST = frozenset({"lengths"})


class _Body(nn.Module):
    """A network as a function of tensors alone; capturing it leaves the network's own ``forward`` untouched."""

    def __init__(
        self, network: nn.Module, forward: Callable[..., Tensor], names: list[str], rest: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.network = network
        self._run, self._names, self._rest = forward, names, rest

    def forward(self, *tensors: Tensor) -> Tensor:
        return self._run(**dict(zip(self._names, tensors)), **self._rest)


class GraphedForward:
    """Stands in for the ``forward`` of a network and replays a CUDA graph where it can.

    One call is captured, the first whose tensors have the same shapes, and whose other arguments the same values,
    :data:`WARM_UP` times in a row; every other call (the last, short batch of an epoch, validation, clips of several
    lengths) runs as before. Parameters and buffers are the network's own, so optimizers, gradient clipping, gradient
    scaling and DDP see no difference.

    Args:
        network: takes tensors on a GPU, and plain values, and returns one tensor.

    Raises:
        UserError: for a network that cannot be captured, because it waits for the GPU on its way.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.eager: Callable[..., Tensor] = network.forward
        self.signature = inspect.signature(self.eager)
        self.key: Hashable = None
        self.count = 0
        self.graphed: Callable[..., Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        arguments = self.signature.bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in arguments.items() if name not in tensors}
        if not self._can_capture(tensors, rest):
            return self.eager(*args, **kwargs)
        key = (
            tuple((name, tuple(t.shape), t.dtype, t.device) for name, t in tensors.items()),
            tuple(rest.items()),
            torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        )
        if self.graphed is None:
            self.key, self.count = key, self.count + 1 if key == self.key else 1
            if self.count <= WARM_UP:
                return self.eager(*args, **kwargs)
            self.graphed = self._capture(tensors, rest)
        if key != self.key:
            return self.eager(*args, **kwargs)
        # The graph's output is overwritten by the next replay; a caller may keep it.
        return self.graphed(*tensors.values()).clone()

    def _can_capture(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> bool:
        return (
            self.network.training
            and torch.is_grad_enabled()
            and bool(tensors)
            and all(t.is_cuda and not t.requires_grad for t in tensors.values())
            and _READ_BY_HOST.isdisjoint(tensors)
            and all(value is None or isinstance(value, bool | int | float | str) for value in rest.values())
        )

    def _capture(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Callable[..., Tensor]:
        body = _Body(self.network, self.eager, list(tensors), rest)
        names, weights = zip(*body.named_parameters())

        def run(*inputs: Tensor) -> Tensor:
            call: Any = torch.func.functional_call
            result: Tensor = call(body, dict(zip(names, inputs[len(tensors) :])), inputs[: len(tensors)])
            return result

        # Captured with other leaves over the same memory: the parameters' own places in the autograd graph belong to
        # the stream of training (DDP made them there), which a capture may not touch.
        leaves = tuple(w.detach().requires_grad_(w.requires_grad) for w in weights)
        device = leaves[0].device
        # Capturing runs the network; batch norm must not count those runs, nor dropout draw for them.
        before = [buffer.detach().clone() for buffer in self.network.buffers()]
        random = torch.cuda.get_rng_state(device)
        try:
            with warnings.catch_warnings():
                # The leaves' places in the autograd graph belong to the stream of the warm-up, which ends before.
                warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
                graphed: Any = torch.cuda.make_graphed_callables(run, (*(t.clone() for t in tensors.values()), *leaves))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error.__context__ or error).splitlines()[0]
            raise UserError(
                f"the network cannot be captured as a CUDA graph; train with --cuda_graphs=false ({reason})"
            ) from error
        with torch.no_grad():
            for buffer, value in zip(self.network.buffers(), before):
                buffer.copy_(value)
        torch.cuda.set_rng_state(random, device)
        return lambda *inputs: graphed(*inputs, *weights)


class CudaGraphs(pl.Callback):
    """Trains with the network's forward and backward captured as CUDA graphs.

    Does nothing on a CPU. It needs a task whose ``network`` returns one tensor. The result is the same; what is saved
    is the time in which the processor launches kernels, which is most of a step at small batches.
    """

    def __init__(self) -> None:
        self._forward: GraphedForward | None = None
        self._hooks: list[Any] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the graphed forward in place."""
        network = getattr(pl_module, "network", None)
        if pl_module.device.type == "cuda" and isinstance(network, nn.Module):
            self._forward = GraphedForward(network)
            network.forward = self._forward

            def own(gradient: Tensor) -> Tensor | None:
                # A replay writes where the one before did; where gradients add up over batches that may be .grad.
                return gradient.clone() if trainer.accumulate_grad_batches > 1 else None

            self._hooks = [p.register_hook(own) for p in network.parameters() if p.requires_grad]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take it away again; the memory of the graphs is free."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._forward is not None:
            del self._forward.network.forward  # the class's own is back
            self._forward = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """As at the end of training."""
        self.on_train_end(trainer, pl_module)
