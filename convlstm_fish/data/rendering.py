"""Fish bodies to pixels: what the camera above the simulated tank sees.

A body is a midline that bends, with a width and a brightness along it. For every pixel near a fish the place
along and beside its midline is found, and the share of the pixel that the body covers: edges are smooth and a
movement of a fraction of a pixel shows, as in a real video. Lengths are in *tank units*: pixels of a 240x320 frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

REFERENCE_SIZE = (240, 320)
"""Height and width of the published frames: at this size one tank unit is one pixel."""

PIVOT = 0.35
"""Where along the body (0 snout, 1 tail tip) the position of a fish is: the point it turns about."""

# The body seen from above in the published frames, from snout (0) to tail tip (1): half width as a
# fraction of the length, and brightness as a fraction of the trunk's.
_ALONG = np.array([0.0, 0.04, 0.10, 0.20, 0.35, 0.50, 0.65, 0.80, 0.92, 1.0])
_HALF_WIDTH = np.array([0.030, 0.062, 0.073, 0.075, 0.068, 0.056, 0.040, 0.027, 0.020, 0.012])
_BRIGHTNESS = np.array([0.90, 1.32, 1.30, 1.08, 1.0, 0.98, 0.92, 0.74, 0.55, 0.40])

_NODES = 40  # pieces of a midline
_FINE = 512  # steps of the tables of width and brightness per body length
_MARGIN = 0.2  # how far before the snout and behind the tail a pixel may still be touched, in body lengths


@dataclass(frozen=True)
class Bodies:
    """The looks of the fish, one entry per fish.

    Attributes:
        length: body lengths in tank units.
        girth: widths relative to the average fish.
        brightness: grey level of the trunk, 0 to 255.
        spot: grey level added by the bright spot before the tail.
    """

    length: npt.NDArray[np.float64]
    girth: npt.NDArray[np.float64]
    brightness: npt.NDArray[np.float64]
    spot: npt.NDArray[np.float64]

    @classmethod
    def random(cls, n_fish: int, rng: np.random.Generator) -> Bodies:
        """Fish of one age: lengths of 29 to 35 units and brightness as measured in the published frames."""
        return cls(
            length=rng.uniform(29.5, 35.0, n_fish),
            girth=rng.uniform(0.94, 1.08, n_fish),
            brightness=rng.uniform(118.0, 138.0, n_fish),
            spot=rng.uniform(20.0, 90.0, n_fish),
        )


def scale_of(size: tuple[int, int]) -> float:
    """Pixels per tank unit of a frame of ``size`` (height, width)."""
    return min(size[0] / REFERENCE_SIZE[0], size[1] / REFERENCE_SIZE[1])


def tank_walls(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom wall in tank units; black borders are left as in the published frames."""
    scale = scale_of(size)
    height, width = size[0] / scale, size[1] / scale
    return (0.045 * width, 0.125 * height, 0.955 * width, 0.872 * height)


