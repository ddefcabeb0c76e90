"""From a user's video or images to a recording that looks like the published one: bright fish on black."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.data import background, clips, labels, store
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.data.video import VideoReader, local_path, resize, sha256
from convlstm_fish.errors import UserError, require
from convlstm_fish.progress import progress

Frame = npt.NDArray[np.uint8]
TimedFrames = Iterator[tuple[Frame, float]]

_SAMPLE_FRAMES = 301
_SAMPLE_BYTES = 2**27


@dataclass
class _Source:
    """Frames with their times, and what is known about them before they are read."""

    fps: float
    claimed: int
    frames: TimedFrames
    splits: dict[str, tuple[int, int]] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    reader: VideoReader | None = None


@dataclass(frozen=True)
class Staged:
    """Grey frames at their final size in a file without a name, which goes away with the process.

    Attributes:
        file: T frames of (H, W) bytes.
        shape: (T, H, W).
    """

    file: IO[bytes]
    shape: tuple[int, int, int]

    def read(self, number: int) -> Frame:
        """One frame."""
        height, width = self.shape[1:]
        data = os.pread(self.file.fileno(), height * width, number * height * width)
        return np.frombuffer(data, np.uint8).reshape(height, width)

    def sample(self) -> npt.NDArray[np.uint8]:
        """Frames spread evenly over the recording, at most 301 and 128 MiB of them."""
        most = max(3, min(_SAMPLE_FRAMES, _SAMPLE_BYTES // (self.shape[1] * self.shape[2])))
        numbers = np.unique(np.linspace(0, self.shape[0] - 1, most).astype(int))
        return np.stack([self.read(number) for number in numbers.tolist()])


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    roi: tuple[int, int, int, int] | None = None,
    invert: str = "auto",
    background_method: str = "auto",
    contrast: float | str = "auto",
    size: tuple[int, int] = (240, 320),
    fps: float | None = None,
    resample: float | None = None,
    splits: Sequence[float] | None = None,
    threshold: float | str = labels.BURST_C,
    clip_seconds: float = labels.CLIP_SECONDS,
    horizon_seconds: float = labels.HORIZON_SECONDS,
    allow_short: bool = False,
    overwrite: bool = False,
) -> Recording:
    """Make a recording of a video, a folder of numbered images, the published layout or another recording.

    Frames become grey, are cropped, resized within ``size`` (their shape is kept, the rest is black), freed of their
    background, and get bright fish on black. Motion and labels are computed, and everything appears under
    ``out`` at once, or not at all. Memory does not depend on the length.

    Args:
        source: what to read.
        out: the folder to make.
        roi: crop, as x, y, width, height in pixels of the source.
        invert: "yes" for fish darker than the tank, "no", or "auto".
        background_method: "median" over time, "none", or "auto" (none where frames are bright on black already).
        contrast: a factor, "none", or "auto" (fish as bright as the published ones).
        size: height and width of the recording's frames.
        fps: frames per second, instead of what the source says (images say nothing and are taken as 30).
        resample: make it so many frames per second, each the nearest in time; needed for a variable frame rate.
        splits: shares of train, validation, test; default the source's own or the published ones.
        threshold: the burst labels' c, or "auto" to have the published share of windows that are bursts.
        clip_seconds, horizon_seconds: windows of the stored labels.
        allow_short: accept a video that ends before the number of frames it claims.
        overwrite: replace a recording of this name.

    Returns:
        The recording; ``metadata`` says what was found and done, and :func:`describe` tells it.

    Raises:
        UserError: for options and input that cannot be used.
    """
    _check_options(invert, background_method, contrast, size, fps, resample, threshold)
    if clip_seconds <= 0 or horizon_seconds <= 0:
        raise UserError(f"clip_seconds {clip_seconds:g} and horizon_seconds {horizon_seconds:g} must be positive")
    if splits is not None:
        clips.split_ranges(1000, splits)
    target = Path(os.path.abspath(out))
    store.check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        reading = _open(Path(source), fps, resample, allow_short, stack)
        file = stack.enter_context(tempfile.TemporaryFile(dir=target.parent, prefix=".prepare.", suffix=".tmp"))
        staged = _stage(reading, file, roi, size)
        if reading.reader is not None and (resample is None or fps is not None):
            reading.reader.check_regular()
        try:
            look = background.study(staged.sample(), invert, background_method, contrast)
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        writer = stack.enter_context(
            RecordingWriter(
                target,
                (staged.shape[0], *size),
                reading.fps,
                splits=splits or reading.splits or clips.PUBLISHED_RATIOS,
                clip_frames=labels.clip_frames_of(clip_seconds, reading.fps),
                horizon=labels.horizon_frames_of(horizon_seconds, reading.fps),
                overwrite=overwrite,
                metadata={
                    **reading.metadata,
                    "roi": None if roi is None else list(roi),
                    "polarity": "dark fish, inverted" if look.dark_fish else "bright fish",
                    "background": "none" if look.background is None else "temporal median",
                    "noise_floor": look.floor,
                    "gain": look.gain,
                },
            )
        )
        _write(staged, look, size, writer)
        if threshold == "auto":
            writer.threshold = labels.auto_threshold(writer.motion, writer.clip_frames - 1, writer.horizon)
        else:
            writer.threshold = float(threshold)
        extra: dict[str, Any] = {} if look.background is None else {"background": look.background}
        return writer.finish(**extra)


def _check_options(
    invert: str,
    background_method: str,
    contrast: float | str,
    size: tuple[int, int],
    fps: float | None,
    resample: float | None,
    threshold: float | str,
) -> None:
    require("invert", invert, invert in ("auto", "yes", "no"), "auto, yes or no")
    require("background", background_method, background_method in ("auto", "median", "none"), "auto, median or none")
    factor = not isinstance(contrast, str) and contrast > 0
    require("contrast", contrast, contrast in ("auto", "none") or factor, "auto, none or a positive factor")
    require("size", size, len(size) == 2 and min(size) >= 1, "height and width of at least 1")
    for option, value in (("fps", fps), ("resample", resample)):
        require(option, value, value is None or 0 < value <= 1000, "a frame rate from 0 to 1000 per second")
    amount = not isinstance(threshold, str) and threshold > 0
    require("threshold", threshold, threshold == "auto" or amount, "auto or a positive amount of motion")


def _open(
    path: Path, fps: float | None, resample: float | None, allow_short: bool, stack: contextlib.ExitStack
) -> _Source:
    """Open whatever ``path`` is; nothing is decoded yet."""
    if path.is_dir():
        recording = Recording.open(path)
        rate = fps or recording.fps
        frames: TimedFrames = ((recording.cut(slice(k, k + 1))[0], k / rate) for k in range(len(recording)))
        source = _Source(rate, len(recording), frames, recording.splits, {"source": path.name})
        if fps is None and not recording.knows_fps:
            source.metadata["fps_assumed"] = True
    else:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; expected a video or a folder of numbered images")
        reader = stack.enter_context(VideoReader(path, allow_short))
        rate = fps or reader.fps or resample or 0.0
        if not rate:
            raise UserError(f"{path}: does not tell its frame rate; give it with --fps")
        metadata = {"source": path.name, "sha256": sha256(local_path(path))}
        frames = iter(reader) if fps is None else ((frame, k / fps) for k, (frame, _) in enumerate(reader))
        source = _Source(rate, reader.claimed, frames, None, metadata, reader)
    if resample is not None:
        source.metadata["resampled_from_fps"] = source.fps
        source.claimed = round(source.claimed / source.fps * resample)
        source.frames, source.fps, source.splits = _resampled(source.frames, resample), resample, None
    return source


def _resampled(frames: TimedFrames, fps: float) -> TimedFrames:
    """At times k / fps after the first frame, the frame that is nearest in time."""
    start, wanted, interval = 0.0, 0, 0.0
    previous: tuple[Frame, float] | None = None
    for frame, seconds in frames:
        if previous is None:
            start = seconds
        else:
            interval = seconds - previous[1]
            while start + wanted / fps <= previous[1] + interval / 2:
                yield previous
                wanted += 1
        previous = (frame, seconds)
    if previous is not None:
        while wanted == 0 or start + wanted / fps < previous[1] + interval / 2:
            yield previous
            wanted += 1


def inner_size(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The largest height and width of the shape ``height`` x ``width`` within ``size``."""
    scale = min(size[0] / height, size[1] / width)
    return max(1, min(size[0], round(height * scale))), max(1, min(size[1], round(width * scale)))


