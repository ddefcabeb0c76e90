"""Clips a second that FishClips delivers to the device, augmented, without a network: what training may not outrun.

The recording is simulated where it is absent. "device" gathers from frames that lie there, "pinned" fetches clips from
memory of the host, "host" cuts them from the file and sends them, in the training process or in loader processes:

    python tests/benchmarks/data_pipeline.py --data data/tank --batch 64
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, machine, now, write

from convlstm_fish.data.modules import FishClips

WARM = 10


def rate(args: argparse.Namespace, pixels_on: str, workers: int) -> dict[str, float]:
    """Clips a second over ``args.batches`` batches, after a few that do not count."""
    data = FishClips(
        str(args.data), args.batch, pixels_on=pixels_on, num_workers=workers, simulate={"minutes": args.minutes}
    )
    data.prepare_data()
    data.setup("fit")
    device, loader = torch.device(args.device), iter(data.train_dataloader())

    def deliver(batches: int) -> float:
        since = now()
        for batch in itertools.islice(loader, batches):
            data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)
        return now() - since

    deliver(WARM)
    seconds = deliver(args.batches)
    return {"per_second": args.batch * args.batches / seconds, "ms_per_batch": 1e3 * seconds / args.batches}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, default=Path("data/tank"))
    options.add_argument("--minutes", type=float, default=25.0, help="of the recording, where it is absent")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--batches", type=int, default=100)
    options.add_argument("--workers", type=int, nargs="+", default=[0, 2, 8])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--output", type=Path)
    args = options.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for pixels_on in ("device", "pinned", "host"):
        for workers in args.workers:
            rows[f"{pixels_on}, {workers} workers"] = rate(args, pixels_on, workers)
    name = f"data_pipeline_{args.batch}"
    write(args.output or RESULTS / f"{name}.json", name, machine(args.device), rows)


if __name__ == "__main__":
    main()
