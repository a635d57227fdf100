from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from alcore.types import Structure
from calculators.checks import reject_reason
from calculators.measure import Measurement

ATOMS = bulk("NaCl", "rocksalt", a=5.64, cubic=True)
STRUCTURE = Structure.from_atoms(ATOMS)


def answer(**changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "status": "ok",
        "energy_ev": -1.0,
        "forces": np.zeros((8, 3)),
        "geometries": ((STRUCTURE.numbers, STRUCTURE.positions, STRUCTURE.cell),),
    }
    return Measurement(**values | changes)


def test_a_sound_answer_passes() -> None:
    assert reject_reason(STRUCTURE, answer()) is None


@given(
    atom=st.integers(0, 7),
    shift=st.lists(st.integers(-2, 2), min_size=3, max_size=3),
)
def test_a_shift_by_lattice_vectors_changes_nothing(atom: int, shift: list[int]) -> None:
    positions = STRUCTURE.positions.copy()
    positions[atom] += np.array(shift) @ STRUCTURE.cell
    assert reject_reason(STRUCTURE, answer(geometries=((STRUCTURE.numbers, positions, STRUCTURE.cell),))) is None


@given(
    atom=st.integers(0, 7),
    length=st.floats(2e-4, 1.0),
    direction=st.sampled_from([(1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.6, 0.0, 0.8)]),
)
def test_a_moved_atom_is_named(atom: int, length: float, direction: tuple[float, float, float]) -> None:
    positions = STRUCTURE.positions.copy()
    positions[atom] += length * np.array(direction)
    reason = reject_reason(STRUCTURE, answer(geometries=((STRUCTURE.numbers, positions, STRUCTURE.cell),)))
    assert reason is not None
    assert f"moved atom {atom} " in reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(bad: float) -> None:
    forces = np.zeros((8, 3))
    forces[3, 1] = bad
    assert "1 atoms have forces" in str(reject_reason(STRUCTURE, answer(forces=forces)))
    assert "the energy is" in str(reject_reason(STRUCTURE, answer(energy_ev=bad)))


def test_the_force_limit_is_a_norm() -> None:
    forces = np.zeros((8, 3))
    forces[5] = (30.0, 40.0, 0.1)
    assert "force of 50.0 eV/Å on atom 5" in str(reject_reason(STRUCTURE, answer(forces=forces)))
    assert reject_reason(STRUCTURE, answer(forces=forces), 51.0) is None


def test_shapes_order_and_cell() -> None:
    assert "shape (7, 3)" in str(reject_reason(STRUCTURE, answer(forces=np.zeros((7, 3)))))
    swapped = (STRUCTURE.numbers[::-1], STRUCTURE.positions, STRUCTURE.cell)
    assert "order of the atoms, first at atom 0" in str(reject_reason(STRUCTURE, answer(geometries=(swapped,))))
    strained = (STRUCTURE.numbers, STRUCTURE.positions, STRUCTURE.cell * 1.01)
    assert "changed the cell by up to 0.0564 Å" in str(reject_reason(STRUCTURE, answer(geometries=(strained,))))
    fewer = (STRUCTURE.numbers[:5], STRUCTURE.positions[:5], STRUCTURE.cell)
    assert "5 atoms instead of 8" in str(reject_reason(STRUCTURE, answer(geometries=(fewer,))))
