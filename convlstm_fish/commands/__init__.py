"""Commands beside fit, validate, test and predict: each is a module with HELP, add_arguments and run."""

COMMANDS = {
    "prepare": "convlstm_fish.commands.prepare",
    "simulate": "convlstm_fish.commands.simulate",
    "evaluate": "convlstm_fish.commands.evaluate",
    "import-keras": "convlstm_fish.commands.import_keras",
    "export-keras": "convlstm_fish.commands.export_keras",
    "ablate": "convlstm_fish.commands.ablate",
}
"""Name on the command line -> module, imported only when the command is used."""