def _stage(source: _Source, file: IO[bytes], roi: tuple[int, int, int, int] | None, size: tuple[int, int]) -> Staged:
    """Decode everything once: grey, cropped, resized."""
    count, inner = 0, (0, 0)
    rows, columns = slice(None), slice(None)
    with progress() as bar:
        for frame, _ in bar.track(source.frames, total=source.claimed or None, description="Decoding"):
            if count == 0:
                rows, columns = _crop(roi, frame.shape[0], frame.shape[1])
                cropped = frame[rows, columns]
                inner = inner_size(cropped.shape[0], cropped.shape[1], size)
            try:
                file.write(np.ascontiguousarray(resize(frame[rows, columns], inner)).data)
            except OSError as error:
                raise UserError(f"no room for the decoded frames beside the output folder ({error.strerror})") from None
            count += 1
    file.flush()
    if source.reader is not None:
        source.metadata["frames_in_source"] = source.reader.count
        source.metadata["frames_claimed_by_source"] = source.reader.claimed
    return Staged(file, (count, *inner))


def _crop(roi: tuple[int, int, int, int] | None, height: int, width: int) -> tuple[slice, slice]:
    if roi is None:
        return slice(None), slice(None)
    x, y, w, h = roi
    if min(x, y) < 0 or min(w, h) < 1 or x + w > width or y + h > height:
        raise UserError(
            f"roi: {x},{y},{w},{h} (x, y, width, height) does not lie within the frames, {width} wide and {height} high"
        )
    return slice(y, y + h), slice(x, x + w)


