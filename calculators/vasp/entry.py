"""VASP, driven through ASE: from settings, from a preset of a foundation model's data, or from a folder of inputs."""

from __future__ import annotations

import mmap
import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from alcore.errors import CalculatorError
from calculators.base import CalculatorEntry, Inspection, Retry
from calculators.programs import find_program
from calculators.vasp.driver import STDOUT, VaspInputs, vasp_calculator
from calculators.vasp.incar import FIXED, SILENT, canonical, facts_of
from calculators.vasp.output import inspect_folder
from calculators.vasp.potcars import Potcar, configured_folder
from calculators.vasp.presets import preset_facts, preset_inputs, preset_unavailable
from calculators.vasp.settings import (
    DEFAULT_NELM,
    VaspSettings,
    folder_kpoints,
    folder_potcars,
    folder_tags,
    library,
    mesh,
    names,
    own_tags,
    plain_tags,
)

if TYPE_CHECKING:
    from ase.calculators.vasp import Vasp

    from alcore.types import FloatArray, Structure

GENTLE: dict[str, Any] = {"AMIX": 0.1, "BMIX": 0.01, "AMIX_MAG": 0.2, "BMIX_MAG": 0.01}
GENTLEST: dict[str, Any] = {"AMIX": 0.02, "BMIX": 0.001, "AMIX_MAG": 0.05, "BMIX_MAG": 0.001}
PRESET_NELM = 200
_VERSION_INSIDE = re.compile(rb"vasp[./_-]?(\d+\.\d+\.\d+)", re.IGNORECASE)


def _moments(structure: Structure) -> FloatArray | None:
    """Moments that are all zero are none: so it is in a label's key, too."""
    moments = structure.magnetic_moments
    return moments if moments is not None and np.any(moments) else None


def _potcars(settings: VaspSettings, structure: Structure) -> list[Potcar]:
    """One for each element, in the order that POSCAR will have.

    Raises:
        CalculatorError: one is missing, or the folder's POTCAR is for other elements.
    """
    asked = list(dict.fromkeys(chemical_symbols[z] for z in structure.numbers))
    given = folder_potcars(settings)
    if given is None:
        table = names(settings)
        return [library(settings).get(element, table.get(element, element)) for element in asked]
    if sorted(potcar.element for potcar in given) != sorted(asked):
        has = " ".join(potcar.element for potcar in given)
        where, mend = f"{settings.folder}/POTCAR", "its elements and the structure's must be the same"
        raise CalculatorError(f"it is for {has}, the structure has {' '.join(asked)}", where=where, mend=mend)
    return given


def _folder_moments(structure: Structure, tags: dict[str, Any], order: list[str]) -> FloatArray | None:
    """Those of INCAR, if the structure brings none and its atoms stand as in POSCAR; the structure's otherwise.

    Raises:
        CalculatorError: INCAR's MAGMOM cannot be given to the atoms, or contradicts them.
    """
    own, said = _moments(structure), tags.pop("MAGMOM", None)
    if said is None:
        return own
    if own is not None:
        raise CalculatorError("INCAR's MAGMOM and the structure's magnetic_moments are both given", mend="remove one")
    listed = np.atleast_1d(np.array(canonical(said), dtype=float))
    places = [order.index(chemical_symbols[z]) for z in structure.numbers]
    if len(listed) != len(structure) or places != sorted(places):
        wanted = f"{len(structure)} moments for atoms in the order {' '.join(order)}"
        raise CalculatorError(f"INCAR's MAGMOM does not fit: {wanted} are needed", mend="give magnetic_moments instead")
    return listed


