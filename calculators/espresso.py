"""Quantum ESPRESSO's pw.x, driven by files through ASE: plane waves and pseudopotentials, always periodic."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from ase.data import atomic_numbers
from pydantic import Field, field_validator, model_validator

from alcore.errors import CalculatorError
from calculators.base import CalculatorEntry, CalculatorSettings, Inspection, LocalPath, Retry
from calculators.kpoints import grid_of_spacing
from calculators.programs import find_program, version_of
from calculators.upf import Pseudopotential, read_upf

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.espresso import Espresso

    from alcore.types import Structure

OUTPUT, ERRORS = "espresso.pwo", "espresso.err"
VERDICT = r"convergence (has been|NOT) achieved"
VERSION = r"Program PWSCF\s+v\.?\s*(\S+)"
PSEUDO_DIRS = ("/usr/share/espresso/pseudo",)
DFTD3_VERSIONS = {"D3": 3, "D3BJ": 4}
SET_ELSEWHERE = {name: f"{name}_ry" for name in ("ecutwfc", "ecutrho", "conv_thr", "degauss")} | {
    name: name
    for name in ("smearing", "pseudo_dir", "mixing_beta", "mixing_mode", "diagonalization", "electron_maxstep")
}
SET_ELSEWHERE |= {"input_dft": "xc", "nspin": "spin", "vdw_corr": "dispersion", "dftd3_version": "dispersion"}
SET_ELSEWHERE["tot_charge"] = "the structure's charge"
SET_ELSEWHERE["starting_magnetization"] = "the structure's magnetic moments"
NOT_OURS = {"restart_mode", "outdir", "wfcdir", "prefix", "tprnfor", "nat", "ntyp", "ibrav", "celldm", "a", "b", "c"}
NOT_OURS |= {"cosab", "cosac", "cosbc", "scf_must_converge", "noncolin", "lspinorb", "nstep", "dt", "max_seconds"}
MOVES_NOTHING: tuple[str, ...] = ("title", "calculation", "verbosity", "wf_collect", "disk_io", "iprint", "tstress")
MOVES_NOTHING += ("report", "lkpoint_dir", "mixing_ndim", "startingpot", "startingwfc", "diago_")
"""What these entries begin with; all others are part of the fingerprint."""


class EspressoSettings(CalculatorSettings):
    command: str = Field("pw.x", description="how pw.x is started, e.g. 'mpirun -np 4 pw.x -nk 2'")
    version: str | None = Field(None, description="version of pw.x; null: asked of the program on this machine")
    pseudo_dir: LocalPath | None = Field(
        None, description="folder of the UPF files; null: $ESPRESSO_PSEUDO, else /usr/share/espresso/pseudo"
    )
    pseudopotentials: dict[str, str] = Field(min_length=1, description="UPF file of each element, {Al: Al.pz-vbc.UPF}")
    xc: str | None = Field(None, description="functional (input_dft); null: that of the pseudopotentials")
    ecutwfc_ry: float = Field(gt=0, description="plane-wave cutoff in Ry")
    ecutrho_ry: float | None = Field(None, gt=0, description="cutoff of the density in Ry; null: 4 times ecutwfc_ry")
    kspacing: float | None = Field(
        None, gt=0, description="largest distance of k-points in 1/Å (2π included, as VASP's KSPACING); or give kpts"
    )
    kpts: tuple[int, int, int] | None = Field(None, description="Monkhorst-Pack grid; null, and no kspacing: Γ only")
    koffset: tuple[Literal[0, 1], Literal[0, 1], Literal[0, 1]] = Field(
        (0, 0, 0), description="1: the grid is shifted by half a step in this direction"
    )
    smearing: Literal["gaussian", "mp", "mv", "fd"] | None = Field(
        "mv", description="smearing of the occupations; null: fixed occupations (insulators)"
    )
    degauss_ry: float = Field(0.01, gt=0, description="width of the smearing in Ry")
    conv_thr_ry: float = Field(1e-8, gt=0, description="the SCF ends when its energy is this sure, in Ry a cell")
    electron_maxstep: int = Field(100, ge=1, description="electronic steps before it counts as unconverged")
    mixing_beta: float = Field(0.7, gt=0, le=1, description="how much of the new density is mixed in (no unit)")
    mixing_mode: Literal["plain", "TF", "local-TF"] = Field("plain", description="how densities are mixed")
    diagonalization: Literal["david", "cg", "ppcg", "paro"] = Field("david", description="how bands are found")
    spin: bool = Field(False, description="collinear spin polarisation; the structure brings the starting moments")
    dispersion: Literal["D3", "D3BJ"] | None = Field(
        None, description="Grimme's D3 with zero or Becke-Johnson damping; three-body terms off, as in VASP"
    )
    input_data: dict[str, Any] = Field(
        default_factory=dict, description="further namelist entries, flat or by namelist: {SYSTEM: {nbnd: 20}}"
    )

    @field_validator("pseudopotentials")
    @classmethod
    def _elements(cls, value: dict[str, str]) -> dict[str, str]:
        if wrong := [symbol for symbol in value if symbol not in atomic_numbers or symbol == "X"]:
            raise ValueError(f"no such element: {', '.join(wrong)}")
        return value

    @field_validator("input_data")
    @classmethod
    def _namelists(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Flat, with keys in lower case."""
        from ase.io.espresso_namelist.keys import pw_keys

        known = {key.lower() for section in pw_keys.values() for key in section}
        flat: dict[str, Any] = {}
        for key, entry in value.items():
            inside = entry if isinstance(entry, Mapping) and key.lower() in pw_keys else {key: entry}
            flat |= {name.lower(): plain for name, plain in inside.items()}
        for key, entry in flat.items():
            if why := _no_entry(key, entry, known):
                raise ValueError(why)
        return flat

    @model_validator(mode="after")
    def _consistent(self) -> EspressoSettings:
        if self.kpts and self.kspacing:
            raise ValueError("kpts and kspacing are both given (keep one)")
        if self.kpts and min(self.kpts) < 1:
            raise ValueError("kpts must be positive")
        if any(self.koffset) and not (self.kpts or self.kspacing):
            raise ValueError("koffset needs kpts or kspacing")
        if self.smearing and "occupations" in self.input_data:
            raise ValueError("occupations in input_data needs smearing: null")
        return self


