"""Honest evaluation: every model beside a panel of baselines, with intervals and a verdict.

``evaluate`` scores arrays, ``evaluate_recording`` a split of a recording; ``print_table`` shows the result in the
terminal and ``write_report`` as one HTML file that needs no network.
"""

from convlstm_fish.evaluate.evaluation import evaluate
from convlstm_fish.evaluate.motion_lstm import MotionLSTMConfig
from convlstm_fish.evaluate.recordings import evaluate_recording
from convlstm_fish.evaluate.report import write_report
from convlstm_fish.evaluate.result import Difference, Evaluation, Row
from convlstm_fish.evaluate.table import print_table

__all__ = [
    "Difference",
    "Evaluation",
    "MotionLSTMConfig",
    "Row",
    "evaluate",
    "evaluate_recording",
    "print_table",
    "write_report",
]