def background(size: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """What is left of an empty tank when its median image is subtracted: faint glints and specks.

    Args:
        size: height and width in pixels.
        rng: where the specks are.

    Returns:
        uint8 (H, W), almost everywhere 0.
    """
    scale = scale_of(size)
    left, top, right, bottom = (wall * scale for wall in tank_walls(size))
    image = np.zeros(size)
    for x, y, level in rng.uniform(size=(60, 3)):
        column = min(int(left + x * (right - left)), size[1] - 1)
        row = min(int(top + y * (bottom - top)), size[0] - 1)
        image[row, column] += 110.0 * level**5
    # Reflections of the surface at the far wall: a glimmer over a few rows that fades downwards.
    rows = np.arange(round(top), min(round(top + 7 * scale) + 1, size[0]))
    for start in (0.03, 0.76):
        columns = np.arange(round(left + start * (right - left)), round(left + (start + 0.19) * (right - left)))
        fade = np.exp(-(rows - rows[0]) / (2.2 * scale))[:, None] * np.sin(np.linspace(0, np.pi, len(columns))) ** 0.5
        image[rows[0] : rows[-1] + 1, columns] += 14.0 * fade * rng.gamma(2.0, 0.5, (len(rows), len(columns)))
    return np.minimum(image, 110).astype(np.uint8)


class Camera:
    """Draws poses of the same fish in front of the same background.

    Args:
        size: height and width of the frames in pixels.
        bodies: the looks of the fish.
        backdrop: uint8 (H, W), see :func:`background`.
    """

    def __init__(self, size: tuple[int, int], bodies: Bodies, backdrop: npt.NDArray[np.uint8]) -> None:
        self.size = size
        self.backdrop = backdrop
        self.scale = scale_of(size)
        self.length = bodies.length * self.scale
        self.patch = int(np.ceil(self.length.max())) + 6
        # Width and brightness along each body, averaged over the length of one pixel: a pixel is no point.
        along = np.arange(-_MARGIN, 1 + _MARGIN, 1 / _FINE)
        within = np.arange(-0.5, 0.5, 1 / 16)
        place = along + within[:, None, None] / self.length[:, None]
        body = (place >= 0) & (place <= 1)
        half_width = np.where(body, np.interp(place, _ALONG, _HALF_WIDTH), 0.0) * bodies.girth[:, None]
        level = np.interp(place, _ALONG, _BRIGHTNESS) * bodies.brightness[:, None]
        level += bodies.spot[:, None] * np.exp(-(((place - 0.6) / 0.035) ** 2))
        # In a small frame fish are drawn somewhat wider, or their motion would drown in the pixels.
        half_width *= self.length[:, None] * max(1.0, 0.7 + 0.15 / self.scale)
        light = (half_width * level).mean(axis=0)
        half_width = half_width.mean(axis=0)
        self.half_width = half_width.astype(np.float32)
        self.level = (light / np.maximum(half_width, 1e-9)).astype(np.float32)

    def draw(self, poses: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
        """Frames of the given poses.

        Args:
            poses: (n, fish, 6): x, y of the pivot in tank units, heading, bend of the tail against the
                heading, amplitude and phase of the tail beat, in radians.

        Returns:
            uint8 (n, H, W), bright fish on black.
        """
        height, width = self.size
        patch, n_frames = self.patch, len(poses)
        # A fish at the wall reaches over the border of the frame: the canvas is wider.
        canvas = np.zeros((n_frames, height + 2 * patch, width + 2 * patch), np.uint8)
        patches, rows, columns = self._patches(poses)
        for frame, image in enumerate(canvas):
            for fish in range(poses.shape[1]):
                row, column = rows[frame, fish] + patch, columns[frame, fish] + patch
                window = image[row : row + patch, column : column + patch]
                np.maximum(window, patches[frame, fish], out=window)
        left, top, right, bottom = (round(wall * self.scale) for wall in tank_walls(self.size))
        frames = np.zeros((n_frames, height, width), np.uint8)
        frames[:, top:bottom, left:right] = canvas[:, patch + top : patch + bottom, patch + left : patch + right]
        np.maximum(frames, self.backdrop, out=frames)
        return frames

    def _patches(
        self, poses: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """Every fish of every frame on a small square of its own, and the row and column of the square's corner."""
        patch = self.patch
        n_frames, n_fish = poses.shape[:2]
        x, y, heading = poses[:, :, 0] * self.scale, poses[:, :, 1] * self.scale, poses[:, :, 2]
        deflection, slope, shrink = self._midlines(poses)
        # 2^-20 steps: processors differ in the last bit of a sine, the frames must not.
        cosine, sine = np.rint(np.cos(heading) * 2**20) / 2**20, np.rint(np.sin(heading) * 2**20) / 2**20
        reach = (0.5 - PIVOT) * self.length
        columns = np.floor(x - reach * cosine).astype(np.intp) - patch // 2
        rows = np.floor(y - reach * sine).astype(np.intp) - patch // 2
        right = (np.arange(patch) + 0.5 + columns[:, :, None] - x[:, :, None]).astype(np.float32)[:, :, None, :]
        down = (np.arange(patch) + 0.5 + rows[:, :, None] - y[:, :, None]).astype(np.float32)[:, :, :, None]
        cosine, sine = (part.astype(np.float32)[:, :, None, None] for part in (cosine, sine))
        # Along the axis behind the snout (0 to 1) and beside it (in pixels).
        extent = (self.length * shrink).astype(np.float32)[:, :, None, None]
        step = extent / np.float32(_NODES)
        along = PIVOT - (right * (cosine / extent) + down * (sine / extent))
        beside = right * sine - down * cosine
        # Only pixels that the body may touch are looked at, an eighth of the square.
        width = np.abs(deflection).max(axis=2) + (self.half_width.max(axis=1) + 1)
        touched = (along > 0.01 - _MARGIN) & (along < 0.99 + _MARGIN) & (np.abs(beside) < width[:, :, None, None])
        near = np.flatnonzero(touched)
        along, beside = along.ravel()[near], beside.ravel()[near]
        fish_of = near // patch**2
        piece = along * np.float32(_NODES)
        at = np.clip(piece.astype(np.intp), 0, _NODES - 1)
        node = fish_of * _NODES + at
        tilt = slope.ravel()[node]
        offset = deflection.ravel()[node] + tilt * (piece - at.astype(np.float32)) * step.ravel()[fish_of]
        apart = np.abs(beside - offset) / np.sqrt(1 + tilt * tilt)
        fine = ((along + np.float32(_MARGIN)) * np.float32(_FINE)).astype(np.intp)
        fine += fish_of % n_fish * self.level.shape[1]
        half_width = self.half_width.ravel()[fine]
        cover = np.minimum(half_width + np.float32(0.5) - apart, np.minimum(2 * half_width, 1))
        light = np.maximum(cover, 0) * self.level.ravel()[fine] + np.float32(0.5)
        grey = np.zeros(n_frames * n_fish * patch**2, np.uint8)
        grey[near] = np.minimum(light, 255)
        limit_row, limit_column = self.size
        return (
            grey.reshape(n_frames, n_fish, patch, patch),
            np.clip(rows, -patch, limit_row),
            np.clip(columns, -patch, limit_column),
        )

    def _midlines(
        self, poses: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float64]]:
        """Midlines over the straight axis of each fish, at equal steps from snout to tail.

        Returns:
            Deflection in pixels and slope, both (n, fish, nodes), and how much shorter the bent fish is along
            its axis (n, fish).
        """
        bend, amplitude, phase = (poses[:, :, i, None] for i in (3, 4, 5))
        along = (np.arange(_NODES) + 0.5) / _NODES
        behind = np.maximum(along - 0.2, 0.0) / 0.8
        # The tail trails in a turn; the beat is a wave that travels backwards and grows towards the tail.
        wave = amplitude * (0.10 + 0.90 * behind**1.5) * np.sin(phase - 5.0 * along)
        slope = np.clip(np.rint((1.5 * bend * behind**1.4 + wave) * 2**20) / 2**20, -2.5, 2.5)
        shrink = _NODES / np.cumsum(np.sqrt(1 + slope * slope), axis=2)[:, :, -1]
        step = (self.length * shrink / _NODES)[:, :, None]
        deflection = (np.cumsum(slope, axis=2) - slope) * step
        pivot = deflection[:, :, int(PIVOT * _NODES), None]
        return (deflection - pivot).astype(np.float32), slope.astype(np.float32), shrink