def _no_entry(key: str, entry: Any, known: set[str]) -> str | None:
    """Why this namelist entry cannot be taken, or None."""
    if key == "calculation" and entry != "scf":
        return f"calculation {entry!r}: a label is an scf calculation (leave it out)"
    if (name := key.partition("(")[0]) in SET_ELSEWHERE:
        return f"{key} in input_data: set {SET_ELSEWHERE[name]} instead"
    if key in NOT_OURS:
        return f"{key} cannot be set here (leave it out of input_data)"
    if "(" in key:
        return f"{key}: entries by species number cannot be set, because the numbers depend on the order of the atoms"
    if key not in known:
        near = get_close_matches(key, known, n=1)
        return f"pw.x has no namelist entry {key}" + (f", did you mean {near[0]}?" if near else "")
    if not isinstance(entry, bool | int | float | str):
        return f"{key}: expected a number, a text or true/false"
    return None


def _folder(settings: EspressoSettings) -> Path:
    """Of the pseudopotentials.

    Raises:
        CalculatorError: none is set and none is found.
    """
    if settings.pseudo_dir:
        return settings.pseudo_dir
    named = os.environ.get("ESPRESSO_PSEUDO")
    for folder in [named] if named else PSEUDO_DIRS:
        if Path(folder).is_dir():
            return Path(folder).absolute()
    text = f"ESPRESSO_PSEUDO names {named}, which is no folder" if named else "there is no folder of pseudopotentials"
    raise CalculatorError(text, where="calculator espresso", mend="set calculator.settings.pseudo_dir")


