"""One sentence that says whether a model has skill."""

from __future__ import annotations

from convlstm_fish.evaluate.result import Difference, Row


def signed(value: float) -> str:
    """Three decimals with a sign that a reader cannot miss."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def verdict(model: Row, baselines: list[Row], differences: list[Difference], confidence: float) -> str:
    """Whether ``model`` beats the panel: every baseline that it does not beat is named.

    A baseline is beaten where the whole interval of the difference lies above 0. Those that the model is no better
    than come before those that it is ahead of without proof.

    Args:
        model: the model's row.
        baselines: the panel's rows.
        differences: the model's differences, one for each baseline that has an AUC.
        confidence: of the intervals.
    """
    if model.metrics is None:
        return f"No verdict on {model.name}: its AUC is {model.undefined}."
    if not differences:
        return f"No verdict on {model.name} (AUC {model.metrics.auc:.3f}): no baseline could be computed."
    auc = {row.name: row.metrics.auc for row in baselines if row.metrics is not None}

    def told(difference: Difference) -> str:
        text = f"{difference.baseline} (AUC {auc[difference.baseline]:.3f}, difference {signed(difference.value)}"
        if difference.interval is None:
            return f"{text}, no confidence interval)"
        low, high = difference.interval.low, difference.interval.high
        return f"{text}, {confidence:.0%} interval {signed(low)} to {signed(high)})"

    ahead = f"{model.name} (AUC {model.metrics.auc:.3f})"
    unbeaten = [d for d in differences if d.interval is None or d.interval.low <= 0]
    if not unbeaten:
        nearest = min(differences, key=lambda d: d.value)
        return f"{ahead} beats every baseline of the panel; the nearest is {told(nearest)}."
    level = [told(d) for d in unbeaten if d.value <= 0]
    unproven = [told(d) for d in unbeaten if d.value > 0]
    if not level:
        return f"{ahead} does not demonstrably beat {_listed(unproven)}."
    more = f", nor demonstrably {_listed(unproven)}" if unproven else ""
    return f"{ahead} does not beat {_listed(level)}{more}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
