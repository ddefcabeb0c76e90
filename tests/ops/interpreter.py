"""Marks of tests that run in Triton's interpreter, which must be chosen before Triton is first imported.

A file of them has a test that runs it in a process of its own, by the fixture ``interpret``.
"""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own, started by another test")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="this is that process")
# A test's device: the interpreter's, or a GPU.
on_both = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]
)