def pseudopotentials(settings: EspressoSettings) -> dict[str, Pseudopotential]:
    """By element, each read and checked.

    Raises:
        CalculatorError: files that are missing (all of them are named), not UPF, or of another element.
    """
    folder, found, problems = _folder(settings), {}, []
    for symbol, name in sorted(settings.pseudopotentials.items()):
        path = folder / name
        try:
            upf = read_upf(path)
        except OSError as error:
            problems.append(f"{symbol}: {name} ({error.strerror})")
            continue
        if upf is None:
            problems.append(f"{symbol}: {name} is not a UPF file")
        elif upf.element != symbol:
            problems.append(f"{symbol}: {name} is for {upf.element}")
        else:
            found[symbol] = upf
    if problems:
        text = f"pseudopotentials in {folder}: {'; '.join(problems)}"
        mend = "mend calculator.settings.pseudopotentials or pseudo_dir"
        raise CalculatorError(text, where="calculator espresso", mend=mend)
    return found


def _grid(settings: EspressoSettings, atoms: Atoms) -> tuple[int, int, int] | None:
    """The k-point grid; None: Γ alone, for which pw.x has a faster way to the same numbers."""
    grid = settings.kpts
    if settings.kspacing:
        grid = grid_of_spacing(atoms.cell.array, atoms.pbc, settings.kspacing)
    return None if grid == (1, 1, 1) and not any(settings.koffset) else grid


def _entries(settings: EspressoSettings, charge: float) -> dict[str, Any]:
    """Every namelist entry that ASE does not make from the atoms."""
    entries: dict[str, Any] = {
        "tstress": True,
        "disk_io": "low",
        **settings.input_data,
        "calculation": "scf",
        "tprnfor": True,
        "outdir": "./",
        "pseudo_dir": str(_folder(settings)),
        "ecutwfc": settings.ecutwfc_ry,
        "ecutrho": settings.ecutrho_ry or 4 * settings.ecutwfc_ry,
        "conv_thr": settings.conv_thr_ry,
        "electron_maxstep": settings.electron_maxstep,
        "mixing_beta": settings.mixing_beta,
        "mixing_mode": settings.mixing_mode,
        "diagonalization": settings.diagonalization,
        "nspin": 2 if settings.spin else 1,
    }
    if settings.smearing:
        entries |= {"occupations": "smearing", "smearing": settings.smearing, "degauss": settings.degauss_ry}
    if settings.xc:
        entries["input_dft"] = settings.xc
    if settings.dispersion:
        entries |= {"vdw_corr": "dft-d3", "dftd3_version": DFTD3_VERSIONS[settings.dispersion]}
        entries.setdefault("dftd3_threebody", False)
    if charge:
        entries["tot_charge"] = charge
    return entries


def make(settings: EspressoSettings, structure: Structure | None = None) -> Espresso:
    from ase.calculators.calculator import ReadError
    from ase.calculators.espresso import Espresso, EspressoProfile, EspressoTemplate

    class Template(EspressoTemplate):
        """ASE's, but fixed atoms keep their forces, and moments go in and come out as every pw.x means them."""

        def write_input(self, profile: Any, directory: Path, atoms: Atoms, parameters: Any, properties: Any) -> None:
            bare = atoms.copy()
            bare.set_constraint()
            if settings.spin:  # pw.x takes fractions of the valence electrons; only 7.3 and later take μ_B as well
                valence = {symbol: upf.valence for symbol, upf in pseudopotentials(settings).items()}
                asked = zip(bare.symbols, bare.get_initial_magnetic_moments(), strict=True)
                fractions = [moment / valence[symbol] for symbol, moment in asked]
                bare.set_initial_magnetic_moments(fractions)
            else:
                bare.set_initial_magnetic_moments(None)
            chosen = {**parameters, "kpts": _grid(settings, bare)}
            super().write_input(profile, directory, bare, chosen, properties)

        def read_results(self, directory: os.PathLike[str]) -> dict[str, Any]:
            text = (Path(directory) / OUTPUT).read_text(errors="replace")
            if not _is_whole(text):
                raise ReadError(f"{OUTPUT} is cut off: pw.x did not come to its end")
            results = dict(super().read_results(directory))
            results.pop("magmoms", None)  # before version 7 ASE takes the constraint's column for the moment
            moments = list(_moments(text))
            return {**results, "magmoms": np.array(moments[-1])} if moments else results

    profile = EspressoProfile(command=settings.command, pseudo_dir=_folder(settings))
    calculator = Espresso(
        profile=profile,
        pseudopotentials=dict(settings.pseudopotentials),
        koffset=settings.koffset,
        input_data=_entries(settings, structure.charge if structure is not None else 0.0),
    )
    calculator.template = Template()
    return calculator


