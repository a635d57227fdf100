from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk, molecule

from alcore.types import Structure
from calculators.base import ResolvedCalculator
from calculators.contract import ContractCheck, example_structure, run_contract


def rattled(atoms: Any, seed: int = 1) -> Structure:
    atoms.rattle(0.05, seed=seed)
    return Structure.from_atoms(atoms)


def copper_aluminium() -> Structure:
    atoms = bulk("Cu", cubic=True)
    atoms.numbers[0] = 13
    return rattled(atoms)


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
    assert_kept(run_contract(name, settings, structure))


def test_contract_of_a_mace_file(tiny_mace: Path) -> None:
    assert_kept(run_contract("mace", {"model": str(tiny_mace)}, copper_aluminium()))


def assert_kept(checks: list[ContractCheck]) -> None:
    assert [check for check in checks if not check.passed] == []
    assert {"forces are -dE/dx", "permutation", "translation", "nothing left running"} <= {c.check for c in checks}


def test_the_energy_of_the_forces_is_taken(misbehaving: Callable[..., ResolvedCalculator]) -> None:
    """A factory whose plain energy is 1 eV off its free energy keeps the contract through the latter."""
    assert_kept(run_contract("ase", misbehaving("two_energies").settings.model_dump(), copper_aluminium()))


def test_forces_that_are_no_gradient_break_the_contract(misbehaving: Callable[..., ResolvedCalculator]) -> None:
    checks = run_contract("ase", misbehaving("inconsistent").settings.model_dump(), copper_aluminium())
    broken = {check.check for check in checks if not check.passed}
    assert broken == {"forces are -dE/dx", "energy is force-consistent"}


def test_a_failing_calculator_is_one_check_with_its_reason(misbehaving: Callable[..., ResolvedCalculator]) -> None:
    checks = run_contract("ase", misbehaving("raises").settings.model_dump(), copper_aluminium())
    assert checks == [ContractCheck("runs", False, "crashed: RuntimeError: no licence")]


@pytest.mark.parametrize("elements", [None, {8, 12, 29}, {13, 29}, {47, 79}])
def test_the_example_uses_known_elements(elements: set[int] | None) -> None:
    structure = example_structure(elements)
    assert len(structure) in (4, 8)
    assert elements is None or set(structure.numbers.tolist()) <= elements
