"""Training under CUDA graphs is training: the same weights, and every other call runs as before."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.callbacks.cuda_graphs import CudaGraphs


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
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": accelerator, "devices": 1, "max_epochs": 3}
    loader: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    pl.Trainer(callbacks=callbacks, **settings, **options).fit(task, loader, loader)
    return task


def test_on_a_cpu_it_does_nothing() -> None:
    task, plain = fit([CudaGraphs()], "cpu"), fit([], "cpu")
    for ours, theirs in zip(task.state_dict().values(), plain.state_dict().values()):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_same_weights_as_without(precision: str) -> None:
    options = {"precision": precision, "gradient_clip_val": 0.5}
    graphs = CudaGraphs()
    used: list[bool] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            used.append(graphs._forward is not None and graphs._forward.graphed is not None)

    task, plain = fit([graphs, Look()], "gpu", **options), fit([], "gpu", **options)
    assert used.count(True) > 15
    assert "forward" not in vars(task.network)
    for (name, ours), theirs in zip(task.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