def build_inputs(settings: VaspSettings, structure: Structure) -> VaspInputs:
    """INCAR, KPOINTS and POTCAR of one structure.

    Raises:
        CalculatorError: a file is missing, or contradicts the structure.
    """
    potcars = _potcars(settings, structure)
    moments, kpoints = _moments(structure), mesh(settings)
    if settings.folder is not None:
        tags = {"ISPIN": 1, **SILENT, **folder_tags(settings)}
        moments = _folder_moments(structure, tags, [potcar.element for potcar in potcars])
        kpoints = folder_kpoints(settings)
    elif settings.preset is not None:
        preset = preset_inputs(settings.preset, structure)
        tags = {**preset.incar, **SILENT, **own_tags(settings)}
        moments = preset.moments if tags.get("ISPIN") == 2 else None
        kpoints = kpoints or (None if settings.kspacing else preset.kpoints)
    else:
        tags = {"ISPIN": 1 if moments is None else 2, **SILENT, **plain_tags(settings)}
    tags |= FIXED
    if structure.charge:
        zs = {potcar.element: potcar.valence for potcar in potcars}
        tags["NELECT"] = round(sum(zs[chemical_symbols[z]] for z in structure.numbers) - structure.charge, 8)
    return VaspInputs(incar=tags, kpoints=kpoints, potcars=potcars, moments=moments, ldau_luj=settings.ldau_luj)


def make(settings: VaspSettings, structure: Structure) -> Vasp:
    return vasp_calculator(build_inputs(settings, structure), settings.command)


def warm_up(settings: VaspSettings) -> None:
    import ase.calculators.vasp  # noqa: F401

    if settings.preset is not None:
        preset_facts(settings.preset)


def _missing_program(command: str) -> str | None:
    first = next((word for word in shlex.split(command) if "=" not in word), "")
    if first and shutil.which(first) is None:
        return f"{first} is not on this machine (load its module, or set calculator.settings.command)"
    if find_program(command) is None:
        mend = "load its module, or set calculator.settings.command"
        return f"what '{command}' should start is not on this machine ({mend})"
    return None


def complete(settings: VaspSettings) -> VaspSettings:
    """With the program's version and the POTCAR folder.

    Raises:
        CalculatorError: no version is given, and none can be read from the program.
    """
    found: dict[str, Any] = {}
    if settings.version is None:
        found["version"] = _ask_version(settings)
    if settings.potcar_folder is None and (folder := configured_folder()) is not None:
        found["potcar_folder"] = folder
    return settings.model_copy(update=found)


def _ask_version(settings: VaspSettings) -> str:
    mend = "set calculator.settings.version as the first line of its OUTCAR says it: 6.4.2"
    program = find_program(settings.command)
    if program is None:
        raise CalculatorError(f"{_missing_program(settings.command)}", where="calculator vasp", mend=f"or {mend}")
    status = program.stat()
    if version := _version_inside(program, (status.st_mtime_ns, status.st_size)):
        return version
    raise CalculatorError(f"cannot tell which version of VASP {program} is", where="calculator vasp", mend=mend)


@cache
def _version_inside(program: Path, _stamp: tuple[int, int]) -> str:
    """The program prints its version only when it computes, but it holds the text; so does a wrapper that names it."""
    try:
        with program.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            match = _VERSION_INSIDE.search(text)
            return match[1].decode() if match else ""
    except (OSError, ValueError):
        return ""


def unavailable(settings: VaspSettings | None) -> str | None:
    command = VaspSettings.model_fields["command"].default if settings is None else settings.command
    if why := _missing_program(command):
        return why
    if settings is None:
        return None
    if settings.preset is not None and (why := preset_unavailable(settings.preset)):
        return why
    try:
        fingerprint_facts(settings)
    except CalculatorError as error:
        return str(error)
    return None


def fingerprint_facts(settings: VaspSettings) -> dict[str, Any]:
    facts: dict[str, Any] = {"code": "VASP", "version": settings.version, "dispersion": settings.dispersion}
    facts["spin"] = settings.ispin or "as the structure's moments say"
    facts["kpoints"] = mesh(settings)
    given = folder_potcars(settings)
    if settings.folder is not None:
        kpoints = folder_kpoints(settings)
        facts["incar"] = facts_of(folder_tags(settings))
        facts["kpoints"] = None if kpoints is None else [line.split() for line in kpoints.splitlines()[1:]]
        facts["spin"] = facts["incar"].get("ISPIN", 1.0)
    elif settings.preset is not None:
        preset = preset_facts(settings.preset)
        facts["preset"] = {**preset, "incar": facts_of(preset["incar"])}
        facts["overrides"] = facts_of(own_tags(settings))
        facts["spin"] = settings.ispin or "as the preset says"
    else:
        facts["functional"] = (settings.xc or "PBE").lower()
        facts["incar"] = facts_of(plain_tags(settings))
        facts["ldau_luj"] = canonical(settings.ldau_luj)
    if given is not None:
        facts["species"] = [potcar.element for potcar in given]
        facts["potcars"] = {potcar.element: potcar.identity for potcar in given}
    else:
        table, chosen = names(settings), settings.setups if isinstance(settings.setups, dict) else {}
        wanted = {element: table.get(element, element) for element in settings.elements or table}
        needed = settings.elements or chosen.keys()
        facts["potcars"] = library(settings).identities(wanted, needed)
    return facts


