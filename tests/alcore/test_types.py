"""The vocabulary: what goes in comes out, and nothing changes afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms, FixCartesian

from alcore.types import Residual, Structure


def test_atoms_come_back_as_they_went() -> None:
    atoms = molecule("H2O")
    atoms.set_cell([9.0, 8.0, 7.0])
    atoms.pbc = (True, False, True)
    atoms.set_constraint([FixAtoms([0]), FixCartesian(1, [True, False, False])])
    structure = Structure.from_atoms(atoms, charge=1.0, magnetic_moments=[0.0, 1.0, -1.0])
    back = structure.to_atoms()
    assert back.info["charge"] == 1.0
    again = Structure.from_atoms(back, charge=back.info["charge"])
    for name in ("numbers", "positions", "cell", "pbc", "fixed", "magnetic_moments"):
        np.testing.assert_array_equal(getattr(again, name), getattr(structure, name))
    assert structure.fixed.tolist() == [[True] * 3, [True, False, False], [False] * 3]


def test_arrays_are_copies_and_cannot_be_written() -> None:
    positions = np.zeros((1, 3))
    structure = Structure.from_atoms(Atoms("H", positions=positions))
    with pytest.raises(ValueError, match="read-only"):
        structure.positions[0, 0] = 1.0
    moved = structure.moved(positions)
    positions[0, 0] = 5.0
    assert moved.positions[0, 0] == 0.0


def test_moving_keeps_everything_else() -> None:
    structure = Structure.from_atoms(molecule("O2"), charge=-1.0, magnetic_moments=[1.0, 1.0])
    moved = structure.moved(structure.positions + 1.0)
    assert moved.charge == -1.0
    assert moved.magnetic_moments is not None
    np.testing.assert_array_equal(moved.positions, structure.positions + 1.0)


def test_force_of_fixed_coordinates_does_not_count() -> None:
    atoms = Atoms("H3", positions=np.eye(3))
    atoms.set_constraint([FixAtoms([0]), FixCartesian(1, [True, False, False])])
    forces = np.array([[9.0, 9.0, 9.0], [9.0, 3.0, 4.0], [1.0, 2.0, 2.0]])
    assert Structure.from_atoms(atoms).free_fmax(forces) == pytest.approx(5.0)


def test_error_is_prediction_minus_label() -> None:
    residual = Residual(
        key="k",
        path="p",
        kind="saddle",
        generation=1,
        predicted_ev=0.5,
        labelled_ev=0.3,
        sigma_committee_ev=0.0,
        sigma_posterior_ev=0.1,
        sigma_ev=0.2,
        fmax_ev_per_ang=0.0,
    )
    assert residual.error_ev == pytest.approx(0.2)