def _is_whole(text: str) -> bool:
    """Whether the output says how the SCF ended, and that pw.x came to its end."""
    return "JOB DONE." in text and re.search(VERDICT, text) is not None


def _moments(text: str) -> Iterator[list[float]]:
    """Each table of moments per site, in μ_B."""
    for block in re.findall(r"Magnetic moment per site[^\n]*\n((?:\s+atom.*\n)+)", text):
        yield [float(value) for value in re.findall(r"magn\s*[:=]\s*(-?[\d.]+)", block)]


def inspect(settings: EspressoSettings, calculator: Any) -> Inspection:
    text, errors = (Path(n).read_text(errors="replace") if Path(n).is_file() else "" for n in (OUTPUT, ERRORS))
    steps = len(re.findall(r"^\s*iteration #", text, re.MULTILINE))
    version = re.search(VERSION, text)
    failed = re.search(r"Error in routine\s+(\S+)\s*\([^)]*\):\s*\n\s*(.*)", text)
    verdicts = re.findall(VERDICT, text)  # one a cycle: hybrid functionals have several, and the last one counts
    converged, reason, notes = (verdicts[-1] == "has been" if verdicts else None), "", {}
    if converged is False:
        reason = f"the SCF has not converged in {steps} steps (electron_maxstep)"
    elif failed:
        reason = f"pw.x: {failed[1]}: {failed[2].strip()}"
    elif not _is_whole(text):
        reason = "pw.x ended in the middle: " + ((errors.strip() or text.strip()).splitlines() or ["no output"])[-1]
    if total := re.findall(r"total magnetization\s+=\s+(-?[\d.]+)", text):
        notes["total_moment_mu_b"] = float(total[-1])
    return Inspection(
        electronic_steps=steps or None,
        converged=converged,
        reason=reason,
        code_version=version[1] if version else "",
        notes=notes,
    )


def unavailable(settings: EspressoSettings | None) -> str | None:
    command = EspressoSettings.model_fields["command"].default if settings is None else settings.command
    if find_program(command) is None:
        return f"{command} is not on this machine (install quantum-espresso or set calculator.settings.command)"
    if settings is not None:
        try:
            pseudopotentials(settings)
        except CalculatorError as error:
            return error.message
    return None


def complete(settings: EspressoSettings) -> EspressoSettings:
    known = {"pseudo_dir": _folder(settings), "version": settings.version}
    if settings.version is None:
        known["version"] = version_of(
            settings.command, VERSION, where="calculator espresso", package="quantum-espresso"
        )
    return settings.model_copy(update=known)


