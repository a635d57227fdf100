"""GPAW: density functional theory in plane waves or atomic orbitals, with PAW data sets; runs inside the worker."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from alcore.errors import CalculatorError
from alcore.identity import json_sha256, sha256_hex
from calculators.base import (
    CalculatorEntry,
    CalculatorSettings,
    Inspection,
    Retry,
    charge_contradiction,
    total_charge,
)
from calculators.kpoints import grid_of_spacing

if TYPE_CHECKING:
    from ase.calculators.abc import GetPropertiesMixin as AseCalculator

    from alcore.types import Structure

DAMPING = {"D3": "d3zero", "D3BJ": "d3bj"}


class GpawSettings(CalculatorSettings):
    mode: Literal["pw", "lcao"] = Field("pw", description="plane waves, or atomic orbitals: quicker and rougher")
    xc: str = Field("PBE", description="functional, as GPAW or libxc names it")
    cutoff_ev: float = Field(400.0, gt=0, description="plane-wave cutoff in eV (pw only)")
    basis: str = Field("dzp", description="atomic orbitals (lcao only): dzp, sz(dzp), ...")
    grid_spacing_ang: float | None = Field(
        None,
        gt=0,
        description="real-space grid in Å; null: GPAW's choice for the cutoff (pw), 0.2 Å (lcao, where forces move "
        "with the atoms' places on the grid: compare with 0.16)",
    )
    kspacing: float = Field(0.25, gt=0, description="largest distance of k-points in 1/Å (2π included, as in VASP)")
    kpts: tuple[int, int, int] | None = Field(None, description="k-points along the three axes, instead of kspacing")
    gamma: bool = Field(True, description="k-points around Γ; false: Monkhorst-Pack's own places")
    point_group: bool = Field(
        False, description="save k-points by symmetry; symmetric structures are then computed a little differently"
    )
    smearing_ev: float = Field(0.1, ge=0, description="Fermi-Dirac width in eV")
    spinpol: bool | None = Field(
        None, description="spin-polarised; null: if the structure brings moments that are not 0"
    )
    charge: float = Field(0.0, description="total charge in e of structures that bring none of their own")
    dispersion: Literal["D3", "D3BJ"] | None = Field(None, description="two-body DFT-D3, zero or BJ damping (dftd3)")
    setups: dict[str, str] = Field(
        default_factory=dict,
        description="PAW data sets that are not GPAW's default, by element; {Cr: ':d,3.0'}: +U in eV",
    )
    energy_convergence_ev: float = Field(1e-5, gt=0, description="SCF: change of energy in eV per valence electron")
    density_convergence: float = Field(1e-5, gt=0, description="SCF: change of density in e per valence electron")
    maxiter: int = Field(200, ge=1, description="SCF steps before it counts as unconverged")
    mixing_beta: float | None = Field(None, gt=0, le=1, description="share of the new density; null: GPAW's choice")
    mixing_history: int | None = Field(None, ge=1, description="densities that are mixed; null: GPAW's choice")
    mixing_weight: float | None = Field(None, ge=1, description="damping of long waves; null: GPAW's choice")
    eigensolver: Literal["dav", "rmm-diis", "cg"] | None = Field(None, description="of pw; null: GPAW's choice")


NOT_FACTS = {"maxiter", "mixing_beta", "mixing_history", "mixing_weight", "eigensolver"}
"""How the SCF gets there does not move where it ends."""


def _kpoints(settings: GpawSettings, structure: Structure) -> dict[str, Any]:
    """GPAW's ``kpts``; one point along directions that are not periodic."""
    size = settings.kpts or grid_of_spacing(structure.cell, structure.pbc, settings.kspacing)
    return {"size": size, "gamma": True} if settings.gamma else {"size": size}


def _mixer(settings: GpawSettings) -> dict[str, Any]:
    chosen = {"beta": settings.mixing_beta, "nmaxold": settings.mixing_history, "weight": settings.mixing_weight}
    return {name: value for name, value in chosen.items() if value is not None}


def make(settings: GpawSettings, structure: Structure) -> AseCalculator:
    from gpaw.calculator import GPAW

    plane_waves = settings.mode == "pw"
    gpaw = GPAW(
        mode={"name": "pw", "ecut": settings.cutoff_ev} if plane_waves else {"name": "lcao"},
        basis={} if plane_waves else settings.basis,
        h=settings.grid_spacing_ang,
        xc=settings.xc,
        kpts=_kpoints(settings, structure),
        symmetry={"point_group": settings.point_group},
        occupations={"name": "fermi-dirac", "width": settings.smearing_ev},
        spinpol=settings.spinpol,
        charge=total_charge(settings, structure),
        setups=dict(settings.setups),
        convergence={"energy": settings.energy_convergence_ev, "density": settings.density_convergence},
        maxiter=settings.maxiter,
        mixer=_mixer(settings) or None,
        eigensolver=settings.eigensolver if plane_waves else None,
        txt="gpaw.txt",
    )
    return gpaw if settings.dispersion is None else _with_dispersion(gpaw, settings)


