"""Networks that predict frames, training step: sequences a second, each against the same network of common cells.

The encoder-decoder of *Video Prediction using ConvLSTM with PyTorch Lightning*, and OpenSTL's ConvLSTM-S, which feeds
its predictions back, with true frames in place of half of them, as scheduled sampling has them:

    python tests/benchmarks/frame_prediction.py --preset holmdk --batch 16
    python tests/benchmarks/frame_prediction.py --preset openstl --batch 16
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from competitors import ConcatCell
from measure import against_best, autocast, forget, measure, parser, report, wanted
from torch import Tensor, nn

from convlstm_fish.models import FramePredictor, StackedPredictor
from convlstm_fish.models.patches import from_patches, to_patches

OURS = "convlstm_fish"
CONTEXT = FUTURE = 10


class Cells(nn.ModuleList):
    """Concat cells one above the other."""

    def __init__(self, channels: int, hidden: Sequence[int], kernel: int, compiled: bool) -> None:
        widths = (channels, *hidden)
        super().__init__(ConcatCell(a, b, kernel) for a, b in itertools.pairwise(widths))
        self.steps: list[Any] = [torch.compile(cell) if compiled else cell for cell in self]

    def start(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Zero states for frames like x."""
        zeros = [x.new_zeros(x.shape[0], cell.hidden, *x.shape[-2:]) for cell in self]
        return [(z, z) for z in zeros]

    def step(self, x: Tensor, states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """One frame through all cells."""
        after = []
        for cell, (h, c) in zip(self.steps, states):
            x, c = cell(x, h, c)
            after.append((x, c))
        return x, after


class EncoderDecoder(nn.Module):
    """The encoder-decoder from concat cells."""

    def __init__(self, compiled: bool, hidden: int = 64) -> None:
        super().__init__()
        self.encoder = Cells(1, (hidden, hidden), 3, compiled)
        self.decoder = Cells(hidden, (hidden, hidden), 3, compiled)
        self.head = nn.Conv3d(hidden, 1, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        states = self.encoder.start(video[:, 0])
        for frame in video.unbind(1):
            x, states = self.encoder.step(frame, states)
        states, outputs = self.decoder.start(x), []
        for _ in range(FUTURE):
            x, states = self.decoder.step(x, states)
            outputs.append(x)
        return torch.sigmoid(self.head(torch.stack(outputs, dim=2))).transpose(1, 2)


class Stacked(nn.Module):
    """OpenSTL's ConvLSTM-S from concat cells: predicts frames 2 .. 20, feeding itself after the tenth."""

    def __init__(self, compiled: bool, hidden: Sequence[int] = (128, 128, 128, 128)) -> None:
        super().__init__()
        self.cells = Cells(16, hidden, 5, compiled)
        self.head = nn.Conv2d(hidden[-1], 16, 1, bias=False)

    def forward(self, video: Tensor, future: Tensor, teacher: Tensor) -> Tensor:
        given, truth = to_patches(video, 4), to_patches(future, 4)
        states, outputs = self.cells.start(given[:, 0]), []
        for t in range(CONTEXT + FUTURE - 1):
            if t < CONTEXT:
                x = given[:, t]
            else:
                x = torch.where(teacher[:, t - CONTEXT, None, None, None], truth[:, t - CONTEXT], outputs[-1].float())
            h, states = self.cells.step(x, states)
            outputs.append(self.head(h))
        return from_patches(torch.stack(outputs, dim=1), 4)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--preset", choices=("holmdk", "openstl"), default="holmdk")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--backend", default="auto")
    args = options.parse_args()

    torch.manual_seed(0)
    video = torch.rand(args.batch, CONTEXT, 1, 64, 64, device=args.device)
    future = torch.rand(args.batch, FUTURE, 1, 64, 64, device=args.device)
    teacher = torch.rand(args.batch, FUTURE - 1, device=args.device) < 0.5
    truth = torch.cat([video[:, 1:], future], dim=1)
    entries: dict[str, Callable[[], nn.Module]]
    if args.preset == "holmdk":
        entries = {OURS: lambda: FramePredictor(1, 64, backend=args.backend)}
        entries |= {f"concat {how}": lambda how=how: EncoderDecoder(how == "compiled") for how in ("eager", "compiled")}
    else:
        entries = {OURS: lambda: StackedPredictor(backend=args.backend)}
        entries |= {f"concat {how}": lambda how=how: Stacked(how == "compiled") for how in ("eager", "compiled")}

    def loss(network: nn.Module, ours: bool) -> Tensor:
        if args.preset == "holmdk":
            frames = torch.sigmoid(network(video, FUTURE)) if ours else network(video)
            return F.mse_loss(frames.float(), future)
        frames = network(video, FUTURE, future, teacher, with_context=True) if ours else network(video, future, teacher)
        return F.mse_loss(frames.float(), truth)

    rows: dict[str, dict[str, float]] = {}
    for name in wanted(list(entries), args):
        network = entries[name]().to(args.device)
        cuda = torch.device(args.device).type == "cuda"
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, capturable=cuda, fused=cuda)

        def train(
            network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer, ours: bool = name == OURS
        ) -> None:
            with autocast(args.device, args.dtype):
                total = loss(network, ours)
            total.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        rows[name] = measure(train, args, args.batch)
        del network, optimizer, train
        forget()
    report(f"frame_prediction_{args.preset}_{args.batch}_{args.dtype}", rows, args, **against_best(rows, OURS))


if __name__ == "__main__":
    main()
