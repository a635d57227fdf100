"""INCAR tags: how they read, which of them move the energy, and which a single point must not have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

HOW_IT_CONVERGES = frozenset(
    {
        "NELM",
        "NELMIN",
        "NELMDL",
        "ALGO",
        "IALGO",
        "LDIAG",
        "TIME",
        "AMIX",
        "BMIX",
        "AMIX_MAG",
        "BMIX_MAG",
        "AMIN",
        "MAXMIX",
        "IMIX",
        "INIMIX",
        "MIXPRE",
        "WC",
        "ISTART",
        "ICHARG",
        "INIWAV",
    }
)
HOW_IT_RUNS = frozenset(
    {
        "NCORE",
        "NPAR",
        "KPAR",
        "NSIM",
        "LPLANE",
        "LSCALAPACK",
        "LSCAAWARE",
        "LSCALU",
        "LASYNC",
        "LELPA",
        "NCCL",
        "NTAUPAR",
        "NOMEGAPAR",
        "MAXMEM",
    }
)
WHAT_IS_WRITTEN = frozenset(
    {
        "SYSTEM",
        "NWRITE",
        "LWAVE",
        "LCHARG",
        "LVTOT",
        "LVHAR",
        "LELF",
        "LAECHG",
        "LORBIT",
        "LDAUPRINT",
        "LH5",
        "LVASPH5",
        "NEDOS",
        "EMIN",
        "EMAX",
    }
)
HOW_IT_MOVES = frozenset({"NSW", "IBRION", "ISIF", "EDIFFG", "POTIM", "NFREE", "NBLOCK", "KBLOCK"})
NOT_FACTS = HOW_IT_CONVERGES | HOW_IT_RUNS | WHAT_IS_WRITTEN | HOW_IT_MOVES
"""Tags that do not move the converged energy of a geometry; everything else belongs to the fingerprint."""

FIXED: dict[str, Any] = {"NSW": 0, "IBRION": -1, "ISIF": 2, "ISTART": 0, "ICHARG": 2, "LORBIT": 11}
"""Of every calculation: one geometry, from scratch, with stress and local moments."""

SILENT: dict[str, Any] = {"LWAVE": False, "LCHARG": False, "LAECHG": False, "LVTOT": False, "LELF": False}
"""Large files that nobody reads; a user's own INCAR tag brings them back."""

BY_SPECIES = frozenset(
    {
        "LDAUL",
        "LDAUU",
        "LDAUJ",
        "RWIGS",
        "ROPT",
        "VDW_C6",
        "VDW_R0",
        "VDW_ALPHA",
        "VDW_C6AU",
        "VDW_R0AU",
        "POMASS",
        "ZVAL",
    }
)
"""Lists in the order of POSCAR's elements, which a setting does not know."""

SELF_CONSISTENT = frozenset({"NORMAL", "VERYFAST", "FAST", "ALL", "DAMPED", "CONJUGATE", "EXACT"})
SELF_CONSISTENT_LETTERS = frozenset("NVFADCE")
SELF_CONSISTENT_NUMBERS = frozenset({8.0, 38.0, 48.0, 53.0, 54.0, 58.0, 68.0, 90.0})

MOVING = {"NSW": 0, "IBRION": -1}
OTHER_METHODS = {
    "IMAGES": "several geometries at once",
    "ICHAIN": "a transition-state method",
    "ML_LMLFF": "a force field in VASP's place",
    "LNONCOLLINEAR": "non-collinear moments, which a structure here does not hold",
    "LSORBIT": "non-collinear moments, which a structure here does not hold",
    "LEPSILON": "a response calculation",
    "LCALCEPS": "a response calculation",
    "PSTRESS": "an enthalpy in the energy's place",
}
FROM_STRUCTURE = {
    "NELECT": "the structure's charge sets it",
    "MAGMOM": "the structure's magnetic_moments set it",
}

_REPEATED = re.compile(r"\d+\*[^*]+")
_TRUE, _FALSE = {"T", "TRUE", ".TRUE.", ".T."}, {"F", "FALSE", ".FALSE.", ".F."}