def fingerprint_facts(settings: EspressoSettings) -> dict[str, Any]:
    files = pseudopotentials(settings)
    data = sorted(settings.input_data.items())
    moving = {key: value for key, value in data if not key.startswith(MOVES_NOTHING)}
    return {
        "code": "quantum-espresso",
        "version": settings.version,
        "functional": settings.xc or sorted({upf.functional for upf in files.values()}),
        "pseudopotential_sha256": {symbol: upf.sha256 for symbol, upf in files.items()},
        "ecutwfc_ry": settings.ecutwfc_ry,
        "ecutrho_ry": settings.ecutrho_ry or 4 * settings.ecutwfc_ry,
        "kspacing": settings.kspacing,
        "kpts": None if settings.kspacing else list(settings.kpts or (1, 1, 1)),
        "koffset": list(settings.koffset),
        "smearing": settings.smearing,
        "degauss_ry": settings.degauss_ry if settings.smearing else None,
        "conv_thr_ry": settings.conv_thr_ry,
        "spin": settings.spin,
        "dispersion": settings.dispersion,
        "input_data": moving,
    }


def elements(settings: EspressoSettings) -> set[int]:
    return {atomic_numbers[symbol] for symbol in settings.pseudopotentials}


def refuse(settings: EspressoSettings, structure: Structure) -> str | None:
    files = pseudopotentials(settings)
    symbols = structure.to_atoms().get_chemical_symbols()
    if abs(np.linalg.det(structure.cell)) < 1e-6:
        return "pw.x needs three lattice vectors (put a molecule into a box, with vacuum)"
    if not structure.pbc.all() and "assume_isolated" not in settings.input_data:
        return "pw.x repeats the cell in all directions (set all three pbc, with vacuum, or input_data.assume_isolated)"
    moments = structure.magnetic_moments
    magnetic = moments is not None and bool(np.any(moments))
    if magnetic and not settings.spin:
        return "spin: false would ignore the structure's magnetic moments (set spin: true or leave them out)"
    if settings.spin and not magnetic and "tot_magnetization" not in settings.input_data:
        return "spin: true needs starting moments (magnetic_moments of the path; all zero would stay zero)"
    for symbol, moment in zip(symbols, moments if moments is not None and magnetic else (), strict=False):
        if abs(moment) > files[symbol].valence:
            return f"a moment of {moment:g} μ_B on {symbol}, which has {files[symbol].valence:g} valence electrons"
    electrons = sum(files[symbol].valence for symbol in symbols) - structure.charge
    fixed = settings.smearing is None and "occupations" not in settings.input_data
    if fixed and not settings.spin and abs(electrons / 2 - round(electrons / 2)) > 1e-6:
        return f"fixed occupations need an even number of electrons, there are {electrons:g} (set smearing)"
    return None


def _rung(steps: int, beta: float, **update: Any) -> Callable[[EspressoSettings], EspressoSettings]:
    """So many times the steps, at most this ``mixing_beta`` and no more than half of the user's, and ``update``."""

    def change(settings: EspressoSettings) -> EspressoSettings:
        mixing = {"mixing_beta": min(beta, settings.mixing_beta / 2)}
        return settings.model_copy(update={"electron_maxstep": steps * settings.electron_maxstep, **mixing, **update})

    return change


ENTRY = CalculatorEntry(
    name="espresso",
    description="Quantum ESPRESSO's pw.x: plane waves, UPF pseudopotentials, smearing, spin, charge, D3; periodic",
    settings_model=EspressoSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    elements=elements,
    takes_charge=True,
    refuse=refuse,
    complete=complete,
    inspect=inspect,
    retries=(
        Retry(name="3x the steps, gentler mixing", change=_rung(3, 0.3)),
        Retry(name="5x the steps, local Thomas-Fermi mixing", change=_rung(5, 0.2, mixing_mode="local-TF")),
        Retry(
            name="bands by conjugate gradients",
            change=_rung(3, 0.3, diagonalization="cg"),
            after=("unconverged", "crashed"),
        ),
    ),
    sabotage={
        "unconverged": lambda settings: settings.model_copy(update={"electron_maxstep": 2}),
        "crashed": lambda settings: settings.model_copy(update={"command": "false"}),
    },
)
