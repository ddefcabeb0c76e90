"""Training under CUDA graphs is training: the same weights, and every other call runs as before."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from convlstm_fish.tasks import ClipClassification, FramePrediction
from convlstm_fish.tasks.callbacks import StepSeed
from convlstm_fish.tasks.callbacks.cuda_graphs import CudaGraphs

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(callbacks: list[pl.Callback], accelerator: str, **options: Any) -> ClipClassification:
    pl.seed_everything(4, verbose=False)
    task = ClipClassification(in_channels=2, hidden_channels=[8, 16], lr=1e-3)
    rng = torch.Generator().manual_seed(1)
    sizes = [4] * 8 + [3]  # the last batch of an epoch is short
    data = [
        {
            "video": torch.rand(n, 5, 2, 20, 24, generator=rng),
            "label": torch.arange(n) % 2,
            "index": torch.arange(n) + 10 * k,
        }
        for k, n in enumerate(sizes)
    ]
    settings = QUIET | {"accelerator": accelerator, "devices": 1, "max_epochs": 3}
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    pl.Trainer(callbacks=callbacks, **settings, **options).fit(task, loader, loader)
    return task


@pytest.mark.filterwarnings("ignore:GPU available but not used")  # on purpose
def test_on_a_cpu_it_does_nothing() -> None:
    task, plain = fit([CudaGraphs()], "cpu"), fit([], "cpu")
    for ours, theirs in zip(task.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(ours, theirs)


class Look(pl.Callback):
    """Notes after which batches a graph was there."""

    def __init__(self, graphs: CudaGraphs) -> None:
        self.graphs, self.used = graphs, list[bool]()

    def on_train_batch_end(self, *args: Any) -> None:
        self.used.append(self.graphs._forward is not None and self.graphs._forward.graphed is not None)


def compare(ours: pl.LightningModule, theirs: pl.LightningModule) -> None:
    for (name, one), other in zip(ours.state_dict().items(), theirs.state_dict().values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "32-true"},
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"precision": "32-true", "accumulate_grad_batches": 2},
    ],
)
def test_same_weights_as_without(options: dict[str, Any]) -> None:
    options = {"gradient_clip_val": 0.5} | options
    graphs = CudaGraphs()
    look = Look(graphs)
    task, plain = fit([graphs, look], "gpu", **options), fit([], "gpu", **options)
    assert look.used.count(True) > 15
    assert "forward" not in vars(task.network)
    compare(task, plain)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "encoder_decoder", "hidden_channels": 8},
        {"architecture": "encoder_forecaster", "hidden_channels": [8, 8]},
        {
            "architecture": "encoder_forecaster",
            "hidden_channels": [8, 8],
            "feedback": True,
            "sampling_start": 1.0,
            "sampling_steps": 20,
        },
        {
            "architecture": "stacked",
            "hidden_channels": [8, 8],
            "loss_on_context": True,
            "sampling_start": 1.0,
            "sampling_steps": 20,
        },
    ],
)
def test_frame_prediction_with_scheduled_sampling_too(options: dict[str, Any]) -> None:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        train_both(options)


def train_both(options: dict[str, Any]) -> None:
    rng = torch.Generator().manual_seed(2)
    data = [{"video": torch.rand(3, 4, 1, 16, 16, generator=rng), "future": torch.rand(3, 3, 1, 16, 16, generator=rng)}]
    data *= 12
    graphs = CudaGraphs()
    look = Look(graphs)
    tasks = []
    for callbacks in ([graphs, look, StepSeed(3)], [StepSeed(3)]):
        pl.seed_everything(4, verbose=False)
        tasks.append(FramePrediction(lr=1e-3, **options))
        settings = QUIET | {"accelerator": "gpu", "devices": 1, "max_epochs": 1, "callbacks": callbacks}
        settings["limit_val_batches"] = 0
        loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
        pl.Trainer(**settings).fit(tasks[-1], loader, loader)
    assert look.used.count(True) == 9
    compare(*tasks)


WAITS = """
import torch
from convlstm_fish.errors import UserError
from convlstm_fish.tasks.callbacks.cuda_graphs import GraphedForward

class Waits(torch.nn.Linear):
    def forward(self, video):
        return super().forward(video) * float(video.amax())

graphed, video = GraphedForward(Waits(4, 2).cuda()), torch.rand(3, 4, device="cuda")
try:
    for _ in range(6):
        graphed(video).sum().backward()
except UserError as error:
    print(error)
"""


@pytest.mark.gpu
def test_a_network_that_waits_for_the_gpu_is_told_in_one_line() -> None:
    # In a process of its own: CUDA is not itself again after a capture that failed.
    done = subprocess.run([sys.executable, "-c", WAITS], capture_output=True, text=True)
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    assert "train with --cuda_graphs=false" in done.stdout
