"""Bright fish on black from any steady camera: background, polarity, noise floor, contrast.

All of it is found once per recording: a scale that followed each frame would itself look like motion. Only a
frame's overall brightness, which lamps and cameras change, is taken out of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from convlstm_fish.errors import UserError

Frame = npt.NDArray[np.uint8]

# Of the published frames' pixels over 20, i.e. of fish, 90 % are below this (measured on the sample frames).
PUBLISHED_FISH_LEVEL = 158.0
_FISH = 20.0
_MAX_GAIN = 20.0
# So many frames of the sample are enough to see polarity, noise and contrast.
_STUDIED = 50
# A background is black already when 95 % of it is not brighter than this.
_BLACK = 12.0


def temporal_median(frames: npt.NDArray[np.uint8]) -> Frame:
    """Median over time of (K, H, W), a few rows at a time."""
    out = np.empty(frames.shape[1:], np.uint8)
    for row in range(0, frames.shape[1], 8):
        out[row : row + 8] = np.median(frames[:, row : row + 8], axis=0)
    return out


@dataclass(frozen=True)
class Appearance:
    """How a grey frame becomes bright fish on black.

    Attributes:
        background: (H, W), or None to subtract nothing.
        dark_fish: whether fish are darker than the background.
        floor: differences up to this are noise.
        gain: what is above the floor is multiplied by this.
    """

    background: Frame | None
    dark_fish: bool
    floor: float
    gain: float

    @property
    def changes_nothing(self) -> bool:
        """Whether frames stay as they are."""
        return self.background is None and not self.dark_fish and self.floor == 0 and self.gain == 1

    def apply(self, frame: Frame) -> Frame:
        """Bright fish on black, uint8 (H, W)."""
        if self.changes_nothing:
            return frame
        return to_uint8((difference(frame, self.background, self.dark_fish) - self.floor) * self.gain)


def difference(frame: Frame, background: Frame | None, dark_fish: bool) -> npt.NDArray[np.float32]:
    """How much brighter (darker, for dark fish) each pixel is than the background.

    Without a background it is how bright (dark) the pixel is. With one, the difference that most pixels of the frame
    have, a change of the light, is taken out.
    """
    values = frame.astype(np.float32)
    if background is None:
        return 255 - values if dark_fish else values
    values -= background
    values -= np.median(values[::2, ::2])
    return -values if dark_fish else values


def to_uint8(values: npt.NDArray[np.float32]) -> Frame:
    """Rounded and cut to 0..255."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def study(
    frames: npt.NDArray[np.uint8], invert: str = "auto", background: str = "auto", contrast: float | str = "auto"
) -> Appearance:
    """Find out from a sample of frames how fish become bright on black.

    Args:
        frames: grey uint8 (K, H, W), spread over the recording.
        invert: "yes" for fish darker than the tank, "no" for brighter ones, "auto" to see on which side of the
            background the moving things are.
        background: "median" over time, "none", or "auto": none if the frames are bright on black already.
        contrast: a factor, "none", or "auto": fish get the brightness of the published ones.

    Raises:
        UserError: when "auto" cannot tell.
    """
    middle = temporal_median(frames)
    black = bool(np.percentile(middle, 95) <= _BLACK)
    subtract = background == "median" or (background == "auto" and not black)
    if not subtract and black and invert != "yes" and contrast in ("auto", "none"):
        return Appearance(None, False, 0.0, 1.0)
    base = middle if subtract else None
    frames = frames[:: -(-len(frames) // _STUDIED)]
    apart = np.stack([difference(frame, base, False) for frame in frames])
    noise = _noise(apart) if subtract else 0.0
    dark = _fish_are_dark(apart, noise, base is None) if invert == "auto" else invert == "yes"
    floor = float(np.ceil(4 * noise))
    bright = np.stack([difference(frame, base, True) for frame in frames]) if dark else apart
    gain = _gain(bright - floor) if contrast == "auto" else 1.0 if contrast == "none" else float(contrast)
    return Appearance(base, dark, floor, gain)


def _noise(apart: npt.NDArray[np.float32]) -> float:
    """Standard deviation of the noise, from the pixels without fish (the median of the absolute values)."""
    return max(0.5, 1.4826 * float(np.median(np.abs(apart))))


def _fish_are_dark(apart: npt.NDArray[np.float32], noise: float, absolute: bool) -> bool:
    """Whether the things that stand out are darker than the rest."""
    values = apart - np.median(apart) if absolute else apart
    limit = 5 * max(noise, 1.0)
    above = float(np.square(np.maximum(values - limit, 0), dtype=np.float64).sum())
    below = float(np.square(np.maximum(-values - limit, 0), dtype=np.float64).sum())
    if max(above, below) == 0:
        raise UserError(
            "invert auto: nothing stands out from the background, so dark and bright fish look the same; "
            "choose --invert yes for dark fish or no for bright ones, or check that fish move"
        )
    return below > above


def _gain(values: npt.NDArray[np.float32]) -> float:
    """The factor that gives fish the published brightness: 90 % of their pixels below ``PUBLISHED_FISH_LEVEL``."""
    values = values[values > _FISH / _MAX_GAIN]
    gain = 1.0
    for _ in range(20):  # what counts as fish depends on the gain; this settles in a few rounds
        fish = values[values * gain > _FISH]
        if len(fish) == 0:
            gain = min(_MAX_GAIN, 2 * gain)
            continue
        gain = min(_MAX_GAIN, PUBLISHED_FISH_LEVEL / float(np.percentile(fish, 90)))
    return round(gain, 3)
