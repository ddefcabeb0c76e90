"""visionary-serenity, forward or training step: clips a second, peak memory, and the time against the memory floor.

python tests/benchmarks/training_step.py --batch 64
python tests/benchmarks/training_step.py --batch 64 --inference --keras jax torch
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from competitors import Serenity, makers
from measure import against_best, autocast, copy_bandwidth, forget, measure, parser, report, wanted
from torch import nn

from convlstm_fish import ClipClassifier

OURS = "convlstm_fish"


def floor_bytes(args: Any, training: bool) -> dict[str, float]:
    """Bytes that must move through device memory, counted from the shapes, 2 bytes a number but c's 4.

    ``kept``: every tensor that one pass hands to another, read once and written once: x, h, the c that is kept, the
    pooled and normalised frames, and in training the gradients of these. ``steps``: in addition what one step hands to
    the next where a step's states are larger than the cache (h and c forward, the gates' gradients and dc backward)
    and what the weights' gradients read.
    """
    (c_1, c_2), (height, width) = args.hidden, args.size
    first = args.batch * args.steps * (height - 2) * (width - 2)
    pooled = args.batch * args.steps * ((height - 2) // 2) * ((width - 2) // 2)
    second = args.batch * args.steps * ((height - 2) // 2 - 2) * ((width - 2) // 2 - 2)
    video = args.batch * args.steps * height * width * args.channels
    kept = video * (4 + 2 + 2)  # read as float32, kept as 2 bytes, read by the first layer
    kept += first * c_1 * (2 + 2) + pooled * c_1 * 2 * (1 + 2 + 1 + 1)  # h, pooled, statistics, normalised, layer 2
    steps = first * c_1 * (2 + 8) + second * c_2 * (2 + 2 + 8)
    if training:
        kept += (first * c_1 + second * c_2) * (2 + 2 + 2) + first * c_1 * (2 + 2 + 2) + second * c_2 * 2
        kept += video * 2 + pooled * c_1 * 2 * 6  # x again; the way back through norm and pool
        steps += (first * c_1 + second * c_2) * (3 * 8 + 8 + 2) + video * 2 + pooled * c_1 * 2 + second * 8 * c_2
    return {"kept": kept, "steps": kept + steps}


def keras_row(backend: str, args: Any) -> dict[str, float]:
    """The same network in Keras, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("keras_step.py")), "--dtype", args.dtype]
    for name in ("batch", "steps", "channels", "repeats"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--size", *map(str, args.size), "--hidden", *map(str, args.hidden)]
    command += ["--inference"] if args.inference else []
    done = subprocess.run(command, env=os.environ | {"KERAS_BACKEND": backend}, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: found[name] for name in ("ms", "per_second")}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--channels", type=int, default=4)
    options.add_argument("--size", type=int, nargs=2, default=(120, 160))
    options.add_argument("--hidden", type=int, nargs=2, default=(16, 32))
    options.add_argument("--activation", default="sigmoid", help="of our gates; the competitors' are sigmoid")
    options.add_argument("--backend", default="auto")
    options.add_argument("--inference", action="store_true")
    options.add_argument("--keras", nargs="*", default=[], metavar="BACKEND", help="Keras too, as --keras jax torch")
    args = options.parse_args()

    torch.manual_seed(0)
    video = torch.rand(args.batch, args.steps, args.channels, *args.size, device=args.device)
    label = torch.randint(0, 2, (args.batch, 1), device=args.device).float()
    hidden = tuple(args.hidden)

    def ours() -> nn.Module:
        return ClipClassifier(
            args.channels, hidden, 3, padding="valid", bias=False, recurrent_activation=args.activation,
            backend=args.backend,
        )  # fmt: skip

    entries: dict[str, Callable[[], nn.Module]] = {OURS: ours}
    for name, make in makers(3, "valid", args.peer).items():
        entries[name] = lambda make=make: Serenity(make, args.channels, hidden)

    rows: dict[str, dict[str, float]] = {f"keras on {backend}": keras_row(backend, args) for backend in args.keras}
    for name in wanted(list(entries), args):
        network = entries[name]().to(args.device).train(not args.inference)
        cuda = torch.device(args.device).type == "cuda"
        optimizer = torch.optim.Adam(network.parameters(), lr=8e-5, eps=1e-7, capturable=cuda, fused=cuda)

        def train(network: nn.Module = network, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with autocast(args.device, args.dtype):
                logits = network(video)
            F.binary_cross_entropy_with_logits(logits.float().reshape(-1, 1), label).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        @torch.no_grad()
        def infer(network: nn.Module = network) -> None:
            with autocast(args.device, args.dtype):
                network(video)

        rows[name] = measure(infer if args.inference else train, args, args.batch)
        del network, optimizer, train, infer
        forget()

    more: dict[str, Any] = against_best(rows, OURS)
    if torch.device(args.device).type == "cuda" and args.dtype != "float32":
        bandwidth = copy_bandwidth()
        floor = {k: 1e3 * v / bandwidth for k, v in floor_bytes(args, not args.inference).items()}
        more |= {"copy_bytes_per_second": bandwidth, "floor_ms": floor}
        print(f"memory floor: {floor['kept']:.1f} ms, with the states between steps {floor['steps']:.1f} ms")
    kind = "inference" if args.inference else "training_step"
    report(f"{kind}_{args.batch}_{args.dtype}", rows, args, **more)


if __name__ == "__main__":
    main()
