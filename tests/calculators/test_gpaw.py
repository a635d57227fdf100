"""GPAW for real, on cells of one to four atoms; skipped where it is not installed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given
from hypothesis import strategies as st

from alcore.errors import CalculatorError
from alcore.types import Structure
from calculators import gpaw
from calculators.attempts import prepare_worker
from calculators.contract import run_contract
from calculators.measure import Measurement
from calculators.registry import resolve

installed = pytest.mark.skipif(bool(gpaw.unavailable(None)), reason=gpaw.unavailable(None) or "")
with_d3 = pytest.mark.skipif(not gpaw.find_spec("dftd3"), reason="dftd3 is not installed (pip install dftd3)")

METAL = {"cutoff_ev": 200.0, "kpts": (2, 2, 2), "gamma": False, "smearing_ev": 1.0}
ORBITALS = {"mode": "lcao", "basis": "sz(dzp)", "smearing_ev": 0.0}


def aluminium_hydride(shift: float = 0.0) -> Structure:
    """One Al and one H, the latter off its symmetric place by ``shift`` more along x."""
    atoms = bulk("Al", a=4.05) + Atoms("H", positions=[[1.6 + shift, 2.3, 1.8]])
    return Structure.from_atoms(atoms)


def boxed(name: str, vacuum: float = 2.5, **keywords: Any) -> Structure:
    atoms = molecule(name)
    atoms.center(vacuum=vacuum)
    return Structure.from_atoms(atoms, **keywords)


def label(settings: dict[str, Any], structure: Structure, retries: int = 0) -> Measurement:
    """What a worker would answer, in the current folder."""
    resolved = resolve("gpaw", settings)
    resolved.check_available()
    resolved.check_structure(structure)
    return prepare_worker((resolved, retries))(structure)


def energy(settings: dict[str, Any], structure: Structure) -> float:
    found = label(settings, structure)
    assert found.status == "ok", found.reason
    return found.energy_ev


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@installed
@pytest.mark.slow
def test_contract_in_plane_waves() -> None:
    checks = run_contract("gpaw", METAL, aluminium_hydride())
    assert [check for check in checks if not check.passed] == []


@installed
def test_the_free_energy_is_the_one_of_the_forces() -> None:
    """At 1 eV of smearing the extrapolated energy is far from it."""
    step = 0.02
    free, extrapolated = [], []
    for shift in (-step, step):
        atoms = aluminium_hydride(shift).to_atoms()
        atoms.calc = gpaw.make(gpaw.GpawSettings(**METAL), aluminium_hydride())
        free.append(atoms.get_potential_energy(force_consistent=True))
        extrapolated.append(atoms.get_potential_energy())
    answer = label(METAL, aluminium_hydride())
    stated = answer.forces[1, 0]
    assert answer.energy_kind == "force-consistent"
    assert abs(stated) > 0.1
    assert -(free[1] - free[0]) / (2 * step) == pytest.approx(stated, abs=5e-3)
    assert abs(-(extrapolated[1] - extrapolated[0]) / (2 * step) - stated) > 0.02


@installed
def test_steps_are_counted_and_a_starved_scf_is_unconverged() -> None:
    good = label(METAL, aluminium_hydride())
    assert good.inspection.converged
    assert good.inspection.electronic_steps is not None
    assert 5 < good.inspection.electronic_steps < 40
    assert set(good.inspection.notes["paw_md5"]) == {"Al", "H"}
    assert Path("gpaw.txt").read_text().count("iter:") >= good.inspection.electronic_steps
    bad = label({**METAL, "maxiter": 2}, aluminium_hydride())
    assert (bad.status, bad.inspection.electronic_steps, bad.inspection.converged) == ("unconverged", 2, False)


@installed
def test_the_ladder_mends_a_starved_scf_without_moving_the_energy() -> None:
    best = energy(METAL, aluminium_hydride())
    answer = label({**METAL, "maxiter": 10}, aluminium_hydride(), retries=2)
    assert [attempt["status"] for attempt in answer.attempts] == ["unconverged", "ok"]
    assert answer.energy_ev == pytest.approx(best, abs=1e-4)
    assert answer.settings["mixing_beta"] == 0.02


@installed
def test_no_rung_moves_a_fact() -> None:
    for settings in (gpaw.GpawSettings(), gpaw.GpawSettings(**ORBITALS)):
        for rung in gpaw.RETRIES:
            assert gpaw.fingerprint_facts(rung.change(settings)) == gpaw.fingerprint_facts(settings)
            assert rung.change(settings) != settings


@installed
def test_another_eigensolver_ends_at_the_same_energy() -> None:
    best = energy(METAL, aluminium_hydride())
    last = gpaw.RETRIES[-1].change(gpaw.GpawSettings(**METAL)).model_dump()
    assert energy(last, aluminium_hydride()) == pytest.approx(best, abs=1e-4)


@installed
def test_charge_comes_from_the_structure_or_the_settings() -> None:
    neutral = energy(ORBITALS, boxed("H2"))
    ion = energy(ORBITALS, boxed("H2", charge=1.0))
    assert ion - neutral > 8  # eV; hydrogen is ionised at 15.4
    assert energy({**ORBITALS, "charge": 1.0}, boxed("H2")) == pytest.approx(ion, abs=1e-6)
    why = gpaw.refuse(gpaw.GpawSettings(charge=1.0), boxed("H2", charge=-1.0))
    assert why is not None
    assert "contradicts" in why


@installed
def test_moments_of_the_structure_polarise_and_come_back() -> None:
    atom, paired = boxed("H", magnetic_moments=[1.0]), boxed("H", magnetic_moments=[0.0])
    answer = label(ORBITALS, atom)
    assert answer.inspection.notes["total_moment_mu_b"] == pytest.approx(1.0, abs=1e-3)
    assert answer.magnetic_moments[0] > 0.2  # inside the augmentation sphere
    assert answer.energy_ev < energy(ORBITALS, paired) - 0.5  # eV
    refused = gpaw.refuse(gpaw.GpawSettings(spinpol=False, mode="lcao"), atom)
    assert refused is not None
    assert "spinpol" in refused


@installed
@with_d3
@pytest.mark.parametrize("dispersion", ["D3", "D3BJ"])
def test_dispersion_is_added_to_energy_forces_and_free_energy(dispersion: str) -> None:
    from dftd3.ase import DFTD3

    hot = {**ORBITALS, "smearing_ev": 2.0}
    structure = boxed("H2O")
    plain, corrected = label(hot, structure), label({**hot, "dispersion": dispersion}, structure)
    atoms = structure.to_atoms()
    atoms.calc = DFTD3(method="PBE", damping=gpaw.DAMPING[dispersion])
    assert corrected.energy_kind == "force-consistent"
    assert corrected.energy_ev - plain.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
    assert corrected.forces - plain.forces == pytest.approx(atoms.get_forces(), abs=1e-8)
    assert corrected.inspection == plain.inspection
    assert corrected.magnetic_moments is not None


@installed
@with_d3
def test_what_gpaw_or_d3_do_not_know_is_said_before_computing() -> None:
    for settings, word in (
        ({"xc": "PBEE"}, "PBEE"),
        ({"xc": "PBEsol"}, "data sets"),
        ({"mode": "lcao", "basis": "qzqp"}, "qzqp"),
    ):
        with pytest.raises(CalculatorError, match=word):
            resolve("gpaw", settings)
    why = gpaw.unavailable(gpaw.GpawSettings(xc="LDA", dispersion="D3BJ"))
    assert why is not None
    assert "no parameters for LDA" in why
    with pytest.raises(CalculatorError, match="does not know Pu"):
        resolve("gpaw", {}).check_structure(Structure.from_atoms(bulk("Pu", "fcc", a=4.6)))


@installed
def test_the_fingerprint_follows_the_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpaw as package

    pbe, lda = gpaw.GpawSettings(), gpaw.GpawSettings(xc="LDA")
    (folder,) = package.setup_paths[:1]
    for file in Path(folder).glob("Al.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(package, "setup_paths", [str(tmp_path)])
    before = gpaw.fingerprint_facts(pbe), gpaw.fingerprint_facts(lda)
    assert gpaw.elements(pbe) == {13}
    changed = tmp_path / "Al.PBE.gz"
    changed.write_bytes(changed.read_bytes() + b"\n")
    after = gpaw.fingerprint_facts(pbe), gpaw.fingerprint_facts(lda)
    assert after[0]["paw_sha256"] != before[0]["paw_sha256"]
    assert after[1] == before[1]


@installed
def test_the_fingerprint_holds_what_moves_the_energy_and_nothing_else() -> None:
    def facts(**settings: Any) -> dict[str, Any]:
        return gpaw.fingerprint_facts(gpaw.GpawSettings(**settings))

    assert facts(maxiter=7, mixing_beta=0.1, mixing_history=3, mixing_weight=2.0, eigensolver="cg") == facts()
    assert facts(mode="lcao", cutoff_ev=700.0) == facts(mode="lcao")
    assert facts(basis="sz(dzp)") == facts()
    assert facts(kpts=(1, 1, 1), kspacing=0.1) == facts(kpts=(1, 1, 1))
    moved = [
        facts(**change)
        for change in (
            {},
            {"xc": "LDA"},
            {"cutoff_ev": 401.0},
            {"smearing_ev": 0.2},
            {"kspacing": 0.2},
            {"kpts": (2, 2, 2)},
            {"gamma": False},
            {"spinpol": True},
            {"charge": 1.0},
            {"setups": {"Al": ":p,1.0"}},
            {"grid_spacing_ang": 0.15},
            {"mode": "lcao"},
            {"point_group": True},
        )
    ]
    assert all(one != other for k, one in enumerate(moved) for other in moved[:k])


@pytest.mark.parametrize(
    ("settings", "structure", "word"),
    [
        ({}, Structure.from_atoms(molecule("H2")), "three vectors"),
        ({}, boxed("H2"), "all three pbc"),
        ({"mode": "lcao", "kpts": (1, 1, 2)}, boxed("H2"), "not periodic"),
        ({"mode": "lcao"}, boxed("H2"), None),
        ({}, aluminium_hydride(), None),
    ],
)
def test_cells_that_gpaw_cannot_take_are_refused(settings: Any, structure: Structure, word: str | None) -> None:
    why = gpaw.refuse(gpaw.GpawSettings(**settings), structure)
    assert why is None if word is None else word in str(why)


@given(
    lengths=st.tuples(*[st.floats(2, 30)] * 3),
    pbc=st.tuples(*[st.booleans()] * 3),
    kspacing=st.floats(0.05, 1.0),
)
def test_kpoints_are_dense_enough_and_not_denser(lengths: Any, pbc: Any, kspacing: float) -> None:
    structure = Structure.from_atoms(Atoms("H", cell=lengths, pbc=pbc))
    size = np.array(gpaw._kpoints(gpaw.GpawSettings(kspacing=kspacing), structure)["size"])
    distance = 2 * np.pi / np.array(lengths) / size
    periodic = np.array(pbc)
    assert (size[~periodic] == 1).all()
    assert (distance[periodic] <= kspacing * (1 + 1e-5)).all()
    assert (size == 1)[periodic & (2 * np.pi / np.array(lengths) < kspacing)].all()
    one_less = size > 1
    assert (distance[one_less] * size[one_less] / (size[one_less] - 1) > kspacing * (1 - 1e-5)).all()
