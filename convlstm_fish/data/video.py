"""Decoding, and everything else that needs OpenCV.

Decoders trust their input: a URL or a text file that names other files opens as a "video", a path that is not
UTF-8 ends the process, a FIFO waits for ever, a broken stream ends early without a word, and seeking may
return another frame. So only regular local files with the first bytes of a known container are opened, frames
are read from first to last, and their number is compared with what the file claims.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import numpy.typing as npt
from filelock import FileLock

from convlstm_fish.data import store
from convlstm_fish.data.recording import Recording
from convlstm_fish.data.recording_writer import RecordingWriter
from convlstm_fish.errors import UserError
from convlstm_fish.progress import progress

Frame = npt.NDArray[np.uint8]

MAX_PIXELS = 2**26
# A container's first bytes: (offset, bytes, name). Playlists and other text are none of them.
_CONTAINERS = (
    (8, b"AVI ", "AVI"),
    (4, b"ftyp", "MP4"),
    (4, b"moov", "QuickTime"),
    (4, b"mdat", "QuickTime"),
    (4, b"wide", "QuickTime"),
    (4, b"free", "QuickTime"),
    (0, b"\x1aE\xdf\xa3", "Matroska"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "ASF"),
    (0, b"\x00\x00\x01\xba", "MPEG"),
    (0, b"\x00\x00\x01\xb3", "MPEG"),
    (0, b"OggS", "Ogg"),
    (0, b"FLV\x01", "Flash"),
    (0, b"YUV4MPEG2 ", "YUV4MPEG2"),
)
# These store how many frames they hold; of others OpenCV knows only duration times frame rate.
_COUNTED = ("AVI", "MP4", "QuickTime")
# This share of frame intervals may differ from the usual one: single dropped frames, not a variable rate.
_IRREGULAR = 0.001


def local_path(path: Path) -> str:
    """Absolute path of a regular local file that OpenCV can be given.

    Raises:
        UserError: for anything else.
    """
    store.regular_file(path)
    real = os.path.realpath(path)
    try:
        real.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{os.fsencode(path)!r}: the path is not valid UTF-8; rename the file or folder") from None
    return real


def sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def grey(image: npt.NDArray[np.uint8]) -> Frame:
    """Luma (H, W) of an image as OpenCV decodes it: (H, W), (H, W, 1) or blue, green, red (H, W, 3)."""
    if image.ndim == 2:
        return image
    if image.shape[2] == 1:
        return image[:, :, 0]
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), dtype=np.uint8)


def resize(frame: Frame, size: tuple[int, int]) -> Frame:
    """Resize to ``size`` (height, width): mean over the area where it shrinks, linear where it grows."""
    if frame.shape == size:
        return frame
    shrinks = size[0] <= frame.shape[0] and size[1] <= frame.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(frame, (size[1], size[0]), interpolation=method), dtype=np.uint8)


def decode_image(data: bytes, where: str) -> Frame:
    """Decode a PNG or JPEG file's bytes to grey uint8 (H, W). The header must have been checked before.

    EXIF orientation is ignored: pixels stay as the camera stored them.

    Raises:
        UserError: naming ``where``, for damaged files, 16-bit samples and transparency.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise UserError(f"{where}: cannot be decoded ({error.err})") from None
    if image is None:
        raise UserError(f"{where}: cannot be decoded; the file is damaged or incomplete")
    if image.dtype != np.uint8:
        raise UserError(f"{where}: has {image.dtype} samples; convert it to 8 bits")
    if image.ndim == 3 and image.shape[2] == 4:
        raise UserError(f"{where}: has transparent pixels; export it without an alpha channel")
    return grey(np.asarray(image, dtype=np.uint8))


