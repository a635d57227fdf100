"""The vocabulary's objects as plain values, and back: what a step found survives its process in this form.

Plain values are what JSON has, plus bytes and numpy arrays. What comes back equals what went in, arrays bit for bit.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from alcore.identity import json_sha256, sha256_hex

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """``value`` with every dataclass in it as a mapping of its fields and every tuple as a list.

    Raises:
        TypeError: it holds something that is neither the vocabulary's nor plain.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    raise TypeError(f"a {type(value).__name__} is no plain value")


def plain_sha256(value: Any) -> str:
    """Hash of ``value``, arrays and bytes by every bit; raises as ``to_plain``."""

    def exact(item: Any) -> Any:
        if isinstance(item, np.ndarray):
            return [item.dtype.str, list(item.shape), sha256_hex(item.tobytes())]
        if isinstance(item, bytes):
            return sha256_hex(item)
        if isinstance(item, list):
            return [exact(each) for each in item]
        return {key: exact(each) for key, each in item.items()} if isinstance(item, dict) else item

    return json_sha256({"value": exact(to_plain(value))})


def from_plain(kind: type[T], plain: Mapping[str, Any]) -> T:
    """The ``kind`` (a dataclass) that ``to_plain`` was given. Fields that are absent get their default: what an earlier
    al-loop wrote can still be read. Fields it does not know are left out.

    Raises:
        TypeError: a field without a default is absent.
    """
    hints = get_type_hints(kind)
    known = [field for field in fields(kind) if field.init]  # type: ignore[arg-type]  # a dataclass, as its caller knows
    missing = [f.name for f in known if f.name not in plain and f.default is MISSING and f.default_factory is MISSING]
    if missing:
        raise TypeError(f"a {kind.__name__} lacks {', '.join(missing)}")
    return kind(**{field.name: _read(hints[field.name], plain[field.name]) for field in known if field.name in plain})


def _read(hint: Any, value: Any) -> Any:
    """``value`` as a field of type ``hint`` holds it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None or origin is Literal:
        return value
    if origin in (Union, types.UnionType):
        return _read(next(kind for kind in arguments if kind is not type(None)), value)
    if isinstance(hint, type) and is_dataclass(hint):
        return from_plain(hint, value)
    if origin is tuple and isinstance(value, Sequence):
        return tuple(_read(arguments[0], item) for item in value)
    return value
