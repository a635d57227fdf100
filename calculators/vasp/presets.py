"""The settings that foundation models' own data were computed with, as the packages that made them write them down."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from alcore.types import FloatArray, Structure

PresetName = Literal["MPtrj", "OMat24", "MatPES-PBE", "MatPES-r2SCAN"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Where a preset comes from.

    Attributes:
        module, name: of the input set, a ``pymatgen.io.vasp.sets.VaspInputSet``.
        package: what to install for it.
        options: arguments of the set.
    """

    name: str
    module: str = "pymatgen.io.vasp.sets"
    package: str = "pymatgen"
    options: Mapping[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "MPtrj": Preset(name="MPStaticSet"),
    "OMat24": Preset(
        name="OMat24StaticSet", module="fairchem.data.omat.vasp.sets", package="pymatgen fairchem-data-omat"
    ),
    "MatPES-PBE": Preset(name="MatPESStaticSet", options={"xc_functional": "PBE"}),
    "MatPES-r2SCAN": Preset(name="MatPESStaticSet", options={"xc_functional": "R2SCAN"}),
}


@dataclass(frozen=True, kw_only=True)
class PresetInputs:
    """What a set writes for one structure.

    Attributes:
        incar: tags without MAGMOM; lists by species are in order of first appearance in the structure.
        kpoints: text of KPOINTS, or None where KSPACING says it.
        moments: initial moments in μ_B in the structure's order, or None.
    """

    incar: dict[str, Any]
    kpoints: str | None
    moments: FloatArray | None


def preset_unavailable(name: str) -> str | None:
    """Why the preset cannot be read here, and the mend."""
    preset = PRESETS[name]
    try:
        if find_spec("pymatgen") and find_spec(preset.module):
            return None
    except ModuleNotFoundError:
        pass
    return f"preset {name} needs a package that is not installed (pip install {preset.package})"


@contextmanager
def _quiet() -> Iterator[None]:
    """pymatgen warns about every choice of its own sets."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _set_class(name: str) -> Any:
    if why := preset_unavailable(name):
        raise CalculatorError(why, where="calculator.settings.preset")
    from pymatgen.io.vasp import sets

    home = sets.MODULE_DIR
    with _quiet():
        try:
            return getattr(import_module(PRESETS[name].module), PRESETS[name].name)
        finally:
            sets.MODULE_DIR = home  # importing OMat24's sets points it at their own folder


def _input_set(name: str, structure: Any = None) -> Any:
    return _set_class(name)(structure, sort_structure=False, **PRESETS[name].options)


def potcar_names(name: str) -> dict[str, str]:
    """Which POTCAR the preset gives each element it knows."""
    table = _set_class(name).CONFIG["POTCAR"]
    return {element: one["symbol"] if isinstance(one, dict) else one for element, one in table.items()}


def potcar_release(name: str) -> str:
    """Which of VASP's releases of PBE POTCARs the preset was made with; "" is the oldest."""
    with _quiet():
        functional = str(_input_set(name).potcar_functional)
    return next((part for part in functional.split("_") if part.isdigit()), "")


def preset_inputs(name: str, structure: Structure) -> PresetInputs:
    """The set's own INCAR and KPOINTS for this structure; its moments where the structure brings none.

    pymatgen centres even k-point meshes on Γ for structures of a face-centred space group. Here the lattice alone
    decides, so that an image of a band does not change its mesh because its atoms happen to be symmetric.
    """
    from ase.data import chemical_symbols
    from pymatgen.core.structure import Structure as PymatgenStructure

    symbols = [chemical_symbols[z] for z in structure.numbers]
    order = np.array(sorted(range(len(symbols)), key=lambda i: symbols.index(symbols[i])))
    moments = structure.magnetic_moments
    given = {"magmom": moments[order].tolist()} if moments is not None and np.any(moments) else None
    atoms = PymatgenStructure(
        structure.cell,
        [symbols[i] for i in order],
        structure.positions[order],
        coords_are_cartesian=True,
        site_properties=given,
    )
    lattice = PymatgenStructure(structure.cell, [symbols[order[0]]], [[0, 0, 0]])
    with _quiet():
        incar = dict(_input_set(name, atoms).incar)
        kpoints = _input_set(name, lattice).kpoints
    sorted_moments = incar.pop("MAGMOM", None)
    back = np.empty(len(order))
    if sorted_moments is not None:
        back[order] = sorted_moments
    return PresetInputs(
        incar=incar,
        kpoints=None if kpoints is None else str(kpoints),
        moments=None if sorted_moments is None else back,
    )


@cache
def preset_facts(name: str) -> dict[str, Any]:
    """What the set says, and a hash of what it writes for a few structures: that catches a change in its code, too."""
    made = _set_class(name)
    with _quiet():
        blank = _input_set(name)
        tags, kpoints = made.CONFIG["INCAR"] | dict(blank.incar_updates), blank.kpoints_updates
    written = [(p.incar, p.kpoints, str(p.moments)) for p in (preset_inputs(name, s) for s in _probes())]
    return {
        "name": name,
        "set": f"{PRESETS[name].module}.{PRESETS[name].name}",
        "options": dict(PRESETS[name].options),
        "incar": tags,
        "kpoints": kpoints or made.CONFIG.get("KPOINTS"),
        "recipe_sha256": json_sha256({"written": written}),
    }


def _probes() -> list[Structure]:
    """An oxide with +U, a fluoride with moments of its own, a hexagonal metal, and a long cell."""
    from ase.build import bulk

    oxide = bulk("FeO", "rocksalt", a=4.3, cubic=True)
    fluoride = bulk("CoF", "zincblende", a=4.6)
    fluoride.set_initial_magnetic_moments([2.0, 0.0])
    metal, long = bulk("Ti", "hcp", a=2.95, c=4.68), bulk("Si", cubic=True) * (1, 1, 3)
    return [Structure.from_atoms(atoms) for atoms in (oxide, fluoride, metal, long)]
