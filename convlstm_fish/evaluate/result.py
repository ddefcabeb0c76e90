"""What an evaluation found, as plain dataclasses and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from convlstm_fish.evaluate.baselines import Scorer
from convlstm_fish.evaluate.bootstrap import Interval
from convlstm_fish.evaluate.calibration import Calibration
from convlstm_fish.evaluate.events import EventPoint, Events
from convlstm_fish.evaluate.metrics import Bools, Floats, Metrics, OperatingPoint


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        scorer: who is scored.
        undefined: why there are no figures; None where there are.
        metrics: AUC, average precision, best thresholds and the curve.
        auc_interval: bootstrap interval of the AUC.
        calibration: for probabilities.
        events: recall at given rates of false alarms; empty where no burst can be announced.
        horizon_auc: AUC against the labels of each of ``Evaluation.horizons``, None where not defined.
    """

    scorer: Scorer
    undefined: str | None
    metrics: Metrics | None = None
    auc_interval: Interval | None = None
    calibration: Calibration | None = None
    events: tuple[EventPoint, ...] = ()
    horizon_auc: tuple[float | None, ...] = ()

    @property
    def name(self) -> str:
        """The scorer's name."""
        return self.scorer.name


@dataclass(frozen=True)
class Difference:
    """AUC of a model minus AUC of a baseline on the same frames, with its paired bootstrap interval."""

    model: str
    baseline: str
    value: float
    interval: Interval | None


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`convlstm_fish.evaluate.evaluate`.

    Attributes:
        rows: the models, then the baseline panel.
        differences: each model against each baseline.
        verdicts: one sentence a model, by its name.
        frames: (K,) the scored frames.
        labels: (T,) labels of the split.
        motion: (T,) its motion.
        fps: frames per second.
        horizon_frames: how far the labels look ahead.
        events: the bursts, or other events, that an alarm at a scored frame could announce.
        event: what one of them is called.
        watched_seconds: time during which an alarm could have been raised.
        horizons: seconds at which ``Row.horizon_auc`` is given.
        horizon_undefined: why there is no skill against horizon, or None.
        intervals_undefined: why there are no confidence intervals, or None.
        settings: how it was computed.
        notes: what a reader should know about the data.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    verdicts: dict[str, str]
    frames: npt.NDArray[np.int64]
    labels: Bools
    motion: Floats
    fps: float
    horizon_frames: int
    events: Events
    watched_seconds: float
    horizons: tuple[float, ...]
    horizon_undefined: str | None
    intervals_undefined: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    event: str = "burst"

    @property
    def positive(self) -> Bools:
        """(K,) the labels at the scored frames."""
        return self.labels[self.frames]

    @property
    def verdict(self) -> str:
        """The verdict on the first model."""
        return self.verdicts[self.rows[0].name]

    def row(self, name: str) -> Row:
        """The row of the scorer called ``name``.

        Raises:
            KeyError: where there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, without the series and curves, as JSON-ready values; None where not defined."""
        return {
            "verdicts": self.verdicts,
            "notes": list(self.notes),
            "settings": self.settings,
            "data": {
                "frames": len(self.frames),
                "first_frame": int(self.frames[0]),
                "last_frame": int(self.frames[-1]),
                "positive": int(self.positive.sum()),
                "bursts": len(self.events.onset),
                "watched_seconds": self.watched_seconds,
            },
            "rows": [_row_dict(row) for row in self.rows],
            "auc_differences": [
                {
                    "model": d.model,
                    "baseline": d.baseline,
                    "difference": d.value,
                    "interval": _interval(d.interval),
                }
                for d in self.differences
            ],
            "horizons_s": list(self.horizons),
            "horizon_undefined": self.horizon_undefined,
            "intervals_undefined": self.intervals_undefined,
        }

    def to_json(self) -> str:
        """``to_dict`` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def _interval(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _finite(value: float) -> float | None:
    """None for an infinite threshold, which JSON cannot hold: nothing is called positive."""
    return value if math.isfinite(value) else None


def _point(point: OperatingPoint) -> dict[str, Any]:
    return {
        "value": point.value,
        "threshold": _finite(point.threshold),
        "tpr": point.tpr,
        "fpr": point.fpr,
    }


def _row_dict(row: Row) -> dict[str, Any]:
    out: dict[str, Any] = {
        "name": row.name,
        "description": row.scorer.description,
        "model": row.scorer.is_model,
        "undefined": row.undefined,
    }
    if row.metrics is not None:
        out |= {
            "auc": row.metrics.auc,
            "auc_interval": _interval(row.auc_interval),
            "average_precision": row.metrics.average_precision,
            "best_accuracy": _point(row.metrics.best_accuracy),
            "best_youden_j": _point(row.metrics.best_j),
        }
    if row.calibration is not None:
        out["calibration"] = {
            "ece": row.calibration.ece,
            "brier": row.calibration.brier,
            "brier_skill": row.calibration.brier_skill,
            "bins": [
                {"lower": low, "count": n, "predicted": p, "observed": o}
                for low, n, p, o in zip(
                    row.calibration.lower,
                    row.calibration.count,
                    row.calibration.predicted,
                    row.calibration.observed,
                )
            ],
        }
    out["events"] = [
        {
            "allowed_false_alarms_per_minute": p.allowed_per_minute,
            "recall": p.recall,
            "false_alarms_per_minute": p.false_alarms_per_minute,
            "median_lead_s": p.median_lead_seconds,
            "threshold": _finite(p.threshold),
        }
        for p in row.events
    ]
    out["horizon_auc"] = list(row.horizon_auc)
    return out
