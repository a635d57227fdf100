"""Structures around hops: disturbed as said, never overlapping, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from alcore.neb import NebSpec, closest_contact, interpolate
from alcore.neighbours import neighbours
from alcore.sampling import (
    DefectSpec,
    SampleSpec,
    around_hops,
    around_structures,
    disturbed,
    rattled,
    squeeze,
    strained,
    swapped,
    vacated,
)
from alcore.types import EndpointPair, Structure

QUIET = SampleSpec(rattle_ang=(0.02, 0.0200001), strain=0.0, squeezed_fraction=0.0)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def crystal() -> Structure:
    return Structure.from_atoms(bulk("Cu", "fcc", a=3.61, cubic=True) * (2, 2, 1))


def _nearest(structure: Structure) -> float:
    return float(neighbours("d", structure, structure.positions, 4.0)[0].min())


@given(seed=seeds, amplitude=st.floats(0.01, 0.3))
@settings(deadline=None, max_examples=25)
def test_rattling_moves_free_coordinates_only(au_pair: EndpointPair, seed: int, amplitude: float) -> None:
    moves = rattled(au_pair.initial, amplitude, np.random.default_rng(seed)).positions - au_pair.initial.positions
    assert (moves[au_pair.initial.fixed] == 0.0).all()
    assert 0.4 * amplitude < moves[~au_pair.initial.fixed].std() < 1.8 * amplitude


@given(seed=seeds, largest=st.floats(0.001, 0.1))
@settings(deadline=None, max_examples=25)
def test_strain_keeps_fractional_places_and_its_bound(crystal: Structure, seed: int, largest: float) -> None:
    moved = strained(crystal, largest, np.random.default_rng(seed))
    assert np.allclose(moved.positions @ np.linalg.inv(moved.cell), crystal.positions @ np.linalg.inv(crystal.cell))
    strain = np.linalg.inv(crystal.cell) @ moved.cell - np.eye(3)
    assert np.allclose(strain, strain.T)
    assert 0.0 < np.abs(strain).max() <= largest * (1 + 1e-9)


def test_strain_leaves_open_directions_alone(crystal: Structure) -> None:
    slab = crystal.to_atoms()
    slab.pbc = (True, True, False)
    moved = strained(Structure.from_atoms(slab), 0.05, np.random.default_rng(0))
    assert np.allclose(moved.positions[:, 2], crystal.positions[:, 2])
    assert not np.allclose(moved.cell[:2], crystal.cell[:2])
    molecule = Structure.from_atoms(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]]))
    assert strained(molecule, 0.05, np.random.default_rng(0)) is molecule


@given(seed=seeds, fraction=st.floats(0.7, 0.95))
@settings(deadline=None, max_examples=25)
def test_one_bond_is_compressed_to_the_fraction(crystal: Structure, seed: int, fraction: float) -> None:
    moved = squeeze(crystal, fraction, np.random.default_rng(seed))
    assert (np.abs(moved.positions - crystal.positions).max(axis=1) > 1e-9).sum() == 1
    assert _nearest(moved) == pytest.approx(fraction * _nearest(crystal), rel=1e-9)


def test_a_fixed_atom_is_not_squeezed(crystal: Structure) -> None:
    atoms = crystal.to_atoms()
    still = Structure(
        numbers=crystal.numbers,
        positions=crystal.positions,
        cell=crystal.cell,
        pbc=crystal.pbc,
        fixed=np.ones((len(atoms), 3)),
    )
    assert squeeze(still, 0.8, np.random.default_rng(0)) is still


@given(seed=seeds)
@settings(deadline=None, max_examples=20)
def test_nothing_overlaps_however_hard_it_is_shaken(crystal: Structure, seed: int) -> None:
    wild = SampleSpec(rattle_ang=(0.3, 0.6), strain=0.1, squeezed_fraction=1.0, min_contact=0.75)
    contact = closest_contact(disturbed(crystal, np.random.default_rng(seed), wild))
    assert contact is None or contact[2] >= 0.75


def test_hops_are_covered_from_end_to_end(au_pair: EndpointPair) -> None:
    """Eighteen structures of one hop visit all nine images twice, close to where they were."""
    band = interpolate(au_pair, NebSpec())
    structures = around_hops([au_pair], 18, np.random.default_rng(3), QUIET)
    nearest = [int(np.linalg.norm(band - s.positions, axis=(1, 2)).argmin()) for s in structures]
    assert sorted(nearest) == sorted([*range(9), *range(9)])
    assert all((s.numbers == au_pair.initial.numbers).all() for s in structures)


def test_the_same_seed_gives_the_same_structures(au_pair: EndpointPair) -> None:
    first, again, other = (
        np.array([s.positions for s in around_hops([au_pair], 4, np.random.default_rng(seed))]) for seed in (5, 5, 6)
    )
    assert (first == again).all()
    assert not np.allclose(first, other)


def test_defects_around_structures_are_as_frequent_as_said(crystal: Structure) -> None:
    """Half miss an atom; the others keep theirs, exchanged or not."""
    alloy = crystal.to_atoms()
    alloy.symbols[:4] = "Au"
    often = DefectSpec(vacancy_fraction=0.5, swap_fraction=0.5)
    found = around_structures([Structure.from_atoms(alloy)], 60, np.random.default_rng(0), QUIET, often)
    n_missing = sum(len(s) == len(crystal) - 1 for s in found)
    assert 20 <= n_missing <= 40
    assert all(len(s) in (len(crystal), len(crystal) - 1) for s in found)
    whole = [s for s in found if len(s) == len(crystal)]
    exchanged = [(np.linalg.norm(s.positions - crystal.positions, axis=1) > 1.0).sum() for s in whole]
    assert exchanged == [2] * len(whole)


def test_fixed_atoms_have_no_defects(au_pair: EndpointPair) -> None:
    structure = au_pair.initial
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert vacated(structure, rng).fixed.sum() == structure.fixed.sum()
        moved = swapped(structure, rng).positions
        assert (moved[structure.fixed] == structure.positions[structure.fixed]).all()


def test_a_pure_crystal_has_nothing_to_exchange(crystal: Structure) -> None:
    assert swapped(crystal, np.random.default_rng(0)) is crystal
