"""Basis sets and GTH pseudopotentials in CP2K's data files: the entries that a calculation uses, by their text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ase.data import chemical_symbols

SYMBOLS = {symbol.upper(): symbol for symbol in chemical_symbols[1:]}
HEADER = re.compile(r"^\s*([A-Za-z]{1,2})\s+([A-Za-z]\S*(?:\s+\S+)*)\s*$")
"""``Al GTH-PBE-q3 GTH-PBE``: an element, a name, and other names of the same entry."""


@dataclass(frozen=True, kw_only=True)
class DataEntry:
    """One basis set or pseudopotential of one element.

    Attributes:
        electrons: that the names say it is for (``-q3``), or None.
        text: its numbers; comments left out, spaces made one.
    """

    electrons: int | None
    text: str

    @property
    def valence(self) -> int:
        """Electrons a GTH pseudopotential brings: its first line counts them shell by shell."""
        return sum(int(word) for word in self.text.split("\n", 1)[0].split())


def entries_named(path: Path, name: str) -> Mapping[str, DataEntry]:
    """Every element's entry of that name (or alias) in a file, by symbol; the first where there are several.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    return _read(str(path), (status.st_mtime_ns, status.st_size)).get(name.upper(), {})


@cache
def _read(path: str, _stamp: tuple[int, int]) -> dict[str, dict[str, DataEntry]]:
    found: dict[str, dict[str, DataEntry]] = {}
    for symbol, names, lines in _blocks(Path(path).read_text(encoding="utf-8", errors="replace")):
        counts = [int(match[1]) for name in names if (match := re.search(r"-q(\d+)$", name, re.IGNORECASE))]
        entry = DataEntry(electrons=counts[0] if counts else None, text="\n".join(lines))
        for name in names:
            found.setdefault(name.upper(), {}).setdefault(symbol, entry)
    return found


def _blocks(text: str) -> list[tuple[str, list[str], list[str]]]:
    """Symbol, names and lines of every entry."""
    blocks: list[tuple[str, list[str], list[str]]] = []
    for line in text.splitlines():
        content = re.split("[#!]", line, maxsplit=1)[0].strip()
        header = HEADER.match(content)
        if header and header[1].upper() in SYMBOLS:
            blocks.append((SYMBOLS[header[1].upper()], header[2].split(), []))
        elif content and blocks:
            blocks[-1][2].append(" ".join(content.split()))
    return blocks
