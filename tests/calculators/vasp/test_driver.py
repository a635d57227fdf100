from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from hypothesis import given, settings, strategies

from calculators.vasp.driver import VaspInputs, vasp_calculator
from calculators.vasp.potcars import parse_potcar


@settings(max_examples=50, deadline=None)
@given(
    numbers=strategies.lists(strategies.sampled_from([13, 29, 8]), min_size=1, max_size=12),
    seed=strategies.integers(0, 99),
)
def test_the_sort_order_is_undone(numbers: list[int], seed: int, potcar_text: Callable[[str], str]) -> None:
    """What VASP computes in POSCAR's order comes back in the asked one, whatever order POTCAR has."""
    from ase import Atoms

    elements = ["Al", "Cu", "O"]
    random.Random(seed).shuffle(elements)
    atoms = Atoms(numbers, positions=np.random.default_rng(seed).random((len(numbers), 3)), cell=np.eye(3), pbc=True)
    there = [element for element in elements if element in atoms.get_chemical_symbols()]
    potcars = [parse_potcar(potcar_text(element).encode(), "here") for element in there]
    calculator = vasp_calculator(VaspInputs(incar={}, kpoints=None, potcars=potcars), "true")
    calculator.initialize(atoms)
    poscar = atoms[calculator.sort]
    assert list(dict.fromkeys(poscar.get_chemical_symbols())) == there
    assert sum(count for _, count in calculator.symbol_count) == len(atoms)
    np.testing.assert_array_equal(poscar.positions[calculator.resort], atoms.positions)
