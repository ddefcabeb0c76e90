"""A stack of ConvLSTM layers that predicts the next frame, training step: sequences a second.

The sizes of holmdk's network, of OpenSTL's ConvLSTM-S (frames of 64x64 in patches of 4), of visionary-serenity's
layers, or any other:

    python tests/benchmarks/layer_step.py --preset openstl --batch 16
    python tests/benchmarks/layer_step.py --scaling
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from competitors import Stack, makers
from measure import against_best, autocast, forget, measure, parser, report, wanted
from torch import Tensor, nn

from convlstm_fish import ConvLSTM

OURS = "convlstm_fish"
PRESETS: dict[str, dict[str, Any]] = {
    "holmdk": {"channels": 1, "size": (64, 64), "hidden": (64, 64), "kernel": 3, "steps": 20},
    "openstl": {"channels": 16, "size": (16, 16), "hidden": (128, 128, 128, 128), "kernel": 5, "steps": 20},
    "serenity": {"channels": 4, "size": (120, 160), "hidden": (16, 32), "kernel": 3, "steps": 30},
}


class Ours(nn.Module):
    """Our layer, called as the competitors are."""

    def __init__(self, channels: int, hidden: int, kernel: int, backend: str) -> None:
        super().__init__()
        self.layer = ConvLSTM(channels, hidden, kernel, bias=False, backend=backend)

    def forward(self, video: Tensor, last_only: bool) -> Tensor:
        output = self.layer(video)[0]
        return output[:, -1] if last_only else output


def run(
    args: argparse.Namespace, batch: int, steps: int, size: tuple[int, int], hidden: tuple[int, ...], names: list[str]
) -> dict[str, Any]:
    """Rows of the named entries at one size."""
    entries: dict[str, Callable[[int, int], nn.Module]] = {
        OURS: lambda a, b: Ours(a, b, args.kernel, args.backend)
    } | makers(args.kernel, "same", args.peer)
    video = torch.rand(batch, steps, args.channels, *size, device=args.device)
    rows = {}
    for name in names:
        network = Stack(entries[name], args.channels, hidden).to(args.device)
        cuda = torch.device(args.device).type == "cuda"
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, capturable=cuda, fused=cuda)

        def train(network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with autocast(args.device, args.dtype):
                frames = network(video)
            F.mse_loss(frames[:, :-1].float(), video[:, 1:]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        rows[name] = measure(train, args, batch)
        del network, optimizer, train
        forget()
    return rows


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--preset", choices=PRESETS, default="holmdk", help="what the other sizes are by default")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int)
    options.add_argument("--channels", type=int)
    options.add_argument("--size", type=int, nargs=2)
    options.add_argument("--hidden", type=int, nargs="+")
    options.add_argument("--kernel", type=int)
    options.add_argument("--backend", default="auto")
    options.add_argument(
        "--scaling",
        action="store_true",
        help="ours alone, with more of batch, T, area and channels",
    )
    args = options.parse_args()
    for key, value in PRESETS[args.preset].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    size, hidden = tuple(args.size), tuple(args.hidden)
    if not args.scaling:
        names = wanted([OURS, *makers(args.kernel, "same", args.peer)], args)
        rows = run(args, args.batch, args.steps, size, hidden, names)
        report(f"layer_step_{args.preset}_{args.batch}_{args.dtype}", rows, args, **against_best(rows, OURS))
        return
    rows = {}
    for title, batch, steps, (height, width), wide in (
        ("as given", 1, 1, (1, 1), 1),
        ("batch x 2", 2, 1, (1, 1), 1),
        ("batch x 4", 4, 1, (1, 1), 1),
        ("T x 2", 1, 2, (1, 1), 1),
        ("T x 4", 1, 4, (1, 1), 1),
        ("area x 2", 1, 1, (1, 2), 1),
        ("area x 4", 1, 1, (2, 2), 1),
        ("channels x 2", 1, 1, (1, 1), 2),
    ):
        large = (size[0] * height, size[1] * width)
        widths = tuple(width * wide for width in hidden)
        row = run(args, args.batch * batch, args.steps * steps, large, widths, [OURS])[OURS]
        work = batch * steps * height * width * wide**2
        first = rows.get("as given", row)
        row["ms_per_work"] = row.get("graph_ms", row["ms"]) / work
        row["over_linear"] = row["ms_per_work"] / first.get("ms_per_work", row["ms_per_work"])
        rows[title] = row
    report(f"scaling_{args.preset}_{args.batch}_{args.dtype}", rows, args)


if __name__ == "__main__":
    main()
