"""``python main.py evaluate``: files in, table, JSON and report out."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import yaml

from convlstm_fish.commands import evaluate as command
from convlstm_fish.errors import UserError
from convlstm_fish.evaluate import MotionLSTMConfig

CONFIG = Path(__file__).parents[2] / "configs/baselines/motion_lstm.yaml"


def parse(arguments: list[str]) -> jsonargparse.Namespace:
    parser = jsonargparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """A made-up minute at 10 frames a second, with chases of which the labels speak."""
    rng = np.random.default_rng(0)
    chases = np.array([[100, 110, 0, 1], [250, 260, 2, 1], [400, 410, 0, 2], [520, 530, 0, 2]])
    labels = command.chase_labels(chases[:, 0], 600, 15)
    arrays = {
        "labels": labels,
        "motion": 1e-3 * rng.random(600),
        "whole": 0.5 * labels + 0.4 * rng.random(600),
        "short": rng.random((557, 1)).astype(np.float32),
        "chases": chases,
        "late": np.array([40, 600]),
        "early": np.array([[-1, 9, 0, 1], [40, 50, 0, 1]]),
    }
    for name, values in arrays.items():
        np.save(tmp_path / f"{name}.npy", values)
    return {name: str(tmp_path / f"{name}.npy") for name in arrays}


def arguments(files: dict[str, str], out: Path, *more: str) -> list[str]:
    return [
        *("--labels", files["labels"], "--motion", files["motion"], "--probabilities", files["whole"]),
        *("--fps", "10", "--out", str(out), "--resamples", "50", *more),
    ]


def test_writes_table_json_and_report(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "runs/1"
    more = ("--probabilities", f"net={files['short']}", "--chases", files["chases"])
    command.run(parse(arguments(files, out, *more)))
    printed = capsys.readouterr().out
    assert "Every forecast on the same frames" in printed
    assert "whole (AUC " in printed
    found = json.loads((out / "metrics.json").read_text())
    assert [row["name"] for row in found["rows"]][:3] == ["whole", "net", "always negative"]
    # From the last frame of the first 4 s to T - 2 - 1/3 s.
    assert (found["data"]["first_frame"], found["data"]["last_frame"]) == (39, 595)
    assert found["data"]["bursts"] == 4
    assert found["horizon_undefined"] is None
    report = (out / "report.html").read_text()
    assert files["short"] in report
    assert sorted(p.name for p in out.iterdir()) == ["metrics.json", "report.html"]


def test_published_arrays(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    test = shared / "published/targets/test"
    command.run(
        parse(
            [
                *("--labels", f"{test}/Y_label.npy", "--motion", f"{test}/Y_tilde.npy", "--fps", "30"),
                *("--probabilities", f"upbeat-snowflake-91={test}/Y_pred.npy"),
                *("--probabilities", f"visionary-serenity={test}/Y_pred_visionary_serenity.npy"),
                *("--probabilities", f"{test}/Y_pred_baseline.npy", "--out", str(tmp_path)),
            ]
        )
    )
    found = json.loads((tmp_path / "metrics.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    auc = {name: round(row["auc"], 3) for name, row in rows.items() if "auc" in row}
    assert (auc["upbeat-snowflake-91"], auc["visionary-serenity"], auc["Y_pred_baseline"]) == (0.830, 0.787, 0.838)
    assert auc["minus the last frame difference"] == 0.865
    assert (found["data"]["first_frame"], found["data"]["last_frame"]) == (119, 5355)
    assert "does not beat minus the last frame difference (AUC 0.865" in found["verdicts"]["upbeat-snowflake-91"]
    assert "does not beat minus the last frame difference" in " ".join(capsys.readouterr().out.split())


def test_the_shipped_lstm_config(files: dict[str, str], tmp_path: Path) -> None:
    assert yaml.safe_load(CONFIG.read_text()) == asdict(MotionLSTMConfig())
    more = ("--train_motion", files["motion"], "--train_labels", files["labels"], "--motion_lstm", str(CONFIG))
    command.run(parse(arguments(files, tmp_path, *more, "--motion_lstm.epochs", "1")))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["settings"]["motion_lstm"]["epochs"] == 1
    assert found["rows"][-1]["auc"] > 0


def test_instantiated_arguments_do_too(files: dict[str, str], tmp_path: Path) -> None:
    args = parse(arguments(files, tmp_path))
    args.motion_lstm = MotionLSTMConfig(epochs=2)
    assert command.run_files(args).rows[0].metrics is not None


def test_options_reach_the_evaluation(files: dict[str, str], tmp_path: Path) -> None:
    options = {
        "block_seconds": 2.0,
        "confidence": 0.8,
        "seed": 3,
        "horizon_seconds": 1.0,
        "first_frame": 50,
        "last_frame": 300,
        "burst_c": 0.002,
    }
    flat = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    result = command.run_files(parse(arguments(files, tmp_path, *flat)))
    assert (result.frames[0], result.frames[-1]) == (50, 300)
    assert result.horizon_frames == 10
    assert {key: result.settings[key] for key in ("block_seconds", "confidence", "seed", "resamples")} == {
        "block_seconds": 2.0,
        "confidence": 0.8,
        "seed": 3,
        "resamples": 50,
    }
    assert "c = 0.002" in str(result.horizon_undefined)


def test_frames_of_series() -> None:
    series = {"a": np.arange(100.0), "b": np.arange(57.0), "c": np.arange(61.0)}
    frames, values = command.scored_frames(series, 100, 10.0, None, None)
    np.testing.assert_array_equal(frames, np.arange(39, 96))
    np.testing.assert_array_equal(values["a"], np.arange(39, 96))
    np.testing.assert_array_equal(values["b"], np.arange(57))
    np.testing.assert_array_equal(values["c"], np.arange(57))
    with pytest.raises(UserError, match="b: 50 values for the 100 frames of --motion: give 100, 61 or 57 of them, or"):
        command.scored_frames({"b": np.arange(50.0)}, 100, 10.0, None, None)
    frames, values = command.scored_frames({"b": np.arange(50.0)}, 100, 10.0, 20, 60)
    np.testing.assert_array_equal(frames, np.arange(20, 61))
    np.testing.assert_array_equal(values["b"], np.arange(41))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--fps", "0"], "--fps: must be a positive number, got 0"),
        (["--labels", "nowhere.npy"], "--labels: nowhere.npy does not exist"),
        (["--labels", str(CONFIG)], r"--labels: .*motion_lstm.yaml is not a whole .npy file of plain numbers"),
        (["--probabilities", "=x.npy"], "--probabilities: '=x.npy' needs a name of its own"),
        (["--probabilities", "whole=x.npy"], "'whole=x.npy' needs a name of its own"),
        (["--first_frame", "-1"], "--first_frame -1, --last_frame None: the split has frames 0 to 599"),
        (["--last_frame", "600"], "--last_frame 600: the split has frames 0 to 599"),
        (["--first_frame", "599"], "--first_frame 599: no frame is left to score"),
        (["--train_motion", "{motion}"], "train_motion and train_labels: give both or neither"),
        (
            ["--probabilities", "n={short}", "--first_frame", "50"],
            "--probabilities n: 557 values from frame 50 on reach",
        ),
        (["--chases", "{late}"], "--chases: start frames 40 to 600 reach beyond the 600 frames of --motion"),
        (["--chases", "{early}"], "--chases: start frames -1 to 40 reach beyond"),
        (["--chases", "{motion}"], r"--chases: .* holds no start frames \(K,\) or \(K, 4\), but float64"),
        (["--horizon_seconds", "60"], "--horizon_seconds: 60 s are 600 frames, and --motion has 600"),
        (["--probabilities", "n={chases}"], r"--probabilities n: one value a frame expected, got shape \(4, 4\)"),
    ],
)
def test_refused_in_one_line(files: dict[str, str], tmp_path: Path, more: list[str], told: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=told) as error:
        command.run(parse(arguments(files, out, *[text.format(**files) for text in more])))
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_a_pickle_is_not_opened(files: dict[str, str], tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (marker,)

    np.save(tmp_path / "bad.npy", np.array([Payload()], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=np.zeros(3))
    truncated = tmp_path / "truncated.npy"
    truncated.write_bytes(Path(files["motion"]).read_bytes()[:900])
    for path, told in (
        ("bad.npy", "plain numbers"),
        ("many.npz", "several arrays"),
        ("truncated.npy", "whole .npy file"),
    ):
        with pytest.raises(UserError, match=told):
            command.load_series("--motion", str(tmp_path / path))
    assert not marker.exists()
