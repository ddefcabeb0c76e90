"""Commands beside fit, validate, test and predict: each is a module with add_arguments and run."""

from typing import NamedTuple


class Command(NamedTuple):
    """A command, whose module is imported only when it is used: some import torch and more, which takes seconds."""

    module: str
    help: str


COMMANDS = {
    "prepare": Command(
        "convlstm_fish.commands.prepare",
        "Make a recording (bright fish on black, motion, labels, splits) of a video or a folder of images.",
    ),
    "simulate": Command(
        "convlstm_fish.commands.simulate", "Simulate a tank of fish seen from above and write it as a recording."
    ),
    "evaluate": Command(
        "convlstm_fish.commands.evaluate",
        "Score probabilities beside the baseline panel: table, verdict and an HTML report.",
    ),
    "import-keras": Command(
        "convlstm_fish.commands.import_keras", "Turn a Keras or TensorFlow model into a checkpoint."
    ),
    "export-keras": Command(
        "convlstm_fish.commands.export_keras",
        "Turn a checkpoint of ClipClassification into Keras weights or a Keras model.",
    ),
    "ablate": Command(
        "convlstm_fish.commands.ablate",
        "Run ablations: change one factor of a base experiment at a time, over several seeds.",
    ),
}
"""By name on the command line."""
