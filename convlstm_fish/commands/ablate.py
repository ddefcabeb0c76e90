"""``ablate``: one base experiment, one factor changed at a time, seeds repeated, told in one table and one plot."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from convlstm_fish.commands.ablation_table import HEADER, Row, cells, markdown, numbers, summarise, write_plot
from convlstm_fish.errors import UserError
from convlstm_fish.files import write_text
from convlstm_fish.progress import progress

BASE_LEVEL = "base"
RESULT = "metrics.json"


@dataclass(frozen=True)
class Factor:
    """One ablation file: a factor and the levels it takes, each a set of overrides of the base config."""

    name: str
    base: Path
    levels: Mapping[str, Mapping[str, Any]]


@dataclass
class Run:
    """One training of one level with one seed; ``folder`` holds everything it writes."""

    level: str
    overrides: Mapping[str, Any]
    base: Path
    seed: int
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def seconds(self) -> float:
        """How long it has trained and tested so far, over all its parts."""
        path = self.folder / "seconds.json"
        return float(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else 0.0

    def result(self) -> Path | None:
        """The newest result file that the run has written, or None while it is unfinished."""
        found = sorted(self.folder.rglob(RESULT), key=lambda path: path.stat().st_mtime)
        return found[-1] if found else None


def read_factor(path: str | Path) -> Factor:
    """Read one ablation file.

    Args:
        path: YAML with ``factor`` (its name), ``base`` (the base config, relative to this file) and ``levels``
            (name of the level -> dotted option -> value; an empty level is the base experiment itself).

    Raises:
        UserError: the file is missing, not YAML, or lacks one of the three.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file ({error})") from None
    if not isinstance(content, dict) or set(content) != {"factor", "base", "levels"}:
        has = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"--config {path}: an ablation file holds exactly the keys base, factor and levels, got {has}")
    levels = content["levels"]
    if not isinstance(levels, dict) or not levels:
        raise UserError(f"--config {path}: levels must map names to overrides, got {levels!r}")
    for name, overrides in levels.items():
        if not isinstance(overrides, dict):
            raise UserError(
                f"--config {path}: level {name!r} must map options such as model.lr to values, got {overrides!r}"
            )
    base = (path.parent / str(content["base"])).resolve()
    if not base.is_file():
        raise UserError(f"--config {path}: its base config {base} does not exist")
    return Factor(str(content["factor"]), base, {str(name): dict(overrides) for name, overrides in levels.items()})


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in ".-+" else "_" for c in text).strip("_") or "level"


def plan_runs(factors: Sequence[Factor], out: Path, seeds: Sequence[int]) -> dict[tuple[str, str, int], Run]:
    """Every run that the factors ask for, by (factor, level, seed). Levels without overrides share the base's runs."""
    plan: dict[tuple[str, str, int], Run] = {}
    shared: dict[tuple[str, str, int], Run] = {}
    for factor in factors:
        for level, overrides in factor.levels.items():
            for seed in seeds:
                key = (str(factor.base), json.dumps(overrides, sort_keys=True), seed)
                if key not in shared:
                    place = f"{_slug(factor.name)}/{_slug(level)}" if overrides else BASE_LEVEL
                    folder = out / "runs" / factor.base.stem / place / f"seed_{seed}"
                    shared[key] = Run(level, overrides, factor.base, seed, folder)
                plan[factor.name, level, seed] = shared[key]
    return plan


def run_command(run: Run, extra: Sequence[str]) -> list[str]:
    """The command line of one run: the ordinary ``fit`` of this package, then its test."""
    command = [sys.executable, "-m", "convlstm_fish", "fit", "--config", str(run.base)]
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in run.overrides.items()}
    command += [f"--{name}={text}" for name, text in texts.items()]
    command += [f"--seed_everything={run.seed}", f"--run_dir={run.folder}", "--test_after_fit=true", *extra]
    if any(run.folder.rglob("*.ckpt")):
        command.append("--ckpt_path=last")  # a run that was stopped goes on where it was
    return command


