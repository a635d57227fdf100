from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from ase.build import bulk, molecule

from alcore.errors import CalculatorError
from alcore.types import Structure
from calculators.base import ResolvedCalculator
from calculators.contract import ContractCheck, Tolerances, example_structure, run_contract

ALWAYS = {
    "same input, same key",
    "runs",
    "geometry and numbers",
    "forces are -dE/dx",
    "permutation",
    "translation",
    "a timeout ends the whole process tree",
    "nothing is left running",
}
WITH_A_CHARGE = {"a charge is not ignored", "initial moments are not ignored"}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where contract tests run; the folder of one that could not go on is kept there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def rattled(atoms: Any, seed: int = 1) -> Structure:
    atoms.rattle(0.05, seed=seed)
    return Structure.from_atoms(atoms)


def copper_aluminium() -> Structure:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[0] = 13
    return rattled(atoms)


def broken(checks: list[ContractCheck]) -> set[str]:
    return {check.check for check in checks if not check.passed}


def assert_kept(checks: list[ContractCheck]) -> None:
    assert [check for check in checks if not check.passed] == []
    assert {check.check for check in checks} >= ALWAYS


CASES = {
    "emt": ("emt", {}, None),
    "tblite molecule": ("tblite", {"method": "GFN2-xTB"}, rattled(molecule("CH3OH"))),
    "tblite periodic": ("tblite", {"method": "GFN1-xTB"}, rattled(bulk("LiF", "rocksalt", a=4.03, cubic=True))),
    "tblite hot electrons": ("tblite", {"electronic_temperature_k": 20000.0}, rattled(molecule("CH3OH"))),
    "chgnet": ("chgnet", {}, None),
    "ase factory": ("ase", {"factory": "ase.calculators.emt:EMT", "settings": {}}, copper_aluminium()),
}


@pytest.mark.parametrize("case", CASES)
def test_contract(case: str) -> None:
    name, settings, structure = CASES[case]
    checks = run_contract(name, settings, structure)
    assert_kept(checks)
    expected = {"tblite": WITH_A_CHARGE, "ase": {"a charge is not ignored"}}  # EMT has no parameter charge: refused
    assert {check.check for check in checks} & WITH_A_CHARGE == expected.get(name, set())


@pytest.mark.slow
def test_contract_of_a_mace_file(tiny_mace: Path) -> None:
    assert_kept(run_contract("mace", {"model": str(tiny_mace)}, copper_aluminium()))


@pytest.mark.usefixtures("entries")
def test_every_promise_is_checked_and_heard_of_in_order(scratch: Path) -> None:
    heard: list[ContractCheck] = []
    checks = run_contract("HONEST", structure=copper_aluminium(), on_check=heard.append)
    assert heard == checks
    assert_kept(checks)
    more = {"retries do not move the energy", "electronic steps are counted"} | WITH_A_CHARGE
    more |= {"a failure is unconverged", "a failure is crashed"}
    assert {check.check for check in checks} == ALWAYS | more
    said = {check.check: check.detail for check in checks}
    assert said["electronic steps are counted"] == "7 steps, version 1.0.2"
    assert "limit of 1 steps" in said["a failure is unconverged"]
    assert "+1 e moves the energy by 7.000 eV" in said["a charge is not ignored"]
    assert list(scratch.iterdir()) == []


BROKEN = {
    "SCALED": {"forces are -dE/dx"},
    "MOVES": {"geometry and numbers"},
    "RAISES": {"runs"},
    "ORDERED": {"permutation"},
    "EGG_BOX": {"translation"},
    "DICE": {"forces are -dE/dx", "permutation", "translation", "same input, same answer"},
    "CHARGE_IGNORED": {"a charge is not ignored"},
    "CHARGE_CRASHES": {"a charge is not ignored"},
    "CHARGE_REFUSED": set[str](),
    "MOMENTS_IGNORED": {"initial moments are not ignored"},
    "CHILD_LEFT": {"nothing is left running"},
    "DAEMON_LEFT": {"nothing is left running", "a timeout ends the whole process tree"},
    "DETACHED": {"a timeout ends the whole process tree"},
    "KEY_MOVES": {"same input, same key", "retries do not move the energy"},
    "KEY_ODD": {"same input, same key"},
    "RUNG_MOVES": {"retries do not move the energy"},
    "RUNG_RAISES": {"retries do not move the energy"},
    "NO_STEPS": {"electronic steps are counted"},
    "HIDES_UNCONVERGED": {"a failure is unconverged"},
    "CRASH_IS_OK": {"a failure is crashed"},
    "SABOTAGE_RAISES": {"a failure is crashed"},
}


@pytest.mark.usefixtures("entries")
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_promise_is_found_and_only_that(name: str) -> None:
    checks = run_contract(name, structure=copper_aluminium())
    assert broken(checks) == BROKEN[name]
    assert all("\n" not in check.detail for check in checks)
    asleep = [p for p in psutil.process_iter(["cmdline", "status"]) if p.info["cmdline"] == ["sleep", "314.159"]]
    assert asleep == [], "what a calculator left running is ended"


@pytest.mark.usefixtures("entries")
def test_what_a_broken_promise_says() -> None:
    (run,) = [check for check in run_contract("RAISES", structure=copper_aluminium()) if not check.passed]
    assert run.detail.startswith("crashed: RuntimeError: no licence; its files: ")
    assert "no licence" in (Path(run.detail.rpartition(" ")[2]) / "error.txt").read_text()
    (rung,) = [c for c in run_contract("RUNG_MOVES", structure=copper_aluminium()) if not c.passed]
    assert rung.detail == "'lower cutoff': it would change cutoff_ev"


@pytest.mark.usefixtures("entries")
def test_tolerances_make_room_for_an_egg_box() -> None:
    wide = Tolerances(energy_ev=2.0, force_ev_per_ang=0.5)
    assert_kept(run_contract("EGG_BOX", structure=copper_aluminium(), tolerances=wide))


def test_a_structure_at_rest_proves_nothing() -> None:
    checks = run_contract("emt", structure=Structure.from_atoms(bulk("Cu", cubic=True)))
    assert broken(checks) == {"forces are -dE/dx"}
    assert "away from its minimum" in next(check.detail for check in checks if not check.passed)


def test_a_structure_it_cannot_take_is_refused_first() -> None:
    with pytest.raises(CalculatorError, match="emt does not know Mg"):
        run_contract("emt", structure=rattled(bulk("MgO", "rocksalt", a=4.21, cubic=True)))


def test_the_energy_of_the_forces_is_taken(misbehaving: Callable[..., ResolvedCalculator]) -> None:
    """A factory whose plain energy is 1 eV off its free energy keeps the contract through the latter."""
    assert_kept(run_contract("ase", misbehaving("two_energies").settings.model_dump(), copper_aluminium()))


@pytest.mark.parametrize("elements", [None, {8, 12, 29}, {13, 29}, {47, 79}])
def test_the_example_uses_known_elements(elements: set[int] | None) -> None:
    structure = example_structure(elements)
    assert len(structure) in (4, 8)
    assert elements is None or set(structure.numbers.tolist()) <= elements
