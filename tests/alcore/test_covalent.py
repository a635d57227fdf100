"""Force constants of bonds and angles: near those measured, and springs that a molecule at rest cannot feel."""

from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from alcore.covalent import Pairs, angle_springs, bond_strengths, near_pairs, stiffest_bond_ev_per_ang2
from alcore.types import Structure

HARMONIC_EV_PER_ANG2 = {"H2": 35.9, "N2": 143.0, "CO": 118.0, "HF": 60.0, "HCl": 32.0, "Cl2": 20.2}
"""From the fundamental frequencies (Huber and Herzberg 1979)."""


@pytest.mark.parametrize("name", HARMONIC_EV_PER_ANG2)
def test_bonds_are_about_as_stiff_as_measured(name: str) -> None:
    """A model of three numbers a row: within a factor of two over molecules that differ by seven."""
    found = stiffest_bond_ev_per_ang2(Structure.from_atoms(molecule(name)))
    assert 0.5 < found / HARMONIC_EV_PER_ANG2[name] < 2.0


@pytest.mark.parametrize("crystal", [bulk("Cu"), bulk("Al"), bulk("NaCl", "rocksalt", a=5.64), bulk("Au")])
def test_metals_and_salts_have_no_covalent_bond(crystal: Atoms) -> None:
    structure = Structure.from_atoms(crystal.repeat(2))
    assert stiffest_bond_ev_per_ang2(structure) < 3.0
    springs, stiffness = angle_springs(structure, near_pairs(structure, 1.7))
    assert len(springs.first) == len(stiffness) == 0


def test_each_pair_is_seen_from_both_sides_and_once() -> None:
    structure = Structure.from_atoms(bulk("Cu", cubic=True))
    near = near_pairs(structure, 1.2)
    assert len(near.first) == 4 * 12  # nearest neighbours
    once = near.take(near.once)
    assert len(once.first) == 4 * 6
    assert len(near.distinct().first) == len(near.first)
    assert len(once.joined(once).distinct().first) == len(once.first)
    assert len(Pairs.none().joined(once).first) == len(once.first)
    np.testing.assert_allclose(np.linalg.norm(near.arms_ang(structure), axis=1), 3.61 / np.sqrt(2), atol=1e-9)


def test_water_is_held_by_two_bonds_and_its_angle() -> None:
    structure = Structure.from_atoms(molecule("H2O"))
    springs, stiffness = angle_springs(structure, near_pairs(structure, 1.7))
    assert sorted((int(springs.first[0]), int(springs.second[0]))) == [1, 2]
    # the angle's own force constant, measured 0.76 mdyn Å/rad²: 4.7 eV/rad²
    apart = structure.positions[1] - structure.positions[2]
    arm = structure.positions[1] - structure.positions[0]
    half_angle = np.arcsin(0.5 * np.linalg.norm(apart) / np.linalg.norm(arm))
    slope = np.linalg.norm(arm) * np.cos(half_angle)  # of the distance by the angle
    assert 0.4 < stiffness[0] * slope**2 / 4.7 < 2.5


def test_a_methyl_group_is_held_against_turning() -> None:
    """Springs between hydrogens of the two ends of ethane: turning one end by a degree costs what a torsion costs."""
    atoms = molecule("C2H6")
    structure = Structure.from_atoms(atoms)
    springs, stiffness = angle_springs(structure, near_pairs(structure, 1.7))
    rest = np.linalg.norm(springs.arms_ang(structure), axis=1)
    carbons = np.flatnonzero(atoms.numbers == 6)
    end = [k for k in range(8) if atoms.get_distance(k, int(carbons[1])) < 1.2 and k != carbons[1]]
    turned = atoms.copy()
    turned.rotate(1.0, turned.positions[carbons[1]] - turned.positions[carbons[0]], center=turned.positions[carbons[1]])
    places = structure.positions.copy()
    places[end] = turned.positions[end]
    strain = np.linalg.norm(springs.arms_ang(structure.moved(places)), axis=1) - rest
    energy = 0.5 * float((stiffness * strain**2).sum())
    measured = 0.5 * 9 * 0.125 / 2 * np.radians(1.0) ** 2  # a threefold barrier of 0.125 eV
    assert 0.3 * measured < energy < 5 * measured


def test_a_bond_across_the_boundary_is_the_same_bond() -> None:
    atoms = molecule("H2O", vacuum=3.0)
    atoms.pbc = True
    whole = Structure.from_atoms(atoms)
    atoms.positions += atoms.cell.lengths() / 2
    atoms.wrap()
    across = Structure.from_atoms(atoms)
    for structure in (whole, across):
        near = near_pairs(structure, 1.3)
        assert np.sort(bond_strengths(structure, near)) == pytest.approx(
            np.sort(bond_strengths(whole, near_pairs(whole, 1.3)))
        )
    springs = [angle_springs(structure, near_pairs(structure, 1.7)) for structure in (whole, across)]
    lengths = [
        np.linalg.norm(found.arms_ang(s), axis=1) for (found, _), s in zip(springs, (whole, across), strict=True)
    ]
    np.testing.assert_allclose(lengths[0], lengths[1], atol=1e-9)
    np.testing.assert_allclose(springs[0][1], springs[1][1], rtol=1e-9)
