"""Ablations: unusable files are named, base runs are shared, an interrupted call goes on, figures are right."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from convlstm_fish.cli import main
from convlstm_fish.commands import ablate, ablation_table
from convlstm_fish.errors import UserError

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))

# Stands in for a training: the AUC follows from the seed and the override, and each run notes that it ran.
FAKE = """
import json, pathlib, sys
folder, seed, lr = pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with open(sys.argv[4], "a") as log: log.write(f"{seed} {lr}\\n")
if lr == 9: sys.exit("lr 9 is too much")
version = folder / "version_0"; version.mkdir(parents=True)
row = {"name": "x", "auc": 0.7 + lr + 0.01 * seed * (1 + lr), "average_precision": 0.5}
(version / "metrics.json").write_text(json.dumps({"rows": [row]}))
"""


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    write(tmp_path / "base.yaml", "seed_everything: 0\n")
    fake = write(tmp_path / "fake.py", FAKE)

    def command(run: ablate.Run, extra: Any) -> list[str]:
        rate = str(run.overrides.get("model.lr", 0.0))
        return [sys.executable, str(fake), str(run.folder), str(run.seed), rate, str(tmp_path / "ran.txt")]

    monkeypatch.setattr(ablate, "run_command", command)
    rate = {"factor": "learning rate", "base": "base.yaml", "levels": {"base": {}, "more": {"model.lr": 0.1}}}
    size = {"factor": "size", "base": "base.yaml", "levels": {"as it is": {}, "large": {"model.lr": 0.2}}}
    return [write(tmp_path / "rate.yaml", rate), write(tmp_path / "size.yaml", size)]


def ran(tmp_path: Path) -> list[str]:
    return sorted((tmp_path / "ran.txt").read_text().split("\n"))[1:]


def test_shares_the_base_and_goes_on_after_an_interruption(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = ablate.ablate(files, out, seeds=(0, 1), jobs=2)
    # Two seeds of base, more and large; the base serves both factors.
    assert ran(tmp_path) == ["0 0.0", "0 0.1", "0 0.2", "1 0.0", "1 0.1", "1 0.2"]
    again = ablate.ablate(files, out, seeds=(0, 1, 2))
    assert len(ran(tmp_path)) == 9
    assert [row.seeds for row in again] == [3, 3, 3, 3]
    by = {(row.factor, row.level): row for row in rows}
    assert by["size", "as it is"].auc == by["learning rate", "base"].auc == pytest.approx(0.705)
    more = by["learning rate", "more"]
    assert more.auc == pytest.approx(0.8055)
    # Paired: 0.1 for seed 0 and 0.101 for seed 1; half width t(1) * sd / sqrt(2).
    assert more.delta == pytest.approx(0.1005)
    assert more.delta_half_width == pytest.approx(12.706 * 0.0005, rel=1e-6)
    assert by["size", "as it is"].delta == 0


def test_writes_table_numbers_and_plot(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    rows = ablate.ablate(files, out, seeds=(0,))
    assert math.isnan(rows[0].auc_sd)
    table = (out / "ablation.md").read_text()
    assert table.count("\n") == 2 + len(rows)
    assert "| learning rate | more | 1 | 0.800 | +0.100 |" in table
    numbers = json.loads((out / "ablation.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert [row["auc_sd"] for row in numbers] == [None] * len(rows)
    assert numbers[1]["auc"] == pytest.approx(0.8)
    assert "plotly" in (out / "ablation.html").read_text()


def test_a_failed_run_is_told_and_the_others_finish(files: list[Path], tmp_path: Path) -> None:
    bad = {"factor": "bad", "base": "base.yaml", "levels": {"base": {}, "nine": {"model.lr": 9}}}
    path = write(tmp_path / "bad.yaml", bad)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 4 runs failed.*nine.*exit code 1: lr 9 is too much"):
        ablate.ablate([path, *files], out, seeds=(0,))
    assert "| size | large | 1 | 0.900 |" in (out / "ablation.md").read_text()


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            {"rows": [{"name": "x", "auc": None, "undefined": "not defined, all 9 scored frames have label 0"}]},
            "label 0",
        ),
        ({"test/mse": 1.0}, "holds no AUC"),
    ],
)
def test_a_run_without_an_auc_is_told(files: list[Path], tmp_path: Path, result: Any, message: str) -> None:
    out = tmp_path / "out"
    ablate.ablate(files[:1], out, seeds=(0,))
    write(next((out / "runs/base/learning_rate").rglob("metrics.json")), json.dumps(result))
    with pytest.raises(UserError, match=f"1 of 2 runs failed.*{message}"):
        ablate.ablate(files[:1], out, seeds=(0,))
    assert (out / "ablation.md").read_text().count("\n") == 2 + 1


def test_the_time_of_a_run_is_that_of_all_its_parts(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    ablate.ablate(files[:1], out, seeds=(0,))
    folder = out / "runs/base/base/seed_0"
    write(folder / "seconds.json", "1000.0")
    shutil.rmtree(folder / "version_0")  # as if it had been stopped then
    assert 1000 < ablate.ablate(files[:1], out, seeds=(0,))[0].seconds < 1100


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_runs_and_says_how_to_go_on(tmp_path: Path, number: int, code: int) -> None:
    """Sent to the command alone; a run left behind would train on, unseen, and beside the one that takes over."""
    program = """