class VideoReader:
    """A video file, read once from its first frame to its last.

    Iterating gives ``(frame, seconds)``: grey uint8 (H, W) and the time at which it is shown.

    Args:
        path: the file.
        allow_short: accept a file that ends before the number of frames it claims.

    Attributes:
        claimed: number of frames according to the file; 0 if it does not say.
        fps: frames per second according to the file.
        size: height and width.

    Raises:
        UserError: when it is not a video file, is damaged, or has a variable frame rate (at its end).
    """

    def __init__(self, path: Path, allow_short: bool = False) -> None:
        self.path, self.allow_short = path, allow_short
        self.real = local_path(path)
        with open(self.real, "rb") as file:
            head = file.read(1024)
        kinds = [name for at, mark, name in _CONTAINERS if head[at : at + len(mark)] == mark]
        # MPEG transport streams: packets of 188 bytes that start with G, in camcorders behind 4 bytes of time.
        if head[0:1024:188] == b"GGGGGG" or head[4:1024:192] == b"GGGGGG":
            kinds.append("MPEG")
        if not kinds:
            names = sorted({name for _, _, name in _CONTAINERS})
            raise UserError(f"{path}: is not a video file ({', '.join(names)}); convert it, to MP4 for example")
        self._capture = cv2.VideoCapture(self.real, cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            raise UserError(f"{path}: cannot be opened as a video; the file is damaged or its codec unknown")
        self.claimed = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self._may_miss = 0 if kinds[0] in _COUNTED else max(2, self.claimed // 100)
        self.fps = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.size = (
            int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
        )
        if not (math.isfinite(self.fps) and 0 < self.fps <= 1000):
            self.fps = 0.0
        if min(self.size) < 1 or self.size[0] * self.size[1] > MAX_PIXELS:
            self.close()
            raise UserError(f"{path}: has frames of {self.size[0]}x{self.size[1]}, expected 1 to {MAX_PIXELS} pixels")
        self.count = 0
        self._times: list[float] = []

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        while True:
            good, image = self._capture.read()
            if not good:
                break
            frame = grey(np.asarray(image, dtype=np.uint8))
            if self.count == 0:
                self.size = (frame.shape[0], frame.shape[1])  # after rotation, as decoded
            elif frame.shape != self.size:
                raise UserError(
                    f"{self.path}: frame {self.count} is {frame.shape[0]}x{frame.shape[1]}, the first one "
                    f"{self.size[0]}x{self.size[1]}"
                )
            seconds = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000
            self._times.append(seconds)
            self.count += 1
            yield frame, seconds
        self._check_count()

    def _check_count(self) -> None:
        if self.count == 0:
            raise UserError(f"{self.path}: holds no frame that can be decoded")
        if self.count < self.claimed - self._may_miss and not self.allow_short:
            raise UserError(
                f"{self.path}: ends after {self.count} of {self.claimed} frames; the file is damaged or incomplete "
                "(--allow_short takes what there is)"
            )

    def irregular(self) -> int:
        """How many frame intervals differ by more than half from the usual one, of the frames read so far."""
        steps = np.diff(np.asarray(self._times))
        usual = float(np.median(steps)) if len(steps) else 0.0
        if usual <= 0:  # no times in this container
            return 0
        return int((np.abs(steps - usual) > 0.5 * usual).sum())

    def check_regular(self) -> None:
        """Raise if the frame rate varies, so that a number of frames would not be a time."""
        odd = self.irregular()
        if odd > max(1, _IRREGULAR * self.count):
            raise UserError(
                f"{self.path}: has a variable frame rate ({odd} of {self.count} intervals differ from the usual "
                "one), so frames are no measure of time; prepare it with --resample 30 and without --fps, for example"
            )

    def close(self) -> None:
        """Release the file."""
        self._capture.release()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_cached(path: Path, cache: Path | None = None) -> Recording:
    """Open a video as a recording: decoded once, in grey and full size, into a folder in ``cache``.

    The folder's name depends on the file's path, size and time of change, so a changed video is decoded anew.

    Raises:
        UserError: as :class:`VideoReader`.
    """
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convlstm_fish"
    real = local_path(path)
    state = os.stat(real)
    key = hashlib.sha256(f"{real}|{state.st_size}|{state.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache / f"{path.stem}-{key}"
    if not (target / store.JSON_FILE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f".{target.name}.lock"):  # all processes of a run on several GPUs come at once
            if not (target / store.JSON_FILE).exists():
                _decode(path, target)
    return Recording.open(target)


def _decode(path: Path, target: Path) -> None:
    with VideoReader(path) as reader:
        if not reader.fps:
            raise UserError(f"{path}: does not tell its frame rate; prepare it with --fps")
        total = reader.claimed or sum(1 for _ in reader)
    most = total + total // 100 + 8  # some containers only estimate how many frames they hold
    with VideoReader(path) as reader, progress() as bar:
        frames = bar.track((frame for frame, _ in reader), total=total, description=f"Decoding {path.name}")
        first = next(iter(frames))
        source = {"source": path.name, "sha256": sha256(reader.real)}
        with RecordingWriter(target, (most, *first.shape), reader.fps, name=path.stem, metadata=source) as writer:
            writer.append(first)
            for frame in frames:
                if reader.count > most:
                    raise UserError(f"{path}: holds more frames than the {reader.claimed} it claims; prepare it")
                writer.append(frame)
            reader.check_regular()
            writer.finish(allow_short=True)
