"""Classify clips of different length with a network of your own: layers of convlstm_fish in a plain PyTorch loop.

Each clip shows two digits of which one moves; the class is that digit, so the network has to look at time. A
convolution on every frame, a ConvLSTM, and its state at each clip's own last step, flattened, give ten classes:

    python examples/sequence_classification.py --steps 2000

The same with checkpoints, TensorBoard and several GPUs:

    python main.py --config configs/sequence_classification.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from convlstm_fish import ConvLSTM, TimeDistributed
from convlstm_fish.data.modules import DigitClips
from convlstm_fish.layers import collate_clips


class WhichMoves(nn.Module):
    """Per-frame convolution, ConvLSTM, flatten, ten classes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.frame = TimeDistributed(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()))
        self.recurrent = ConvLSTM(8, 12, 3, return_sequences=False)
        dense = nn.Sequential(nn.Linear(12 * (size // 2) ** 2, 64), nn.ReLU(), nn.Linear(64, 10))
        self.head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), dense)

    def forward(self, video: Tensor, lengths: Tensor) -> Tensor:
        last, _ = self.recurrent(self.frame(video, lengths), lengths=lengths)
        logits: Tensor = self.head(last)
        return logits


class Clips(Dataset[dict[str, Any]]):
    """Clips as they would come from files: each a tensor (T, 1, H, W) of its own length."""

    def __init__(self, source: DigitClips, split: str) -> None:
        self.video, self.lengths, self.labels = source.clips(split, torch.arange(source.sizes[split]))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        frames = self.video[index, : self.lengths[index], None]
        return {"video": frames.float() / 255, "label": self.labels[index]}


def main(args: Sequence[str] | None = None) -> float:
    """Train, print as it goes, and return the accuracy on the test clips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--clips", type=int, default=20_000, help="training clips")
    parser.add_argument("--test_clips", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(args)

    torch.manual_seed(0)
    source = DigitClips(train_size=options.clips, test_size=options.test_clips)
    train = DataLoader(Clips(source, "train"), options.batch_size, shuffle=True, collate_fn=collate_clips)
    test = DataLoader(Clips(source, "test"), options.batch_size, collate_fn=collate_clips)
    network = WhichMoves(source.image_size).to(options.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)

    step = 0
    while step < options.steps:
        for batch in train:
            logits = network(batch["video"].to(options.device), batch["lengths"].to(options.device))
            loss = F.cross_entropy(logits, batch["label"].to(options.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 100 == 0 or step == options.steps:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            if step == options.steps:
                break

    network.eval()
    hits = 0
    with torch.no_grad():
        for batch in test:
            logits = network(batch["video"].to(options.device), batch["lengths"].to(options.device))
            hits += int((logits.argmax(1).cpu() == batch["label"]).sum())
    accuracy = hits / source.sizes["test"]
    print(f"test accuracy {accuracy:.3f} (guessing: 0.1)")
    return accuracy


if __name__ == "__main__":
    main()
