"""The kernels of one layer: a step forward, a step backward, and the sums of the weights' gradients."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from convlstm_fish.ops.hopper_kernels.compiled import Kernel, kernel, prepare
from convlstm_fish.ops.hopper_kernels.parameters import Parameters
from convlstm_fish.ops.hopper_kernels.plan import Plan, Shape, plan_adjoint, plan_backward, plan_forward, plan_sums

# The kernels' arguments: p a tensor or None, i and l integers of 32 and 64 bits.
_SIGNATURES = {
    "forward_step": "ppppppppiillll",
    "backward_step": "ppppppppppppiilllll",
    "adjoint_step": "ppppiill",
    "weight_gradients": "ppppiiiiiiiiillllll",
}


class Steps:
    """Launches of a layer's steps. Images of one step are (N, H, W, C), apart in memory by their first stride.

    Args:
        shape: of the layer.
        parameters: its weights.
        device: a GPU.
        multiprocessors: of it.
    """

    def __init__(self, shape: Shape, parameters: Parameters, device: torch.device, multiprocessors: int) -> None:
        self.shape, self.parameters = shape, parameters
        self.device, self.multiprocessors = device, multiprocessors
        self._backwards = 1
        self._kernels: dict[tuple[str, bool], tuple[Plan, Kernel]] = {}

    def _kernel(self, name: str, variant: bool = False) -> tuple[Plan, Kernel]:
        key = (name, variant)
        if key not in self._kernels:
            plan = _plan(self.shape, name, variant)
            made = kernel(self.device, name, _SIGNATURES[name], plan.constants, plan.threads, plan.shared)
            self._kernels[key] = plan, made
        return self._kernels[key]

    def _programs(self, plan: Plan, size: tuple[int, int], clips: int) -> int:
        return min(plan.tiles(size) * clips, plan.programs * self.multiprocessors)

    def backwards(self) -> int:
        """Every other launch goes through the tiles backwards, and finds in the L2 cache what the last one left."""
        self._backwards ^= 1
        return self._backwards

    def forward(
        self, x: Tensor, h_in: Tensor | None, h_out: Tensor, c_in: Tensor | None, c_out: Tensor, c_kept: Tensor | None
    ) -> None:
        """Writes h and c of a step (c in float32), and c once more in h's dtype where it is kept."""
        plan, compiled = self._kernel("forward_step")
        clips = x.shape[0]
        compiled.launch(
            (self._programs(plan, self.shape.size, clips), 1), x, h_in, h_out, c_in, c_out, c_kept,
            self.parameters.forward, self.parameters.bias, clips, self.backwards(), x.stride(0), _stride(h_in),
            h_out.stride(0), _stride(c_kept),
        )  # fmt: skip

    @property
    def bias_rows(self) -> int:
        """How many rows of sums the backward step adds the bias's gradient to, at most."""
        plans = {_plan(self.shape, "backward_step", fused) for fused in (False, self.shape.fused)}
        return max(plan.programs * plan.threads for plan in plans) * self.multiprocessors // 32

    def da_shape(self, clips: int, steps: int) -> tuple[int, ...]:
        """Of the gradients of the gates of so many steps, (N, steps, 4 * C_h / 8, H', W', 8)."""
        return (clips, steps, self.shape.gates // 8, *self.shape.size, 8)

    def backward(
        self, x: Tensor, h_in: Tensor | None, c_in: Tensor | None, da_next: Tensor | None, dh: Tensor | None,
        dout: Tensor | None, dc: Tensor, da: Tensor, dbias: Tensor | None, fused: bool,
    ) -> None:  # fmt: skip
        """Writes the gradients of a step's gates, and of the c before in place of that of c.

        The gradient of h is the sum of dh, dout and, if ``fused``, the adjoint product of ``da_next``.
        """
        plan, compiled = self._kernel("backward_step", fused)
        clips = x.shape[0]
        compiled.launch(
            (self._programs(plan, self.shape.size, clips), 1), x, h_in, c_in, da_next, dh, dout, dc, da,
            self.parameters.forward, self.parameters.adjoint if fused else None, self.parameters.bias, dbias, clips,
            self.backwards(), x.stride(0), _stride(h_in), _stride(c_in), da.stride(0), _stride(dout),
        )  # fmt: skip

    def adjoint(self, da: Tensor, dh: Tensor | None, dx: Tensor | None) -> None:
        """Writes the gradients of h of the step before, and of x, from the gates' gradients."""
        with_x = dx is not None
        plan, compiled = self._kernel("adjoint_step", with_x)
        clips = da.shape[0]
        weights = self.parameters.adjoint_both if with_x else self.parameters.adjoint
        size = self.shape.size_in if with_x else self.shape.size
        compiled.launch(
            (self._programs(plan, size, clips), 1),
            da,
            dh,
            dx,
            weights,
            clips,
            self.backwards(),
            da.stride(0),
            _stride(dx),
        )

    def sums(self, weight_hh: Tensor, weight_ih: Tensor, clips: int, steps: int, reverse: bool) -> Sums:
        """New sums of the weights' gradients, of calls of so many clips and steps."""
        plan, compiled = self._kernel("weight_gradients")
        self._backwards = 1  # each backward pass adds up in the same order
        programs = max(1, self.multiprocessors * plan.programs // (self.shape.gates // 64))
        programs = min(programs, plan.tiles(self.shape.size) * clips)
        return Sums(self, compiled, programs, weight_hh, weight_ih, steps - 1 if reverse else None)


class Sums:
    """Gradients of both weights, added up chunk by chunk in an order that does not change."""

    def __init__(
        self, owner: Steps, compiled: Kernel, programs: int, weight_hh: Tensor, weight_ih: Tensor, last: int | None
    ) -> None:
        self.owner, self.shape = owner, owner.shape
        self.kernel, self.programs, self.last = compiled, programs, last
        self.weight_hh, self.weight_ih = weight_hh, weight_ih
        self.sums = weight_hh.new_empty(programs, owner.shape.rows, owner.shape.gates, dtype=torch.float32)
        self.fresh = True

    def add(
        self, h: Tensor, h_t: int, with_h: bool, x: Tensor, factor: Tensor | None, da: Tensor, first: int,
        steps: int, lengths: Tensor | None,
    ) -> None:  # fmt: skip
        """Adds the steps first .. first + steps - 1; arguments as those of the Triton kernels' sums."""
        assert factor is None
        assert lengths is None
        self.kernel.launch(
            (self.programs, self.shape.gates // 64), x, h, da, self.sums, x.shape[0], first, steps, da.shape[1],
            self.last or 0, int(self.last is not None), int(with_h), int(self.fresh),
            self.owner.backwards(), x.stride(0), x.stride(1),
            h.stride(0), h_t, da.stride(0), da.stride(1),
        )  # fmt: skip
        self.fresh = False

    def results(self) -> list[Tensor]:
        """The gradients of W_hh and W_ih, in their dtypes."""
        shape = self.shape
        rows = self.sums.sum(0)
        of_x, of_h = rows.split([shape.steps_x * 16, 9 * shape.hidden])
        of_x = of_x.view(3, -1, shape.channels, shape.gates)[:, :3]
        of_h = of_h.view(3, 3, shape.hidden, shape.gates)
        return [
            torch.empty_like(w, memory_format=torch.contiguous_format).copy_(part.permute(3, 2, 0, 1))
            for w, part in ((self.weight_hh, of_h), (self.weight_ih, of_x))
        ]


def _plan(shape: Shape, name: str, variant: bool) -> Plan:
    plans = {
        "forward_step": lambda: plan_forward(shape),
        "backward_step": lambda: plan_backward(shape, variant),
        "adjoint_step": lambda: plan_adjoint(shape, variant),
        "weight_gradients": lambda: plan_sums(shape),
    }
    plan = plans[name]()
    assert plan is not None  # covers() has looked
    return plan


@functools.lru_cache(maxsize=1024)
def prepare_backward(shape: Shape) -> None:
    """Starts to compile what a backward pass will most likely need: a first layer's, or one's inside a network."""
    needed = [("backward_step", shape.fused), ("weight_gradients", False)]
    if not shape.fused:
        needed.append(("adjoint_step", True))
    for name, variant in needed:
        prepare(name, _plan(shape, name, variant).constants)


def _stride(images: Tensor | None) -> int:
    return 0 if images is None else images.stride(0)
