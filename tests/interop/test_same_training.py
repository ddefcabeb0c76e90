"""Twenty steps of this package's training and of Keras's, from the same weights on the same batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from convlstm_fish.tasks.clip_classification import ClipClassification

keras = pytest.importorskip("keras")

pytestmark = [
    # Keras's own, on its torch backend with NumPy 2.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]

STEPS, BATCH, CLIP = 20, 4, (4, 2, 12, 14)
CLASS_WEIGHTS = [0.133, 0.866]


class Batches(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The same batches in every pass."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        random = np.random.default_rng(0)
        for _ in range(STEPS):
            yield {
                "video": torch.from_numpy(random.random((BATCH, *CLIP), dtype=np.float32)),
                "label": torch.from_numpy(random.integers(0, 2, BATCH)),
            }


class Losses(pl.Callback):
    """Keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(outputs["loss"].item())


def test_twenty_adam_steps() -> None:
    from convlstm_fish.interop.keras_export import build_keras_model

    torch.manual_seed(0)
    task = ClipClassification(
        in_channels=CLIP[1],
        hidden_channels=[4, 5],
        padding="valid",
        bias=False,
        recurrent_activation="hard_sigmoid",
        class_weights=CLASS_WEIGHTS,
        lr=8e-5,
        eps=1e-7,
        batch_norm_momentum=0.01,
        backend="reference",
    )
    clip_shape = (CLIP[0], *CLIP[2:])
    model = build_keras_model(task.network, clip_shape)
    before = [np.array(array) for array in model.get_weights()]
    model.compile(optimizer=keras.optimizers.Adam(8e-5, epsilon=1e-7), loss="binary_crossentropy")
    keras_losses = [
        float(
            model.train_on_batch(
                batch["video"].permute(0, 1, 3, 4, 2).numpy(),
                batch["label"][:, None].float().numpy(),
                class_weight=dict(enumerate(CLASS_WEIGHTS)),
            )
        )
        for batch in Batches()
    ]

    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(task, torch.utils.data.DataLoader(Batches(), batch_size=None))

    assert len(losses.values) == len(keras_losses) == STEPS
    np.testing.assert_allclose(losses.values, keras_losses, rtol=1e-4)
    ours = build_keras_model(task.network, clip_shape).get_weights()
    for variable, start, mine, theirs in zip(model.weights, before, ours, model.get_weights()):
        difference = np.linalg.norm(mine - theirs)
        assert difference <= 1e-3 * np.linalg.norm(theirs), variable.path
        # Both have gone far more than they have gone apart.
        assert difference <= 0.05 * np.linalg.norm(theirs - start), variable.path
