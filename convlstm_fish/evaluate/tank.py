"""How near the simulated tank comes to the published recording, and what its chases can be foreseen from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from convlstm_fish.data import labels as rules
from convlstm_fish.data.recording import Recording
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate.metrics import Bools, Floats, rank_auc
from convlstm_fish.evaluate.motion_lstm import train_motion_lstm
from convlstm_fish.evaluate.table import number

CLIP, HORIZON, BASELINE_END = 120, 45, 10
"""Windows of the published experiment in frames: it scores frames 119 to T - 2 - 10."""

FITTED_SHARE = 0.6
"""Share of a recording, from its start, that classifiers of chases learn from; the rest scores them."""

_TIGHTEST = 1e-12


@dataclass(frozen=True)
class Statistic:
    """One row of the table: a figure of the simulated tank, the published one, and what the former should be.

    Attributes:
        name: what it is.
        ours: of the simulated tank.
        published: of the published training recording; NaN where nobody can know it.
        low, high: the goal, an interval for ``ours``.
    """

    name: str
    ours: float
    published: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return bool(self.low <= self.ours <= self.high)


def compare(motion: npt.ArrayLike, published: npt.ArrayLike) -> list[Statistic]:
    """Statistics of a simulated motion series beside those of the published training recording.

    Args:
        motion: (T,) motion of the simulated tank at 30 frames per second, without gaps.
        published: (T',) the published ``targets/train/Y_tilde.npy``.

    Returns:
        One row each for mean, standard deviation, the 1, 50 and 99 % quantiles, the autocorrelation at lags of
        1, 5, 15 and 30 frames, share and median length of runs of burst labels, and two AUCs on these labels.

    Raises:
        UserError: for series shorter than a minute or without both labels.
    """
    ours, theirs = _figures(motion, "motion"), _figures(published, "published motion")
    rows = []
    for name, value in ours.items():
        known = theirs[name]
        if name in ("mean", "standard deviation"):
            low, high = 0.8 * known, 1.2 * known
        elif name.startswith("quantile"):
            low, high = 0.75 * known, 1.25 * known
        elif name.startswith("autocorrelation"):
            low, high = known - 0.1, known + 0.1
        else:
            low, high = _FIXED_GOALS[name]
        rows.append(Statistic(name, value, known, low, high))
    return rows


_FIXED_GOALS = {
    "burst labels, share": (0.10, 0.17),
    "burst labels, median run": (2.0, 5.0),
    "AUC, published baseline": (0.81, 0.87),
    "AUC, minus last difference": (0.83, 0.90),
}


def _figures(motion: npt.ArrayLike, what: str) -> dict[str, float]:
    y = np.asarray(motion, dtype=np.float64)
    if y.ndim != 1 or len(y) < 1800 or not np.isfinite(y).all() or y.std() < _TIGHTEST:
        raise UserError(f"{what}: shape {y.shape} is not a series of at least 1800 finite values that differ")
    apart = y - y.mean()
    labels = rules.burst_labels(y).astype(bool)
    if not labels.any():
        raise UserError(f"{what}: no burst of motion in {len(y)} frames, nothing to compare")
    edges = np.flatnonzero(np.diff(np.concatenate(([0], labels.view(np.int8), [0]))))
    scored = np.arange(CLIP - 1, len(y) - 1 - BASELINE_END)
    baseline = rules.published_baseline(y)
    figures = {"mean": y.mean(), "standard deviation": y.std()}
    figures |= {f"quantile {q} %": np.percentile(y, q) for q in (1, 50, 99)}
    figures |= {
        f"autocorrelation, lag {lag}": (apart[lag:] * apart[:-lag]).mean() / apart.var() for lag in (1, 5, 15, 30)
    }
    figures["burst labels, share"] = labels.mean()
    figures["burst labels, median run"] = float(np.median(edges[1::2] - edges[::2]))
    figures["AUC, published baseline"] = _auc(baseline[scored], labels[scored])
    figures["AUC, minus last difference"] = _auc(-y[scored - 1], labels[scored])
    return {name: float(value) for name, value in figures.items()}


def _auc(scores: Floats, positive: Bools) -> float:
    return float(rank_auc(scores, positive[None])[0])


def unbroken_motion(recording: Recording) -> Floats:
    """Motion (T,) of a recording as if it were one split: its own series is 0 wherever a split ends."""
    motion = recording.motion.copy()
    for _, stop in recording.splits.values():
        if stop < len(recording):
            motion[stop - 1] = rules.frame_differences(
                recording.frames[stop - 1 : stop], recording.frames[stop : stop + 1]
            )[0]
    return motion


def chase_skill(recording: Recording) -> list[Statistic]:
    """What a coming chase can be foreseen from: hardly from the motion, well from where the fish are.

    The label is 1 where a chase starts within the next 1.5 s. Classifiers learn from the first 60 % of the
    recording and every score is taken on the rest.

    Args:
        recording: one made by ``simulate``, with at least two fish.

    Returns:
        The share of positive labels and the AUCs of minus the last frame difference, of the published
        baseline, of an LSTM on the motion series, and of a logistic regression on the distances.

    Raises:
        UserError: where the recording has no chases or too few frames.
    """
    frames, fps = len(recording), recording.fps
    horizon = rules.horizon_frames_of(rules.HORIZON_SECONDS, fps)
    first = rules.clip_frames_of(rules.CLIP_SECONDS, fps) - 1
    positive = recording.labels("chase").astype(bool)
    at = np.arange(frames)
    labelled = (at >= first) & (at < frames - horizon)
    fitted = round(FITTED_SHARE * frames)
    learn, score = labelled & (at < fitted - horizon), labelled & (at >= fitted)
    for part in (learn, score):
        if not (positive[part].any() and not positive[part].all()):
            raise UserError(
                f"{recording.path}: {frames / fps / 60:.1f} minutes hold too few chases to score forecasts; "
                "simulate 10 minutes or more"
            )
    motion = unbroken_motion(recording)
    newest = np.concatenate(([0.0], motion[:-1]))
    lstm = train_motion_lstm(motion[:fitted], positive[:fitted], learn[:fitted], fps=fps).predict(motion)
    features = distance_features(
        recording.array("positions").astype(np.float64), recording.array("chases"), fps, recording.size
    )
    by_distance = _logistic_regression(features, positive, learn)
    baseline = rules.published_baseline(motion, last=0)
    nan = float("nan")
    rows = [Statistic("chase labels, share", float(positive[score].mean()), nan, 0.15, 0.35)]
    for name, scores, low, high in (
        ("AUC, minus last difference", -newest, 0.0, 0.65),
        ("AUC, published baseline", baseline, 0.0, 0.65),
        ("AUC, LSTM on the motion", lstm, 0.0, 0.65),
        ("AUC, logistic regression on distances", by_distance, 0.85, 1.0),
    ):
        rows.append(Statistic(name, _auc(scores[score], positive[score]), nan, low, high))
    return rows


def distance_features(
    positions: Floats, chases: npt.NDArray[np.int64], fps: float, size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """What a simple forecast of chases looks at, frame by frame, without any look ahead.

    Args:
        positions: (T, fish, 3), as a simulated recording holds them.
        chases: (K, 4) start, end, chaser, chased.
        fps: frames per second.
        size: height and width of the frames: distances are in their diagonals / 400.

    Returns:
        (T, 13): distance of the closest pair and of the next one; how much the closest pair came nearer in
        the last 1/3, 1 and 2 s; how much nearer than five bounds it is; seconds since the last chase (at most 10)
        and whether they are fewer than 1 and 3.
    """
    n_frames, n_fish = positions.shape[:2]
    if n_fish < 2:
        raise UserError("positions: one fish alone has no distances")
    unit = np.hypot(*size) / 400.0
    first, second = np.triu_indices(n_fish, 1)
    distance = np.hypot(
        positions[:, first, 0] - positions[:, second, 0], positions[:, first, 1] - positions[:, second, 1]
    )
    distance /= unit
    at = np.arange(n_frames)
    pair = distance.argmin(axis=1)
    closest = distance[at, pair]
    following = np.partition(distance, 1, axis=1)[:, 1] if distance.shape[1] > 1 else closest
    came = [distance[np.maximum(at - round(s * fps), 0), pair] - closest for s in (1 / 3, 1.0, 2.0)]
    nearer = [np.maximum(bound - closest, 0.0) for bound in (22, 30, 38, 46, 60)]
    # Frames in a chase count as 0 s after it; before the first chase it is 10 s.
    last = np.full(n_frames, -round(10 * fps))
    for start, end, _, _ in chases:
        last[start:end] = at[start:end]
    since = np.minimum((at - np.maximum.accumulate(last)) / fps, 10.0)
    return np.stack([closest, following, *came, *nearer, since, since < 1, since < 3], axis=1)


def _logistic_regression(features: Floats, positive: Bools, learn: Bools) -> Floats:
    """Scores (T,) of a logistic regression fitted on the frames ``learn``."""
    mean, deviation = features[learn].mean(axis=0), features[learn].std(axis=0)
    inputs = torch.from_numpy((features - mean) / np.where(deviation > 0, deviation, 1.0))
    target = torch.from_numpy(positive.astype(np.float64))
    rows = torch.from_numpy(learn)
    line = nn.Linear(inputs.shape[1], 1, dtype=torch.float64)
    nn.init.zeros_(line.weight)
    nn.init.zeros_(line.bias)
    optimiser = torch.optim.LBFGS(line.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(line(inputs[rows])[:, 0], target[rows])
        value = value + 1e-4 * line.weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        scores: Floats = line(inputs)[:, 0].numpy()
    return scores


def print_statistics(rows: list[Statistic], title: str, console: Console | None = None) -> None:
    """Print rows of :func:`compare` or :func:`chase_skill` as a table."""
    known = any(np.isfinite(row.published) for row in rows)
    table = Table(title=title, title_justify="left")
    table.add_column("statistic")
    for column in ("simulated", *(("published",) if known else ()), "goal"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in rows:
        small = row.high < 0.02
        texts = [_text(value, small) for value in (row.ours, row.published, row.low, row.high)]
        goal = (
            f"under {texts[3]}"
            if row.low == 0
            else f"over {texts[2]}"
            if row.high == 1
            else f"{texts[2]} to {texts[3]}"
        )
        table.add_row(row.name, texts[0], *((texts[1],) if known else ()), goal, "met" if row.met else "missed")
    (console or Console()).print(table)


def _text(value: float, small: bool) -> str:
    return f"{value:.6f}" if small and np.isfinite(value) else number(value)
