from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from ase.constraints import FixAtoms
from ase.units import Ry
from hypothesis import given
from hypothesis import strategies as st

from alcore.errors import CalculatorError
from alcore.types import Label, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.contract import run_contract
from calculators.espresso import EspressoSettings, _grid, inspect
from calculators.labeling import LocalLabeler
from calculators.measure import Measurement, measure
from calculators.registry import resolve

PSEUDO = Path("/usr/share/espresso/pseudo")
needs_pw = pytest.mark.skipif(
    shutil.which("pw.x") is None or not (PSEUDO / "Al.pz-vbc.UPF").is_file(),
    reason="pw.x and its pseudopotentials are not here (apt-get install quantum-espresso quantum-espresso-data)",
)
MakeRequests = Callable[..., list[LabelRequest]]
AL = {"pseudopotentials": {"Al": "Al.pz-vbc.UPF"}, "ecutwfc_ry": 12.0, "kpts": (2, 2, 2), "degauss_ry": 0.05}
FE = {"pseudopotentials": {"Fe": "Fe.pbe-nd-rrkjus.UPF"}, "ecutwfc_ry": 20.0, "ecutrho_ry": 160.0, "degauss_ry": 0.05}
UPF = '<UPF version="2.0.1">\n<PP_HEADER element="{0} " functional=" SLA  PW   PBX  PBC" z_valence="{1}"/>\n'
OLD_UPF = "<PP_HEADER>\n   0                   Version Number\n   {0}                  Element\n   US\n"
OLD_UPF += " SLA  PW   PBX  PBC     PBE  Exchange-Correlation functional\n   {1}      Z valence\n</PP_HEADER>\n"


def aluminium(**changes: Any) -> Structure:
    """Two rattled atoms of bcc Al: half a second a label."""
    atoms = bulk("Al", "bcc", a=3.2, cubic=True)
    atoms.rattle(0.1, seed=1)
    return Structure.from_atoms(atoms, **changes)


def without_program(folder: Path, **settings: Any) -> dict[str, Any]:
    """Settings for a machine where pw.x is not: made-up pseudopotentials, and a version that is told."""
    (folder / "Al.UPF").write_text(UPF.format("Al", "3.000000000000e0"))
    (folder / "O.UPF").write_text(OLD_UPF.format("O", "6.00000000000"))
    told = {"command": "no-such-pw.x", "version": "7.2", "pseudo_dir": str(folder), "ecutwfc_ry": 30.0}
    return {**told, "pseudopotentials": {"Al": "Al.UPF", "O": "O.UPF"}, **settings}


