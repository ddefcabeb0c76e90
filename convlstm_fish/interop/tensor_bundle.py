"""Reads TensorFlow's checkpoint format (a "tensor bundle") without TensorFlow.

``variables.index`` is a table of sorted strings in LevelDB's format: the key is the variable's name, the value
a ``BundleEntryProto`` (type, shape, place in ``variables.data-*``, CRC32C). The tensors themselves lie raw in
the data files. Formats: tensorflow/core/lib/io/format.cc, tensorflow/core/protobuf/tensor_bundle.proto and
https://protobuf.dev/programming-guides/encoding. Nothing here executes or imports anything that a file says;
every checksum is verified and no length is believed beyond the file it is in.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convlstm_fish.errors import UserError
from convlstm_fish.interop.keras_source import Budget

_TABLE_MAGIC = 0xDB4775248B80FB57
_LONGEST_NAME = 4096
_STRING = 7
_NUMBERS = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8", 19: "<f2"}


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC32C = _crc32c_table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32 with Castagnoli's polynomial, rotated and offset as TensorFlow and LevelDB store it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC32C[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number runs over 10 bytes")


def _cut(data: bytes, at: int, length: int) -> bytes:
    if length < 0 or at < 0 or at + length > len(data):
        raise ValueError(f"{length} bytes at {at} lie outside the {len(data)} that are there")
    return data[at : at + length]


def proto_fields(data: bytes) -> dict[int, list[int | bytes]]:
    """A protobuf message as field number -> values (integers, or the bytes of strings, messages and fixed)."""
    fields: dict[int, list[int | bytes]] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        if tag & 7 == 0:
            value, at = _varint(data, at)
        else:
            if tag & 7 == 2:
                length, at = _varint(data, at)
            elif tag & 7 in (1, 5):
                length = 8 if tag & 7 == 1 else 4
            else:
                raise ValueError(f"protobuf wire type {tag & 7} is not known")
            value = _cut(data, at, length)
            at += length
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def messages(fields: dict[int, list[int | bytes]], number: int) -> list[bytes]:
    """The values of a repeated message, string or bytes field."""
    values = fields.get(number, [])
    if not all(isinstance(value, bytes) for value in values):
        raise ValueError(f"protobuf field {number} holds numbers where messages belong")
    return [value for value in values if isinstance(value, bytes)]


def integer(fields: dict[int, list[int | bytes]], number: int) -> int:
    """The value of an optional integer field; 0 where it is absent, as protobuf has it."""
    value = fields.get(number, [0])[-1]
    return int.from_bytes(value, "little") if isinstance(value, bytes) else value


def text(fields: dict[int, list[int | bytes]], number: int) -> str:
    """The value of an optional string field; empty where it is absent."""
    return (messages(fields, number) or [b""])[-1].decode()


def _block(table: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of one block; each key says how much of its predecessor it repeats."""
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    data = _cut(table, offset, size)
    trailer = _cut(table, offset + size, 5)
    if masked_crc32c(data + trailer[:1]) != struct.unpack("<I", trailer[1:])[0]:
        raise ValueError(f"the checksum of the block at {offset} does not match")
    if trailer[0] != 0:
        raise ValueError(f"block compression {trailer[0]} is not known")
    restarts = struct.unpack("<I", data[-4:])[0]
    data = _cut(data, 0, len(data) - 4 * (restarts + 1))
    key, at = b"", 0
    while at < len(data):
        shared, at = _varint(data, at)
        unshared, at = _varint(data, at)
        length, at = _varint(data, at)
        key = _cut(key, 0, shared) + _cut(data, at, unshared)
        at += unshared
        if len(key) > _LONGEST_NAME:
            raise ValueError(f"a variable's name has {len(key)} bytes")
        yield key, _cut(data, at, length)
        at += length


class TensorBundle:
    """The variables of a TensorFlow checkpoint, read one by one.

    Args:
        prefix: the path without ``.index``, for a SavedModel ``FOLDER/variables/variables``.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._budget = Budget(prefix)
        table = prefix.with_name(prefix.name + ".index").read_bytes()
        footer = table[-48:]
        if len(footer) < 48 or struct.unpack("<Q", footer[40:])[0] != _TABLE_MAGIC:
            raise ValueError("variables.index is not a TensorFlow checkpoint index")
        _, at = _varint(footer, 0)
        _, at = _varint(footer, at)  # the first handle is that of a meta index, which bundles do not use
        self._entries: dict[str, dict[int, list[int | bytes]]] = {}
        for _, handle in _block(table, footer[at:40]):
            for key, value in _block(table, handle):
                self._entries[key.decode()] = proto_fields(value)
        header = self._entries.pop("", None)
        if header is None or integer(header, 2) != 0:
            raise ValueError("variables.index has no header of a little-endian checkpoint")
        self._shards = integer(header, 1)

    def _raw(self, name: str) -> tuple[int, tuple[int, ...], bytes]:
        entry = self._entries[name]
        if 7 in entry:
            raise UserError(f"{self.prefix}: variable {name!r} is split over several devices, which is not read")
        shape = tuple(
            integer(proto_fields(dimension), 1)
            for message in messages(entry, 2)
            for dimension in messages(proto_fields(message), 2)
        )
        shard, offset, size = (integer(entry, number) for number in (3, 4, 5))
        path = self.prefix.with_name(f"{self.prefix.name}.data-{shard:05d}-of-{self._shards:05d}")
        if offset + size > path.stat().st_size:
            raise ValueError(f"variable {name!r} lies outside {path.name}")
        self._budget.spend(name, (size,), 1)
        with path.open("rb") as file:
            file.seek(offset)
            return integer(entry, 1), shape, file.read(size)

    def number(self, name: str) -> np.ndarray:
        """The variable of that name as an array; its checksum must match."""
        dtype, shape, data = self._raw(name)
        if dtype not in _NUMBERS:
            raise UserError(f"{self.prefix}: variable {name!r} has TensorFlow type {dtype}, weights must be numbers")
        if math.prod(shape) * np.dtype(_NUMBERS[dtype]).itemsize != len(data):
            raise ValueError(f"variable {name!r} of shape {list(shape)} has {len(data)} bytes")
        self._check(name, data)
        return np.frombuffer(data, _NUMBERS[dtype]).reshape(shape)

    def string(self, name: str) -> bytes:
        """The scalar string of that name: its length, the length's checksum, then the bytes."""
        dtype, shape, data = self._raw(name)
        if dtype != _STRING or shape != ():
            raise ValueError(f"{name!r} is not a string")
        length, at = _varint(data, 0)
        body = _cut(data, at + 4, length)
        # The checksum is over the length as a 32-bit number, as the file has it only as a varint.
        self._check(name, struct.pack("<I", length) + data[at : at + 4] + body)
        return body

    def _check(self, name: str, data: bytes) -> None:
        if masked_crc32c(data) != integer(self._entries[name], 6):
            raise ValueError(f"the checksum of {name!r} does not match: the file is damaged")
