"""Morse potential for copper: a calculator that al-loop finds by its entry point (see pyproject.toml)."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from calculators.base import CalculatorEntry, CalculatorSettings


# What a run file may say under `calculator.settings`. Types and bounds are checked, unknown keys refused;
# `al-loop calculators morse` shows the descriptions, so name the units in them.
class MorseSettings(CalculatorSettings):
    depth_ev: float = Field(0.3429, gt=0, description="depth of the well in eV")
    distance_ang: float = Field(2.866, gt=0, description="distance of the minimum in Å")
    decay_per_ang: float = Field(1.3588, gt=0, description="decay in 1/Å")


def make(settings: MorseSettings, structure: Any = None) -> Any:
    """A fresh ASE calculator. Called once a label, in a folder of its own; import what is heavy here, not above."""
    from ase.calculators.morse import MorsePotential

    rho0 = settings.decay_per_ang * settings.distance_ang
    return MorsePotential(epsilon=settings.depth_ev, r0=settings.distance_ang, rho0=rho0)


def unavailable(settings: MorseSettings | None) -> str | None:
    """Why it cannot run here and how to mend that (a program, a licence file), or None. With None for the settings:
    whether the installation is there at all."""
    return None


def fingerprint_facts(settings: MorseSettings) -> dict[str, Any]:
    """The code, its version, and every setting that moves the energy, none that does not: labels with the same facts
    are the same labels, are reused, and are trained on together."""
    from ase import __version__

    return {"code": "ase.calculators.morse", "version": __version__, **settings.model_dump()}


ENTRY = CalculatorEntry(
    name="morse",  # as the entry point is called
    description="Morse potential for copper, an example of a plug-in",
    settings_model=MorseSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=lambda settings: {29},
    # Further promises are there for codes that have them: takes_charge, refuse, inspect (count electronic steps),
    # retries, complete, warm_up, sabotage. `calculators.base.CalculatorEntry` describes each.
)