class _Children:
    """The trainings that are running, so that none outlives this command."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(self, command: Sequence[str], log: IO[str], environment: Mapping[str, str]) -> int:
        """Run ``command`` to its end; the exit code."""
        with self._lock:
            if self._stopped:
                return 128 + signal.SIGTERM
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._running.add(child)
        try:
            return child.wait()
        finally:
            with self._lock:
                self._running.discard(child)

    def stop(self) -> None:
        """Ask all to stop, which they do after the current step with a checkpoint; start no more."""
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM, which would end this process at once and leave its trainings behind, raises SystemExit."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals can be handled in the main thread only
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _execute(run: Run, extra: Sequence[str], settings: Mapping[str, str], children: _Children) -> Run:
    run.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **settings}
    started = time.monotonic()
    with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
        code = children.run(run_command(run, extra), log, environment)
    # A run that was stopped and goes on has taken the time of all its parts.
    seconds = time.monotonic() - started + run.seconds()
    write_text(run.folder / "seconds.json", json.dumps(seconds))
    if code or run.result() is None:
        lines = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        run.error = f"exit code {code}: {lines[-1].strip() if lines else 'it printed nothing'}"
    return run


def _settings(slot: int, jobs: int, devices: Sequence[str]) -> dict[str, str]:
    """What a run gets of the machine: one GPU, and the processors divided among the jobs, or they fight for them."""
    settings = {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {}
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        settings["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return settings


def execute(runs: Sequence[Run], extra: Sequence[str], jobs: int, devices: Sequence[str]) -> None:
    """Train what is not finished yet, ``jobs`` runs at a time, spread over the CUDA ``devices`` if there are any.

    A run that fails does not stop the others; its ``error`` tells why. Ctrl-C or SIGTERM stops the runs that are under
    way, each with a checkpoint, before it ends this process.
    """
    waiting = [run for run in runs if run.result() is None]
    # The first run alone makes whatever data does not exist yet; the others find it.
    groups = [waiting[:1], waiting[1:]] if jobs > 1 else [waiting]
    children = _Children()
    try:
        with _sigterm_exits(), progress() as bar, ThreadPoolExecutor(jobs) as pool:
            task = bar.add_task("Ablation runs", total=len(runs), completed=len(runs) - len(waiting))
            for group in groups:
                futures = [
                    pool.submit(_execute, run, extra, _settings(slot, jobs, devices), children)
                    for slot, run in enumerate(group)
                ]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.advance(task)
                except BaseException:
                    for future in futures:
                        future.cancel()
                    children.stop()
                    raise
    except (KeyboardInterrupt, SystemExit):
        done = sum(run.result() is not None for run in runs)
        sys.stderr.write(f"stopped: {done} of {len(runs)} runs are finished; the same command goes on from here\n")
        raise


def ablate(
    configs: Sequence[str | Path],
    out: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    jobs: int = 1,
    extra: Sequence[str] = (),
) -> list[Row]:
    """Run the ablations of ``configs`` and write ``ablation.md``, ``ablation.json`` and ``ablation.html`` to ``out``.

    A run whose result is there already is not repeated, and one that was stopped goes on from its last checkpoint, so
    the same call after an interruption finishes the work.

    Args:
        configs: ablation files, see :func:`read_factor`.
        out: folder of the runs and the table.
        seeds: one run of every level for each.
        jobs: runs at a time; several CUDA GPUs are shared out among them.
        extra: options added to every run's ``fit``.

    Returns:
        One row for each level of each factor.

    Raises:
        UserError: an ablation file that cannot be used, or runs that failed (the others are finished and told).
    """
    import torch

    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds must be different numbers, got {list(seeds)}")
    factors = [read_factor(path) for path in configs]
    names = [factor.name for factor in factors]
    if len(set(names)) != len(names):
        raise UserError(f"--config: two files tell of the same factor, {sorted(names)}")
    folder = Path(out)
    plan = plan_runs(factors, folder, seeds)
    unique = list({id(run): run for run in plan.values()}.values())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    execute(unique, extra, jobs, devices)
    rows = summarise(plan)
    if rows:
        write_text(folder / "ablation.md", markdown(rows))
        write_text(folder / "ablation.json", json.dumps([numbers(row) for row in rows], indent=1, allow_nan=False))
        write_plot(rows, folder / "ablation.html")
    failed = [run for run in unique if run.error]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(unique)} runs failed; the first, {first.folder}, ended with {first.error} "
            f"(its whole output is in log.txt there; run the same command again to try them again)"
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--config", nargs="+", required=True, metavar="FILE", help="ablation files (configs/ablations/*.yaml)"
    )
    parser.add_argument("--out", default="runs/ablations", help="folder of the runs, the table and the plot")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run of every level for each")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="OPTION",
        help="option added to every run, as --fit=--n_gpus=1",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command and print the table."""
    from rich.console import Console
    from rich.table import Table

    rows = ablate(args.config, args.out, args.seeds, args.jobs, args.fit)
    table = Table(*HEADER, title="Ablations")
    for row in cells(rows):
        table.add_row(*row)
    Console().print(table)
    Console().print(f"Table, numbers and plot: {args.out}/ablation.md, .json, .html", soft_wrap=True)
