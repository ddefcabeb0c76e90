"""visionary-serenity in Keras, on the backend that KERAS_BACKEND names: what training_step.py --keras runs.

Prints one line of JSON. A process of its own, because Keras has one backend a process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import keras
import numpy as np


def build(args: argparse.Namespace) -> Any:
    """The network, sigmoid gates as the other competitors have, "valid" input convolution, no biases."""
    layers = keras.layers
    recurrent = {"kernel_size": 3, "padding": "valid", "use_bias": False, "recurrent_activation": "sigmoid"}
    model = keras.Sequential(
        [
            keras.Input((args.steps, *args.size, args.channels)),
            layers.ConvLSTM2D(args.hidden[0], return_sequences=True, **recurrent),
            layers.TimeDistributed(layers.MaxPooling2D()),
            layers.BatchNormalization(scale=False, center=False),
            layers.ConvLSTM2D(args.hidden[1], **recurrent),
            layers.GlobalMaxPooling2D(),
            layers.Dense(1, dtype="float32"),
        ]
    )
    model.compile(keras.optimizers.Adam(8e-5, epsilon=1e-7), keras.losses.BinaryCrossentropy(from_logits=True))
    return model


def clock(function: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds; the result comes back to the host each time, so nothing is left running."""
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        before = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - before))
    return statistics.median(times)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--channels", type=int, default=4)
    options.add_argument("--size", type=int, nargs=2, default=(120, 160))
    options.add_argument("--hidden", type=int, nargs=2, default=(16, 32))
    options.add_argument("--repeats", type=int, default=10)
    options.add_argument("--inference", action="store_true")
    args = options.parse_args()
    if args.dtype != "float32":
        keras.mixed_precision.set_global_policy(f"mixed_{args.dtype}")
    keras.utils.set_random_seed(0)
    model = build(args)
    rng = np.random.default_rng(0)
    # On the device beforehand, as the others' clips are.
    video = keras.ops.convert_to_tensor(rng.random((args.batch, args.steps, *args.size, args.channels), np.float32))
    label = keras.ops.convert_to_tensor(rng.integers(0, 2, (args.batch, 1)).astype(np.float32))

    def step() -> Any:
        return model.predict_on_batch(video) if args.inference else model.train_on_batch(video, label)

    milliseconds = clock(step, args.repeats)
    print(json.dumps({"ms": milliseconds, "per_second": 1e3 * args.batch / milliseconds, "keras": keras.__version__}))


if __name__ == "__main__":
    main()
