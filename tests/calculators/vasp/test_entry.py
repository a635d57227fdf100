from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from alcore.errors import CalculatorError
from alcore.types import Label, Structure
from calculators.base import ResolvedCalculator
from calculators.contract import run_contract
from calculators.registry import resolve
from calculators.vasp import entry as vasp
from calculators.vasp.incar import canonical, parse_incar
from calculators.vasp.output import name_error
from calculators.vasp.presets import PRESETS
from calculators.vasp.settings import VaspSettings

Run = Callable[..., Label]
# fingerprint and ladder ----------------------------------------------------------------------------------------------

MOVES: list[dict[str, Any]] = [
    {"xc": "r2SCAN"}, {"encut": 521}, {"kspacing": 0.2}, {"kspacing": None, "kpts": [4, 4, 4]}, {"gamma": False},
    {"ediff": 1e-7}, {"ismear": 1}, {"sigma": 0.1}, {"ispin": 2}, {"lreal": "Auto"}, {"dispersion": "D3BJ"},
    {"ldau_luj": {"Cu": {"L": 2, "U": 4.0, "J": 0.0}}}, {"setups": {"Cu": "Cu_pv"}}, {"elements": ["Cu"]},
    {"incar": {"LMAXMIX": 4}}, {"version": "6.3.0"},
]  # fmt: skip
MOVES_NOT: list[dict[str, Any]] = [
    {"nelm": 500}, {"algo": "Fast"}, {"xc": "pbe"}, {"encut": 520.0}, {"version": "6.4.2 20Jul23"},
    {"command": "mpirun -np 4 vasp_gam", "version": "6.4.2"},
    {"incar": {"ncore": 4, "Kpar": 2, "LWAVE": True, "SYSTEM": "x", "AMIX": 0.1, "NWRITE": 3}},
]  # fmt: skip


def test_the_interface_s_example_gives_free_energy_and_forces_in_the_asked_order(
    run: Run, mixed: Callable[..., Structure]
) -> None:
    structure = mixed()
    label = run(structure)
    atoms = structure.to_atoms()
    atoms.calc = EMT(asap_cutoff=False)
    assert label.ok, label.reason
    assert label.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=2e-8)  # not energy(sigma->0)
    np.testing.assert_allclose(label.forces, atoms.get_forces(), atol=2e-8)
    np.testing.assert_allclose(label.stress, atoms.get_stress(), atol=1e-7)
    assert label.magnetic_moments is None
    assert label.details["energy_kind"] == "force-consistent"
    assert label.details["code_version"] == label.details["calculator"]["version"] == "6.4.2"
    assert 5 < label.details["electronic_steps"] < 100
    incar = parse_incar((Path(label.folder) / "INCAR").read_text())
    wanted = {"NSW": 0, "IBRION": -1, "ISPIN": 1, "ENCUT": 520, "GGA": "PE", "KSPACING": 0.25, "EDIFF": 1e-6}
    assert {tag: canonical(incar[tag]) for tag in wanted} == wanted
    assert not (Path(label.folder) / "KPOINTS").exists()


def test_the_stand_in_writes_what_pymatgen_reads_too(run: Run, mixed: Callable[..., Structure]) -> None:
    outputs = pytest.importorskip("pymatgen.io.vasp.outputs")
    label = run(mixed([1.0, 0.0, 2.0, 0.0]), ispin=2)
    xml = outputs.Vasprun(Path(label.folder) / "vasprun.xml", parse_potcar_file=False)
    outcar = outputs.Outcar(Path(label.folder) / "OUTCAR")
    assert xml.converged
    assert xml.ionic_steps[-1]["e_fr_energy"] == pytest.approx(label.energy_ev)
    assert abs(xml.ionic_steps[-1]["e_0_energy"] - xml.ionic_steps[-1]["e_fr_energy"]) > 0.01
    assert len(xml.ionic_steps[-1]["electronic_steps"]) == label.details["electronic_steps"]
    assert [site["tot"] for site in outcar.magnetization] == pytest.approx([0.9, 1.8, 0.0, 0.0])


def test_moments_and_charge_reach_vasp_and_final_moments_come_back_in_order(
    run: Run, mixed: Callable[..., Structure]
) -> None:
    moments = np.array([2.0, 0.5, -1.0, 0.25])
    neutral, charged = run(mixed(moments)), run(mixed(moments, charge=1.0))
    np.testing.assert_allclose(neutral.magnetic_moments, 0.9 * moments, atol=1e-3)
    incar = parse_incar((Path(charged.folder) / "INCAR").read_text())
    assert canonical(incar["MAGMOM"]) == [2.0, -1.0, 0.5, 0.25]
    assert (canonical(incar["ISPIN"]), canonical(incar["NELECT"])) == (2.0, 2 * 11 + 2 * 3 - 1)
    assert charged.energy_ev is not None
    assert charged.energy_ev - neutral.energy_ev == pytest.approx(3.0, abs=1e-6)
    assert "NELECT" not in (Path(neutral.folder) / "INCAR").read_text()


