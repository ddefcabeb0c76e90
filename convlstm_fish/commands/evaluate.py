"""``evaluate``: probabilities from files, scored beside the baseline panel."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jsonargparse
import numpy as np
import numpy.typing as npt

from convlstm_fish.commands.options import load_series
from convlstm_fish.data.labels import BURST_C, HORIZON_SECONDS, chase_labels, horizon_frames_of
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate import MotionLSTMConfig, evaluate, print_table, write_report
from convlstm_fish.evaluate.baselines import PUBLISHED_CLIP, scaled_frames
from convlstm_fish.evaluate.checks import positive_number
from convlstm_fish.evaluate.evaluation import BLOCK_SECONDS, CONFIDENCE, RESAMPLES
from convlstm_fish.evaluate.result import Evaluation
from convlstm_fish.files import write_text

# The published test set is scored up to frame T - 2 - 10.
PUBLISHED_TAIL = 10


def add_arguments(parser: jsonargparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--labels", required=True, metavar="NPY", help="0 or 1 for every frame of the split")
    parser.add_argument("--motion", required=True, metavar="NPY", help="motion of every frame of the split")
    parser.add_argument(
        "--probabilities",
        required=True,
        action="append",
        metavar="[NAME=]NPY",
        help="probability of label 1, for every frame of the split or from --first_frame on; repeat it to compare "
        "models, the first one gets the first verdict",
    )
    parser.add_argument("--fps", required=True, type=float, help="frames per second")
    parser.add_argument("--out", required=True, metavar="DIR", help="where report.html and metrics.json go")
    parser.add_argument("--train_motion", metavar="NPY", help="motion of the training split, for the LSTM baseline")
    parser.add_argument("--train_labels", metavar="NPY", help="labels of the training split, for the LSTM baseline")
    parser.add_argument(
        "--chases",
        metavar="NPY",
        help="start frames of the events (K,), or chases (K, 4) as a simulated recording has them, counted within "
        "the split; the labels then say whether one starts within the horizon",
    )
    parser.add_argument(
        "--first_frame",
        type=int,
        help="first scored frame, and the frame of the first value of a probability file that is shorter than the "
        "split; default: the last frame of the first 4 s",
    )
    parser.add_argument(
        "--last_frame", type=int, help="last scored frame; default: as in the published evaluation, T - 2 - 1/3 s"
    )
    parser.add_argument("--horizon_seconds", type=float, default=HORIZON_SECONDS, help="how far the labels look ahead")
    parser.add_argument("--burst_c", type=float, default=BURST_C, help="the burst rule's c that made the labels")
    parser.add_argument("--block_seconds", type=float, default=BLOCK_SECONDS, help="length of a bootstrap block")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="number of bootstrap resamples")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of the intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the resampling")
    parser.add_argument("--motion_lstm", type=MotionLSTMConfig, default=MotionLSTMConfig(), help="the LSTM baseline")


def named_paths(values: list[str]) -> dict[str, str]:
    """``NAME=PATH`` or ``PATH``, named after the file, as a mapping.

    Raises:
        UserError: where two have the same name.
    """
    out: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or Path(value).exists():
            name, path = Path(value).stem, value
        if not name or name in out:
            raise UserError(f"--probabilities: {value!r} needs a name of its own, as in NAME=PATH")
        out[name] = path
    return out


def scored_frames(
    series: Mapping[str, npt.NDArray[Any]], length: int, fps: float, first: int | None, last: int | None
) -> tuple[npt.NDArray[np.int64], dict[str, npt.NDArray[Any]]]:
    """The frames that every series has a value for, and those values.

    A series of ``length`` values has one for every frame of the split; a shorter one starts at ``first``.

    Raises:
        UserError: where a series is too long or no frame is left.
    """
    start = scaled_frames(PUBLISHED_CLIP, fps) - 1 if first is None else first
    stop = length - 1 - scaled_frames(PUBLISHED_TAIL, fps) if last is None else last + 1
    fitting = sorted({length, length - start, stop - start}, reverse=True)
    if start < 0 or (last is not None and last >= length):
        raise UserError(f"--first_frame {start}, --last_frame {last}: the split has frames 0 to {length - 1}")
    for name, values in series.items():
        if values.ndim != 1:
            raise UserError(f"--probabilities {name}: one value a frame expected, got shape {values.shape}")
        if len(values) == length:
            continue
        if first is None and len(values) not in fitting:
            raise UserError(
                f"--probabilities {name}: {len(values)} values for the {length} frames of --motion: give "
                f"{', '.join(map(str, fitting[:-1]))} or {fitting[-1]} of them, or say with --first_frame which frame "
                "the first value is of"
            )
        if start + len(values) > length:
            raise UserError(
                f"--probabilities {name}: {len(values)} values from frame {start} on reach beyond the {length} frames "
                f"of --motion"
            )
        stop = min(stop, start + len(values))
    if stop <= start:
        raise UserError(
            f"--first_frame {start}: no frame is left to score before frame {stop} of the {length} frames of --motion"
        )
    frames = np.arange(start, stop)
    return frames, {
        name: values[frames] if len(values) == length else values[: len(frames)] for name, values in series.items()
    }


def _config(value: Any) -> MotionLSTMConfig:
    """The LSTM's configuration, whether the parser has already made the dataclass of it or not."""
    options = asdict(value) if is_dataclass(value) and not isinstance(value, type) else vars(value)
    return MotionLSTMConfig(**{field.name: options[field.name] for field in fields(MotionLSTMConfig)})


