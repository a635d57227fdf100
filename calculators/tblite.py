"""GFN1-xTB and GFN2-xTB by the tblite library: real electronic structure, molecules and periodic cells (Γ point)."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from calculators.base import (
    CalculatorEntry,
    CalculatorSettings,
    Inspection,
    Retry,
    charge_contradiction,
    total_charge,
)

if TYPE_CHECKING:
    from tblite.ase import TBLite

    from alcore.types import Structure


LOG = "tblite.txt"
_STEP = re.compile(r"^ +(\d+) +-?\d+\.\d+ +-?\d+\.\d+E[+-]\d+ +\d+\.\d+E[+-]\d+ *$", re.MULTILINE)


class TbliteSettings(CalculatorSettings):
    method: Literal["GFN1-xTB", "GFN2-xTB"] = Field("GFN1-xTB", description="the Hamiltonian")
    charge: int = Field(0, description="total charge in e of structures that bring none of their own")
    multiplicity: int | None = Field(
        None, ge=1, description="2S+1; null: from the sum of the initial magnetic moments, in μ_B"
    )
    accuracy: float = Field(1.0, gt=0, le=1000, description="numerical accuracy (no unit), smaller is tighter")
    electronic_temperature_k: float = Field(300.0, gt=0, description="Fermi smearing in K")
    max_iterations: int = Field(250, ge=1, description="self-consistency iterations before it counts as unconverged")
    mixer_damping: float = Field(
        0.4, gt=0, le=1, description="share of the new charges in the mixing, smaller is gentler"
    )


def make(settings: TbliteSettings, structure: Structure | None = None) -> TBLite:
    from tblite.ase import TBLite

    class LoggedTBLite(TBLite):
        def calculate(self, *args: Any, **keywords: Any) -> None:
            with Path(LOG).open("w", encoding="utf-8") as log, redirect_stdout(log):
                super().calculate(*args, **keywords)

    return LoggedTBLite(
        method=settings.method,
        charge=round(total_charge(settings, structure)),
        multiplicity=settings.multiplicity,
        accuracy=settings.accuracy,
        electronic_temperature=settings.electronic_temperature_k,
        max_iterations=settings.max_iterations,
        mixer_damping=settings.mixer_damping,
    )


def unavailable(settings: TbliteSettings | None) -> str | None:
    return None if find_spec("tblite") else "tblite is not installed (pip install tblite)"


def fingerprint_facts(settings: TbliteSettings) -> dict[str, Any]:
    from importlib.metadata import version

    # Neither steps nor mixing move the energy of an SCF that converged.
    settled = settings.model_dump(exclude={"max_iterations", "mixer_damping"})
    return {"code": "tblite", "version": version("tblite"), **settled}


def elements(settings: TbliteSettings) -> set[int]:
    return set(range(1, 87))


def refuse(settings: TbliteSettings, structure: Structure) -> str | None:
    if why := charge_contradiction(settings, structure):
        return why
    charge = total_charge(settings, structure)
    if charge != round(charge):
        return f"the charge {charge:+g} e is not a whole number, which tblite would round silently"
    # Seen: pbc (T, T, F) gives exactly the energy of (T, T, T), and a missing lattice vector ends in a solver error.
    if structure.pbc.any() and not structure.pbc.all():
        return "tblite takes a partly periodic cell for a fully periodic one (set all three pbc, with vacuum)"
    moments = structure.magnetic_moments
    unpaired = 0 if moments is None else round(moments.sum())
    if settings.multiplicity:
        unpaired = settings.multiplicity - 1
    electrons = int(structure.numbers.sum()) - int(charge)
    if unpaired and (electrons - unpaired) % 2:
        return f"{unpaired} unpaired electrons are impossible with {electrons} electrons (mend multiplicity or moments)"
    return None


def warm_up(settings: TbliteSettings) -> None:
    make(settings)


def inspect(settings: TbliteSettings, calculator: Any) -> Inspection:
    """Steps as tblite printed them; without a result, the last of those allowed means that they ran out."""
    log = Path(LOG)
    steps = [int(step) for step in _STEP.findall(log.read_text(encoding="utf-8"))] if log.is_file() else []
    if not steps:
        return Inspection()
    if "energy" in calculator.results:
        return Inspection(electronic_steps=steps[-1], converged=True)
    ended = steps[-1] >= settings.max_iterations
    return Inspection(
        electronic_steps=steps[-1],
        converged=False if ended else None,
        reason=f"not self-consistent after {steps[-1]} steps (max_iterations)" if ended else "",
    )


def _gently(settings: TbliteSettings) -> TbliteSettings:
    return settings.model_copy(update={"max_iterations": 3 * settings.max_iterations, "mixer_damping": 0.1})


def _slowly(settings: TbliteSettings) -> TbliteSettings:
    return settings.model_copy(update={"max_iterations": 10 * settings.max_iterations, "mixer_damping": 0.02})


def _starved(settings: TbliteSettings) -> TbliteSettings:
    return settings.model_copy(update={"max_iterations": 1})


RETRIES = (
    Retry(name="3x the steps, gentler mixing", change=_gently),
    Retry(name="10x the steps, still gentler mixing", change=_slowly),
)

ENTRY = CalculatorEntry(
    name="tblite",
    description="GFN1-xTB / GFN2-xTB tight binding, Z up to 86, molecules and 3D periodic cells at the Γ point",
    settings_model=TbliteSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
    takes_charge=True,
    warm_up=warm_up,
    refuse=refuse,
    inspect=inspect,
    retries=RETRIES,
    sabotage={"unconverged": _starved},
)
