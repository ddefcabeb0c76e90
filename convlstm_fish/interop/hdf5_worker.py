"""Takes an HDF5 file apart in a process of its own; hdf5.py starts it, nothing imports it.

HDF5's C library can loop for ever or crash on a damaged file (a block of zeros in its string heap is enough), so
it is kept away from the process that does the work. Reads the file from standard input; writes the length of a
JSON tree as eight bytes, the tree and the arrays' bytes to standard output. Only plain, uncompressed numbers and a
few text attributes are taken, and no link is followed.
"""

from __future__ import annotations

import io
import json
import math
import sys
from typing import Any

import h5py
import numpy as np

MAX_VISITS = 100_000
MAX_DEPTH = 16
MAX_MEMORY = 2**33
ATTRIBUTES = ("backend", "keras_version", "layer_names", "model_config", "name", "training_config", "weight_names")


class Refused(Exception):
    """What is in the file cannot be meant."""


class Reader:
    """Walks the file once.

    Args:
        limit: bytes of all arrays together.
    """

    def __init__(self, limit: int) -> None:
        self.left = self.limit = limit
        self.visits = 0
        self.arrays: list[np.ndarray] = []
        self.at = 0

    def group(self, group: h5py.Group, depth: int = 0) -> dict[str, Any]:
        """A group as attributes and members, these by name."""
        if depth > MAX_DEPTH:
            raise Refused(f"{group.name} lies more than {MAX_DEPTH} groups deep")
        members: dict[str, Any] = {}
        for name in group:
            self.visits += 1
            if self.visits > MAX_VISITS:
                raise Refused(f"it holds more than {MAX_VISITS} groups and arrays")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise Refused(f"{group.name}/{name} is a link, Keras files have none")
            member = group[name]
            members[name] = self.group(member, depth + 1) if isinstance(member, h5py.Group) else self.array(member)
        attributes = {name: self.text(group.attrs[name]) for name in ATTRIBUTES if name in group.attrs}
        return {"attributes": attributes, "members": members}

    def text(self, value: Any) -> str | list[str]:
        """A text attribute, or a list of them."""
        if isinstance(value, np.ndarray):
            return [item.decode() if isinstance(item, bytes) else str(item) for item in value.ravel()]
        return value.decode() if isinstance(value, bytes) else str(value)

    def array(self, dataset: Any) -> dict[str, Any]:
        """Type, shape and place of a dataset, of which the data are all in the file and are numbers."""
        name = str(dataset.name)
        if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
            raise Refused(f"{name!r} is neither a group nor an array")
        if dataset.dtype.kind not in "fiu":
            raise Refused(f"array {name!r} has type {dataset.dtype}, weights must be numbers")
        if dataset.external or dataset.is_virtual:
            raise Refused(f"array {name!r} refers to data outside the file, which are not read")
        if dataset.compression is not None:
            raise Refused(f"array {name!r} is compressed, Keras writes none such")
        size = math.prod(dataset.shape) * dataset.dtype.itemsize
        if size > self.left:
            raise Refused(
                f"with array {name!r} of shape {list(dataset.shape)} it would take more than the {self.limit} bytes "
                "that are read"
            )
        stored = dataset.id.get_storage_size()
        if size > stored:
            raise Refused(f"array {name!r} of shape {list(dataset.shape)} has only {stored} bytes in the file")
        self.left -= size
        array = np.asarray(dataset[()], dtype=dataset.dtype.newbyteorder("<"), order="C")
        self.arrays.append(array)
        place = {"type": array.dtype.str, "shape": list(array.shape), "at": self.at}
        self.at += array.nbytes
        return place


def limit_memory() -> None:
    """Let a file that makes HDF5 ask for absurd memory fail here, where that can be done."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def main() -> None:
    """Read, and write what was found or why it was refused."""
    limit_memory()
    reader = Reader(int(sys.argv[1]))
    try:
        with h5py.File(io.BytesIO(sys.stdin.buffer.read()), "r") as file:
            tree = reader.group(file)
    except Refused as refusal:
        tree = {"refused": str(refusal)}
    except Exception as error:  # HDF5's errors come as many kinds
        tree = {"damaged": f"{type(error).__name__}: {error}"}
    header = json.dumps(tree).encode()
    sys.stdout.buffer.write(len(header).to_bytes(8, "little") + header)
    if "members" in tree:
        for array in reader.arrays:
            sys.stdout.buffer.write(array.tobytes())


if __name__ == "__main__":
    main()
