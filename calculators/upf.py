"""Pseudopotentials in Quantum ESPRESSO's UPF format: what their headers say."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from alcore.identity import sha256_hex

HEADER_LIMIT = 8000
"""Characters; comments within a header of version 2 may be long, the radial mesh that follows is far longer."""


@dataclass(frozen=True, kw_only=True)
class Pseudopotential:
    """One UPF file.

    Attributes:
        element: its symbol.
        valence: electrons it brings.
        functional: that it was made with, as the file writes it, or "".
        sha256: of the whole file.
    """

    element: str
    valence: float
    functional: str
    sha256: str


def read_upf(path: Path) -> Pseudopotential | None:
    """None if it is no UPF file; read once as long as the file stays the same.

    Raises:
        OSError: it cannot be read.
    """
    status = path.stat()
    return _read(str(path), (status.st_mtime_ns, status.st_size))


@cache
def _read(path: str, _stamp: tuple[int, int]) -> Pseudopotential | None:
    data = Path(path).read_bytes()
    _, found, rest = data.decode(errors="replace").partition("<PP_HEADER")
    header = rest[:HEADER_LIMIT]
    # Version 2 writes attributes, version 1 a line each: "3.000  Z valence".
    element = re.search(r"\belement\s*=\s*[\"']\s*([A-Za-z]+)|^\s*([A-Za-z]+)\s+Element", header, re.MULTILINE)
    valence = re.search(r"\bz_valence\s*=\s*[\"']\s*([^\"'\s]+)|^\s*(\S+)\s+Z valence", header, re.MULTILINE)
    functional = re.search(r"\bfunctional\s*=\s*[\"']([^\"']+)|^(.*?)\s+Exchange-Corr", header, re.MULTILINE)
    if not found or not element or not valence:
        return None
    return Pseudopotential(
        element=(element[1] or element[2]).capitalize(),
        valence=float(re.sub("[dD]", "e", valence[1] or valence[2])),
        functional=" ".join((functional[1] or functional[2]).split()) if functional else "",
        sha256=sha256_hex(data),
    )
