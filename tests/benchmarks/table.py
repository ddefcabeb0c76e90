"""The README's table of speed, from results/*.json, its plot, and the curves of what was trained.

python tests/benchmarks/table.py
"""

from __future__ import annotations

import json
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from measure import RESULTS

OURS = "convlstm_fish"
ROWS = {
    "training_step_64_bfloat16": "visionary-serenity, training, batch 64",
    "training_step_4_bfloat16": "visionary-serenity, training, batch 4",
    "inference_64_bfloat16": "visionary-serenity, inference, batch 64",
    "frame_prediction_holmdk_16_bfloat16": "encoder-decoder, training, batch 16",
    "frame_prediction_holmdk_128_bfloat16": "encoder-decoder, training, batch 128",
    "frame_prediction_openstl_16_bfloat16": "ConvLSTM-S, training, batch 16",
    "frame_prediction_openstl_128_bfloat16": "ConvLSTM-S, training, batch 128",
    "training_step_4_float32_cpu": "visionary-serenity, training, batch 4, float32",
    "training_step_4_float32_cpu_avx2": "the same on an older processor, AVX2",
    "training_step_4_bfloat16_cpu": "visionary-serenity, training, batch 4, bfloat16",
    "inference_4_float32_cpu": "visionary-serenity, inference, batch 4, float32",
    "inference_4_float32_cpu_avx2": "the same on an older processor, AVX2",
    "inference_4_bfloat16_cpu": "visionary-serenity, inference, batch 4, bfloat16",
}


def rate(row: dict[str, float], graphed: bool) -> float:
    return max(row["per_second"], row.get("graph_per_second", 0.0) if graphed else 0.0)


def line(title: str, device: str, rows: dict[str, dict[str, float]]) -> str:
    """One row of the table: both rates as they come and as CUDA graphs, and the memory."""
    others = {name: row for name, row in rows.items() if name != OURS}
    cells = [title, next((name for name in ("H100", "H200") if name in device), "2 CPU cores")]
    for graphed in (False, True):
        if graphed and "graph_per_second" not in rows[OURS]:
            cells.append("")
            continue
        best = max(others, key=lambda name: rate(others[name], graphed))
        ours, theirs = rate(rows[OURS], graphed), rate(others[best], graphed)
        cells.append(f"{ours:,.0f} : {theirs:,.0f} ({best}) = {ours / theirs:.2f}")
    peaks = [rows[name]["peak_gib"] for name in (OURS, "concat eager") if "peak_gib" in rows.get(name, {})]
    cells.append(" : ".join(f"{peak:.1f}" for peak in peaks))
    return "| " + " | ".join(cells) + " |"


def draw_backends() -> None:
    """Validation loss of one training on either backend, results/backends.json."""
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, row in json.loads((RESULTS / "backends.json").read_text())["rows"].items():
        steps, losses = zip(*row["curve"]["val/loss"])
        axis.plot(steps, losses, label=f"backend {name}, test AUC {row['test_auc']:.3f}")
    axis.set_xlabel("training step")
    axis.set_ylabel("validation loss")
    axis.legend()
    figure.savefig(RESULTS / "backends.png", dpi=90)


def draw_predictor() -> None:
    """Validation error of the training that results/openstl_convlstm_s.json tells of, beside the published end."""
    result = json.loads((RESULTS / "openstl_convlstm_s.json").read_text())
    steps, errors = zip(*result["curve"]["val/mse"])
    published = result["published_125000_steps"]["mse"]
    figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axis.plot(steps, errors, "o-", label="validation")
    axis.plot([result["steps"]], [result["test"]["test/mse"]], "k*", markersize=10, label="test, at the end")
    axis.axhline(published, color="tab:red", linestyle="--", label="published, after 125,000 steps")
    axis.set_xlabel("training steps of 16 sequences")
    axis.set_ylabel("squared error of a frame")
    axis.set_ylim(0)
    axis.legend()
    figure.savefig(RESULTS / "openstl_convlstm_s.png", dpi=90)


def main() -> None:
    found: dict[str, dict[str, Any]] = {}
    for name in ROWS:
        path = RESULTS / f"{name}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    print("| | on | sequences a second, ours : best other | both as CUDA graphs | peak GiB, ours : concat cell |")
    print("| --- | --- | --- | --- | --- |")
    for name, result in found.items():
        print(line(ROWS[name], result["machine"]["device"], result["rows"]))

    figure, axes = plt.subplots(2, -(-len(found) // 2), figsize=(14, 7), layout="constrained")
    for axis, (name, result) in zip(axes.flat, found.items()):
        rows = result["rows"]
        for offset, graphed, colour in ((-0.2, False, "tab:blue"), (0.2, True, "tab:orange")):
            heights = [rate(row, graphed) if not graphed or "graph_per_second" in row else 0.0 for row in rows.values()]
            axis.bar([k + offset for k in range(len(rows))], heights, 0.4, color=colour)
        axis.set_xticks(range(len(rows)), list(rows), rotation=60, ha="right", fontsize=7)
        title = ROWS[name].replace(", ", "\n", 1)
        axis.set_title(f"{title}\n{result['machine']['device']}", fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
    for axis in axes.flat[len(found) :]:
        axis.remove()
    figure.suptitle("Sequences a second: as written (blue), as a CUDA graph (orange)", fontsize=9)
    figure.savefig(RESULTS / "speed.png", dpi=90)
    draw_predictor()
    draw_backends()


if __name__ == "__main__":
    main()