def _write(staged: Staged, look: background.Appearance, size: tuple[int, int], writer: RecordingWriter) -> None:
    """Write every frame as bright fish on black, centred in ``size``."""
    height, width = staged.shape[1:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = np.zeros(size, np.uint8)
    with progress() as bar:
        for number in bar.track(range(staged.shape[0]), description="Writing"):
            canvas[top : top + height, left : left + width] = look.apply(staged.read(number))
            writer.append(canvas)


def describe(recording: Recording) -> list[str]:
    """What was prepared, for people: size, what was done to the frames, label windows, and labels in each split."""
    height, width = recording.size
    did, rule = recording.metadata, recording.label_rule
    clip, ahead, c = rule["first"] + 1, rule["horizon"], rule["c"]
    lines = [
        f"{recording.path}: {len(recording)} frames of {height}x{width} at {recording.fps:g} per second "
        f"({recording.seconds:.1f} s); splits "
        + ", ".join(f"{name} {stop - start}" for name, (start, stop) in recording.splits.items())
    ]
    if did.get("fps_assumed"):
        lines.append("images do not tell a frame rate; 30 per second is assumed, --fps says otherwise")
    claimed, there = did.get("frames_claimed_by_source", 0), did.get("frames_in_source", 0)
    if there < claimed:
        lines.append(f"the video ends after {there} of {claimed} frames")
    if "polarity" in did:
        lines.append(
            f"{did['polarity']}; background: {did['background']}; noise floor {did['noise_floor']:g}; "
            f"contrast x {did['gain']:g}"
        )
    other = "" if recording.fps == 30 else f" (windows follow seconds: {recording.fps:g} frames per second, not 30)"
    lines.append(
        f"labels: clips of {clip} frames ({clip / recording.fps:.2f} s), horizon {ahead} frames "
        f"({ahead / recording.fps:.2f} s){other}"
    )
    made = recording.labels(first=rule["first"], horizon=ahead)
    rates, counts = [], []
    for name, (start, stop) in recording.splits.items():
        ends = clips.clip_ends(start, stop, clip, ahead)
        counts.append(f"{name} {len(ends)}")
        if len(ends):
            rates.append((name, 100 * float(made[ends].mean())))
    lines.append(f"clips: {', '.join(counts)}, one for each frame that has a whole clip before it and a label")
    if rates:
        lines.append(
            f"positive labels at threshold {c:.3g}: "
            + ", ".join(f"{name} {rate:.1f} %" for name, rate in rates)
            + " (published: 13.4 %)"
        )
        if not all(5 <= rate <= 30 for _, rate in rates):
            auto = labels.auto_threshold(recording.motion, clip - 1, ahead)
            if not math.isclose(auto, c, rel_tol=1e-3):
                lines.append(
                    "motion grows with the number and size of the fish and with the frame interval; --threshold auto "
                    f"would take {auto:.3g}, where as many windows are bursts as in the published recording"
                )
    same = [name for name, rate in rates if rate in (0, 100) and name != "train"]
    if same:
        lines.append(f"all labels of {' and of '.join(same)} are the same: nothing can be scored there")
    short = clips.too_short(recording.name, recording.splits, len(recording), clip, ahead, recording.fps)
    return [*lines, short] if short else lines
