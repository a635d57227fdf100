from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.units import Hartree

from alcore.errors import CalculatorError
from alcore.types import Label, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.contract import run_contract
from calculators.cp2k import Cp2kSettings, _results, inspect
from calculators.labeling import LocalLabeler
from calculators.measure import Measurement, measure
from calculators.registry import resolve

needs_cp2k = pytest.mark.skipif(
    shutil.which("cp2k.psmp") is None or not Path("/usr/share/cp2k/GTH_POTENTIALS").is_file(),
    reason="cp2k.psmp and its data are not here (apt-get install cp2k cp2k-data)",
)
MakeRequests = Callable[..., list[LabelRequest]]
SMALL = {"basis_set": "SZV-MOLOPT-SR-GTH", "cutoff_ry": 300.0, "rel_cutoff_ry": 40.0, "eps_scf": 1e-9}
HOT = {**SMALL, "smearing_k": 30000.0, "added_mos": -1}


def hydrogen(molecules: int = 2, pbc: Any = True, larger: float = 1.0, **changes: Any) -> Structure:
    """Rattled H2 molecules, side by side in a box: two seconds a label."""
    atoms = molecule("H2")
    for n in range(1, molecules):
        other = molecule("H2")
        other.translate([2.1 * n, 0.4, 0.3])
        atoms += other
    atoms.set_cell(np.array([2.1 * (molecules + 1), 4.3, 4.4]) * larger)
    atoms.center()
    atoms.rattle(0.05, seed=1)
    atoms.pbc = pbc
    return Structure.from_atoms(atoms, **changes)


BASIS = """# Element, names
 H  SZV-TEST SZV-TEST-q1   # comment
  1
  1 0 0 1 1
      {exponent}  1.0
 na SZV-TEST SZV-TEST-q9
  1
  1 0 0 1 1
      0.3  1.0
"""
POTENTIAL = "H GTH-PBE-q1 GTH-PBE\n 1\n 0.2 2 -4.1 0.7\n 0\nNa GTH-PBE-q1 GTH-PBE\n 1\n 0.9 1 -1.2\n 0\n"
POTENTIAL += "#\nNa GTH-PBE-q9 GTH-PBE\n 3 6\n 0.2 1 -1.2\n 0\n"


def without_program(folder: Path, exponent: float = 0.5, **settings: Any) -> dict[str, Any]:
    """Settings for a machine where CP2K is not: made-up data files, and a version that is told."""
    (folder / "BASIS_MOLOPT").write_text(BASIS.format(exponent=exponent))
    (folder / "GTH_POTENTIALS").write_text(POTENTIAL)
    (folder / "dftd3.dat").write_text("c6")
    told = {"command": "no-such-cp2k", "version": "2024.1", "data_dir": str(folder), "basis_set": "SZV-TEST"}
    return {**told, **settings}