def compute(
    settings: dict[str, Any], structure: Structure, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Measurement:
    resolved = resolve("espresso", settings)
    resolved.check_structure(structure)
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    make = partial(resolved.entry.make, resolved.settings, structure)
    return measure(make, structure, partial(resolved.entry.inspect, resolved.settings))


def label(resolved: ResolvedCalculator, folder: Path, requests: list[LabelRequest], **limits: Any) -> Label:
    with LocalLabeler(resolved, folder, workers=1, **{"timeout_s": 120.0, **limits}) as labeler:
        (found,) = labeler.label(requests[:1])
    return found


@needs_pw
def test_a_label(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("espresso", AL)
    found = label(resolved, tmp_path, make_requests(resolved, structure=aluminium()))
    assert found.ok, found.reason
    assert found.forces is not None
    assert found.stress is not None
    assert found.magnetic_moments is None
    np.testing.assert_allclose(found.forces.sum(axis=0), 0.0, atol=1e-6)
    assert 0.1 < np.linalg.norm(found.forces[0]) < 5.0
    assert found.energy_ev == pytest.approx(2 * -57.0, abs=3.0)  # an Al atom's three valence electrons
    assert found.details["electronic_steps"] > 3
    assert found.details["code_version"] == resolved.facts["version"] != ""
    assert found.details["energy_kind"] == "force-consistent"
    assert resolved.facts["functional"] == ["SLA PZ NOGX NOGC"]


@needs_pw
def test_the_energy_is_the_one_whose_gradient_the_forces_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hot electrons the free energy and the internal energy have clearly different slopes."""
    hot = {**AL, "smearing": "fd", "degauss_ry": 0.1}
    asked, step = aluminium(), 0.01
    forces = compute(hot, asked, tmp_path / "0", monkeypatch).forces
    force = float(np.linalg.norm(forces))
    direction, free, internal = forces / force, [], []
    for sign in (1, -1):
        there = compute(hot, asked.moved(asked.positions + sign * step * direction), tmp_path / f"{sign}", monkeypatch)
        free.append(there.energy_ev)
        printed = re.search(r"internal energy E=F\+TS\s+=\s+(\S+) Ry", Path("espresso.pwo").read_text())
        assert printed
        internal.append(float(printed[1]) * Ry)
    assert -(free[0] - free[1]) / (2 * step) == pytest.approx(force, abs=5e-3)
    assert abs(-(internal[0] - internal[1]) / (2 * step) - force) > 0.1


@needs_pw
def test_the_stress_is_the_energy_s_slope_with_strain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, strain = aluminium(), 0.005
    found = compute({**AL, "ecutwfc_ry": 40.0}, asked, tmp_path / "0", monkeypatch)
    energies = []
    for sign in (1, -1):
        atoms = asked.to_atoms()
        atoms.set_cell(atoms.cell.array @ np.diag([1.0, 1.0, 1.0 + sign * strain]), scale_atoms=True)
        energies.append(
            compute(
                {**AL, "ecutwfc_ry": 40.0}, Structure.from_atoms(atoms), tmp_path / f"{sign}", monkeypatch
            ).energy_ev
        )
    slope = (energies[0] - energies[1]) / (2 * strain) / float(np.linalg.det(asked.cell))
    assert found.stress[2] == pytest.approx(slope, abs=2e-3)
    assert abs(slope) > 0.01


@needs_pw
def test_fixed_atoms_keep_their_forces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = aluminium().to_atoms()
    atoms.set_constraint(FixAtoms([0]))
    found = compute(AL, Structure.from_atoms(atoms), tmp_path / "fixed", monkeypatch)
    assert np.linalg.norm(found.forces, axis=1).min() > 0.1


@needs_pw
def test_gamma_alone_is_the_grid_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faster way at Γ gives the numbers of the grid with one point; conv_thr decides how closely."""
    gamma = compute({**AL, "kpts": None}, aluminium(), tmp_path / "gamma", monkeypatch)
    assert "gamma" in Path("espresso.pwi").read_text()
    settings = resolve("espresso", {**AL, "kpts": (1, 1, 1)})
    assert settings.fingerprint == resolve("espresso", {**AL, "kpts": None}).fingerprint
    text = Path("espresso.pwi").read_text().replace("K_POINTS gamma", "K_POINTS automatic\n1 1 1 0 0 0")
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "in").write_text(text)
    out = subprocess.run(
        ["pw.x", "-in", "in"], cwd=tmp_path / "grid", capture_output=True, text=True, check=True
    ).stdout
    total = re.search(r"^!\s+total energy\s+=\s+(\S+) Ry", out, re.MULTILINE)
    assert total
    assert gamma.energy_ev == pytest.approx(float(total[1]) * Ry, abs=1e-5)


@needs_pw
def test_moments_spin_and_dispersion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iron is a ferromagnet whatever the start; two atoms that start apart are two species of one element."""
    atoms = bulk("Fe", a=2.86, cubic=True)
    atoms.rattle(0.05, seed=1)
    structure = Structure.from_atoms(atoms, magnetic_moments=[4.0, 3.0])
    found = compute(
        {**FE, "spin": True, "kpts": (1, 1, 2), "dispersion": "D3BJ"}, structure, tmp_path / "fe", monkeypatch
    )
    assert found.status == "ok", found.reason
    assert np.all(np.abs(found.magnetic_moments) > 1.0)
    assert found.inspection.notes["total_moment_mu_b"] == pytest.approx(np.sum(found.magnetic_moments), abs=1.5)
    written = Path("espresso.pwi").read_text()
    assert re.findall(r"starting_magnetization\(\d\) = (\S+)", written) == ["0.5", "0.375"]  # of 8 electrons
    assert "DFT-D3 Dispersion" in Path("espresso.pwo").read_text()


@needs_pw
def test_charge_reaches_the_calculation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compute(AL, aluminium(charge=0.5), tmp_path / "charged", monkeypatch)
    electrons = re.search(r"number of electrons\s+=\s+(\S+)", Path("espresso.pwo").read_text())
    assert electrons
    assert float(electrons[1]) == 5.5


@needs_pw
def test_the_ladder_rescues_and_the_energy_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_requests: MakeRequests
) -> None:
    monkeypatch.chdir(tmp_path)
    resolved = resolve("espresso", AL)
    requests = make_requests(resolved, structure=aluminium())
    smooth = label(resolved, tmp_path / "a", requests)
    short = resolve("espresso", {**AL, "electron_maxstep": 4, "mixing_beta": 0.4})
    assert short.fingerprint == resolved.fingerprint
    rescued = label(short, tmp_path / "b", requests, retries=2)
    assert rescued.ok, rescued.reason
    assert [attempt["status"] for attempt in rescued.details["attempts"]] == ["unconverged", "ok"]
    assert rescued.details["settings"]["mixing_beta"] == 0.2
    assert rescued.energy_ev == pytest.approx(smooth.energy_ev, abs=1e-5)
    for rung in resolved.entry.retries:
        changed = rung.change(resolved.settings)
        assert changed != resolved.settings
        assert resolved.entry.facts(changed) == resolved.facts
        again = measure(partial(resolved.entry.make, changed, aluminium()), aluminium())
        assert again.energy_ev == pytest.approx(smooth.energy_ev, abs=1e-5), rung.name


@needs_pw
def test_what_goes_wrong_is_a_status(tmp_path: Path, make_requests: MakeRequests) -> None:
    short = resolve("espresso", {**AL, "electron_maxstep": 2})
    found = label(short, tmp_path / "a", make_requests(short, structure=aluminium()), retries=0)
    assert (found.status, found.energy_ev, found.forces) == ("unconverged", None, None)
    assert "not converged in 2 steps" in found.reason
    assert found.details["electronic_steps"] == 2
    bad = resolve("espresso", {**AL, "input_data": {"nbnd": 1}, "smearing": "fd"})
    found = label(bad, tmp_path / "b", make_requests(bad, structure=aluminium()), retries=0)
    assert found.status == "crashed"
    assert found.reason.startswith("pw.x: ")
    assert "band" in found.reason
    other = resolve("espresso", {**AL, "version": "7.2"})
    found = label(other, tmp_path / "c", make_requests(other, structure=aluminium()))
    assert found.status == "rejected"
    assert "the fingerprint says 7.2" in found.reason


@needs_pw
def test_a_pseudopotential_that_goes_away_in_the_run(tmp_path: Path, make_requests: MakeRequests) -> None:
    shutil.copy(PSEUDO / "Al.pz-vbc.UPF", tmp_path / "Al.UPF")
    resolved = resolve("espresso", {**AL, "pseudopotentials": {"Al": "Al.UPF"}, "pseudo_dir": str(tmp_path)})
    assert resolved.fingerprint == resolve("espresso", AL).fingerprint  # the content counts, not its place
    requests = make_requests(resolved, structure=aluminium())
    with LocalLabeler(resolved, tmp_path / "calc", workers=1, timeout_s=60, retries=0) as labeler:
        (fine,) = labeler.label(requests)
        with pytest.MonkeyPatch.context() as patch:  # the check before a label knows; the worker must cope as well
            patch.setattr(ResolvedCalculator, "check_structure", lambda *_: None)
            (tmp_path / "Al.UPF").unlink()
            (found,) = labeler.label(requests)
    assert fine.ok
    assert found.status == "crashed"
    assert "Al.UPF" in found.reason or "pseudo" in found.reason
    assert resolved.entry.unavailable(resolved.settings) is not None


@needs_pw
def test_a_timeout_ends_pw(tmp_path: Path, make_requests: MakeRequests) -> None:
    slow = resolve("espresso", {**AL, "ecutwfc_ry": 80.0, "kpts": (8, 8, 8)})
    found = label(slow, tmp_path, make_requests(slow, structure=aluminium()), timeout_s=2.0)
    assert found.status == "timeout"
    assert "Program PWSCF" in (Path(found.folder) / "espresso.pwo").read_text()  # it was running
    left = [p for p in psutil.process_iter(["name", "cwd"]) if p.info["name"] == "pw.x"]
    assert [p for p in left if str(p.info["cwd"]).startswith(str(tmp_path))] == []


@needs_pw
@pytest.mark.slow
def test_contract() -> None:
    assert [check for check in run_contract("espresso", AL, aluminium()) if not check.passed] == []


def test_what_moves_the_energy_is_in_the_fingerprint(tmp_path: Path) -> None:
    plain = without_program(tmp_path)
    before = resolve("espresso", plain)
    assert before.facts["pseudopotential_sha256"].keys() == {"Al", "O"}
    still: list[dict[str, Any]] = [
        {"command": "mpirun -np 4 no-such-pw.x"},
        {"electron_maxstep": 7},
        {"mixing_beta": 0.1},
        {"mixing_mode": "TF"},
        {"diagonalization": "cg"},
        {"ecutrho_ry": 120.0},  # what null means
        {"input_data": {"CONTROL": {"disk_io": "none", "Verbosity": "high"}, "mixing_ndim": 4}},
    ]
    for change in still:
        assert resolve("espresso", {**plain, **change}).fingerprint == before.fingerprint, change
    moving: list[dict[str, Any]] = [
        {"version": "7.3"},
        {"xc": "PBEsol"},
        {"ecutwfc_ry": 31.0},
        {"ecutrho_ry": 240.0},
        {"kspacing": 0.2},
        {"kpts": (2, 2, 2)},
        {"kpts": (2, 2, 2), "koffset": (1, 1, 1)},
        {"smearing": None},
        {"smearing": "fd"},
        {"degauss_ry": 0.02},
        {"conv_thr_ry": 1e-6},
        {"spin": True},
        {"dispersion": "D3"},
        {"dispersion": "D3BJ"},
        {"input_data": {"SYSTEM": {"nbnd": 40}}},
        {"input_data": {"assume_isolated": "2D"}},
    ]
    prints = [resolve("espresso", {**plain, **change}).fingerprint for change in moving]
    assert len({before.fingerprint, *prints}) == len(moving) + 1
    (tmp_path / "Al.UPF").write_text((tmp_path / "Al.UPF").read_text() + "another mesh")
    assert resolve("espresso", plain).fingerprint != before.fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pseudopotentials": {"Al": "Al.UPF", "O": "no.UPF", "Li": "li.UPF"}}, "Li: li.UPF (No such file"),
        ({"pseudopotentials": {"Al": "O.UPF"}}, "Al: O.UPF is for O"),
        ({"pseudopotentials": {"Al": "text"}}, "Al: text is not a UPF file"),
        ({"pseudopotentials": {"Zz": "Al.UPF"}}, "no such element: Zz"),
        ({"pseudopotentials": {}}, "pseudopotentials"),
        ({"version": None}, "no-such-pw.x is not on this machine"),
        ({"kpts": (2, 2, 2), "kspacing": 0.3}, "keep one"),
        ({"koffset": (1, 1, 1)}, "koffset needs"),
        ({"input_data": {"calculation": "relax"}}, "a label is an scf calculation"),
        ({"input_data": {"SYSTEM": {"ecutwfc": 20}}}, "set ecutwfc_ry instead"),
        ({"input_data": {"starting_magnetization(1)": 0.5}}, "the structure's magnetic moments"),
        ({"input_data": {"hubbard_u(1)": 4.0}}, "depend on the order of the atoms"),
        ({"input_data": {"nbnt": 40}}, "did you mean nbnd?"),
        ({"input_data": {"scf_must_converge": False}}, "cannot be set here"),
        ({"input_data": {"occupations": "tetrahedra"}}, "needs smearing: null"),
        ({"input_data": {"nbnd": [1]}}, "expected a number"),
    ],
)
def test_bad_settings_are_one_clear_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing")
    with pytest.raises(CalculatorError, match=re.escape(said)) as caught:
        resolve("espresso", {**without_program(tmp_path), **change})
    assert "\n" not in str(caught.value)


def test_a_program_that_runs_elsewhere(tmp_path: Path) -> None:
    resolved = resolve("espresso", without_program(tmp_path))
    with pytest.raises(CalculatorError, match=r"no-such-pw\.x is not on this machine"):
        resolved.check_available()


def test_the_folder_of_pseudopotentials_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPRESSO_PSEUDO", str(tmp_path))
    settings = without_program(tmp_path, pseudo_dir=None)
    assert resolve("espresso", settings).settings.model_dump()["pseudo_dir"] == tmp_path
    monkeypatch.setenv("ESPRESSO_PSEUDO", str(tmp_path / "none"))
    with pytest.raises(CalculatorError, match="ESPRESSO_PSEUDO names"):
        resolve("espresso", settings)


@pytest.mark.parametrize(
    ("settings", "structure", "said"),
    [
        ({}, Structure.from_atoms(bulk("Cu")), "does not know Cu"),
        ({}, Structure.from_atoms(Atoms("Al", pbc=False)), "needs three lattice vectors"),
        ({}, Structure.from_atoms(Atoms("Al", cell=[4, 4, 9], pbc=(1, 1, 0))), "set all three pbc"),
        ({}, Structure.from_atoms(bulk("Al"), magnetic_moments=[1.0]), "spin: false would ignore"),
        ({"spin": True}, Structure.from_atoms(bulk("Al")), "needs starting moments"),
        ({"spin": True}, Structure.from_atoms(bulk("Al"), magnetic_moments=[4.0]), "3 valence electrons"),
        ({"smearing": None}, Structure.from_atoms(bulk("Al")), "an even number of electrons, there are 3"),
    ],
)
def test_structures_that_are_refused(settings: dict[str, Any], structure: Structure, said: str, tmp_path: Path) -> None:
    with pytest.raises(CalculatorError, match=re.escape(said)):
        resolve("espresso", without_program(tmp_path, **settings)).check_structure(structure)


def test_structures_that_are_taken(tmp_path: Path) -> None:
    slab = Structure.from_atoms(Atoms("Al", cell=[4, 4, 9], pbc=(1, 1, 0)))
    resolve("espresso", without_program(tmp_path, input_data={"assume_isolated": "2D"})).check_structure(slab)
    charged = Structure.from_atoms(bulk("Al"), charge=1.0)
    resolve("espresso", without_program(tmp_path, smearing=None)).check_structure(charged)


@given(
    lengths=st.lists(st.floats(2.0, 40.0), min_size=3, max_size=3),
    shear=st.floats(-0.5, 0.5),
    kspacing=st.floats(0.05, 3.0),
)
def test_the_grid_is_as_dense_as_asked_and_no_denser(lengths: list[float], shear: float, kspacing: float) -> None:
    cell = np.diag(lengths)
    cell[1, 0] = shear * lengths[0]
    atoms = Atoms("Al", cell=cell, pbc=True)
    settings = EspressoSettings(pseudopotentials={"Al": "Al.UPF"}, ecutwfc_ry=20.0, kspacing=kspacing)
    found = _grid(settings, atoms) or (1, 1, 1)
    edges = 2 * np.pi * np.linalg.norm(np.linalg.inv(cell).T, axis=1)
    for edge, n in zip(edges, found, strict=True):
        assert edge / n <= kspacing * (1 + 1e-5)
        assert n == 1 or edge / (n - 1) > kspacing * (1 - 1e-5)


def test_an_output_that_breaks_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no output" in inspect(None, None).reason  # type: ignore[arg-type]
    Path("espresso.pwo").write_text(
        "     Program PWSCF v.6.7MaX starts\n     iteration #  1     ecut=\n     iteration #  2\n"
    )
    Path("espresso.err").write_text("slurmstepd: error: Detected 1 oom-kill event\n")
    found = inspect(None, None)  # type: ignore[arg-type]
    assert (found.electronic_steps, found.converged, found.code_version) == (2, None, "6.7MaX")
    assert "oom-kill" in found.reason
