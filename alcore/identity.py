"""Content keys: two requests are the same request exactly if their keys are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alcore.types import Structure

POSITION_DECIMALS = 6
"""Geometries that differ by less than 1e-6 Å are the same geometry."""


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def json_sha256(values: Mapping[str, Any]) -> str:
    """Hash of plain values, independent of the order of keys."""
    return sha256_hex(json.dumps(values, sort_keys=True, separators=(",", ":"), default=str).encode())


def keys_sha256(keys: Sequence[str]) -> str:
    """Hash of label keys in their order: what a model was trained on."""
    return sha256_hex("\n".join(keys).encode())


def geometry_bytes(structure: Structure) -> bytes:
    """Canonical bytes of a geometry: order and origin are kept, because forces refer to them; constraints do not enter,
    because they do not move the energy."""
    scale = 10**POSITION_DECIMALS
    parts = [
        structure.numbers.astype("<i8").tobytes(),
        np.rint(structure.positions * scale).astype("<i8").tobytes(),
        np.rint(structure.cell * scale).astype("<i8").tobytes(),
        structure.pbc.astype("u1").tobytes(),
        repr(round(float(structure.charge), POSITION_DECIMALS)).encode(),
    ]
    moments = structure.magnetic_moments
    if moments is not None and np.any(moments):
        parts.append(np.rint(moments * scale).astype("<i8").tobytes())
    return b"|".join(parts)


def label_key(structure: Structure, fingerprint: str) -> str:
    """Key of a label: geometry (rounded to 1e-6 Å) and calculator fingerprint, as 64 hex digits."""
    return sha256_hex(geometry_bytes(structure) + b"#" + fingerprint.encode())
