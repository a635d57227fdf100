from __future__ import annotations

from typing import Any

import pytest
from ase import Atoms

from alcore.types import Structure
from calculators.base import CalculatorSettings, charge_contradiction, total_charge
from calculators.registry import get_calculator


class Charged(CalculatorSettings):
    charge: float = 0.0


def lithium(charge: float) -> Structure:
    return Structure.from_atoms(Atoms("Li", cell=[9, 9, 9], pbc=True), charge=charge)


@pytest.mark.parametrize(("own", "of_settings", "total"), [(0, 0, 0), (1, 0, 1), (0, -1, -1), (0.5, 0.5, 0.5)])
def test_the_charge_comes_from_one_of_the_two(own: float, of_settings: float, total: float) -> None:
    settings = Charged(charge=of_settings)
    assert total_charge(settings, lithium(own)) == total
    assert total_charge(settings, None) == of_settings
    assert charge_contradiction(settings, lithium(own)) is None


@pytest.mark.parametrize("name", ["tblite", "gpaw"])
def test_two_charges_that_differ_are_refused(name: str) -> None:
    entry = get_calculator(name)
    settings: Any = entry.settings_model(charge=1)
    said = "the structure's charge +2 e contradicts the settings' +1 e"
    assert charge_contradiction(settings, lithium(2.0)) == said
    assert entry.refuse(settings, lithium(2.0)) == said
