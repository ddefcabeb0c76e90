"""The second published baseline: a two-layer LSTM that sees nothing but the motion series.

Motion y[t] is the mean absolute difference of frames t and t+1, so at frame t the newest value known is
y[t-1]. The network reads y[..t-1] step by step and gives, at each step, the probability of the label at t.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.metrics import Bools, Floats, rank_auc
from convlstm_fish.progress import progress


@dataclass
class MotionLSTMConfig:
    """How the LSTM on the motion series is built and trained.

    Args:
        hidden_size: width of each layer.
        num_layers: number of layers; two in the published baseline.
        dropout: dropout between the layers.
        epochs: passes over the training series; the one with the best validation AUC is kept.
        lr: learning rate of Adam.
        batch_size: segments per step.
        segment_seconds: length of a training segment; its first second only warms up the state.
        class_weights: loss weights of labels 0 and 1, by default those of the published ConvLSTM.
        validation_fraction: the end of the training series, kept for choosing the epoch.
        seed: weights and segment offsets follow from it.
    """

    hidden_size: int = 32
    num_layers: int = 2
    dropout: float = 0.0
    epochs: int = 20
    lr: float = 5e-3
    batch_size: int = 16
    segment_seconds: float = 10.0
    class_weights: list[float] = field(default_factory=lambda: [0.133, 0.866])
    validation_fraction: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"motion LSTM: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "segment_seconds"):
            if not getattr(self, name) > 0:
                raise UserError(f"motion LSTM: {name} must be positive, got {getattr(self, name)}")
        for name in ("dropout", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"motion LSTM: {name} must be in [0, 1), got {getattr(self, name)}")
        if self.dropout and self.num_layers == 1:
            raise UserError(f"motion LSTM: dropout {self.dropout} acts between layers and needs num_layers above 1")
        if len(self.class_weights) != 2 or not all(w > 0 for w in self.class_weights):
            raise UserError(f"motion LSTM: class_weights must be two positive numbers, got {self.class_weights}")


class MotionLSTM(nn.Module):
    """LSTM layers and a linear head on a standardised motion series.

    Args:
        config: sizes.
        mean: mean of the training motion.
        std: its standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: MotionLSTMConfig, mean: float, std: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))
        self.lstm = nn.LSTM(1, config.hidden_size, config.num_layers, batch_first=True, dropout=config.dropout)
        self.head = nn.Linear(config.hidden_size, 1)

    def forward(self, motion: Tensor) -> Tensor:
        """Logits (N, T) of the label at each frame, from motion (N, T) of which step t is y[t-1]."""
        steps, _ = self.lstm(((motion - self.mean) / self.std).unsqueeze(-1))
        logits: Tensor = self.head(steps).squeeze(-1)
        return logits

    @torch.no_grad()
    def predict(self, motion: Floats) -> Floats:
        """Probability (T,) of label 1 at each frame of one motion series (T,), from its past alone."""
        training = self.training
        self.eval()
        logits = self(_known_at_each_frame(motion).unsqueeze(0))[0]
        self.train(training)
        return torch.sigmoid(logits.double()).numpy()


def _known_at_each_frame(motion: Floats) -> Tensor:
    """The newest motion known at each frame, y[t-1], with 0 at frame 0, where nothing has moved yet."""
    return torch.from_numpy(np.concatenate(([0.0], motion[:-1])).astype(np.float32))


def _segments(length: int, segment: int, batch_size: int, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """Batches of start frames: the series cut into segments at a random offset, in random order."""
    starts = np.arange(int(rng.integers(0, segment)), length - segment + 1, segment)
    starts = rng.permutation(starts)
    return [starts[i : i + batch_size] for i in range(0, len(starts), batch_size)]


def train_motion_lstm(
    motion: Floats, positive: Bools, labelled: Bools, *, fps: float, config: MotionLSTMConfig | None = None
) -> MotionLSTM:
    """Train the baseline on one split; seconds on one core for half an hour of 30 frames a second.

    Args:
        motion: (T,) motion of the training split.
        positive: (T,) its labels.
        labelled: (T,) frames whose label may be learnt from.
        fps: frames per second.
        config: sizes and schedule.

    Returns:
        The network of the epoch with the best AUC on the last ``validation_fraction`` of the series; of the
        last epoch where that part holds one class only.

    Raises:
        UserError: where the series is shorter than two segments or holds one class only.
    """
    config = config or MotionLSTMConfig()
    segment = max(2, round(config.segment_seconds * fps))
    split = round(len(motion) * (1 - config.validation_fraction))
    if split < 2 * segment:
        raise UserError(
            f"motion LSTM: the training motion has {len(motion)} frames, too few for two segments of "
            f"{segment} frames beside the validation part: give more of it or a smaller segment_seconds"
        )
    trained_on = labelled[:split]
    if not positive[:split][trained_on].any() or positive[:split][trained_on].all():
        raise UserError("motion LSTM: the training labels hold one class only, so there is nothing to learn")
    warm_up = min(round(fps), segment // 2)
    rng = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        std = float(motion[:split].std())
        network = MotionLSTM(config, float(motion[:split].mean()), std if std > 0 else 1.0)
        optimiser = torch.optim.Adam(network.parameters(), lr=config.lr)
        inputs = _known_at_each_frame(motion)
        target = torch.from_numpy(positive.astype(np.float32))
        weight = torch.where(target > 0, config.class_weights[1], config.class_weights[0])
        weight = weight * torch.from_numpy(labelled.astype(np.float32))
        held_out = labelled & (np.arange(len(motion)) >= split)
        best_auc, best_state = -np.inf, copy.deepcopy(network.state_dict())
        with progress() as bar:
            for _ in bar.track(range(config.epochs), description="Training the LSTM on the motion series"):
                for starts in _segments(split, segment, config.batch_size, rng):
                    at = torch.from_numpy(starts[:, None] + np.arange(segment))
                    loss = F.binary_cross_entropy_with_logits(
                        network(inputs[at])[:, warm_up:], target[at][:, warm_up:], weight[at][:, warm_up:]
                    )
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                    optimiser.step()
                probabilities = network.predict(motion)
                auc = float(rank_auc(probabilities[held_out], positive[held_out][None])[0])
                if not auc <= best_auc:  # also true for NaN, the AUC of one class: keep the newest
                    best_auc, best_state = auc, copy.deepcopy(network.state_dict())
        network.load_state_dict(best_state)
    return network.eval()
