"""Scoring every frame of a recording, as ``predict`` does: frames a second, against the network alone.

python tests/benchmarks/recording_scoring.py --data data/tank --batch 64
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from measure import RESULTS, autocast, clock, machine, now, write

from convlstm_fish.data.modules import FishClips
from convlstm_fish.tasks import ClipClassification


class PredictClock(pl.Callback):
    """Seconds between the end of the first batch, in which kernels are compiled, and the end of the last."""

    def __init__(self) -> None:
        self.first = self.seconds = 0.0
        self.batches = 0

    def on_predict_batch_end(self, *args: object, **kwargs: object) -> None:
        if not self.batches:
            self.first = now()
        self.batches += 1

    def on_predict_end(self, *args: object) -> None:
        self.seconds = now() - self.first


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, default=Path("data/tank"))
    options.add_argument("--minutes", type=float, default=25.0, help="of the recording, where it is absent")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path)
    args = options.parse_args()
    task = ClipClassification(
        in_channels=4, hidden_channels=[16, 32], padding="valid", bias=False, recurrent_activation="hard_sigmoid"
    )
    data = FishClips(str(args.data), args.batch, num_workers=2, simulate={"minutes": args.minutes})
    timer = PredictClock()
    trainer = pl.Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu", devices=1, callbacks=[timer], logger=False,
        precision="32-true" if args.dtype == "float32" else "bf16-mixed", enable_progress_bar=False,
    )  # fmt: skip
    frames = sum(len(part["index"]) for part in trainer.predict(task, data) or [])
    rate = args.batch * (timer.batches - 1) / timer.seconds

    network, video = task.network.to(args.device).eval(), torch.rand(args.batch, *data.input_shape, device=args.device)

    @torch.no_grad()
    def alone() -> None:
        with autocast(args.device, args.dtype):
            network(video)

    bare = 1e3 * args.batch / clock(alone, args.device, 10)
    rows = {"predict": {"frames": float(frames), "per_second": rate}, "network alone": {"per_second": bare}}
    name = f"recording_scoring_{args.batch}_{args.dtype}"
    write(args.output or RESULTS / f"{name}.json", name, machine(args.device), rows, share_of_bare=rate / bare)


if __name__ == "__main__":
    main()
