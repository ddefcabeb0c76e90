"""The two published networks: their parameters, and their probabilities on the published clips."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from convlstm_fish.models import ClipClassifier, upbeat_snowflake, visionary_serenity

NETWORKS = {"visionary-serenity": visionary_serenity, "upbeat-snowflake-91": upbeat_snowflake}


def published(shared: Path, name: str) -> tuple[ClipClassifier, int]:
    """The network with the published arrays in it, and how many numbers those arrays hold."""
    with np.load(shared / "published" / "weights" / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    total = sum(array.numel() for array in arrays.values())
    network = NETWORKS[name]().eval()

    def put(target: Tensor, array: Tensor) -> None:
        assert target.shape == array.shape
        target.copy_(array)

    with torch.no_grad():
        for k, layer in enumerate(network.layers, start=1):
            put(layer.cells[0].weight_ih, arrays.pop(f"convLSTM_{k}_kernel").permute(3, 2, 0, 1))
            put(layer.cells[0].weight_hh, arrays.pop(f"convLSTM_{k}_recurrent_kernel").permute(3, 2, 0, 1))
        put(network.norms[0].running_mean, arrays.pop("batchnorm_1_moving_mean"))
        put(network.norms[0].running_var, arrays.pop("batchnorm_1_moving_variance"))
        put(network.classifier.weight, arrays.pop("dense_kernel").T)
        put(network.classifier.bias, arrays.pop("dense_bias"))
    assert not arrays
    return network, total


def clip_of(shared: Path, indices: list[int], flip: str | None) -> Tensor:
    """(1, 30, 4, 120, 160) in [0, 1], made as reference_probabilities.json says."""
    frames = []
    for index in indices:
        image = Image.open(shared / "published" / "frames" / f"{index:05d}.png").convert("L")
        frames.append(np.asarray(image.resize((160, 120), Image.Resampling.NEAREST)))
    video = torch.from_numpy(np.stack(frames)).float().div(255).view(1, 30, 4, 120, 160)
    assert flip in (None, "W")
    return video.flip(-1) if flip else video


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_are_the_published_ones(shared: Path, name: str) -> None:
    network, total = published(shared, name)
    ours = sum(p.numel() for p in network.parameters())
    ours += sum(buffer.numel() for buffer in network.buffers() if buffer.dim())
    assert ours == total


@pytest.mark.parametrize("name", NETWORKS)
def test_probabilities_are_the_published_ones(shared: Path, name: str) -> None:
    network, _ = published(shared, name)
    clips = json.loads((shared / "published" / "reference_probabilities.json").read_text())["clips"]
    clips = [clip for clip in clips if name in clip]
    assert clips
    for clip in clips:
        with torch.no_grad():
            probability = network(clip_of(shared, clip["frame_indices"], clip["flip"])).sigmoid().item()
        assert abs(probability - clip[name]) < 1e-6
