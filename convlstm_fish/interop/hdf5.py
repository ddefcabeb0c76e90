"""HDF5 files as plain groups and arrays, read by a process of its own that may fail without harm."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_source import MAX_ARRAY_BYTES

WORKER = Path(__file__).with_name("hdf5_worker.py")
TIME_LIMIT = 120.0
"""Seconds after which a file is taken to be one on which HDF5 loops for ever."""


@dataclass
class Group:
    """An HDF5 group.

    Attributes:
        attributes: the text attributes that Keras writes; lists of them as lists.
        members: groups and arrays by name.
    """

    attributes: dict[str, Any] = field(default_factory=dict)
    members: dict[str, Group | np.ndarray] = field(default_factory=dict)

    def group(self, name: str) -> Group:
        """The member of that name, which must be a group."""
        found = self.members[name]
        if not isinstance(found, Group):
            raise ValueError(f"{name!r} is not a group")
        return found

    def groups(self) -> dict[str, Group]:
        """All members, which must be groups."""
        return {name: self.group(name) for name in self.members}

    def array(self, key: str) -> np.ndarray:
        """The array at a path below the group."""
        *parents, name = key.split("/")
        group = self
        for parent in parents:
            group = group.group(parent)
        found = group.members[name]
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{key!r} is not an array")
        return found


def read_hdf5(path: Path, data: bytes) -> Group:
    """The groups and arrays of an HDF5 file.

    Args:
        path: for the message.
        data: the file's bytes.

    Raises:
        UserError: if it is damaged, or holds what no Keras file does: links, data outside the file, compressed or
            absurdly large arrays.
    """
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{path}: reading it needs h5py: pip install 'convlstm_fish[keras]'")
    try:
        done = subprocess.run(
            [sys.executable, str(WORKER), str(MAX_ARRAY_BYTES)],
            input=data,
            capture_output=True,
            timeout=TIME_LIMIT,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # whose threads would take the memory it is allowed
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{path}: not a readable HDF5 file (the HDF5 library did not come to an end with it)") from None
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        told = last[0][:200] if last else f"the HDF5 library ended with {done.returncode}"
        raise UserError(f"{path}: not a readable HDF5 file ({told})")
    length = int.from_bytes(done.stdout[:8], "little")
    tree = json.loads(done.stdout[8 : 8 + length])
    if "refused" in tree:
        raise UserError(f"{path}: {tree['refused']}")
    if "damaged" in tree:
        raise UserError(f"{path}: not a readable HDF5 file ({' '.join(tree['damaged'].split())[:200]})")
    return _group(tree, memoryview(done.stdout)[8 + length :])


def _group(tree: dict[str, Any], data: memoryview) -> Group:
    members: dict[str, Group | np.ndarray] = {}
    for name, member in tree["members"].items():
        if "members" in member:
            members[name] = _group(member, data)
        else:
            count = math.prod(member["shape"])
            flat = np.frombuffer(data, member["type"], count, member["at"]) if count else np.empty(0, member["type"])
            members[name] = flat.reshape(member["shape"])
    return Group(tree["attributes"], members)
