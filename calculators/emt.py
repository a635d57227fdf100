"""Effective medium theory, in ASE itself: metals in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from calculators.base import CalculatorEntry, CalculatorSettings

if TYPE_CHECKING:
    from ase.calculators.emt import EMT

    from alcore.types import Structure


class EmtSettings(CalculatorSettings):
    """EMT has nothing to set."""


def make(settings: EmtSettings, structure: Structure | None = None) -> EMT:
    from ase.calculators.emt import EMT

    return EMT(asap_cutoff=False)


def unavailable(settings: EmtSettings | None) -> str | None:
    return None


def fingerprint_facts(settings: EmtSettings) -> dict[str, Any]:
    from ase import __version__

    return {"code": "ase.calculators.emt", "version": __version__, "asap_cutoff": False}


def elements(settings: EmtSettings) -> set[int]:
    from ase.calculators.emt import parameters
    from ase.data import atomic_numbers

    return {atomic_numbers[symbol] for symbol in parameters}


ENTRY = CalculatorEntry(
    name="emt",
    description="effective medium theory for Al Cu Ag Au Ni Pd Pt (H C N O without meaning); ignores moments",
    settings_model=EmtSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
)
