"""What moves a molecule as a whole: found, taken out, undone."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from alcore.rigid import is_loose, rigid_motions, superimposed, without
from alcore.types import Structure

seeds = st.integers(0, 2**32 - 1)


@given(seed=seeds, n_atoms=st.integers(3, 12))
def test_a_small_turn_and_shift_is_nothing_but_motion_as_a_whole(seed: int, n_atoms: int) -> None:
    rng = np.random.default_rng(seed)
    places = rng.standard_normal((2, n_atoms, 3))
    motions = rigid_motions(places)
    assert motions.shape == (2, 6, n_atoms, 3)
    overlaps = np.einsum("imax,ikax->imk", motions, motions)
    np.testing.assert_allclose(overlaps, np.broadcast_to(np.eye(6), (2, 6, 6)), atol=1e-9)
    turn, shift = rng.standard_normal(3), rng.standard_normal(3)
    moves = np.cross(turn, places - places.mean(axis=1, keepdims=True)) + shift
    np.testing.assert_allclose(without(motions, moves), 0.0, atol=1e-9)
    inner = without(motions, rng.standard_normal(places.shape))
    np.testing.assert_allclose(inner.sum(axis=1), 0.0, atol=1e-9)  # no shift is left
    np.testing.assert_allclose(np.cross(places, inner).sum(axis=1), 0.0, atol=1e-9)  # and no turn
    np.testing.assert_allclose(without(motions, inner), inner, atol=1e-9)


@given(seed=seeds)
def test_any_turn_and_shift_is_undone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((5, 3))
    moved = Rotation.random(random_state=rng.integers(2**31)).apply(target) + rng.standard_normal(3)
    np.testing.assert_allclose(superimposed(moved, target), target, atol=1e-6)


def test_a_mirror_image_is_not_turned_into_what_it_mirrors() -> None:
    target = np.random.default_rng(0).standard_normal((5, 3))
    assert np.abs(superimposed(target * [-1, 1, 1], target) - target).max() > 0.1


def test_a_linear_molecule_has_two_turns_and_superimposes_in_silence() -> None:
    places = molecule("CO2").positions
    motions = rigid_motions(places[None])[0]
    assert np.count_nonzero(np.abs(motions).max(axis=(1, 2)) > 0) == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(superimposed(places[:, [1, 2, 0]] + 3.0, places), places, atol=1e-6)


def test_nothing_is_taken_out_of_what_is_not_loose() -> None:
    vectors = np.ones((2, 3, 3))
    assert without(None, vectors) is vectors


@pytest.mark.parametrize(("change", "loose"), [("none", True), ("pbc", False), ("held", False), ("alone", False)])
def test_only_a_free_molecule_is_loose(change: str, loose: bool) -> None:
    atoms = Atoms("H", positions=[[0, 0, 0]]) if change == "alone" else molecule("NH3")
    if change == "pbc":
        atoms.set_cell([9, 9, 9])
        atoms.pbc = [True, False, False]
    if change == "held":
        atoms.set_constraint(FixAtoms([0]))
    assert is_loose(Structure.from_atoms(atoms)) is loose
