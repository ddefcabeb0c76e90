"""``import-keras``: a Keras model as a checkpoint that test, predict and fit go on from."""

from __future__ import annotations

import argparse
import inspect
import logging
from pathlib import Path
from typing import Any

import torch

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras import KerasImport, import_keras
from convlstm_fish.models import ClipClassifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("source", help="a SavedModel folder, or a .keras, .h5, .weights.h5 or .npz file")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write, such as model.ckpt")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint if it exists")
    parser.add_argument(
        "--class_weights",
        type=float,
        nargs="+",
        metavar="W",
        help="weight of each label in further training, which Keras does not store; published: 0.133 0.866",
    )
    parser.add_argument(
        "--padding", nargs="+", help="for weights alone: valid or same, of all ConvLSTM layers or of each"
    )
    parser.add_argument("--recurrent_activation", help="for weights alone: sigmoid, hard_sigmoid or hard_sigmoid_v3")
    parser.add_argument(
        "--pool_size",
        type=int,
        nargs="+",
        metavar="N",
        help="for weights alone: size of the max pool between ConvLSTM layers (0 for none), or after each of them",
    )
    parser.add_argument("--head", help="for weights alone: max, avg or flatten")
    parser.add_argument(
        "--image_size", type=int, nargs=2, metavar=("H", "W"), help="for weights alone: height and width of the clips"
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    # A Trainer is made only to write the checkpoint: what it says about the machine helps nobody.
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out}: exists already; --overwrite replaces it")
    imported = import_keras(
        args.source,
        padding=_one_or_each(args.padding),
        recurrent_activation=args.recurrent_activation,
        pool_size=_one_or_each(args.pool_size),
        head=args.head,
        image_size=None if args.image_size is None else (args.image_size[0], args.image_size[1]),
    )
    save_as_checkpoint(imported, out, class_weights=args.class_weights)
    steps, channels, height, width = ("any" if size is None else size for size in imported.input_shape)
    weights = sum(value.numel() for value in imported.network().parameters())
    print(f"{out}: {weights:,} weights, for clips of {steps} steps, {channels} channels, {height} x {width} pixels")
    if imported.optimizer is not None and imported.optimizer.moments:
        print(
            f"with the state of Adam after {imported.optimizer.step:,} steps, learning rate {imported.optimizer.lr:g}"
        )
    for note in imported.notes:
        print(f"note: {note}")


def save_as_checkpoint(imported: KerasImport, out: str | Path, class_weights: list[float] | None = None) -> None:
    """Write an imported model as a checkpoint of :class:`~convlstm_fish.tasks.ClipClassification`.

    Its hyper-parameters are the whole shape of the network, which no config may change, and what else the Keras file
    tells; a config or the defaults supply the others. What the file tells of the clips lies beside them, for runs
    without a config.

    Args:
        imported: from :func:`~convlstm_fish.interop.keras.import_keras`.
        out: the file, replaced if it exists; complete or absent.
        class_weights: for further training.

    Raises:
        UserError: if the class weights do not fit or the file cannot be written.
    """
    # Lightning takes seconds to import, and a file that cannot be read should be refused at once.
    import pytorch_lightning as pl

    from convlstm_fish.tasks.checkpoint_io import SafeCheckpointIO
    from convlstm_fish.tasks.clip_classification import ClipClassification

    told: dict[str, Any] = {**imported.settings, "l1": imported.l1, "l2": imported.l2}
    if class_weights is not None:
        told["class_weights"] = class_weights
    adam = imported.optimizer
    if adam is not None:
        told |= {"lr": adam.lr, "betas": list(adam.betas), "eps": adam.eps}
    task = ClipClassification(**told)
    task.network.load_state_dict(imported.state_dict)

    class Clips(pl.Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            checkpoint[pl.LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY] = clip_settings(imported.input_shape)

    trainer = pl.Trainer(
        callbacks=[Clips()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[SafeCheckpointIO()],
    )
    trainer.strategy.connect(task)
    if adam is not None and adam.moments:
        optimizer = task.configure_optimizers()
        for name, parameter in task.network.named_parameters():
            if name in adam.moments:
                first, second = adam.moments[name]
                step = torch.tensor(float(adam.step))
                optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        trainer.strategy.optimizers = [optimizer]
    how_it_is_computed = {"backend", "checkpoint_every"}
    shape = set(inspect.signature(ClipClassifier).parameters) - how_it_is_computed
    for name in set(task.hparams) - set(told) - shape:
        del task.hparams[name]
    trainer.save_checkpoint(out, weights_only=False)


def clip_settings(input_shape: tuple[int | None, ...]) -> dict[str, Any]:
    """The options of :class:`~convlstm_fish.data.modules.FishClips` that give clips (T, C, H, W); None is left open."""
    steps, channels, height, width = input_shape
    told: dict[str, Any] = {}
    if channels is not None:
        told["input_form"] = "single_channel" if channels == 1 else "time_channels"
        if channels > 1:
            told["frames_per_step"] = channels
        if steps is not None:
            told["clip_frames"] = steps * channels
    if height is not None and width is not None:
        told["image_size"] = [height, width]
    return told


def _one_or_each(values: list[Any] | None) -> Any:
    """One value for all layers, or a list with one for each."""
    return values[0] if values is not None and len(values) == 1 else values