def refuse(settings: VaspSettings, structure: Structure) -> str | None:
    if not structure.pbc.all() or np.linalg.matrix_rank(structure.cell) < 3:
        return "VASP computes cells that are periodic in all three directions (set pbc, with vacuum around)"
    if np.linalg.det(structure.cell) < 0:
        return "VASP refuses a left-handed cell (swap two lattice vectors in both end states)"
    elements = {chemical_symbols[z] for z in structure.numbers}
    if settings.elements is not None and (left := sorted(elements - set(settings.elements))):
        return f"calculator.settings.elements does not name {', '.join(left)} (add it, or remove the setting)"
    try:
        inputs = build_inputs(settings, structure)
    except CalculatorError as error:
        return str(error)
    if _moments(structure) is not None and canonical(inputs.incar.get("ISPIN", 1)) != 2:
        return "ISPIN = 1 would ignore the structure's magnetic moments (set ispin: 2, or remove the moments)"
    return None


def inspect(settings: VaspSettings, calculator: Any) -> Inspection:
    return inspect_folder(Path.cwd(), STDOUT, getattr(calculator, "exit_code", None))


def _steps(settings: VaspSettings) -> int:
    if settings.nelm is not None:
        return settings.nelm
    if settings.folder is not None:
        return int(float(folder_tags(settings).get("NELM", 60)))
    return DEFAULT_NELM if settings.preset is None else PRESET_NELM


def _smearing(settings: VaspSettings) -> float:
    """ISMEAR, wherever it is said; VASP's own default is 1."""
    tags = own_tags(settings)
    if settings.folder is not None:
        tags = folder_tags(settings)
    elif settings.preset is not None:
        tags = {**preset_facts(settings.preset)["incar"], **tags}
    return float(canonical(tags.get("ISMEAR", 1)))


def _gentler(settings: VaspSettings) -> VaspSettings:
    changed = {"algo": "Normal", "nelm": 3 * _steps(settings), "incar": {**settings.incar, **GENTLE}}
    return settings.model_copy(update=changed)


def _another_solver(settings: VaspSettings) -> VaspSettings:
    """All minimises the energy directly, but fails often with the tetrahedron method."""
    algo, mixing = ("Normal", GENTLEST) if _smearing(settings) < -1 else ("All", GENTLE)
    changed = {"algo": algo, "nelm": 5 * _steps(settings), "incar": {**settings.incar, **mixing}}
    return settings.model_copy(update=changed)


ENTRY = CalculatorEntry(
    name="vasp",
    description="VASP in periodic cells, from settings, presets (MPtrj, OMat24, MatPES) or a folder; needs its licence",
    settings_model=VaspSettings,
    make=make,
    unavailable=unavailable,
    fingerprint_facts=fingerprint_facts,
    takes_charge=True,
    warm_up=warm_up,
    refuse=refuse,
    complete=complete,
    inspect=inspect,
    retries=(
        Retry(name="ALGO Normal, 3x the steps, gentler mixing", change=_gentler, after=("unconverged", "crashed")),
        Retry(name="another solver, 5x the steps", change=_another_solver),
    ),
    sabotage={
        "unconverged": lambda settings: settings.model_copy(update={"nelm": 2}),
        "crashed": lambda settings: settings.model_copy(update={"command": "false"}),
    },
)