def _with_dispersion(gpaw: Any, settings: GpawSettings) -> AseCalculator:
    from ase.calculators.mixing import SumCalculator

    class GpawD3(SumCalculator):
        def calculate(self, atoms: Any, properties: Any, system_changes: Any) -> None:
            super().calculate(atoms, properties, system_changes)
            self.results["magmoms"] = gpaw.results.get("magmoms")

    dispersion = _dispersion(settings)
    # It gives a free energy without announcing it; only what all parts announce is summed.
    dispersion.implemented_properties = [*dispersion.implemented_properties, "free_energy"]
    return GpawD3([gpaw, dispersion])


def _dispersion(settings: GpawSettings) -> Any:
    """Raises:
    CalculatorError: D3 has no parameters for this functional, or is not installed.
    """
    if not find_spec("dftd3"):
        raise CalculatorError("dftd3 is not installed (pip install dftd3)")
    from dftd3.ase import DFTD3
    from dftd3.interface import RationalDampingParam, ZeroDampingParam

    assert settings.dispersion is not None
    try:
        (RationalDampingParam if settings.dispersion == "D3BJ" else ZeroDampingParam)(method=settings.xc)
    except RuntimeError as error:
        text = f"{settings.dispersion} has no parameters for {settings.xc} (mend dispersion or xc)"
        raise CalculatorError(text) from error
    return DFTD3(method=settings.xc, damping=DAMPING[settings.dispersion])


def _dft(calculator: Any) -> Any:
    """GPAW's own part of what ``make`` returned."""
    return calculator.mixer.calcs[0] if hasattr(calculator, "mixer") else calculator


def unavailable(settings: GpawSettings | None) -> str | None:
    if not find_spec("gpaw"):
        return "gpaw is not installed (pip install 'al-loop[gpaw]' with libxc and a C compiler, or make install-dft)"
    if settings is None:
        return None
    try:
        fingerprint_facts(settings)
        if settings.dispersion is not None:
            _dispersion(settings)
    except CalculatorError as error:
        return str(error)
    return None


def _setup_name(settings: GpawSettings) -> str:
    """Name of the functional that the PAW data sets were made with.

    Raises:
        CalculatorError: GPAW does not know the functional.
    """
    from gpaw.xc import XC

    try:
        return str(XC(settings.xc).get_setup_name())
    except Exception as error:  # a NameError, or whatever a functional's own module raises
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CalculatorError(f"GPAW has no functional {settings.xc!r}: {text} (mend xc)") from error


def _data_files(settings: GpawSettings) -> dict[str, Path]:
    """Every PAW data set (and basis) that a calculation could read, by name; the first folder that has it counts.

    Raises:
        CalculatorError: there are none.
    """
    import gpaw

    kinds = [_setup_name(settings)]
    if settings.mode == "lcao":
        kinds.append(settings.basis.rpartition("(")[2].rstrip(")") + ".basis")  # sz(dzp) is read from dzp's file
    found: dict[str, Path] = {}
    for folder in map(Path, gpaw.setup_paths):
        for file in chain.from_iterable(folder.glob(f"*{kind}*") for kind in kinds):
            found.setdefault(file.name, file)
    for kind in kinds:
        if not any(f".{kind}" in file for file in found):
            where = ", ".join(map(str, gpaw.setup_paths)) or "no folder"
            mend = "pip install gpaw-data, or set GPAW_SETUP_PATH, or mend xc or basis"
            raise CalculatorError(f"GPAW has no data sets *.{kind} in {where} ({mend})")
    return dict(sorted(found.items()))


@cache
def _hash(files: tuple[tuple[str, str, int, int], ...]) -> str:
    """One hash of name and content of all files; their times and sizes make it anew when one changes."""
    return json_sha256({name: sha256_hex(Path(path).read_bytes()) for name, path, _, _ in files})