import signal, sys
from pathlib import Path
from convlstm_fish.cli import main
from convlstm_fish.cli import main
from convlstm_fish.commands import ablate
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
run = "import sys, time; from pathlib import Path; Path('started').touch(); time.sleep(4); Path('left behind').touch()"
ablate.run_command = lambda *_: [sys.executable, "-c", run]
sys.exit(main(["ablate", "--config", "rate.yaml", "--out", "out", "--seeds", "0", "1"]))
"""
    write(tmp_path / "base.yaml", "seed_everything: 0\n")
    write(tmp_path / "rate.yaml", {"factor": "rate", "base": "base.yaml", "levels": {"base": {}}})
    command = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    command.send_signal(number)
    _, said = command.communicate(timeout=60)
    assert command.returncode == code
    assert "stopped: 0 of 2 runs are finished; the same command goes on from here" in said
    assert "Traceback" not in said
    time.sleep(4)
    assert not (tmp_path / "left behind").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("factor: [", "not a YAML file"),
        ({"factor": "x"}, "exactly the keys base, factor and levels"),
        ({"factor": "x", "base": "base.yaml", "levels": {}}, "levels must map"),
        ({"factor": "x", "base": "base.yaml", "levels": {"a": 3}}, "level 'a' must map options"),
        ({"factor": "x", "base": "none.yaml", "levels": {"a": {}}}, "none.yaml does not exist"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path / "base.yaml", "seed_everything: 0\n")
    with pytest.raises(UserError, match=message):
        ablate.read_factor(write(tmp_path / "f.yaml", content))


def test_absent_file_and_senseless_numbers(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        ablate.read_factor(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="--jobs"):
        ablate.ablate(files, tmp_path, jobs=0)
    with pytest.raises(UserError, match="--seeds"):
        ablate.ablate(files, tmp_path, seeds=(1, 1))
    with pytest.raises(UserError, match="two files"):
        ablate.ablate([files[0], files[0]], tmp_path)


def test_the_seven_factors_are_shipped_with_one_base_level_each() -> None:
    factors = [ablate.read_factor(path) for path in SHIPPED]
    assert len(factors) == 7
    assert len({factor.base for factor in factors}) == 1
    for factor in factors:
        assert [dict(overrides) for overrides in factor.levels.values()].count({}) == 1, factor.name
        assert len(factor.levels) >= 3


def test_command_is_the_ordinary_fit(tmp_path: Path) -> None:
    run = ablate.Run(
        "x", {"model.hidden_channels": [8, 16], "data.flips": "none"}, tmp_path / "b.yaml", 3, tmp_path / "r"
    )
    command = ablate.run_command(run, ["--n_gpus=1"])
    assert command[1:5] == ["-m", "convlstm_fish", "fit", "--config"]
    assert "--model.hidden_channels=[8, 16]" in command
    assert "--seed_everything=3" in command
    assert "--n_gpus=1" in command
    assert "--ckpt_path=last" not in command
    (tmp_path / "r" / "version_0").mkdir(parents=True)
    (tmp_path / "r" / "version_0" / "last.ckpt").touch()
    assert ablate.run_command(run, [])[-1] == "--ckpt_path=last"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_levels_say_what_they_mean(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run in ablate.plan_runs([ablate.read_factor(path)], tmp_path, [0]).values():
        arguments = ablate.run_command(run, ["--n_gpus=0", "--print_config"])
        assert main(arguments[3:]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        for name, value in run.overrides.items():
            group, key = name.split(".")
            assert config[group].get("init_args", config[group])[key] == value


@pytest.mark.parametrize(("runs", "quantile"), [(2, 12.706), (11, 2.228), (12, 2.201), (21, 2.086), (101, 1.984)])
def test_interval_is_students_for_any_number_of_seeds(runs: int, quantile: float) -> None:
    values = list(range(runs))
    expected = quantile * statistics.stdev(values) / math.sqrt(runs)
    assert ablation_table._half_width(values) == pytest.approx(expected, rel=1e-3)
