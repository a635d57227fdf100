"""CP2K's Quickstep, driven by files: Gaussians and plane waves, GTH pseudopotentials; molecules, slabs and crystals."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ase.data import atomic_numbers
from ase.units import Bohr, GPa, Hartree
from pydantic import Field, model_validator

from alcore.errors import CalculatorError
from alcore.identity import json_sha256, sha256_hex
from calculators.base import (
    CalculatorEntry,
    CalculatorSettings,
    Inspection,
    LocalPath,
    Retry,
    charge_contradiction,
    total_charge,
)
from calculators.cp2k_data import DataEntry, entries_named
from calculators.cp2k_input import add_structure, settings_tree, template_lines
from calculators.programs import find_program, version_of

if TYPE_CHECKING:
    from ase.calculators.calculator import FileIOCalculator

    from alcore.types import Structure

INPUT, OUTPUT = "cp2k.inp", "cp2k.out"
ENDED = "PROGRAM ENDED AT"
VERSION = r"CP2K version\s+(\S+)"
DATA_DIRS = ("/usr/share/cp2k", "/usr/share/cp2k/data", "/usr/local/share/cp2k/data")
POTENTIALS = {"LDA": "GTH-PADE", "PBE": "GTH-PBE", "PBEsol": "GTH-PBE", "revPBE": "GTH-PBE", "TPSS": "GTH-PBE"}
POTENTIALS |= {"BLYP": "GTH-BLYP", "BP": "GTH-BP"}
NUMBER = r"\s+([-+]?\d+\.\d+(?:[Ee][-+]?\d+)?)"
LAST_CHANGE_HARTREE = 1e-4
"""CP2K looks at the density matrix alone. Where a small basis and symmetry fix it, it stops at once, while the mixed
density is far off: seen with H2 (0.3 Hartree in the last step, forces wrong by 0.04 eV/Å, the energy right)."""
SKIPPED = r"\s+[-+]?\d+\.\d+"


class Cp2kSettings(CalculatorSettings):
    command: str = Field("cp2k.psmp", description="how CP2K is started, e.g. 'mpirun -np 4 cp2k.psmp'")
    version: str | None = Field(None, description="version of CP2K; null: asked of the program on this machine")
    data_dir: LocalPath | None = Field(None, description="CP2K's data files; null: $CP2K_DATA_DIR or /usr/share/cp2k")
    xc: Literal["LDA", "PBE", "PBEsol", "revPBE", "BLYP", "BP", "TPSS"] | None = Field(
        "PBE", description="functional; null: the XC section stands in inp"
    )
    basis_set: str = Field("DZVP-MOLOPT-SR-GTH", description="basis set of every element")
    basis_sets: dict[str, str] = Field(default_factory=dict, description="another basis set for some elements")
    basis_set_file: LocalPath = Field(Path("BASIS_MOLOPT"), description="file of basis sets: a path, or in data_dir")
    potential: str | None = Field(None, description="pseudopotential of every element; null: GTH of the functional")
    potentials: dict[str, str] = Field(default_factory=dict, description="another pseudopotential for some elements")
    potential_file: LocalPath = Field(Path("GTH_POTENTIALS"), description="their file: a path, or in data_dir")
    cutoff_ry: float = Field(400.0, gt=0, description="plane-wave cutoff of the density in Ry")
    rel_cutoff_ry: float = Field(50.0, gt=0, description="cutoff of the grid that the widest Gaussians need, in Ry")
    eps_default: float = Field(1e-12, gt=0, description="accuracy of integrals (no unit), smaller is tighter")
    algorithm: Literal["diagonalization", "ot"] = Field(
        "diagonalization", description="ot: orbital transformation, faster where there is a band gap"
    )
    eps_scf: float = Field(1e-7, gt=0, description="the SCF ends when its error (no unit) is below this")
    max_scf: int = Field(100, ge=1, description="electronic steps before it counts as unconverged")
    mixing_method: Literal["BROYDEN_MIXING", "PULAY_MIXING", "DIRECT_P_MIXING"] = Field(
        "BROYDEN_MIXING", description="how densities are mixed (diagonalization)"
    )
    mixing_alpha: float = Field(0.4, gt=0, le=1, description="how much of the new density is mixed in (no unit)")
    ot_minimizer: Literal["DIIS", "CG"] = Field("DIIS", description="minimizer of ot; CG is slower and more robust")
    smearing_k: float | None = Field(None, gt=0, description="electronic temperature in K (Fermi-Dirac); null: none")
    added_mos: int = Field(0, ge=-1, description="empty orbitals, which smearing needs; -1: all there are")
    kpoints: tuple[int, int, int] | None = Field(None, description="Monkhorst-Pack grid; null: Γ only")
    uks: bool = Field(False, description="spin polarisation")
    multiplicity: int | None = Field(
        None, ge=1, description="2S+1; null: from the initial magnetic moments (with smearing: free), else the lowest"
    )
    charge: int = Field(0, description="total charge in e of structures that bring none of their own")
    dispersion: Literal["D3", "D3BJ"] | None = Field(
        None, description="Grimme's D3 with zero or Becke-Johnson damping; no three-body terms"
    )
    inp: str = Field("", description="more of the input file, as CP2K writes it: sections and keywords")

    @model_validator(mode="after")
    def _consistent(self) -> Cp2kSettings:
        if unknown := [s for s in (*self.basis_sets, *self.potentials) if s not in atomic_numbers or s == "X"]:
            raise ValueError(f"no such element: {', '.join(unknown)}")
        if self.kpoints and min(self.kpoints) < 1:
            raise ValueError("kpoints must be positive")
        if self.algorithm == "ot" and (self.smearing_k or self.grid or self.added_mos):
            raise ValueError("algorithm ot takes no smearing, added_mos or kpoints (use diagonalization)")
        if self.smearing_k and not self.added_mos:
            raise ValueError("smearing_k needs empty orbitals (set added_mos, -1 for all)")
        if self.multiplicity and self.multiplicity > 1 and not self.uks:
            raise ValueError("multiplicity needs uks: true")
        if self.xc is None and (self.potential is None or self.dispersion):
            raise ValueError("xc: null needs potential, and takes dispersion from inp")
        return self

    @property
    def grid(self) -> tuple[int, int, int] | None:
        """None for Γ alone, for which CP2K has a faster way to the same numbers."""
        return None if self.kpoints == (1, 1, 1) else self.kpoints

    def basis_of(self, symbol: str) -> str:
        return self.basis_sets.get(symbol, self.basis_set)

    def potential_of(self, symbol: str) -> str:
        return self.potentials.get(symbol, self.potential or POTENTIALS[self.xc or "PBE"])


def _files(settings: Cp2kSettings) -> tuple[Path, Path, Path]:
    """Paths of the basis sets, the pseudopotentials and D3's parameters.

    Raises:
        CalculatorError: one is not there.
    """
    named = os.environ.get("CP2K_DATA_DIR")
    places = [settings.data_dir] if settings.data_dir else [Path(p) for p in ([named] if named else DATA_DIRS)]
    found = []
    for asked in (settings.basis_set_file, settings.potential_file, *([Path("dftd3.dat")] * bool(settings.dispersion))):
        choices = [asked] if asked.is_absolute() else []
        choices += [place / asked.name for place in places]
        if (path := next((choice for choice in choices if choice.is_file()), None)) is None:
            text = f"there is no {asked.name} in {', '.join(map(str, places))}"
            mend = "install cp2k-data or set calculator.settings.data_dir"
            raise CalculatorError(text, where="calculator cp2k", mend=mend)
        found.append(path.absolute())
    return found[0], found[1], found[-1]


def _select(path: Path, common: str, special: dict[str, str], what: str) -> dict[str, DataEntry]:
    """By element: the entries of the common name, with the special ones in their place.

    Raises:
        CalculatorError: no entry has that name.
    """
    chosen = dict(entries_named(path, common))
    for symbol, name in special.items():
        chosen.pop(symbol, None)
        if entry := entries_named(path, name).get(symbol):
            chosen[symbol] = entry
    missing = [f"{what} {name} for {symbol}" for symbol, name in special.items() if symbol not in chosen]
    missing += [] if chosen else [f"{what} {common}"]
    if missing:
        raise CalculatorError(f"{path} has no {', '.join(missing)}", where="calculator cp2k", mend="mend the names")
    return chosen


def _data(settings: Cp2kSettings) -> tuple[dict[str, DataEntry], dict[str, DataEntry]]:
    """Basis sets and pseudopotentials by element; raises as ``_files`` and ``_select`` do."""
    basis_file, potential_file, _ = _files(settings)
    common = settings.potential or POTENTIALS[settings.xc or "PBE"]
    return (
        _select(basis_file, settings.basis_set, settings.basis_sets, "basis set"),
        _select(potential_file, common, settings.potentials, "pseudopotential"),
    )


def _tree(settings: Cp2kSettings) -> Any:
    basis_file, potential_file, parameters = map(str, _files(settings))
    return settings_tree(settings, (basis_file, potential_file, parameters))


def _multiplicity(settings: Cp2kSettings, moments: Any) -> int | None:
    if settings.multiplicity or not settings.uks or moments is None or not np.any(moments):
        return settings.multiplicity
    return round(abs(float(np.sum(moments)))) + 1


def make(settings: Cp2kSettings, structure: Structure | None = None) -> FileIOCalculator:
    from ase.calculators.calculator import FileIOCalculator, ReadError

    class Cp2k(FileIOCalculator):
        """One run of CP2K in the current folder."""

        implemented_properties = ["energy", "free_energy", "forces", "stress", "magmoms"]  # noqa: RUF012  # as ASE declares it

        def write_input(self, atoms: Any, properties: Any = None, system_changes: Any = None) -> None:
            super().write_input(atoms, properties, system_changes)
            multiplicity = _multiplicity(settings, atoms.get_initial_magnetic_moments())
            charge = round(total_charge(settings, structure))
            text = add_structure(_tree(settings), settings, atoms, charge, multiplicity)
            Path(INPUT).write_text(text, encoding="utf-8")
            Path(OUTPUT).unlink(missing_ok=True)  # CP2K would append to it

        def read_results(self) -> None:
            text = Path(OUTPUT).read_text(errors="replace")
            if ENDED not in text:
                raise ReadError(f"{OUTPUT} is cut off: CP2K did not come to its end")
            self.results = _results(text)

    return Cp2k(command=f"{settings.command} -i {INPUT} -o {OUTPUT}")


def _results(text: str) -> dict[str, Any]:
    """What ASE wants to know, of what is there.

    CP2K's energy contains the electronic entropy: it is the free energy, and the forces are its gradient.
    """
    results: dict[str, Any] = {}
    if energy := re.findall(r"ENERGY\| Total FORCE_EVAL.*\]:?" + NUMBER, text):
        results["energy"] = results["free_energy"] = float(energy[-1]) * Hartree
    # Up to 2023 a row is "1  1  Al  x y z", later "FORCES|  1  x y z |f|".
    table = _block(r"(?:ATOMIC FORCES in|FORCES\| Atomic forces)", r"(?:SUM OF|FORCES\|\s+Sum)", text)
    if rows := re.findall(rf"^\s*(?:\d+\s+\d+\s+[A-Z][a-z]?|FORCES\|\s+\d+){NUMBER * 3}", table, re.MULTILINE):
        results["forces"] = np.array(rows, dtype=float) * Hartree / Bohr
    table = _block(r"Analytical stress tensor", r"STRESS\| 1/3 Trace", text)
    if rows := re.findall(rf"^\s*STRESS\|\s+[xyz]{NUMBER * 3}", table, re.MULTILINE):
        tensor = -np.array(rows, dtype=float) * (1e-4 * GPa if "[bar]" in table else GPa)
        results["stress"] = np.array([tensor[i] for i in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))])
    table = _block(r"Mulliken Population Analysis", r"# Total charge and spin", text)
    row = rf"^\s*\d+\s+[A-Z][a-z]?\s+\d+{SKIPPED * 3}{NUMBER}\s*$"
    if moments := re.findall(row, table, re.MULTILINE):
        results["magmoms"] = np.array(moments, dtype=float)
    return results


def _block(start: str, end: str, text: str) -> str:
    """What stands between the first ``start`` and the next ``end``, or ""."""
    found = re.search(f"{start}(.*?){end}", text, re.DOTALL)
    return found[1] if found else ""


def inspect(settings: Cp2kSettings, calculator: Any) -> Inspection:
    text = Path(OUTPUT).read_text(errors="replace") if Path(OUTPUT).is_file() else ""
    version = re.search(VERSION, text)
    # Orbital transformation counts anew after each preconditioner.
    cycles = re.findall(r"(?:SCF run converged in|inner SCF loop after reaching)\s+(\d+)\s+steps", text)
    failed = re.search(r"\[ABORT\](.*?)\*{70}", text, re.DOTALL)
    converged, reason = None, ""
    if "SCF run NOT converged" in text:
        # Up to 2023 only a warning: CP2K goes on to forces.
        converged, reason = False, f"the SCF has not converged in {sum(map(int, cycles))} steps (max_scf)"
    elif failed:
        art = r"^(?:\\___/|\||O/\||/\| \||/ \\)\s*"
        reason = "CP2K: " + " ".join(re.sub(art, "", line.strip(" *")) for line in failed[1].splitlines()).strip()
    elif cycles:
        changes = re.findall(r"^\s+\d+ .*\s-?\d+\.\d{10}\s+(-?\d\.\d+E[-+]\d+)\s*$", text, re.MULTILINE)
        last = abs(float(changes[-1])) if changes else 0.0
        converged = last < LAST_CHANGE_HARTREE
        reason = "" if converged else f"the SCF stopped while its energy still changed by {last:.1e} Hartree a step"
    if not reason and ENDED not in text:
        reason = "CP2K ended in the middle: " + (text.strip().splitlines() or ["no output"])[-1].strip()
    # Forces that do not add up to nothing: the cutoff is too low.
    forces = getattr(calculator, "results", {}).get("forces")
    net = None if forces is None else round(float(np.linalg.norm(np.sum(forces, axis=0))), 6)
    return Inspection(
        electronic_steps=sum(map(int, cycles)) or None,
        converged=converged,
        reason=reason,
        code_version=version[1] if version else "",
        notes={"net_force_ev_per_ang": net} if net is not None else {},
    )


def unavailable(settings: Cp2kSettings | None) -> str | None:
    command = Cp2kSettings.model_fields["command"].default if settings is None else settings.command
    if find_program(command) is None:
        return f"{command} is not on this machine (install cp2k, or set calculator.settings.command)"
    if settings is not None:
        try:
            _data(settings)
            _tree(settings)
        except CalculatorError as error:
            return f"{error.message} ({error.mend})" if error.mend else error.message
    return None


def complete(settings: Cp2kSettings) -> Cp2kSettings:
    """With the version, and with the paths of the files: another machine may have other defaults."""
    files = _files(settings)
    known: dict[str, Any] = {"basis_set_file": files[0], "potential_file": files[1]}
    if settings.data_dir is None:
        known["data_dir"] = files[1].parent
    if settings.version is None:
        known["version"] = version_of(settings.command, VERSION, "--version", where="calculator cp2k", package="cp2k")
    return settings.model_copy(update=known)


def _sha256(entries: dict[str, DataEntry]) -> str:
    return json_sha256({symbol: entry.text for symbol, entry in entries.items()})


def fingerprint_facts(settings: Cp2kSettings) -> dict[str, Any]:
    basis, potentials = _data(settings)
    keys = ["xc", "basis_set", "basis_sets", "potential", "potentials", "cutoff_ry", "rel_cutoff_ry", "eps_default"]
    keys += ["eps_scf", "smearing_k", "added_mos", "uks", "multiplicity", "charge", "dispersion"]
    plain = settings.model_dump(mode="json")
    facts = {
        "code": "cp2k",
        "version": settings.version,
        **{key: plain[key] for key in keys},
        "basis_sha256": _sha256(basis),
        "potential_sha256": _sha256(potentials),
        "kpoints": list(settings.grid or (1, 1, 1)),
        "inp": template_lines(settings.inp),
    }
    if settings.dispersion:
        facts["dispersion_sha256"] = sha256_hex(_files(settings)[2].read_bytes())
    return facts


def elements(settings: Cp2kSettings) -> set[int]:
    basis, potentials = _data(settings)
    return {atomic_numbers[symbol] for symbol in basis.keys() & potentials.keys()}


def refuse(settings: Cp2kSettings, structure: Structure) -> str | None:
    basis, potentials = _data(settings)
    symbols = structure.to_atoms().get_chemical_symbols()
    for symbol in sorted(set(symbols)):
        made_for, has = basis[symbol].electrons, potentials[symbol].valence
        if made_for is not None and made_for != has:
            return f"the basis set of {symbol} is for {made_for} electrons, its pseudopotential has {has} (mend a name)"
    if abs(np.linalg.det(structure.cell)) < 1e-6:
        return "CP2K needs three lattice vectors (a box around a molecule, twice as wide as its electrons, pbc false)"
    if settings.grid and any(n > 1 for n in np.asarray(settings.grid)[~structure.pbc]):
        return f"k-points {settings.grid} along an axis that is not periodic (set 1 there)"
    charge, moments = total_charge(settings, structure), structure.magnetic_moments
    if why := charge_contradiction(settings, structure):
        return why
    if charge != round(charge):
        return f"the charge {charge:+g} e is not a whole number"
    if moments is not None and np.any(moments) and not settings.uks:
        return "uks: false would ignore the structure's magnetic moments (set uks: true or leave them out)"
    electrons = sum(potentials[symbol].valence for symbol in symbols) - round(charge)
    if electrons % 2 and not settings.uks:
        return f"an odd number of electrons, {electrons} (set uks: true)"
    multiplicity = _multiplicity(settings, moments)
    if multiplicity and (electrons - multiplicity + 1) % 2:
        return f"{multiplicity - 1} unpaired electrons are impossible with {electrons} electrons (mend multiplicity)"
    return None


def _gentler(settings: Cp2kSettings) -> Cp2kSettings:
    update = {"max_scf": 3 * settings.max_scf, "mixing_alpha": settings.mixing_alpha / 2, "ot_minimizer": "CG"}
    return settings.model_copy(update=update)


def _other_way(settings: Cp2kSettings) -> Cp2kSettings:
    """Both algorithms end in the same energy; one of them only exists with a gap and at Γ."""
    update: dict[str, Any] = {"max_scf": 6 * settings.max_scf, "mixing_alpha": min(0.1, settings.mixing_alpha / 4)}
    only_diagonalization = settings.smearing_k or settings.added_mos or settings.grid or settings.algorithm == "ot"
    return settings.model_copy(update={**update, "algorithm": "diagonalization" if only_diagonalization else "ot"})


def _broken(**update: Any) -> Callable[[Cp2kSettings], Cp2kSettings]:
    return lambda settings: settings.model_copy(update=update)


ENTRY = CalculatorEntry(
    name="cp2k",
    description="CP2K: Gaussians and plane waves, GTH pseudopotentials, smearing, spin, charge, D3; any pbc",
    settings_model=Cp2kSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
    takes_charge=True,
    refuse=refuse,
    complete=complete,
    inspect=inspect,
    retries=(
        Retry(name="3x the steps, half the mixing; ot by conjugate gradients", change=_gentler),
        Retry(name="6x the steps, the other algorithm or a quarter of the mixing", change=_other_way),
    ),
    sabotage={"unconverged": _broken(max_scf=2), "crashed": _broken(command="false")},
)
