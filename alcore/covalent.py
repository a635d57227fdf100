"""How stiff covalent bonds, their angles and dihedrals are before any label: a model Hessian for all elements.

Strengths and force constants are those of Lindh, Bernhardsson, Karlström and Malmqvist, Chem. Phys. Lett. 241, 423
(1995). Angles and dihedrals are held by springs between their ends, with the force constant carried over from the angle
to that distance; where the distance says little of the angle (a stretched one, a planar dihedral) there is no spring.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii
from ase.units import Bohr, Hartree

from alcore.neighbours import neighbours
from alcore.types import BoolArray, FloatArray, IntArray, Structure

STRETCH_EV_PER_ANG2 = 0.45 * Hartree / Bohr**2
BEND_EV, TORSION_EV = 0.15 * Hartree, 0.005 * Hartree
"""Per squared radian."""
DECAY_PER_ANG2 = np.array([[1.0, 0.3949, 0.3949], [0.3949, 0.28, 0.28], [0.3949, 0.28, 0.28]]) / Bohr**2
LENGTH_ANG = np.array([[1.35, 2.10, 2.53], [2.10, 2.87, 3.40], [2.53, 3.40, 3.40]]) * Bohr
"""Table 1 there, by the rows of the two atoms; from the third row on all are alike."""
LEAST_BOND = 0.3
"""Strength of a bond whose angles are held: pairs of a metal or of a salt are weaker."""
SAME_BOND = 0.3
"""Share of the sum of covalent radii by which a bond may be longer than that."""
LEAST_SINE = 0.5
"""Of an angle or a dihedral that is held."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Pairs of atoms.

    Attributes:
        first, second: the atoms, ``(n_pairs,)``.
        offsets: of the second, in lattice vectors, ``(n_pairs, 3)``.
    """

    first: IntArray
    second: IntArray
    offsets: IntArray

    @classmethod
    def none(cls) -> Pairs:
        """Of nothing."""
        return cls(first=np.zeros(0, int), second=np.zeros(0, int), offsets=np.zeros((0, 3), int))

    @property
    def once(self) -> BoolArray:
        """True for one of the two sides from which each pair is seen."""
        lead = np.array([next((x for x in row if x), 0) for row in self.offsets.tolist()])
        return np.asarray((self.first < self.second) | ((self.first == self.second) & (lead > 0)))

    def distinct(self) -> Pairs:
        """Each of them once."""
        rows = np.column_stack([self.first, self.second, self.offsets])
        return self.take(np.unique(rows, axis=0, return_index=True)[1])

    def take(self, which: IntArray | BoolArray) -> Pairs:
        """Some of them: indices or a mask."""
        return Pairs(first=self.first[which], second=self.second[which], offsets=self.offsets[which])

    def joined(self, *others: Pairs) -> Pairs:
        """These and others."""
        all_of_them = (self, *others)
        return Pairs(
            first=np.concatenate([pairs.first for pairs in all_of_them]),
            second=np.concatenate([pairs.second for pairs in all_of_them]),
            offsets=np.concatenate([pairs.offsets for pairs in all_of_them]),
        )

    def arms_ang(self, structure: Structure) -> FloatArray:
        """From the first to the second, Å, ``(n_pairs, 3)``."""
        places = structure.positions
        return np.asarray(places[self.second] + self.offsets @ structure.cell - places[self.first])


def near_pairs(structure: Structure, reach: float) -> Pairs:
    """Pairs nearer than ``reach`` times the sum of their covalent radii, each from both of its sides."""
    radii = covalent_radii[structure.numbers]
    i, j, offsets, distance = neighbours("ijSd", structure, structure.positions, reach * 2 * float(radii.max()))
    return Pairs(first=i, second=j, offsets=offsets).take(distance < reach * (radii[i] + radii[j]))


def bond_strengths(structure: Structure, pairs: Pairs) -> FloatArray:
    """ρ of each pair, ``(n_pairs,)``: about 1 for a bond, 0 far away (eq. 3)."""
    return bond_strength(structure, pairs, np.linalg.norm(pairs.arms_ang(structure), axis=1))


def bond_strength(structure: Structure, pairs: Pairs, distance_ang: FloatArray) -> FloatArray:
    """The same at other distances, ``(n_pairs,)``."""
    rows = np.digitize(structure.numbers, [3, 11])
    mine = rows[pairs.first], rows[pairs.second]
    return np.asarray(np.exp(DECAY_PER_ANG2[mine] * (LENGTH_ANG[mine] ** 2 - distance_ang**2)))


def stiffest_bond_ev_per_ang2(structure: Structure) -> float:
    """Force constant of the stiffest bond there is; 0 for none."""
    strengths = bond_strengths(structure, near_pairs(structure, 1.0 + SAME_BOND))
    return STRETCH_EV_PER_ANG2 * float(strengths.max(initial=0.0))


def angle_springs(structure: Structure, pairs: Pairs) -> tuple[Pairs, FloatArray]:
    """Springs between the ends of angles and of dihedrals, and their stiffness in eV/Å².

    Args:
        structure: the atoms.
        pairs: near ones, each from both of its sides.
    """
    strength = bond_strengths(structure, pairs)
    bonds, strength = pairs.take(strength > LEAST_BOND), strength[strength > LEAST_BOND]
    of_atom: dict[int, list[int]] = {}
    for bond, atom in enumerate(bonds.first.tolist()):
        of_atom.setdefault(atom, []).append(bond)
    bends = _bends(structure, bonds, strength, of_atom)
    turns = _turns(structure, bonds, strength, of_atom)
    return bends[0].joined(turns[0]), np.concatenate([bends[1], turns[1]])


def _bends(
    structure: Structure, bonds: Pairs, strength: FloatArray, of_atom: dict[int, list[int]]
) -> tuple[Pairs, FloatArray]:
    a, b = _columns((two for mine in of_atom.values() for two in itertools.combinations(mine, 2)), 2)
    arm = bonds.arms_ang(structure)
    area = np.linalg.norm(np.cross(arm[a], arm[b]), axis=1)
    slope = area / np.linalg.norm(arm[a] - arm[b], axis=1)  # of the distance, Å per radian
    held = area > LEAST_SINE * np.linalg.norm(arm[a], axis=1) * np.linalg.norm(arm[b], axis=1)
    a, b, slope = a[held], b[held], slope[held]
    ends = Pairs(first=bonds.second[a], second=bonds.second[b], offsets=bonds.offsets[b] - bonds.offsets[a])
    return ends, BEND_EV * strength[a] * strength[b] / slope**2


def _turns(
    structure: Structure, bonds: Pairs, strength: FloatArray, of_atom: dict[int, list[int]]
) -> tuple[Pairs, FloatArray]:
    a, axis, b = _columns(
        (
            (a, axis, b)
            for axis, (i, j) in enumerate(zip(bonds.first.tolist(), bonds.second.tolist(), strict=True))
            if i <= j
            for a in of_atom[i]
            for b in of_atom[j]
        ),
        3,
    )
    arm = bonds.arms_ang(structure)
    along = arm[axis] / np.linalg.norm(arm[axis], axis=1, keepdims=True)
    off_a, off_b = np.cross(arm[a], along), np.cross(arm[b], along)
    far_a, far_b = np.linalg.norm(off_a, axis=1), np.linalg.norm(off_b, axis=1)
    area = np.linalg.norm(np.cross(off_a, off_b), axis=1)  # ends' distances from the axis, times the sine
    bent = (far_a > LEAST_SINE * np.linalg.norm(arm[a], axis=1)) & (far_b > LEAST_SINE * np.linalg.norm(arm[b], axis=1))
    held = bent & (area > LEAST_SINE * far_a * far_b)
    a, axis, b = a[held], axis[held], b[held]
    slope = area[held] / np.linalg.norm(arm[axis] + arm[b] - arm[a], axis=1)
    ends = Pairs(
        first=bonds.second[a], second=bonds.second[b], offsets=bonds.offsets[axis] + bonds.offsets[b] - bonds.offsets[a]
    )
    return ends, TORSION_EV * strength[a] * strength[axis] * strength[b] / slope**2


def _columns(rows: Iterable[tuple[int, ...]], n: int) -> IntArray:
    return np.array(list(rows), dtype=np.int64).reshape(-1, n).T
