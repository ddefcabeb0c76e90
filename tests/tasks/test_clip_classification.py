"""The loss as Keras weighs it, scores against scikit-learn, padding that counts nowhere, and every option at work."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from sklearn.metrics import accuracy_score, average_precision_score, log_loss, roc_auc_score, roc_curve
from torch.utils.data import DataLoader

from convlstm_fish.errors import UserError
from convlstm_fish.tasks import ClipClassification
from convlstm_fish.tasks.base import schedule_factor
from convlstm_fish.tasks.callbacks import NonFiniteError, NonFiniteGuard

SMALL: dict[str, Any] = {"in_channels": 2, "hidden_channels": [3, 4]}


def batches(clips: int, size: int, classes: int = 2, pad: int = 0) -> list[dict[str, torch.Tensor]]:
    """``clips`` random clips in batches of ``size``; the last ``pad`` of them are padding with absurd content."""
    rng = torch.Generator().manual_seed(3)
    out = []
    for start in range(0, clips, size):
        count = min(size, clips - start)
        index = torch.arange(start, start + count)
        valid = index < clips - pad
        video = torch.rand(count, 4, 2, 9, 11, generator=rng)
        video[~valid] = 1e4
        label = torch.where(valid, (index * 7 // 3) % classes, 0)
        out.append({"video": video, "label": label, "index": 2 * index, "valid": valid})
    return out


def trainer(**options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return pl.Trainer(**(settings | options))


def loader(data: list[dict[str, torch.Tensor]]) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None)  # type: ignore[arg-type]


def test_scores_are_those_of_scikit_learn_and_padding_counts_nowhere() -> None:
    pl.seed_everything(1, verbose=False)
    task = ClipClassification(**SMALL, class_weights=[0.133, 0.866])
    data = batches(37, 8, pad=5)
    figures = trainer().test(task, loader(data), verbose=False)[0]
    said = task.predictions
    assert np.array_equal(said["index"], 2 * np.arange(32))
    label, probability = said["label"], said["probability"]
    assert figures["test/auroc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
    assert figures["test/average_precision"] == pytest.approx(average_precision_score(label, probability), abs=1e-6)
    assert figures["test/accuracy"] == pytest.approx(accuracy_score(label, probability > 0.5), abs=1e-6)
    # Unweighted, whatever the class weights of training.
    assert figures["test/loss"] == pytest.approx(log_loss(label, probability.astype(np.float64)), rel=1e-5)
    false_positive, true_positive, thresholds = roc_curve(label, probability, drop_intermediate=False)
    best = np.argmax(true_positive - false_positive)
    assert figures["test/youden_j"] == pytest.approx((true_positive - false_positive)[best], abs=1e-6)
    assert figures["test/youden_threshold"] == pytest.approx(thresholds[best], abs=1e-6)


def test_class_weights_and_penalties_are_those_of_keras() -> None:
    import keras

    pl.seed_everything(1, verbose=False)
    task = ClipClassification(**SMALL, class_weights=[0.133, 0.866], l1=1e-3, l2=2e-3)
    task.trainer = trainer()
    task.log = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    batch = batches(6, 6)[0]
    loss = task.training_step(batch, 0)
    with torch.no_grad():
        probability = torch.sigmoid(task(batch["video"])[:, 0])
    weights = torch.tensor([0.133, 0.866])[batch["label"]]
    judge = keras.losses.BinaryCrossentropy()(
        batch["label"][:, None].float(), probability[:, None], sample_weight=weights
    )
    for cell in (layer.cells[0] for layer in task.network.layers):
        for kernel in (cell.weight_ih, cell.weight_hh):
            judge = judge + keras.regularizers.L1L2(1e-3, 2e-3)(kernel.detach())
    assert float(loss.detach()) == pytest.approx(float(judge), rel=1e-5)
    task.penalty().backward()
    assert task.network.layers[1].cells[0].weight_hh.grad is not None
    assert task.network.classifier.weight.grad is None


def test_several_classes_with_lengths() -> None:
    pl.seed_everything(1, verbose=False)
    task = ClipClassification(**SMALL, num_classes=3, class_weights=[1.0, 2.0, 0.5])
    data = batches(12, 6, classes=3)
    for batch in data:
        batch["lengths"] = torch.tensor([4, 2, 3, 1, 4, 2])
    figures = trainer().test(task, loader(data), verbose=False)[0]
    said = task.predictions
    assert said["probability"].shape == (12, 3)
    assert figures["test/auroc"] == pytest.approx(
        roc_auc_score(said["label"], said["probability"], multi_class="ovr", average="macro"), abs=1e-5
    )
    assert figures["test/loss"] == pytest.approx(log_loss(said["label"], said["probability"]), rel=1e-5)


def test_one_label_only_reports_what_is_defined() -> None:
    task = ClipClassification(**SMALL)
    data = batches(4, 4)
    data[0]["label"].zero_()
    figures = trainer().test(task, loader(data), verbose=False)[0]
    assert set(figures) == {"test/loss", "test/accuracy"}


def test_training_learns_and_a_checkpoint_gives_the_same_task(tmp_path: Any) -> None:
    pl.seed_everything(2, verbose=False)
    task = ClipClassification(**SMALL, lr=2e-2)
    data = batches(16, 8)
    for batch in data:  # label 1: a bright dot appears in the last step
        batch["video"] *= 0.1
        batch["video"][batch["label"] == 1, -1, :, 4, 5] = 1.0
    runner = trainer(max_epochs=40, limit_val_batches=0)
    runner.fit(task, loader(data), loader(data))
    figures = trainer().test(task, loader(data), verbose=False)[0]
    assert figures["test/auroc"] > 0.95
    runner.save_checkpoint(tmp_path / "model.ckpt")
    again = ClipClassification.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert again.hparams == task.hparams
    video = data[0]["video"]
    assert torch.equal(again.eval()(video), task.eval()(video))


def test_predict_leaves_padding_out() -> None:
    task = ClipClassification(**SMALL)
    said = trainer().predict(task, loader(batches(8, 4, pad=3)))
    assert said is not None
    assert torch.equal(torch.cat([part["index"] for part in said]), 2 * torch.arange(5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"class_weights": [1.0]},
        {"class_weights": [1.0, -1.0]},
        {"l1": -1.0},
        {"l2": float("nan")},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"betas": [0.9]},
        {"betas": [0.9, 1.0]},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"weight_decay": float("nan")},
        {"lr_schedule": "steps"},
        {"warmup_steps": -1},
    ],
)
def test_wrong_hyper_parameters_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ClipClassification(**SMALL, **wrong)


def test_schedules() -> None:
    constant = schedule_factor("constant", 4, 0)
    assert [constant(k) for k in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    cosine = schedule_factor("cosine", 0, 100)
    assert (cosine(0), cosine(50), cosine(100), cosine(101)) == pytest.approx((1.0, 0.5, 0.0, 0.0))
    cycle = schedule_factor("one_cycle", 0, 100)
    assert (cycle(0), cycle(9), cycle(10)) == pytest.approx((0.1, 1.0, 1.0))
    assert cycle(99) < 0.01


@pytest.mark.parametrize(
    ("option", "value", "seen"),
    [
        ("weight_decay", 0.1, lambda o: o.param_groups[0]["weight_decay"]),
        ("lr", 1e-2, lambda o: o.param_groups[0]["lr"]),
        ("eps", 1e-3, lambda o: o.param_groups[0]["eps"]),
        ("betas", [0.5, 0.6], lambda o: list(o.param_groups[0]["betas"])),
    ],
)
def test_optimizer_options_reach_the_optimizer(option: str, value: Any, seen: Any) -> None:
    plain = ClipClassification(**SMALL).configure_optimizers()
    mine = ClipClassification(**SMALL, **{option: value}).configure_optimizers()
    assert seen(mine) == value
    assert seen(plain) != value


@pytest.mark.gpu
@pytest.mark.parametrize("batches_seen", [5, 4], ids=["on its way", "in its last step"])
def test_on_a_gpu_a_clip_that_is_not_finite_reaches_no_weight(batches_seen: int) -> None:
    data = batches(30, 6)
    data[3]["video"][2, 1] = float("nan")
    tasks = []
    options = {"accelerator": "gpu", "max_epochs": 1, "precision": "bf16-mixed", "gradient_clip_val": 1.0}
    for limit in (3, batches_seen):
        pl.seed_everything(1, verbose=False)
        tasks.append(ClipClassification(**SMALL, lr=0.1))
        run = trainer(**options, limit_train_batches=limit, limit_val_batches=0, callbacks=[NonFiniteGuard()])
        if limit == 3:
            run.fit(tasks[-1], loader(data), loader(data))
            continue
        with pytest.raises(NonFiniteError, match=r"step 3: the loss is not a finite number.*clips 36, 38, 40, 42, 44"):
            run.fit(tasks[-1], loader(data), loader(data))
    for ours, clean in zip(tasks[1].parameters(), tasks[0].parameters()):
        assert torch.equal(ours, clean)
    assert tasks[0].cuda().adam(torch.optim.Adam).param_groups[0]["fused"]
