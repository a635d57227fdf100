"""Plain values and numpy arrays as BSON takes them, and the mongoengine fields that hold them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from bson import Binary, Int64
from mongoengine import DictField
from mongoengine.base import BaseField
from numpy.lib.format import read_array_header_1_0
from numpy.typing import NDArray

INT64 = 2**63
ESCAPES = {"%": "%25", ".": "%2E", "$": "%24", "\0": "%00"}


def pack_array(array: NDArray[Any]) -> bytes:
    """Compressed bytes that keep shape, dtype and every bit. Objects are refused with ValueError."""
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return zlib.compress(buffer.getvalue())


def unpack_array(packed: bytes) -> NDArray[Any]:
    """The read-only array that was packed."""
    data = zlib.decompress(packed)
    start = 10 + int.from_bytes(data[8:10], "little")  # npy 1.0: magic, version, length of the header, header
    if data[6:8] != b"\1\0":
        array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        array.setflags(write=False)
        return array
    shape, dtype = _header(data[:start])
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@lru_cache(maxsize=1024)
def _header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Of arrays in C order, as ``pack_array`` writes them. Parsing it takes longer than all else."""
    shape, _, dtype = read_array_header_1_0(io.BytesIO(header[8:]))
    return shape, dtype


def encode_plain(value: Any) -> Any:
    """Plain values (what JSON has, plus bytes, numpy scalars and arrays, and ints of any size) as BSON takes them.

    Keys are escaped, so what starts with ``%`` here was never a user's key. Tuples become lists.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | float | str | bytes):
        return value
    if isinstance(value, int):
        return value if -INT64 <= value < INT64 else {"%int": str(value)}
    if isinstance(value, np.ndarray):
        return {"%npy": Binary(pack_array(value))}
    if isinstance(value, list | tuple):
        return [encode_plain(item) for item in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only strings can be keys")
        return {_escape(key): encode_plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def decode_plain(value: Any) -> Any:
    """Undoes ``encode_plain``."""
    if isinstance(value, list):
        return [decode_plain(item) for item in value]
    if isinstance(value, Mapping):
        if "%int" in value:
            return int(value["%int"])
        if "%npy" in value:
            return unpack_array(value["%npy"])
        return {_unescape(key): decode_plain(item) for key, item in value.items()}
    return int(value) if isinstance(value, Int64) else value


def _escape(key: str) -> str:
    return "".join(ESCAPES.get(character, character) for character in key)


def _unescape(key: str) -> str:
    for character, escaped in reversed(ESCAPES.items()):  # "%25" last, or it would make new escapes
        key = key.replace(escaped, character)
    return key


class ArrayField(BaseField):
    """A numpy array of any shape and dtype."""

    def to_mongo(self, value: Any) -> Any:
        return value if isinstance(value, bytes) else Binary(pack_array(value))

    def to_python(self, value: Any) -> Any:
        return value  # most queries look at few of them

    def __get__(self, instance: Any, owner: Any) -> Any:
        value = super().__get__(instance, owner)
        if isinstance(value, bytes):
            value = instance._data[self.name] = unpack_array(value)
        return value

    def validate(self, value: Any) -> None:
        if not isinstance(value, np.ndarray | bytes):
            self.error("must be a numpy array")


class PlainField(BaseField):
    """A mapping of plain values; its entries can be queried (``surrogate__strategy="multihead"``)."""

    def to_mongo(self, value: Any) -> Any:
        return encode_plain(value)

    def to_python(self, value: Any) -> Any:
        return decode_plain(value)

    def validate(self, value: Any) -> None:
        if not isinstance(value, Mapping):
            self.error("must be a mapping")

    def lookup_member(self, member_name: str) -> DictField:
        """How mongoengine finds the entry in a query."""
        return DictField(db_field=member_name)
