"""Videos in TensorBoard, which shows an animated GIF as an image; torch's add_video needs moviepy for the same."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def encode_gif(frames: np.ndarray, fps: float) -> bytes:
    """An endless GIF.

    Args:
        frames: uint8 (T, H, W) or (T, H, W, 3).
        fps: frames per second; GIF counts in hundredths of a second.
    """
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or len(frames) < 1:
        raise ValueError(f"frames must be uint8 (T, H, W) or (T, H, W, 3), got {frames.dtype} {frames.shape}")
    images = [Image.fromarray(frame) for frame in frames]
    file = io.BytesIO()
    duration = max(20, round(100 / fps) * 10)
    # A GIF's frame that equals the one before would be merged with it: optimize and disposal keep every frame.
    images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0, optimize=False, disposal=2
    )
    return file.getvalue()


def add_video(writer: Any, tag: str, frames: np.ndarray, step: int, fps: float = 4.0) -> None:
    """Write a video to TensorBoard's image tab.

    Args:
        writer: a torch.utils.tensorboard.SummaryWriter.
        tag: its name.
        frames: uint8 (T, H, W) or (T, H, W, 3).
        step: the global step.
        fps: frames per second.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    height, width = frames.shape[1:3]
    image = Summary.Image(
        height=height,
        width=width,
        colorspace=1 if frames.ndim == 3 else 3,
        encoded_image_string=encode_gif(frames, fps),
    )
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