def fingerprint_facts(settings: GpawSettings) -> dict[str, Any]:
    """Which data sets a structure will need is not known yet, so all that belong to the functional are hashed; the hash
    of each one that was read is kept with the label.

    Raises:
        CalculatorError: an unknown functional, or no data sets for it.
    """
    from importlib.metadata import PackageNotFoundError, version

    import _gpaw

    stamps = [(name, file, file.stat()) for name, file in _data_files(settings).items()]
    unused = {"basis"} if settings.mode == "pw" else {"cutoff_ev"}
    unused.add("kpts" if settings.kpts is None else "kspacing")
    facts = settings.model_dump(mode="json", exclude=NOT_FACTS | unused)
    facts |= {"code": "gpaw", "version": version("gpaw"), "libxc": getattr(_gpaw, "libxc_version", "")}
    facts["paw_sha256"] = _hash(tuple((name, str(file), s.st_mtime_ns, s.st_size) for name, file, s in stamps))
    if settings.dispersion is not None:
        try:
            facts["dftd3"] = version("dftd3")
        except PackageNotFoundError:
            raise CalculatorError("dftd3 is not installed (pip install dftd3)") from None
    return facts


def elements(settings: GpawSettings) -> set[int] | None:
    from ase.data import atomic_numbers

    if any(not kind.startswith(":") for kind in settings.setups.values()):
        return None  # kinds of one's own follow no rule of names
    ending = f".{_setup_name(settings)}"
    files = _data_files(settings)
    return {z for symbol, z in atomic_numbers.items() if z and {symbol + ending, f"{symbol}{ending}.gz"} & files.keys()}


def refuse(settings: GpawSettings, structure: Structure) -> str | None:
    if why := charge_contradiction(settings, structure):
        return why
    if abs(np.linalg.det(structure.cell)) < 1e-6:
        return "gpaw needs a cell with three vectors, vacuum included, for molecules too"
    if settings.mode == "pw" and not structure.pbc.all():
        return "plane waves are periodic along all axes (set all three pbc, with vacuum in the cell, or mode: lcao)"
    if settings.kpts is not None and any(n > 1 for n in np.asarray(settings.kpts)[~structure.pbc]):
        return f"k-points {settings.kpts} along an axis that is not periodic (set 1 there, or use kspacing)"
    moments = structure.magnetic_moments
    if settings.spinpol is False and moments is not None and np.any(moments):
        return "the structure brings magnetic moments, but spinpol is false (set it to null)"
    return None


def inspect(settings: GpawSettings, calculator: Any) -> Inspection:
    gpaw = _dft(calculator)
    scf, wfs = getattr(gpaw, "scf", None), getattr(gpaw, "wfs", None)
    if scf is None or scf.niter is None:
        return Inspection()
    ended = scf.niter > settings.maxiter
    steps = min(scf.niter, settings.maxiter)
    notes: dict[str, Any] = {}
    if wfs is not None:
        kinds = {setup.symbol: setup.fingerprint for setup in wfs.setups}
        notes = {"paw_md5": kinds, "irreducible_kpoints": int(wfs.kd.nibzkpts), "spins": int(wfs.nspins)}
    if scf.converged and wfs is not None and wfs.nspins == 2:
        notes["total_moment_mu_b"] = float(gpaw.results["magmom"])
    return Inspection(
        electronic_steps=steps,
        converged=True if scf.converged else (False if ended else None),
        reason=f"not self-consistent after {steps} steps (maxiter)" if ended and not scf.converged else "",
        notes=notes,
    )


def warm_up(settings: GpawSettings) -> None:
    import gpaw.calculator  # noqa: F401

    if settings.dispersion is not None:
        _dispersion(settings)


def _slower(settings: GpawSettings, beta: float) -> GpawSettings:
    mixing = {"mixing_beta": beta, "mixing_history": 8, "mixing_weight": 100.0}
    return settings.model_copy(update={"maxiter": 3 * settings.maxiter, **mixing})


def _gently(settings: GpawSettings) -> GpawSettings:
    return _slower(settings, 0.02)


def _otherwise(settings: GpawSettings) -> GpawSettings:
    other = "cg" if settings.eigensolver != "cg" else "dav"
    return _slower(settings, 0.01).model_copy(update={"eigensolver": other})


def _starved(settings: GpawSettings) -> GpawSettings:
    return settings.model_copy(update={"maxiter": 2})


RETRIES = (
    Retry(name="3x the steps, gentler mixing", change=_gently),
    Retry(
        name="3x the steps, still gentler mixing, another eigensolver",
        change=_otherwise,
        after=("unconverged", "crashed"),
    ),
)

ENTRY = CalculatorEntry(
    name="gpaw",
    description="DFT by GPAW, plane waves or atomic orbitals, PAW; spin, charge, D3; no program to start",
    settings_model=GpawSettings,
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