def test_forces_of_fixed_atoms_are_asked_for(run: Run, mixed: Callable[..., Structure]) -> None:
    atoms = mixed().to_atoms()
    structure = Structure(**{**vars(Structure.from_atoms(atoms)), "fixed": np.ones((4, 3), dtype=bool)})
    label = run(structure)
    assert label.forces is not None
    assert np.linalg.norm(label.forces, axis=1).min() > 0.01
    assert "elective" not in (Path(label.folder) / "POSCAR").read_text()


@pytest.mark.parametrize("word", ["never", "old"])
def test_stopping_at_nelm_is_unconverged_though_old_vasp_prints_that_ediff_is_reached(
    run: Run, word: str, mixed: Callable[..., Structure]
) -> None:
    label = run(mixed(), nelm=4, retries=0, incar={"SYSTEM": word})
    said = (Path(label.folder) / "OUTCAR").read_text()
    assert ("because EDIFF is reached" in said) == (word == "old")
    assert (label.status, label.reason) == ("unconverged", "the SCF stopped at its limit of 4 electronic steps")
    assert label.energy_ev is None
    assert (Path(label.folder) / "error.txt").is_file()


def test_the_ladder_converges_a_stubborn_structure_and_is_told(run: Run, mixed: Callable[..., Structure]) -> None:
    structure = mixed()
    label = run(structure, nelm=30, incar={"SYSTEM": "stubborn"})
    attempts = label.details["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["unconverged", "unconverged", "ok"]
    assert [attempt["electronic_steps"] for attempt in attempts[:2]] == [30, 90]
    assert label.details["settings"]["algo"] == "All"
    assert label.fingerprint == resolve("vasp", label.details["settings"] | {"nelm": 30, "incar": {}}).fingerprint
    atoms = structure.to_atoms()
    atoms.calc = EMT(asap_cutoff=False)
    assert label.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=2e-8)


@pytest.mark.parametrize("word", ["crash", "silent"])
def test_a_crash_is_named_whatever_the_exit_code(run: Run, word: str, mixed: Callable[..., Structure]) -> None:
    label = run(mixed(), retries=0, incar={"SYSTEM": word})
    assert label.status == "crashed"
    assert "ZBRENT: fatal error in bracketing" in label.reason
    assert "after 3 electronic steps" in label.reason
    assert ("exit code 1" in label.reason) == (word == "crash")
    if find_spec("custodian"):
        assert "[zpotrf, zbrent]" in label.reason
    kept = {path.name for path in Path(label.folder).iterdir()}
    assert {"INCAR", "POSCAR", "POTCAR", "OUTCAR", "vasp.out", "vasprun.xml", "error.txt", "input.extxyz"} <= kept


def test_a_file_cut_in_the_middle_of_the_forces_is_a_crash(run: Run, mixed: Callable[..., Structure]) -> None:
    label = run(mixed(), retries=0, incar={"SYSTEM": "cut"})
    assert label.status == "crashed"
    assert "killed by signal 9" in label.reason or "exit code 137" in label.reason
    assert "vasprun.xml is cut off" in label.reason
    assert label.forces is None
    assert label.details["electronic_steps"] > 5


def test_forces_cut_off_are_never_taken_for_zero(run: Run, home: Path, mixed: Callable[..., Structure]) -> None:
    """ASE's reader would fill them up with zeros; here even the exit code says that all is well."""
    label = run(mixed(), retries=0, command=f"{home / 'vasp_std'} ; true", version="6.4.2", incar={"SYSTEM": "cut"})
    assert label.status == "crashed"
    assert "vasprun.xml is cut off" in label.reason


def test_a_hang_is_ended_with_all_it_started(run: Run, mixed: Callable[..., Structure]) -> None:
    label = run(mixed(), timeout_s=4, incar={"SYSTEM": "hang"})
    assert (label.status, label.energy_ev) == ("timeout", None)
    assert "running on" in (Path(label.folder) / "vasp.out").read_text()


def test_a_version_that_is_not_the_fingerprint_s_is_rejected(run: Run, mixed: Callable[..., Structure]) -> None:
    label = run(mixed(), version="5.4.4")
    assert label.status == "rejected"
    assert "version 6.4.2, the fingerprint says 5.4.4" in label.reason


