"""``export-keras``: a trained clip classifier as a file that Keras loads."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from convlstm_fish.errors import UserError
from convlstm_fish.models import ClipClassifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("checkpoint", help="a .ckpt file")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="ending in .weights.h5 (weights) or .keras (model)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--clip_shape",
        type=int,
        nargs=3,
        default=[30, 120, 160],
        metavar=("T", "H", "W"),
        help="steps, height and width of the clips that a .keras model takes",
    )


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise UserError(f"--out {out}: exists already; --overwrite replaces it")
    network = load_classifier(args.checkpoint)
    from convlstm_fish.interop.keras_export import export_keras

    path = export_keras(network, out, args.clip_shape)
    print(f"{path}: {sum(value.numel() for value in network.parameters()):,} weights")
    activation = network.layers[0].cells[0].recurrent_activation  # type: ignore[union-attr, index]
    if path.suffix == ".h5":
        print("to load them: convlstm_fish.interop.keras_export.build_keras_model(network).load_weights(path)")
        print(f"import-keras, which weights alone do not tell, needs --recurrent_activation {activation}")
    elif activation == "hard_sigmoid":
        print(
            "Keras 3 has no such hard sigmoid: import convlstm_fish.interop.keras_export before keras.saving.load_model"
        )


def load_classifier(path: str | Path) -> ClipClassifier:
    """The network in a checkpoint of :class:`~convlstm_fish.tasks.ClipClassification`, in eval mode.

    Raises:
        UserError: if the file is not one or is damaged; nothing in it is run.
    """
    from convlstm_fish.tasks.checkpoint_io import check_weights, hyper_parameters, load_checkpoint

    checkpoint = load_checkpoint(path)
    known = set(inspect.signature(ClipClassifier).parameters)
    told = {name: value for name, value in hyper_parameters(path, checkpoint).items() if name in known}
    prefix = "network."
    state = {str(name).removeprefix(prefix): value for name, value in checkpoint["state_dict"].items()}
    try:
        network = ClipClassifier(**told)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"checkpoint {path}: is not one of ClipClassification ({reason})") from error
    check_weights(path, state, network.state_dict(), "ClipClassification", prefix)
    network.load_state_dict(state)
    return network.eval()
