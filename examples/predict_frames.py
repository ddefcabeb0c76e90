"""Predict the next frames of a video with FramePredictor in a plain PyTorch loop, and look at them.

    python examples/predict_frames.py --steps 500 --out prediction.gif

In so few steps, a minute on two cores, the network learns little more than where nothing is; on a GPU give it
thousands. The GIF shows prediction, truth and squared error side by side. The same with checkpoints, metrics,
TensorBoard and several GPUs: ``python main.py --config configs/moving_mnist.yaml``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from convlstm_fish import FramePredictor
from convlstm_fish.data.modules import MovingMNIST
from convlstm_fish.evaluate.frame_metrics import copy_last, frame_metrics
from convlstm_fish.tasks.callbacks.frame_grids import frame_video
from convlstm_fish.tasks.callbacks.video_summary import encode_gif


def main(args: Sequence[str] | None = None) -> float:
    """Train, print as it goes, write the GIF, and return the test's squared error per frame."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", default=None, help="folder with MNIST's IDX files; without it digits are drawn")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("prediction.gif"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)

    torch.manual_seed(0)
    data = MovingMNIST(options.digits)
    network = FramePredictor(1, options.hidden, 5, patch_size=4).to(options.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)

    def sequences(split: str, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys = torch.arange(first, first + options.batch_size, device=options.device)
        frames = data.sequences(split, keys)[:, :, None].float() / 255  # made on the device from their numbers
        return frames[:, :10], frames[:, 10:]

    for step in range(options.steps):
        video, future = sequences("train", step * options.batch_size)
        loss = F.mse_loss(network.to_frames(network(video, steps=10)), future)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: squared error per frame {loss.item() * 64 * 64:.1f}", flush=True)

    video, future = sequences("test", 0)
    predicted = network.predict(video, steps=10)
    error = frame_metrics(predicted, future)["mse"].mean().item()
    baseline = frame_metrics(copy_last(video, 10), future)["mse"].mean().item()
    print(f"test: squared error per frame {error:.1f}, copy of the last frame {baseline:.1f}")
    shown = frame_video(video[0], predicted[0], future[0])
    options.out.write_bytes(encode_gif((shown[:, 0] * 255).round().to(torch.uint8).cpu().numpy(), fps=5))
    print(f"written: {options.out}")
    return error


if __name__ == "__main__":
    main()