def run_files(args: argparse.Namespace) -> Evaluation:
    """Load what ``args`` names and evaluate it."""
    positive_number("--fps", args.fps)
    motion = load_series("--motion", args.motion)
    horizon = horizon_frames_of(positive_number("--horizon_seconds", args.horizon_seconds), args.fps)
    if horizon >= len(motion):
        raise UserError(
            f"--horizon_seconds: {args.horizon_seconds:g} s are {horizon} frames, and --motion has {len(motion)}"
        )
    paths = named_paths(args.probabilities)
    series = {name: load_series(f"--probabilities {name}", path) for name, path in paths.items()}
    frames, probabilities = scored_frames(series, len(motion), args.fps, args.first_frame, args.last_frame)
    onsets, labels_at_horizon = None, None
    if args.chases is not None:
        chases = load_series("--chases", args.chases)
        onsets = chases[:, 0] if chases.ndim == 2 and chases.shape[1] else chases
        if onsets.ndim != 1 or (onsets.size and not np.issubdtype(onsets.dtype, np.integer)):
            raise UserError(
                f"--chases: {args.chases} holds no start frames (K,) or (K, 4), but {onsets.dtype} of shape "
                f"{chases.shape}"
            )
        if onsets.size and (onsets.min() < 0 or onsets.max() >= len(motion)):
            raise UserError(
                f"--chases: start frames {onsets.min()} to {onsets.max()} reach beyond the {len(motion)} frames of "
                f"--motion; they are counted within the split"
            )
        labels_at_horizon = partial(chase_labels, onsets, len(motion))

    return evaluate(
        frames,
        load_series("--labels", args.labels),
        probabilities,
        motion,
        fps=args.fps,
        horizon_seconds=args.horizon_seconds,
        event="burst" if onsets is None else "chase",
        onsets=onsets,
        labels_at_horizon=labels_at_horizon,
        train_motion=None if args.train_motion is None else load_series("--train_motion", args.train_motion),
        train_labels=None if args.train_labels is None else load_series("--train_labels", args.train_labels),
        burst_c=args.burst_c,
        block_seconds=args.block_seconds,
        resamples=args.resamples,
        confidence=args.confidence,
        seed=args.seed,
        motion_lstm=_config(args.motion_lstm),
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    result = run_files(args)
    settings = {
        "files": {
            **{f"probabilities {name}": path for name, path in named_paths(args.probabilities).items()},
            **{key: getattr(args, key) for key in ("labels", "motion", "train_motion", "train_labels", "chases")},
        }
    }
    out = Path(args.out)
    write_text(out / "metrics.json", result.to_json())
    report = write_report(result, out / "report.html", settings)
    print_table(result)
    print(f"Report: {report}\nFigures: {out / 'metrics.json'}")