def compute(settings: dict[str, Any], asked: Structure, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Measurement:
    resolved = resolve("cp2k", settings)
    resolved.check_structure(asked)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    make = partial(resolved.entry.make, resolved.settings, asked)
    return measure(make, asked, partial(resolved.entry.inspect, resolved.settings))


def label(resolved: ResolvedCalculator, folder: Path, requests: list[LabelRequest], **limits: Any) -> Label:
    with LocalLabeler(resolved, folder, workers=1, **{"timeout_s": 120.0, **limits}) as labeler:
        (found,) = labeler.label(requests[:1])
    return found


@needs_cp2k
def test_a_label(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("cp2k", SMALL)
    found = label(resolved, tmp_path, make_requests(resolved, structure=hydrogen()))
    assert found.ok, found.reason
    assert found.forces is not None
    assert found.stress is not None
    assert found.magnetic_moments is None
    assert found.energy_ev == pytest.approx(2 * -31.7, abs=1.0)  # H2 in PBE
    assert 0.5 < np.linalg.norm(found.forces[0]) < 5.0
    assert found.details["net_force_ev_per_ang"] < 0.01
    assert found.details["electronic_steps"] > 3
    assert found.details["code_version"] == resolved.facts["version"] != ""
    assert found.details["energy_kind"] == "force-consistent"


@needs_cp2k
def test_the_energy_is_the_one_whose_gradient_the_forces_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hot electrons the free energy and the energy without their entropy have clearly different slopes."""
    asked, step = hydrogen(), 0.003
    forces = compute(HOT, asked, tmp_path / "0", monkeypatch).forces
    force = float(np.linalg.norm(forces))
    free, internal = [], []
    for sign in (1, -1):
        there = compute(
            HOT, asked.moved(asked.positions + sign * step * forces / force), tmp_path / f"{sign}", monkeypatch
        )
        entropic = re.search(r"Electronic entropic energy:\s+(\S+)", Path("cp2k.out").read_text())
        assert entropic
        free.append(there.energy_ev)
        internal.append(there.energy_ev - float(entropic[1]) * Hartree)
    assert -(free[0] - free[1]) / (2 * step) == pytest.approx(force, abs=5e-3)
    assert abs(-(internal[0] - internal[1]) / (2 * step) - force) > 0.1


@needs_cp2k
def test_the_stress_is_the_energy_s_slope_with_strain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, strain = hydrogen(), 0.002
    found = compute(SMALL, asked, tmp_path / "0", monkeypatch)
    energies = []
    for sign in (1, -1):
        atoms = asked.to_atoms()
        atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.0, 1.0 + sign * strain]), scale_atoms=True)
        energies.append(compute(SMALL, Structure.from_atoms(atoms), tmp_path / f"{sign}", monkeypatch).energy_ev)
    slope = (energies[0] - energies[1]) / (2 * strain) / float(np.linalg.det(asked.cell))
    assert found.stress[2] == pytest.approx(slope, abs=1e-3)
    assert abs(slope) > 0.01


@needs_cp2k
@pytest.mark.slow
def test_both_algorithms_and_every_rung_give_the_same_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ot = resolve("cp2k", SMALL), resolve("cp2k", {**SMALL, "algorithm": "ot"})
    assert plain.fingerprint == ot.fingerprint
    first = compute(SMALL, hydrogen(), tmp_path / "plain", monkeypatch)
    for start in (plain, ot):
        for settings in (start.settings, *(rung.change(start.settings) for rung in start.entry.retries)):
            again = measure(partial(plain.entry.make, settings, hydrogen()), hydrogen())
            assert again.energy_ev == pytest.approx(first.energy_ev, abs=1e-6)
            np.testing.assert_allclose(again.forces, first.forces, atol=1e-3)
            assert plain.entry.facts(settings) == plain.facts


@needs_cp2k
def test_fixed_atoms_keep_their_forces_and_a_second_run_its_own_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    atoms = hydrogen().to_atoms()
    atoms.set_constraint(FixAtoms([0, 1]))
    found = compute(SMALL, Structure.from_atoms(atoms), tmp_path / "fixed", monkeypatch)
    assert np.linalg.norm(found.forces, axis=1).min() > 0.1
    other = compute(SMALL, hydrogen().moved(hydrogen().positions * 1.02), tmp_path / "fixed", monkeypatch)
    assert abs(other.energy_ev - found.energy_ev) > 1e-3
    assert np.abs(other.forces - found.forces).max() > 0.01


@needs_cp2k
@pytest.mark.slow
def test_a_molecule_in_vacuum_a_slab_and_k_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images of H2 hardly matter in a large box, but they do: pbc and k-points reach the calculation."""
    energies = [
        compute(SMALL, hydrogen(1, pbc, larger=1.7), tmp_path / "pbc", monkeypatch).energy_ev
        for pbc in (True, False, (True, True, False))
    ]
    assert len({round(energy, 5) for energy in energies}) == 3
    np.testing.assert_allclose(energies, energies[0], atol=0.02)
    gamma = compute(SMALL, hydrogen(), tmp_path / "k", monkeypatch).energy_ev
    several = compute({**SMALL, "kpoints": (1, 1, 2)}, hydrogen(), tmp_path / "k", monkeypatch).energy_ev
    assert 1e-4 < abs(gamma - several) < 0.3


@needs_cp2k
def test_moments_charge_and_dispersion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spin = {**SMALL, "uks": True, "dispersion": "D3BJ", "algorithm": "ot", "eps_scf": 1e-6}
    triplet = compute(spin, hydrogen(magnetic_moments=[1.0, 1.0, 0.0, 0.0]), tmp_path / "triplet", monkeypatch)
    assert triplet.status == "ok", triplet.reason
    assert float(np.sum(triplet.magnetic_moments)) == pytest.approx(2.0, abs=1e-4)
    assert "DFTD3(BJ)" in Path("cp2k.inp").read_text()
    ion = compute(spin, hydrogen(charge=1.0), tmp_path / "ion", monkeypatch)
    assert float(np.sum(ion.magnetic_moments)) == pytest.approx(1.0, abs=1e-4)
    singlet = compute(spin, hydrogen(), tmp_path / "singlet", monkeypatch)
    assert singlet.energy_ev < min(triplet.energy_ev, ion.energy_ev) - 5.0


@needs_cp2k
def test_the_ladder_rescues_and_the_energy_stays(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("cp2k", SMALL)
    requests = make_requests(resolved, structure=hydrogen())
    smooth = label(resolved, tmp_path / "a", requests)
    short = resolve("cp2k", {**SMALL, "max_scf": 4})
    assert short.fingerprint == resolved.fingerprint
    rescued = label(short, tmp_path / "b", requests, retries=2)
    assert rescued.ok, rescued.reason
    assert rescued.details["attempts"][0]["status"] == "unconverged"
    assert rescued.details["settings"]["max_scf"] > 4
    assert rescued.energy_ev == pytest.approx(smooth.energy_ev, abs=1e-6)


@needs_cp2k
@pytest.mark.parametrize("algorithm", ["diagonalization", "ot"])
def test_scf_that_stops_at_its_limit_is_unconverged(
    algorithm: str, tmp_path: Path, make_requests: MakeRequests
) -> None:
    """CP2K 2023.1 warns and goes on to forces."""
    short = resolve("cp2k", {**SMALL, "max_scf": 2, "algorithm": algorithm})
    found = label(short, tmp_path, make_requests(short, structure=hydrogen()), retries=0)
    assert (found.status, found.energy_ev, found.forces) == ("unconverged", None, None)
    assert "not converged in 2 steps" in found.reason
    assert found.details["electronic_steps"] == 2


@needs_cp2k
def test_an_scf_that_only_seems_converged_is_not_believed(tmp_path: Path, make_requests: MakeRequests) -> None:
    """At this place the density matrix of H2 stays the same to 1e-7 in the second step, and the density is far off."""
    resolved = resolve("cp2k", {**SMALL, "eps_scf": 1e-7})
    asked = hydrogen(1).moved(hydrogen(1).positions + np.random.default_rng(0).uniform(0.3, 0.7, 3))
    requests = make_requests(resolved, structure=asked)
    seeming = label(resolved, tmp_path / "a", requests, retries=0)
    assert seeming.status == "unconverged"
    assert "energy still changed by 3.2e-01 Hartree" in seeming.reason
    assert "SCF run converged in" in (Path(seeming.folder) / "cp2k.out").read_text()
    rescued = label(resolved, tmp_path / "b", requests, retries=2)
    assert rescued.ok, rescued.reason
    assert rescued.details["settings"]["algorithm"] == "ot"


@needs_cp2k
def test_what_goes_wrong_is_a_status(tmp_path: Path, make_requests: MakeRequests) -> None:
    bad = resolve("cp2k", {**SMALL, "inp": "&FORCE_EVAL\n&DFT\n&MGRIDX\n&END\n&END DFT\n&END"})
    found = label(bad, tmp_path / "a", make_requests(bad, structure=hydrogen()), retries=0)
    assert found.status == "crashed"
    assert "unknown subsection MGRIDX of section DFT" in found.reason
    other = resolve("cp2k", {**SMALL, "version": "2024.2"})
    found = label(other, tmp_path / "b", make_requests(other, structure=hydrogen()))
    assert found.status == "rejected"
    assert "the fingerprint says 2024.2" in found.reason


@needs_cp2k
def test_a_timeout_ends_cp2k(tmp_path: Path, make_requests: MakeRequests) -> None:
    slow = resolve("cp2k", {**SMALL, "cutoff_ry": 2000.0, "kpoints": (3, 3, 3)})
    found = label(slow, tmp_path, make_requests(slow, structure=hydrogen()), timeout_s=2.0)
    assert found.status == "timeout"
    assert "CP2K version" in (Path(found.folder) / "cp2k.out").read_text()  # it was running
    left = [p for p in psutil.process_iter(["name", "cwd"]) if str(p.info["name"]).startswith("cp2k")]
    mine = [p for p in left if str(p.info["cwd"]).startswith(str(tmp_path))]
    _, alive = psutil.wait_procs(mine, timeout=5)  # what is killed needs a moment to give its memory back
    assert alive == []


@needs_cp2k
@pytest.mark.slow
@pytest.mark.parametrize("settings", [SMALL, HOT], ids=["cold", "hot"])
def test_contract(settings: dict[str, Any]) -> None:
    assert [check for check in run_contract("cp2k", settings, hydrogen()) if not check.passed] == []


@needs_cp2k
@pytest.mark.slow
def test_every_functional_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ot = {**SMALL, "algorithm": "ot", "eps_scf": 1e-6}
    names = ["PBE", "LDA", "PBEsol", "revPBE", "BLYP", "BP", "TPSS"]
    found = [compute({**ot, "xc": xc}, hydrogen(), tmp_path / xc, monkeypatch) for xc in names]
    assert [answer.reason for answer in found] == [""] * len(names)
    assert len({round(answer.energy_ev, 2) for answer in found}) == len(names)
    assert np.ptp([answer.energy_ev for answer in found]) < 4.0


def test_what_moves_the_energy_is_in_the_fingerprint(tmp_path: Path) -> None:
    plain = without_program(tmp_path)
    before = resolve("cp2k", plain)
    still: list[dict[str, Any]] = [
        {"command": "mpirun -np 4 no-such-cp2k"},
        {"max_scf": 7},
        {"mixing_alpha": 0.1},
        {"mixing_method": "PULAY_MIXING"},
        {"algorithm": "ot"},
        {"ot_minimizer": "CG"},
        {"kpoints": (1, 1, 1)},
        {"inp": "\n! a comment\n"},
    ]
    for change in still:
        assert resolve("cp2k", {**plain, **change}).fingerprint == before.fingerprint, change
    moving: list[dict[str, Any]] = [
        {"version": "2024.2"},
        {"xc": "revPBE"},
        {"potential": "GTH-PBE-q9"},
        {"basis_sets": {"H": "SZV-TEST-q1"}},
        {"cutoff_ry": 500.0},
        {"rel_cutoff_ry": 60.0},
        {"eps_default": 1e-10},
        {"eps_scf": 1e-5},
        {"added_mos": 10},
        {"added_mos": 10, "smearing_k": 300.0},
        {"added_mos": 10, "smearing_k": 400.0},
        {"kpoints": (2, 2, 2)},
        {"uks": True},
        {"uks": True, "multiplicity": 3},
        {"charge": 1},
        {"dispersion": "D3"},
        {"dispersion": "D3BJ"},
        {"inp": "&FORCE_EVAL\n&DFT\nSURFACE_DIPOLE_CORRECTION T\n&END\n&END"},
    ]
    prints = [resolve("cp2k", {**plain, **change}).fingerprint for change in moving]
    assert len({before.fingerprint, *prints}) == len(moving) + 1


def test_the_text_of_the_entries_counts_and_not_the_file(tmp_path: Path) -> None:
    before = resolve("cp2k", without_program(tmp_path))
    path = tmp_path / "BASIS_MOLOPT"
    path.write_text("# another comment\n" + path.read_text() + "He OTHER-BASIS\n 1\n 1 0 0 1 1\n 0.1 1.0\n")
    assert resolve("cp2k", {**before.settings.model_dump()}).fingerprint == before.fingerprint
    assert resolve("cp2k", without_program(tmp_path, exponent=0.6)).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": None}, "no-such-cp2k is not on this machine"),
        ({"basis_set": "NO-SUCH"}, "has no basis set NO-SUCH"),
        ({"potentials": {"H": "GTH-NO"}}, "has no pseudopotential GTH-NO for H"),
        ({"basis_set_file": "NO_FILE"}, "there is no NO_FILE in"),
        ({"basis_sets": {"Zz": "SZV-TEST"}}, "no such element: Zz"),
        ({"algorithm": "ot", "kpoints": (2, 2, 2)}, "ot takes no smearing"),
        ({"smearing_k": 300.0}, "set added_mos"),
        ({"multiplicity": 3}, "needs uks: true"),
        ({"xc": None}, "needs potential"),
        ({"kpoints": (0, 1, 1)}, "kpoints must be positive"),
        ({"cutof_ry": 3}, "did you mean cutoff_ry?"),
    ],
)
def test_bad_settings_are_one_clear_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CalculatorError, match=re.escape(said)) as caught:
        resolve("cp2k", {**without_program(tmp_path), **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("&FORCE_EVAL\n&DFT\n&END", "leaves 1 sections open"),
        ("&GLOBAL\nRUN_TYPE MD\n&END", "RUN_TYPE already present"),
        ("&FORCE_EVAL\n&DFT\n&SCF\nMAX_SCF 7\n&END\n&END\n&END", "MAX_SCF already present"),
    ],
)
def test_a_template_that_contradicts_is_found_before_anything_runs(
    template: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "cp2k.here"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    resolved = resolve("cp2k", without_program(tmp_path, command=str(program), inp=template))
    with pytest.raises(CalculatorError, match=re.escape(said)):
        resolved.check_available()


@pytest.mark.parametrize(
    ("settings", "structure", "said"),
    [
        ({}, Structure.from_atoms(bulk("Cu")), "does not know Cu"),
        ({}, Structure.from_atoms(Atoms("H2", [[0, 0, 0], [0, 0, 0.7]])), "needs three lattice vectors"),
        ({}, Structure.from_atoms(Atoms("Na", cell=[4, 4, 9])), "for 9 electrons, its pseudopotential has 1"),
        ({}, Structure.from_atoms(Atoms("H", cell=[4, 4, 9])), "an odd number of electrons, 1"),
        ({}, hydrogen(charge=1.0), "an odd number of electrons, 3"),
        ({}, hydrogen(charge=0.5), "not a whole number"),
        ({"charge": 1, "uks": True}, hydrogen(charge=2.0), "contradicts the settings' +1 e"),
        ({}, hydrogen(magnetic_moments=[1.0, 1.0, 0.0, 0.0]), "uks: false would ignore"),
        ({"uks": True}, hydrogen(magnetic_moments=[1.0, 0.0, 0.0, 0.0]), "1 unpaired electrons are impossible with 4"),
        ({"kpoints": (2, 2, 2)}, hydrogen(pbc=False), "along an axis that is not periodic"),
    ],
)
def test_structures_that_are_refused(settings: dict[str, Any], structure: Structure, said: str, tmp_path: Path) -> None:
    with pytest.raises(CalculatorError, match=re.escape(said)):
        resolve("cp2k", without_program(tmp_path, **settings)).check_structure(structure)


def test_outputs_of_later_versions_and_broken_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Cp2kSettings()
    assert "no output" in inspect(settings, None).reason
    Path("cp2k.out").write_text(" CP2K| version string:   CP2K version 2024.1\n  1 OT DIIS  0.80E-01  0.0  0.02\n")
    found = inspect(settings, None)
    assert (found.converged, found.code_version) == (None, "2024.1")
    assert "ended in the middle" in found.reason
    later = " ENERGY| Total FORCE_EVAL ( QS ) energy [hartree]            -1.163100000000\n"
    later += " FORCES| Atomic forces [hartree/bohr]\n FORCES| Atom     x      y      z     |f|\n"
    later += (
        " FORCES|      1  1.0E-02 -2.5E-02  0.0E+00  2.6E-02\n FORCES|      2 -1.0E-02  2.5E-02  0.0E+00  2.6E-02\n"
    )
    results = _results(later + " FORCES| Sum  0.0E+00  0.0E+00  0.0E+00  0.0E+00\n")
    assert results["free_energy"] == pytest.approx(-1.1631 * Hartree)
    assert results["forces"].shape == (2, 3)
    assert results["forces"][0, 1] == pytest.approx(-0.025 * 51.422, rel=1e-4)
