from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ase.build import bulk

from alcore.types import Label, LabelRequest, Structure
from calculators.labeling import LocalLabeler
from calculators.registry import resolve

EXAMPLE: dict[str, Any] = {"xc": "PBE", "encut": 520, "kspacing": 0.25, "ediff": 1.0e-6}
VALENCE = {"Cu": 11.0, "Cu_pv": 17.0, "Al": 3.0, "Ni_pv": 16.0, "O": 6.0}
STAND_IN = Path(__file__).with_name("stand_in_vasp.py")


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """The program that stands in for VASP."""
    return STAND_IN


@pytest.fixture(scope="session")
def potcar_text() -> Callable[[str], str]:
    """What VASP, ASE and pymatgen read of a POTCAR; the data itself is VASP's own and is not here."""

    def text(name: str) -> str:
        element, zval = name.split("_", maxsplit=1)[0], VALENCE[name]
        return (
            f"  PAW_PBE {name} 01Jan2001\n   {zval:.4f}\n parameters from PSCTR are:\n   VRHFIN ={element}: d10 p1\n"
            f"   LEXCH  = PE\n   EATOM  =  1.0 eV\n\n   TITEL  = PAW_PBE {name} 01Jan2001\n"
            "   LULTRA =        F    use ultrasoft PP ?\n   IUNSCR =        1    unscreen\n   RPACOR =    2.000\n"
            f"   POMASS =   63.546; ZVAL   =   {zval:.3f}    mass and valenz\n"
            "   ENMAX  =  295.446; ENMIN  =  221.585 eV\nEnd of Dataset\n"
        )

    return text


@pytest.fixture(scope="session")
def put_potcars(potcar_text: Callable[[str], str]) -> Callable[..., Path]:
    """``put_potcars(folder, "Cu", "Fe_pv")``: ``folder/Cu/POTCAR``, ..."""

    def put(folder: Path, *names: str) -> Path:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "POTCAR").write_text(potcar_text(name))
        return folder

    return put


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory, put_potcars: Callable[..., Path]) -> Path:
    """A folder with a program ``vasp_std`` and, in ``pp``, POTCARs of one release."""
    folder = tmp_path_factory.mktemp("vasp")
    program = folder / "vasp_std"
    program.write_text(f'#!/bin/sh\n# vasp.6.4.2 20Jul23\nexec "{sys.executable}" "{STAND_IN}"\n')
    program.chmod(0o755)
    put_potcars(folder / "pp" / "potpaw_PBE", "Cu", "Cu_pv", "Al", "Ni_pv", "O")
    return folder


@pytest.fixture(scope="session")
def ready(home: Path) -> Callable[..., dict[str, Any]]:
    """``ready(ismear=1)``: the settings of the interface's example with this and the stand-in."""

    def make(**changes: Any) -> dict[str, Any]:
        here = {"command": str(home / "vasp_std"), "potcar_folder": str(home / "pp")}
        return {name: value for name, value in {**here, **EXAMPLE, **changes}.items() if value is not None}

    return make


@pytest.fixture(scope="session")
def without_level() -> dict[str, Any]:
    """For ``ready``: the settings that a preset or a folder stands in for, taken away."""
    return dict.fromkeys(EXAMPLE)


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) - before == set()


@pytest.fixture(scope="session")
def mixed() -> Callable[..., Structure]:
    """``mixed(moments, charge)``: Cu Al Cu Al, an order that POSCAR does not keep."""

    def make(moments: Any = None, charge: float = 0.0) -> Structure:
        atoms = bulk("Cu", cubic=True)
        atoms.numbers[[1, 3]] = 13
        atoms.rattle(0.06, seed=4)
        return Structure.from_atoms(atoms, charge=charge, magnetic_moments=moments)

    return make


Run = Callable[..., Label]
MakeRequests = Callable[..., list[LabelRequest]]


@pytest.fixture
def run(tmp_path: Path, ready: Any, make_requests: MakeRequests) -> Run:
    """``run(structure, retries=2, timeout_s=60, **settings)``: a label through a real worker and the stand-in."""

    def label(structure: Structure, *, retries: int = 2, timeout_s: float = 60.0, **changes: Any) -> Label:
        resolved = resolve("vasp", ready(**changes))
        resolved.check_available()
        with LocalLabeler(resolved, tmp_path / "calc", timeout_s=timeout_s, retries=retries) as labeler:
            return labeler.label(make_requests(resolved, structure=structure))[0]

    return label


@pytest.fixture
def inputs(tmp_path: Path, potcar_text: Callable[[str], str]) -> Path:
    """A user's INCAR, KPOINTS and POTCAR, for Al and Cu."""
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "INCAR").write_text(
        "encut = 400 ; PREC = Accurate ! eV\nISPIN = 2\nMAGMOM = 2*1.0 \\\n 2*-0.5\nLDAU = .T.\n"
        "LDAUL = -1 2\nLDAUU = 0 3.5\nEDIFF = 1E-7  # tight\nLWAVE = F\n"
    )
    (folder / "KPOINTS").write_text("mine\n0\nGamma\n3 3 3\n0 0 0\n")
    (folder / "POTCAR").write_text(potcar_text("Al") + potcar_text("Cu_pv"))
    return folder
