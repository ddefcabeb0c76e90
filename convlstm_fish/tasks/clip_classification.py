"""Train and score a network that forecasts from a clip what is about to happen."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from convlstm_fish.errors import UserError, require
from convlstm_fish.layers import ConvLSTMCell
from convlstm_fish.models import ClipClassifier
from convlstm_fish.tasks.base import Batch, Task, valid_and_index
from convlstm_fish.tasks.scores import Scores


class ClipClassification(Task):
    """Classify clips with a :class:`~convlstm_fish.models.ClipClassifier`.

    One class is a yes-or-no question, trained with binary cross-entropy on logits; several classes are trained with
    cross-entropy. ``class_weights`` weigh each clip's loss and the sum is divided by the number of clips, as Keras does
    with ``class_weight``. Validation and test report the unweighted loss. The defaults of the optimizer are those of
    the published experiment.

    Batches: ``video`` (N, T, C, H, W) in [0, 1], ``label`` (N,); optional ``lengths`` (N,), ``index`` (N,) and
    ``valid`` (N,), False for padding that counts nowhere.

    Args:
        in_channels ... recurrent_dropout, backend: of the network, see :class:`~convlstm_fish.models.ClipClassifier`.
        class_weights: one weight for each label (two for the yes-or-no question), or None.
        l1, l2: penalty on the absolute values and on the squares of the ConvLSTM kernels, input and recurrent, as
            Keras's ``kernel_regularizer`` and ``recurrent_regularizer``.
        lr, betas, eps, weight_decay, lr_schedule, warmup_steps: see :class:`~convlstm_fish.tasks.base.Task`.

    Attributes:
        predictions: after ``test`` or ``validate``, arrays ``index``, ``probability`` and ``label``, one row a clip,
            of all processes, in order of ``index``.

    Raises:
        UserError: for a hyper-parameter that makes no sense.
    """

    def __init__(
        self,
        in_channels: int = 4,
        hidden_channels: list[int] = [16, 32],  # noqa: B006 (never changed; jsonargparse shows it in --help)
        kernel_size: int | list[int] | list[list[int]] = 3,
        num_classes: int = 1,
        padding: str | int | list[str] | list[int] = "same",
        bias: bool | list[bool] = True,
        peephole: str | None = None,
        recurrent_activation: str = "sigmoid",
        pool_size: int | list[int] = 2,
        batch_norm: bool | list[bool] = True,
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.01,
        batch_norm_affine: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        head: str = "max",
        dense_features: list[int] = [],  # noqa: B006
        stem_channels: list[int] = [],  # noqa: B006
        image_size: list[int] | None = None,
        checkpoint_every: int | None = None,
        backend: str = "auto",
        class_weights: list[float] | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        lr: float = 8e-5,
        betas: list[float] = [0.9, 0.999],  # noqa: B006
        eps: float = 1e-7,
        weight_decay: float = 0.0,
        lr_schedule: str = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(lr, betas, eps, weight_decay, lr_schedule, warmup_steps)
        self.save_hyperparameters()
        labels = max(2, num_classes)
        if class_weights is not None and (len(class_weights) != labels or min(class_weights) < 0):
            raise UserError(f"class_weights: {class_weights!r} are not {labels} numbers from 0 up, one for each label")
        for name, value in (("l1", l1), ("l2", l2)):
            require(name, value, value >= 0, "0 or more")
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()
        self.predictions: dict[str, npt.NDArray[Any]] = {}

    # -- set-up ----------------------------------------------------------------------------------------------------

    def configure_models(self) -> None:
        """Build the network from the hyper-parameters."""
        own = {"class_weights", "l1", "l2", "lr", "betas", "eps", "weight_decay", "lr_schedule", "warmup_steps"}
        self.network = ClipClassifier(**{name: value for name, value in self.hparams.items() if name not in own})

    def configure_losses(self) -> None:
        """Keep the class weights beside the network, so that they are on its device; they are no weights of it."""
        weights = self.hparams["class_weights"]
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)

    def configure_metrics(self) -> None:
        """Scores and mean loss of validation and test."""
        classes = self.hparams["num_classes"]
        self.val_scores, self.test_scores = Scores(classes), Scores(classes)
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    # -- parts of a step -------------------------------------------------------------------------------------------

    def forward(self, video: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (N, num_classes) of clips (N, T, C, H, W)."""
        logits: Tensor = self.network(video, lengths)
        return logits

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """Unweighted loss of each clip (N,), in float32."""
        logits = logits.float()
        if logits.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(logits[:, 0], label.float(), reduction="none")
        return F.cross_entropy(logits, label, reduction="none")

    def probability(self, logits: Tensor) -> Tensor:
        """Probability of label 1 (N,), or of every class (N, classes)."""
        logits = logits.float()
        return torch.sigmoid(logits[:, 0]) if logits.shape[1] == 1 else torch.softmax(logits, dim=1)

    def penalty(self) -> Tensor:
        """L1 and L2 penalty of the ConvLSTM kernels."""
        kernels = [w for m in self.network.modules() if isinstance(m, ConvLSTMCell) for w in (m.weight_ih, m.weight_hh)]
        total = kernels[0].new_zeros(())
        if self.hparams["l1"]:
            total = total + self.hparams["l1"] * torch.stack([w.abs().sum() for w in kernels]).sum()
        if self.hparams["l2"]:
            total = total + self.hparams["l2"] * torch.stack([w.square().sum() for w in kernels]).sum()
        return total

    def _score(self, batch: Batch, scores: Scores, mean_loss: MeanMetric) -> None:
        valid, index = valid_and_index(batch)
        logits = self(batch["video"], batch.get("lengths"))[valid]
        label = batch["label"][valid]
        if len(label):
            mean_loss.update(self.loss(logits, label))
        # Even with nothing but padding: a process with no part to gather would keep the others waiting.
        scores.update(index, self.probability(logits), label)

    def _report(self, stage: str, scores: Scores, mean_loss: MeanMetric) -> None:
        self.log(f"{stage}/loss", mean_loss, prog_bar=stage == "val")
        for name, value in scores.compute().items():
            # compute() gives the same value on all processes: their mean is that value.
            self.log(f"{stage}/{name}", value, prog_bar=name == "auroc", sync_dist=True)
        with scores.sync_context():
            gathered = scores.predictions()
        self.predictions = {name: np.asarray(part.cpu()) for name, part in vars(gathered).items()}
        scores.reset()

    # -- steps -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Weighted loss of the batch and the penalties."""
        label = batch["label"]
        losses = self.loss(self(batch["video"], batch.get("lengths")), label)
        self.log("train/bce" if self.hparams["num_classes"] == 1 else "train/ce", losses.mean().detach())
        if self.class_weights is not None:
            losses = losses * self.class_weights[label]
        total = losses.mean() + self.penalty()
        self._log_loss(total)
        return total

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """``index`` and ``probability`` of the clips that are no padding."""
        probability = self.probability(self(batch["video"], batch.get("lengths")))
        valid, index = valid_and_index(batch)
        return {"index": index, "probability": probability[valid]}