@pytest.mark.parametrize("missing", ["INCAR", "POSCAR", "POTCAR"])
def test_the_stand_in_fails_as_vasp_does(
    tmp_path: Path, missing: str, potcar_text: Callable[[str], str], stand_in: Path
) -> None:
    (tmp_path / "INCAR").write_text("ENCUT = 300\n")
    (tmp_path / "POTCAR").write_text(potcar_text("Al") + potcar_text("Cu"))
    bulk("Cu").write(tmp_path / "POSCAR", format="vasp")
    (tmp_path / missing).unlink()
    ended = subprocess.run([sys.executable, stand_in], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert missing in name_error(ended.stdout)
    if missing == "INCAR":
        (tmp_path / "INCAR").write_text("ENCUT = 300\n")
        ended = subprocess.run([sys.executable, stand_in], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "the elements of POSCAR (Cu) and of POTCAR differ" in name_error(ended.stdout)


@pytest.mark.slow
def test_contract(ready: Any, mixed: Callable[..., Structure]) -> None:
    checks = run_contract("vasp", ready(), mixed())
    assert [check for check in checks if not check.passed] == []
    names = {check.check for check in checks}
    assert {"forces are -dE/dx", "permutation", "a failure is unconverged", "a failure is crashed"} <= names


def test_structures_that_vasp_cannot_take(ready: Any, mixed: Callable[..., Structure]) -> None:
    resolved = resolve("vasp", ready())
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    mirrored = bulk("Cu", cubic=True)
    mirrored.set_cell(mirrored.cell.array[[1, 0, 2]])
    for atoms, message in (
        (slab, "periodic in all three directions"),
        (mirrored, "left-handed"),
        (bulk("Au"), r"potpaw_PBE: there is no POTCAR Au for Au \(set calculator\.settings\.potcar_folder"),
    ):
        with pytest.raises(CalculatorError, match=message):
            resolved.check_structure(Structure.from_atoms(atoms))
    with pytest.raises(CalculatorError, match="would ignore the structure's magnetic moments"):
        resolve("vasp", ready(ispin=1)).check_structure(mixed([1.0, 0.0, 0.0, 0.0]))


def test_a_program_elsewhere_needs_its_version_only(ready: Any) -> None:
    resolved = resolve("vasp", ready(command="no-such-vasp", version="6.4.2"))
    assert resolved.fingerprint == resolve("vasp", ready()).fingerprint
    with pytest.raises(CalculatorError, match="no-such-vasp is not on this machine"):
        resolved.check_available()


def test_a_missing_launcher_is_named(ready: Any, home: Path) -> None:
    settings = ready(command=f"OMP_NUM_THREADS=1 no-such-mpirun -np 4 {home / 'vasp_std'}")
    with pytest.raises(CalculatorError, match="no-such-mpirun is not on this machine"):
        resolve("vasp", settings)
    with pytest.raises(CalculatorError, match="no-such-mpirun is not on this machine"):
        resolve("vasp", {**settings, "version": "6.4.2"}).check_available()


def test_the_fingerprint_moves_with_what_moves_the_energy_and_only_with_that(ready: Any) -> None:
    plain = resolve("vasp", ready()).fingerprint
    prints = {resolve("vasp", ready(**changes)).fingerprint for changes in MOVES}
    assert len(prints | {plain}) == 1 + len(MOVES)
    assert {resolve("vasp", ready(**changes)).fingerprint for changes in MOVES_NOT} == {plain}


@pytest.mark.parametrize("source", ["settings", "folder", *PRESETS])
def test_no_rung_and_no_sabotage_changes_a_fact(
    ready: Any,
    tmp_path: Path,
    inputs: Path,
    source: str,
    put_potcars: Callable[..., Path],
    without_level: dict[str, Any],
) -> None:
    cases: list[dict[str, Any]] = [{}, *MOVES, *MOVES_NOT]
    if source == "folder":
        cases = [{**without_level, "folder": str(inputs), "nelm": nelm} for nelm in (None, 7)]
    elif source in PRESETS:
        if why := vasp.preset_unavailable(source):
            pytest.skip(why)
        put_potcars(tmp_path / "pp", "Cu_pv")
        cases = [{**without_level, "preset": source, "potcar_folder": str(tmp_path / "pp"), **more}
                 for more in ({}, {"ismear": 0}, {"nelm": 7})]  # fmt: skip
    for case in cases:
        resolved = resolve("vasp", ready(**case))
        changes = [rung.change for rung in resolved.entry.retries] + list(resolved.entry.sabotage.values())
        for change in changes:
            changed = change(resolved.settings)
            assert changed != resolved.settings
            assert resolved.entry.facts(changed) == resolved.facts
            VaspSettings.model_validate(changed.model_dump())
        for rung in resolved.entry.retries:
            assert rung.change(resolved.settings).nelm > (resolved.settings.nelm or 60)  # type: ignore[attr-defined]


def test_the_tetrahedron_method_is_not_given_to_direct_minimisation(ready: Any) -> None:
    last = vasp.ENTRY.retries[-1].change
    assert last(VaspSettings(**ready())).algo == "All"
    assert last(VaspSettings(**ready(ismear=-5))).algo == "Normal"


def test_listing_calculators_loads_nothing_heavy() -> None:
    code = (
        "import sys; from calculators.registry import describe_all; describe_all();"
        "print([m for m in ('pymatgen', 'custodian', 'ase.calculators.vasp') if m in sys.modules])"
    )
    path = os.pathsep.join([str(Path(vasp.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ended.stdout.strip() == "[]"


def test_resolved_settings_travel(ready: Any) -> None:
    resolved: ResolvedCalculator = resolve("vasp", ready())
    again = resolve("vasp", resolved.settings.model_dump(mode="json"))
    assert again.fingerprint == resolved.fingerprint
