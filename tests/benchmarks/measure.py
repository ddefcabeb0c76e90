"""What the benchmarks share: clocks, CUDA graphs, memory, the machine, and results as JSON and a table."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options.add_argument("--repeats", type=int, default=10, help="timed runs, of which the median counts")
    options.add_argument("--peer", help="another project's layer, module:Class, to be measured too")
    options.add_argument("--only", nargs="*", help="measure only the entries whose name holds one of these")
    options.add_argument("--no-graph", action="store_true", help="do not time CUDA graphs")
    options.add_argument("--output", type=Path, help="JSON file; by default results/<benchmark>.json")
    return options


def autocast(device: str, dtype: str) -> torch.autocast:
    """Autocast to ``dtype``, off for float32."""
    kind = getattr(torch, dtype)
    return torch.autocast(torch.device(device).type, kind, enabled=kind != torch.float32)


def now() -> float:
    """Seconds on the clock, once the GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _once(function: Callable[[], Any], device: str) -> float:
    """Milliseconds of one run."""
    if torch.device(device).type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)
    before = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - before)


def clock(function: Callable[[], Any], device: str, repeats: int, warm: int = 3) -> float:
    """Median milliseconds of ``function`` after some runs that do not count."""
    for _ in range(warm):
        function()
    return statistics.median(_once(function, device) for _ in range(repeats))


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """``function``, which takes and returns nothing new, as the replay of a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def measure(function: Callable[[], Any], args: argparse.Namespace, batch: int) -> dict[str, float]:
    """Time and rate of ``function`` on so many clips, eager and as a graph, and the memory it peaks at; what fails is
    told, not hidden."""
    cuda = torch.device(args.device).type == "cuda"
    function()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    row = {"ms": clock(function, args.device, args.repeats)}
    if cuda:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if not args.no_graph:
            try:
                row["graph_ms"] = clock(graphed(function), args.device, args.repeats)
            except RuntimeError as error:
                print(f"  no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
                torch.cuda.synchronize()
    row["per_second"] = 1e3 * batch / row["ms"]
    if "graph_ms" in row:
        row["graph_per_second"] = 1e3 * batch / row["graph_ms"]
    return row


def forget() -> None:
    """Free the memory of what was deleted, so that the next entry starts as the first did."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth(gib: float = 4.0) -> float:
    """Bytes a second, read and written, of a device-to-device copy larger than the cache."""
    source = torch.randint(0, 255, (int(gib * 2**30) // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (clock(lambda: target.copy_(source), "cuda", 10) / 1e3)


def machine(device: str) -> dict[str, str]:
    """What the figures were measured on."""
    found = {"python": sys.version.split()[0], "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        found |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        import triton

        found["triton"] = triton.__version__
    else:
        found |= {"device": "cpu", "threads": str(torch.get_num_threads())}
    return found


def write(path: Path, name: str, where: dict[str, str], rows: dict[str, dict[str, float]], **more: Any) -> None:
    """Prints the rows as a table and writes them as JSON, with the command and the machine."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    print(f"{'':28s}" + "".join(f"{column:>14s}" for column in columns))
    for title, row in rows.items():
        print(f"{title:28s}" + "".join(f"{row[c]:14.2f}" if c in row else " " * 14 for c in columns))
    result = {
        "benchmark": name,
        "command": "python tests/benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": where,
        "rows": rows,
        **more,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def report(name: str, rows: dict[str, dict[str, float]], args: argparse.Namespace, **more: Any) -> None:
    """:func:`write` to where the options say."""
    output = args.output or RESULTS
    write(output / f"{name}.json" if output.is_dir() else output, name, machine(args.device), rows, **more)


def wanted(names: list[str], args: argparse.Namespace) -> list[str]:
    """The entries that ``--only`` lets through."""
    return [n for n in names if not args.only or any(part in n for part in args.only)]


def against_best(rows: dict[str, dict[str, float]], ours: str) -> dict[str, float]:
    """Our best rate over the best competitor's, in the same run: as they come, and with all of them as CUDA graphs."""
    rates = {n: max(row.get("per_second", 0), row.get("graph_per_second", 0)) for n, row in rows.items()}
    if ours not in rows or len(rows) == 1:
        return {}
    found = {
        "against_best_competitor": rates[ours] / max(r["per_second"] for n, r in rows.items() if n != ours),
        "against_best_competitor_graphed": rates[ours] / max(rate for n, rate in rates.items() if n != ours),
    }
    print("  ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in found.items()))
    return found
