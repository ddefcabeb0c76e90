"""``simulate``: a tank of fish from a seed, as a recording on the disk."""

from __future__ import annotations

import argparse

from convlstm_fish.commands.options import frame_size, load_series
from convlstm_fish.data.simulate import simulate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--minutes", type=float, default=30.0, help="duration")
    parser.add_argument("--seed", type=int, default=0, help="everything follows from it")
    parser.add_argument("--fish", type=int, default=6, metavar="N", help="how many fish")
    parser.add_argument("--size", default="240x320", metavar="HxW", help="height and width in pixels")
    parser.add_argument("--fps", type=float, default=30.0, metavar="F", help="frames per second")
    parser.add_argument("--workers", type=int, help="drawing threads; default one per processor, at most four")
    parser.add_argument(
        "--compare",
        metavar="NPY",
        help="motion of a real recording (Y_tilde.npy): print statistics beside its, and what foresees chases",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a recording that stands in the folder")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    published = None if args.compare is None else load_series("--compare", args.compare)
    recording = simulate(
        args.out,
        minutes=args.minutes,
        seed=args.seed,
        n_fish=args.fish,
        size=frame_size("--size", args.size),
        fps=args.fps,
        workers=args.workers,
        overwrite=args.overwrite,
    )
    height, width = recording.size
    print(
        f"{recording.path}: {len(recording)} frames of {height}x{width} at {recording.fps:g} per second, "
        f"{100 * recording.labels().mean():.1f} % burst labels, {len(recording.array('chases'))} chases"
    )
    if published is not None:
        from convlstm_fish.evaluate.tank import chase_skill, compare, print_statistics, unbroken_motion

        print_statistics(compare(unbroken_motion(recording), published), "The simulated tank beside the real one")
        print_statistics(chase_skill(recording), "Will a chase start within 1.5 s?")
