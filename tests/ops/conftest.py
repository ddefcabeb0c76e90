"""Memory in which an element that nobody writes is seen, the precision of products, and Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills every uninitialised tensor with NaN, so that an element that is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def precision() -> Iterator[Callable[[bool], None]]:
    """Sets whether float32 convolutions may use TF32, and sets it back."""
    before = torch.backends.cudnn.allow_tf32

    def allow(tf32: bool) -> None:
        torch.backends.cudnn.allow_tf32 = tf32

    yield allow
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def interpret() -> Callable[[str], None]:
    """Runs the tests of a file that need no GPU in Triton's interpreter, which is chosen before Triton is imported."""

    def run(file: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", file]
        done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "passed" in done.stdout

    return run