def parse_incar(text: str) -> dict[str, str]:
    """Tags in capitals and their values as text; the first of a tag that comes twice counts, as in VASP."""
    tags: dict[str, str] = {}
    joined = re.sub(r"\\\s*\n", " ", text)
    for line in joined.splitlines():
        for part in re.split(r"[#!]", line, maxsplit=1)[0].split(";"):
            key, equals, value = part.partition("=")
            if equals:
                tags.setdefault(key.strip().upper(), value.strip().strip('"'))
    return tags


def canonical(value: Any) -> Any:
    """The same for every way to write the same value: ``.TRUE.`` and True; ``520`` and ``520.0``; ``Pe`` and ``PE``."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): canonical(one) for key, one in value.items()}
    if isinstance(value, str):
        words = value.split()
        return (
            canonical(words) if len(words) > 1 or _REPEATED.fullmatch(value.strip()) else _word(value.strip().upper())
        )
    if isinstance(value, Iterable):
        listed = [one for item in value for one in _repeated(item)]
        return listed[0] if len(listed) == 1 else listed
    return value


def _repeated(item: Any) -> list[Any]:
    """``3*0.6`` is three values."""
    if isinstance(item, str) and _REPEATED.fullmatch(item):
        count, _, word = item.partition("*")
        return [canonical(word)] * int(count)
    return [canonical(item)]


def _word(word: str) -> Any:
    if word in _TRUE | _FALSE:
        return word in _TRUE
    try:
        return float(word.replace("D", "E"))
    except ValueError:
        return word


def facts_of(tags: Mapping[str, Any]) -> dict[str, Any]:
    """Those tags that move the energy, each written in one way."""
    return {key.upper(): canonical(value) for key, value in tags.items() if key.upper() not in NOT_FACTS}


def incar_text(value: Any) -> str:
    """A value as INCAR has it, with all its digits."""
    if isinstance(value, bool):
        return ".TRUE." if value else ".FALSE."
    if isinstance(value, str):
        return value
    if isinstance(value, Iterable):
        return " ".join(incar_text(one) for one in value)
    return repr(value)


def objection(tags: Mapping[str, Any], allowed: Iterable[str] = ()) -> str | None:
    """What keeps these tags from being a single point of the structure that is asked about, or None.

    Args:
        tags: in capitals.
        allowed: tags that are let through although the structure usually sets them.
    """
    for tag, value in tags.items():
        said = canonical(value)
        if tag in MOVING and said != MOVING[tag]:
            return f"{tag} = {value} would relax or move the atoms (remove it: al-loop moves them)"
        if tag in OTHER_METHODS and said not in (False, 0.0):
            return f"{tag} = {value} asks for {OTHER_METHODS[tag]} (remove it)"
        if tag in FROM_STRUCTURE and tag not in allowed:
            return f"{tag} must not be set: {FROM_STRUCTURE[tag]} (remove it)"
        if tag in BY_SPECIES and tag not in allowed:
            return f"{tag} depends on the order of the elements in POSCAR (use the setting ldau_luj, or folder)"
        if tag in ("ICHARG", "ISTART") and said not in (0.0, 1.0, 2.0):
            return f"{tag} = {value} keeps a charge density that is not there (remove it)"
        if tag == "ISIF" and said not in (0.0, 1.0, 2.0, 3.0):
            return f"ISIF = {value} would change the cell (remove it)"
        if tag == "IALGO" and said not in SELF_CONSISTENT_NUMBERS:
            return f"IALGO = {value} is no self-consistent ground state (use ALGO = Normal)"
        if tag == "ALGO" and not self_consistent(str(value)):
            return f"ALGO = {value} is no self-consistent ground state (use Normal, Fast, VeryFast, All or Damped)"
    return None


def self_consistent(algo: str) -> bool:
    """Whether ALGO ends in the ground state; VASP takes the first letter alone for those."""
    word = algo.strip().upper()
    return word in SELF_CONSISTENT or (len(word) == 1 and word in SELF_CONSISTENT_LETTERS)
