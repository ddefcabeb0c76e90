"""The TensorBoard server: really started, really asked, and gone with its run, however that ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from convlstm_fish.tensorboard_server import TensorBoardServer

ROOT = Path(__file__).resolve().parents[1]


def ask(url: str, what: str) -> object:
    with urllib.request.urlopen(f"{url}{what}", timeout=10) as reply:
        return json.load(reply)


def gone(url: str) -> bool:
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except (urllib.error.URLError, OSError):
            return True
        time.sleep(0.1)
    return False


def test_it_serves_the_folder_while_the_run_lasts(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        writer.add_scalar("val/loss", 0.5, 1)
    with TensorBoardServer(tmp_path) as server:
        assert server.url.startswith("http://localhost:")
        for _ in range(100):
            runs = ask(server.url, "data/runs")
            if runs == ["version_0"]:
                break
            time.sleep(0.1)
        assert runs == ["version_0"]
    assert gone(server.url)


def test_it_ends_with_a_run_that_fails(tmp_path: Path) -> None:
    server = TensorBoardServer(tmp_path)
    with pytest.raises(RuntimeError, match="the run fails"), server:
        raise RuntimeError("the run fails")
    assert gone(server.url)


_RUN = """
import sys, time
from convlstm_fish.tensorboard_server import TensorBoardServer
with TensorBoardServer(sys.argv[1]) as server:
    print(server.url, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_a_run_that_is_interrupted_or_killed(tmp_path: Path, number: int) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", _RUN, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A test run in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert run.stdout is not None
    url = run.stdout.readline().strip()
    assert isinstance(ask(url, "data/environment"), dict)
    run.send_signal(number)
    run.wait()
    run.stdout.close()
    assert gone(url)
