"""Checkpoints survive kills and full disks, and damaged, foreign and malicious files are refused in one line."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convlstm_fish.errors import UserError
from convlstm_fish.tasks.checkpoint_io import SafeCheckpointIO, check_checkpoint, load_checkpoint, newest_good


def content(size: int = 5000, value: float = 0.0) -> dict[str, Any]:
    return {"state_dict": {"w": torch.arange(size, dtype=torch.float32) + value}, "hyper_parameters": {"lr": 0.1}}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    SafeCheckpointIO().save_checkpoint(content(), path)
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    again = SafeCheckpointIO().load_checkpoint(path)
    assert torch.equal(again["state_dict"]["w"], content()["state_dict"]["w"])
    assert again["hyper_parameters"] == {"lr": 0.1}


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    SafeCheckpointIO().save_checkpoint(content(), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        record = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    data = range(record.header_offset + 200, record.header_offset + 5000 * 4)
    random = np.random.default_rng(0)
    for _ in range(30):  # torch.load alone would return wrong weights for nearly all of them
        damaged = bytearray(whole)
        damaged[random.choice(data)] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged, record .* fails its checksum"):
            load_checkpoint(path)
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_checkpoint(path)


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("forced", [False, True])
def test_code_in_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    if forced:  # an environment variable that makes torch.load run code unless it is told otherwise
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    witness = tmp_path / "witness"
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "payload": Malicious(f"touch {witness}")}, path)
    with pytest.raises(UserError, match=r"refused, it holds more than weights .*\(posix.system, which is not run\)"):
        load_checkpoint(path)
    with pytest.raises(UserError, match="would run code"):
        SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Malicious(f"touch {witness}")))
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "plain.ckpt")
    assert not witness.exists()


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="only local files"):
        check_checkpoint("http://127.0.0.1:9/a.ckpt")
    with pytest.raises(UserError, match="no such file"):
        check_checkpoint(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match=r"is a folder; name a \.ckpt file"):
        check_checkpoint(tmp_path)
    (tmp_path / "cut.ckpt").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"not a readable checkpoint \(incomplete, or no checkpoint at all"):
        check_checkpoint(tmp_path / "cut.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    with pytest.raises(UserError, match="no state_dict"):
        load_checkpoint(tmp_path / "tensor.ckpt")


def test_a_checkpoint_that_unpacks_to_more_than_it_is(tmp_path: Path) -> None:
    torch.save(content(2**20), tmp_path / "whole.ckpt")
    with zipfile.ZipFile(tmp_path / "whole.ckpt") as old, zipfile.ZipFile(tmp_path / "bomb.ckpt", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record), zipfile.ZIP_DEFLATED)
    assert load_checkpoint(tmp_path / "whole.ckpt")
    with pytest.raises(UserError, match=r"not a readable checkpoint \(record .* is compressed\)"):
        load_checkpoint(tmp_path / "bomb.ckpt")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    SafeCheckpointIO().save_checkpoint(content(), path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the system refuses to write more into one file
    try:
        with pytest.raises(UserError, match="cannot be written"):
            SafeCheckpointIO().save_checkpoint(content(100_000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


_KILLER = """
import os, random, signal, sys, time
import torch
from convlstm_fish.tasks.checkpoint_io import SafeCheckpointIO, load_checkpoint
folder, kills = sys.argv[1], int(sys.argv[2])
path = os.path.join(folder, "last.ckpt")
save = lambda value: SafeCheckpointIO().save_checkpoint({"state_dict": {"w": torch.full((1_000_000,), value)}}, path)
random.seed(0)
save(-1.0)
litter = changed = 0
for kill in range(kills):
    child = os.fork()
    if not child:
        value = 1000.0 * kill
        while True:
            save(value)
            value += 1
    time.sleep(random.uniform(0.02, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    litter += any(name.endswith(".tmp") for name in os.listdir(folder))
    weights = load_checkpoint(path)["state_dict"]["w"]
    assert weights.min() == weights.max(), "a mixture of two checkpoints"
    changed += float(weights[0]) >= 1000 * kill
save(-2.0)
print(litter, changed, os.listdir(folder))
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, str(tmp_path), "8"],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    litter, changed, left = done.stdout.split(maxsplit=2)
    assert int(litter) > 0, "no kill fell into a write, so nothing was shown"
    assert int(changed) > 0
    assert left.strip() == "['last.ckpt']", "half-written files of killed processes are removed"


def test_the_half_written_file_of_a_living_process_stays(tmp_path: Path) -> None:
    beside = tmp_path / f"best.ckpt.{os.getppid()}.tmp"
    beside.write_bytes(b"in the making")
    (tmp_path / "notes.tmp").write_text("not ours")
    SafeCheckpointIO().save_checkpoint(content(), tmp_path / "last.ckpt")
    assert {p.name for p in tmp_path.iterdir()} == {beside.name, "notes.tmp", "last.ckpt"}


def test_newest_good_passes_over_damaged_files(tmp_path: Path) -> None:
    assert newest_good(tmp_path) == (None, [])
    for age, name in ((30, "old"), (20, "good"), (10, "torn")):
        SafeCheckpointIO().save_checkpoint(content(), tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", (time.time() - age,) * 2)
    torn = tmp_path / "torn.ckpt"
    torn.write_bytes(torn.read_bytes()[:-500])
    found, problems = newest_good(tmp_path)
    assert found == tmp_path / "good.ckpt"
    assert len(problems) == 1
    assert "torn.ckpt" in problems[0]
