"""How the tiles in ops/triton_kernels/tuning.py were found: time of each kernel of one layer, tile by tile.

One kernel's tile is varied at a time, the others keep theirs; results that differ from the default tiles' are refused.

    python tests/benchmarks/tiles.py --channels 128 --hidden 128 --kernel 5 --size 16 16 --batch 16
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import torch
from measure import RESULTS, machine, write
from torch.profiler import ProfilerActivity, profile

from convlstm_fish.ops import conv_lstm
from convlstm_fish.ops.triton_kernels import convolved, tuning, weights

KERNELS = {
    "forward": "forward_step",
    "backward": "backward_step",
    "image": "image_gradient",
    "weight": "weight_gradients",
}
CHOOSE = tuning.choose


def candidates(kernel: str, hidden: int, default: tuning.Tiles) -> Iterator[tuning.Tiles]:
    """The tiles to try for one kernel."""
    tile: Any = getattr(default, kernel)
    yield default
    if kernel == "weight":
        for pixels, columns, rows, warps, stages in itertools.product(
            (32, 64, 128), (64, 128, 256), (64, 128), (4, 8), (2, 3, 4)
        ):
            if pixels * (columns + rows) * stages * 2 <= 200 << 10 and 16 <= columns * rows // (warps * 32) <= 256:
                changed = tile._replace(pixels=pixels, columns=columns, rows=rows, warps=warps, stages=stages)
                yield default._replace(weight=changed)
        return
    gates = 4 if kernel == "forward" or (kernel == "backward" and not default.keep_gates) else 1
    ahead = (1, 3, 4) if hidden <= 32 else (2, 3, 4)  # unrolled, a wide layer takes minutes to compile
    if hidden <= 32:  # small programs: how many run side by side, and how their pixels lie, counts for more
        for pixels, patch, warps, halo in itertools.product((64, 128, 256), (0, 8, 16, 32), (4, 8), (0, 1)):
            if not halo or (kernel in ("backward", "image") and patch >= 16):
                changed = tile._replace(pixels=pixels, patch=patch, warps=warps, halo=halo, held=0)
                yield default._replace(**{kernel: changed})
                if kernel == "image" or pixels < 16 * warps or pixels * 2 * max(hidden, 16) // (warps * 16) > 64:
                    continue
                for held in range(2, 7):
                    registers = min(255, 65536 // (held * warps * 32) // 8 * 8)
                    changed = changed._replace(held=held, registers=registers, stages=1, stages_back=1)
                    if registers >= 80:
                        yield default._replace(**{kernel: changed})
        for registers, stages, back in itertools.product((80, 96, 112, 128), (1, 3, 4), (1, 3, 4)):
            changed = tile._replace(registers=registers, stages=stages, stages_back=back, held=0)
            yield default._replace(**{kernel: changed})
    for pixels, channels, warps, stages in itertools.product((64, 128, 256), (16, 32, 64, 128), (4, 8), ahead):
        numbers = pixels * channels * gates // (warps * 32)
        if channels > max(hidden, 16) or not 8 <= numbers <= 128:
            continue
        changed = tile._replace(pixels=pixels, channels=channels, warps=warps)
        changed = changed._replace(**{"stages" if kernel == "forward" else "stages_back": stages})
        yield default._replace(**{kernel: changed})


def run(args: argparse.Namespace, clips: int, tiles: tuning.Tiles) -> tuple[torch.Tensor, ...]:
    """Output and gradients of the layer with these tiles."""
    tuning.choose = lambda *_: tiles
    # The Triton kernels, also where others would take the layer.
    weights.covers = lambda *_: False
    convolved.covers = lambda _: False
    rng = torch.Generator("cuda").manual_seed(0)
    dtype = getattr(torch, args.dtype)
    x = torch.rand(clips, args.steps, *args.size, args.channels, device="cuda", generator=rng).to(dtype)
    x = x.permute(0, 1, 4, 2, 3).requires_grad_(not args.first)
    shapes = [(4 * args.hidden, c, args.kernel, args.kernel) for c in (args.channels, args.hidden)]
    both = [(0.05 * torch.randn(s, device="cuda", generator=rng)).requires_grad_() for s in shapes]
    output, _ = conv_lstm(x, None, both[0].to(dtype), both[1].to(dtype), padding=args.padding, backend="triton")
    return (output, *torch.autograd.grad(output, both if args.first else [x, *both], output.detach()))


def prepare(job: tuple[argparse.Namespace, tuning.Tiles]) -> str | None:
    """Compile the kernels in a process of its own; why that failed, or None."""
    try:
        run(job[0], 1, job[1])
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def milliseconds(args: argparse.Namespace, tiles: tuning.Tiles, name: str) -> float:
    """Time of all launches of one kernel, the best of three runs."""
    found = []
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            run(args, args.batch, tiles)
            torch.cuda.synchronize()
        found.append(sum(e.self_device_time_total for e in recorded.key_averages() if e.key.startswith(name)) / 1e3)
    return min(found)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--channels", type=int, default=128)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--kernel", type=int, default=5)
    options.add_argument("--size", type=int, nargs=2, default=(16, 16))
    options.add_argument("--padding", default="same")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--first", action="store_true", help="a first layer, whose input needs no gradient")
    options.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=KERNELS)
    options.add_argument("--jobs", type=int, default=8, help="processes that compile")
    args = options.parse_args()
    default = CHOOSE(args.channels, args.hidden, getattr(torch, args.dtype))
    plan = {kernel: list(dict.fromkeys(candidates(kernel, args.hidden, default))) for kernel in args.kernels}
    jobs = [(args, tiles) for every in plan.values() for tiles in every]
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        failures = dict(zip((tiles for _, tiles in jobs), pool.map(prepare, jobs, chunksize=1)))
    truth = run(args, args.batch, default)
    rows: dict[str, dict[str, Any]] = {}
    for kernel, every in plan.items():
        times = {}
        for tiles in every:
            if failures[tiles] is not None:
                continue
            off = max(
                float((a.double() - b.double()).norm() / b.double().norm())
                for a, b in zip(run(args, args.batch, tiles), truth)
            )
            if off < 1e-2:
                times[tiles] = milliseconds(args, tiles, KERNELS[kernel])
        for tiles, ms in sorted(times.items(), key=lambda item: item[1])[:5]:
            rows[f"{kernel} {tuple(getattr(tiles, kernel))}"] = {"ms": ms, "default_ms": times[default]}
    name = f"tiles_{args.channels}_{args.hidden}_{args.kernel}_{args.size[0]}x{args.size[1]}_{args.batch}"
    write(RESULTS / f"{name}.json", name, machine("cuda"), rows)


if __name__ == "__main__":
    main()
