"""Writes tensorflow_probabilities.json: what TensorFlow gives for the published SavedModels on clips of our own.

Run with TensorFlow installed (2.21 was used): python tests/interop/make_tensorflow_probabilities.py ../shared
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

FRAMES = 120
NETWORKS = ("visionary-serenity", "upbeat-snowflake-91")
# A clip is noise from PCG64(seed), of which the given share of pixels is kept and the others are black, or
# sample frames by their indices, mirrored as "flip" says.
CLIPS: list[dict[str, object]] = [
    {"seed": 1, "share": 256},
    {"seed": 2, "share": 8},
    {"indices": [(7 * t) % 11 for t in range(FRAMES)], "flip": "HW"},
]


def clip(recipe: dict, frames: Path) -> np.ndarray:
    """(120, 120, 160) uint8."""
    if "seed" in recipe:
        raw = np.random.PCG64(recipe["seed"]).random_raw(FRAMES * 120 * 160).reshape(FRAMES, 120, 160)
        return np.where((raw >> 32 & 0xFF) < recipe["share"], raw >> 56, 0).astype(np.uint8)
    images = [
        np.asarray(Image.open(frames / f"{i:05d}.png").convert("L").resize((160, 120), Image.Resampling.NEAREST))
        for i in recipe["indices"]
    ]
    video = np.stack(images)
    video = video[:, ::-1] if "H" in recipe["flip"] else video
    return video[:, :, ::-1] if "W" in recipe["flip"] else video


def main(shared: Path) -> None:
    published = shared / "published"
    for name in NETWORKS:
        # Loaded as a graph: as objects, TensorFlow cannot restore the optimizer that Keras 2.4 saved.
        with tf.compat.v1.Session(graph=tf.Graph()) as session:
            model = tf.compat.v1.saved_model.load(session, ["serve"], str(published / "checkpoints" / name))
            signature = model.signature_def["serving_default"]
            (video_in,), (probability_out,) = signature.inputs.values(), signature.outputs.values()
            for recipe in CLIPS:
                video = clip(recipe, published / "frames").astype(np.float32) / 255
                video = video.reshape(30, 4, 120, 160).transpose(0, 2, 3, 1)[None]
                recipe[name] = session.run(probability_out.name, {video_in.name: video}).item()
    target = Path(__file__).with_name("tensorflow_probabilities.json")
    target.write_text(json.dumps({"tensorflow": tf.__version__, "clips": CLIPS}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
