"""``python main.py fit`` as users run it: clips a second of an epoch, against the bare training step and over GPUs.

The published epoch, 179,456 clips, on a recording of 30 simulated minutes; two GPUs against one; and wherever the
pixels may lie:

    python tests/benchmarks/fit_rate.py --config fish_serenity --batch 64 --steps 2804
    python tests/benchmarks/fit_rate.py --config moving_mnist --batch 16 --gpus 1 2 --steps 600 \
        --fit=--data.train_size=19200 --fit=--trainer.callbacks=null
    python tests/benchmarks/fit_rate.py --config fish_serenity --batch 64 --steps 300 --fit=--data.path=data/tank \
        --vary=--data.pixels_on=device --vary=--data.pixels_on=pinned --vary=--data.pixels_on=host

A rate is of the steps after the first few, up to the end of the epoch, which takes a moment: compare equal steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, write

ROOT = Path(__file__).resolve().parents[2]


def run(args: argparse.Namespace, gpus: int, also: Sequence[str] = ()) -> dict[str, float]:
    """One run of the command; ``clocks.EpochClock`` inside it notes the epoch."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "clock.json"
        command = [sys.executable, str(ROOT / "main.py"), "fit", "--config", args.config, "--n_gpus", str(gpus)]
        command += ["--use_amp=true", f"--batch_size={args.batch}", "--test_after_fit=false", "--trainer.max_epochs=1"]
        command += ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false", f"--run_dir={folder}/runs"]
        command += [*args.fit, *also, "--trainer.callbacks+=clocks.EpochClock"]
        if args.steps:
            command.append(f"--trainer.limit_train_batches={args.steps}")
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {"EPOCH_CLOCK": str(told), "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
        before = time.perf_counter()
        # Whoever stops this stops the run and its processes with it.
        process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
        try:
            if process.wait():
                raise SystemExit(process.returncode)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        row: dict[str, float] = json.loads(told.read_text())
        row["command_seconds"] = time.perf_counter() - before
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--config", default="fish_serenity")
    options.add_argument("--batch", type=int, default=64, help="per GPU")
    options.add_argument("--gpus", type=int, nargs="+", default=[1], help="0 is the CPU")
    options.add_argument("--steps", type=int, help="batches; by default the whole epoch")
    options.add_argument("--fit", action="append", default=[], metavar="OPTION", help="as --fit=--data.path=data/tank")
    options.add_argument("--vary", action="append", default=[], metavar="OPTIONS", help="a run for each, on one device")
    options.add_argument("--output", type=Path)
    args = options.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.vary and len(args.gpus) > 1:
        options.error("--vary goes with one number of --gpus")
    if args.vary:
        rows = {each: run(args, args.gpus[0], each.split()) for each in args.vary}
    else:
        rows = {f"{gpus} GPU" if gpus else "CPU": run(args, gpus) for gpus in args.gpus}
    more: dict[str, Any] = {}
    if len(args.gpus) > 1:
        first, *_, last = (row["steady_per_second"] for row in rows.values())
        more["speedup"] = last / first
        print(f"{last / first:.3f} times {next(iter(rows))}")
    device = "cuda" if any(args.gpus) else "cpu"
    name = f"fit_{Path(args.config).stem}_{args.batch}" + (f"_{max(args.gpus)}gpus" if max(args.gpus) > 1 else "")
    write(args.output or RESULTS / f"{name}.json", name, machine(device), rows, **more)


if __name__ == "__main__":
    main()
