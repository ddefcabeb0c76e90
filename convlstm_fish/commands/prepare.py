"""``prepare``: a user's video or images as a recording of bright fish on black."""

from __future__ import annotations

import argparse

from convlstm_fish.commands.options import frame_size, number_or_word, numbers, rectangle
from convlstm_fish.data.labels import BURST_C, CLIP_SECONDS, HORIZON_SECONDS
from convlstm_fish.data.prepare import describe, prepare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("input", metavar="INPUT", help="a video, a folder of numbered images, the published layout, or a recording")
    add("--out", required=True, metavar="DIR", help="the folder to make")
    add("--roi", metavar="X,Y,W,H", help="crop to this rectangle of the source")
    add("--invert", default="auto", help="yes: fish are darker than the tank; no; auto: see")
    add("--background", default="auto", help="median over time, none, or auto: none if frames are black already")
    add(
        "--contrast",
        default="auto",
        help="a factor, none, or auto: as bright as the published fish",
    )
    add("--size", default="240x320", metavar="HxW", help="height and width of the frames")
    add("--fps", type=float, metavar="F", help="frames per second, instead of what the source says")
    add("--resample", type=float, metavar="F", help="make it F frames per second, for a variable frame rate")
    add("--splits", metavar="A,B,C", help="shares of train, validation, test; default as published")
    add("--threshold", default=str(BURST_C), help="least range of motion that is a burst, or auto")
    add("--clip_seconds", type=float, default=CLIP_SECONDS, metavar="S", help="length of the clips to label")
    add("--horizon_seconds", type=float, default=HORIZON_SECONDS, metavar="S", help="how far labels look ahead")
    add("--allow_short", action="store_true", help="accept a video that ends before the frames it claims")
    add("--overwrite", action="store_true", help="replace a recording that stands in the folder")


def run(args: argparse.Namespace) -> None:
    """Run the command and tell what was made."""
    recording = prepare(
        args.input,
        args.out,
        roi=rectangle("--roi", args.roi),
        invert=args.invert,
        background_method=args.background,
        contrast=number_or_word(args.contrast),
        size=frame_size("--size", args.size),
        fps=args.fps,
        resample=args.resample,
        splits=numbers("--splits", args.splits),
        threshold=number_or_word(args.threshold),
        clip_seconds=args.clip_seconds,
        horizon_seconds=args.horizon_seconds,
        allow_short=args.allow_short,
        overwrite=args.overwrite,
    )
    print("\n".join(describe(recording)))
