"""An elastic network between atoms that stay neighbours: what two end states say about the host before any label.

E = Σ ½ k d², over pairs whose distance is nearly the same in all end states; d is how far a pair lies outside the range
of its distances there, so the network is silent in the end states themselves. k falls as the sixth power of distance
(after Tirion, Phys. Rev. Lett. 77, 1905 (1996); Yang, Song and Jernigan, PNAS 106, 12347 (2009)), or is that of a
covalent bond where this is stiffer. Where such bonds open and close, the sum of their orders is kept for each atom
(Johnston and Parr, J. Am. Chem. Soc. 85, 2544 (1963)). It keeps a host together while nothing is known yet; the
correction and the committee learn what it leaves unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import covalent_radii
from ase.geometry import complete_cell

from alcore.covalent import (
    LEAST_BOND,
    STRETCH_EV_PER_ANG2,
    Pairs,
    angle_springs,
    bond_strength,
    bond_strengths,
    near_pairs,
)
from alcore.types import BoolArray, FloatArray, IntArray, Structure

STIFFNESS_EV_PER_ANG2 = 2.0
"""Of a bond as long as the sum of covalent radii: between a metal's and a covalent crystal's."""
REACH = 1.7
"""Longest pair, in sums of covalent radii; (1/1.7)⁶ is 4 % of a bond's stiffness."""
SAME_DISTANCE = 0.1
"""Largest relative change of a pair's distance between end states."""
ORDER_LENGTH_ANG = 0.26
"""Over which the order of a bond falls by a factor e (Pauling, J. Am. Chem. Soc. 69, 542 (1947))."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ElasticNetwork:
    """Springs of one set of atoms.

    Attributes:
        first, second: atoms of each pair, ``(n_pairs,)``.
        shifts_ang: lattice vector added to the second atom, ``(n_pairs, 3)``.
        home_ang: mean positions of the end states, by which wrapped atoms are unwrapped, ``(n_atoms, 3)``.
        cell, pbc: of that state.
        shortest_ang, longest_ang: each pair's range of distances over the end states, ``(n_pairs,)``.
        stiffness_ev_per_ang2: k of each pair.
        opened: pairs that are a covalent bond in some end states alone, as indices of ``first``, ``(n_opened,)``.
        least_valence, most_valence: range over the end states of the sum of the orders of the opened bonds of each
            atom, ``(n_atoms,)``.
        valence_stiffness_ev: of that sum, ``(n_atoms,)``.
    """

    first: IntArray
    second: IntArray
    shifts_ang: FloatArray
    home_ang: FloatArray
    cell: FloatArray
    pbc: BoolArray
    shortest_ang: FloatArray
    longest_ang: FloatArray
    stiffness_ev_per_ang2: FloatArray
    opened: IntArray
    least_valence: FloatArray
    most_valence: FloatArray
    valence_stiffness_ev: FloatArray

    def energies(self, positions: torch.Tensor) -> torch.Tensor:
        """Energies in eV ``(n_images,)`` of ``positions`` ``(n_images, n_atoms, 3)`` in Å, differentiable."""
        if not len(self.first):
            return positions.sum(dim=(1, 2)) * 0.0
        first, second = torch.as_tensor(self.first), torch.as_tensor(self.second)
        wraps = lattice_wraps(positions.detach().cpu().numpy(), self.home_ang, self.cell, self.pbc)
        unwrapped = positions - positions.new_tensor(wraps)
        gap = unwrapped[:, second] + positions.new_tensor(self.shifts_ang) - unwrapped[:, first]
        length = torch.linalg.vector_norm(gap, dim=2)
        short = torch.relu(positions.new_tensor(self.shortest_ang) - length)
        long = torch.relu(length - positions.new_tensor(self.longest_ang))
        energies = (0.5 * positions.new_tensor(self.stiffness_ev_per_ang2) * (short + long) ** 2).sum(dim=1)
        return energies + self._valence_energies(length) if len(self.opened) else energies

    def _valence_energies(self, length: torch.Tensor) -> torch.Tensor:
        opened = torch.as_tensor(self.opened)
        order = torch.exp((length.new_tensor(self.shortest_ang[self.opened]) - length[:, opened]) / ORDER_LENGTH_ANG)
        valence = length.new_zeros((len(length), len(self.home_ang)))
        for atoms in (self.first, self.second):
            valence = valence.index_add(1, torch.as_tensor(atoms[self.opened], device=length.device), order)
        lacking = torch.relu(length.new_tensor(self.least_valence) - valence)
        beyond = torch.relu(valence - length.new_tensor(self.most_valence))
        return (0.5 * length.new_tensor(self.valence_stiffness_ev) * (lacking + beyond) ** 2).sum(dim=1)


def lattice_wraps(
    positions: FloatArray, home_ang: FloatArray, cell: FloatArray, pbc: BoolArray, *, beyond: float = 0.5
) -> FloatArray:
    """Lattice vectors by which atoms ``(n_images, n_atoms, 3)`` lie elsewhere than around ``home_ang``
    ``(n_atoms, 3)``, Å, same shape as ``positions``; ``beyond``: fractions of a lattice vector that are near enough."""
    if not pbc.any():
        return np.zeros_like(positions)
    fractional = (positions - home_ang) @ np.linalg.inv(complete_cell(cell))
    wraps = np.sign(fractional) * np.ceil(np.abs(fractional) - beyond)
    return np.asarray(np.where(pbc, wraps, 0.0) @ cell)


def network_key(structure: Structure) -> bytes:
    """Structures with equal keys share a network: the same atoms in the same order and cell, equally charged."""
    cell = np.round(structure.cell, 3) + 0.0  # -0.0 is 0.0
    return structure.numbers.tobytes() + cell.tobytes() + np.float64(structure.charge).tobytes()


def make_network(ends: Sequence[Structure]) -> ElasticNetwork:
    """The network of end states that share a key (of one hop, or of several in the same host), all unwrapped alike."""
    radii, template = covalent_radii[ends[0].numbers], ends[0]
    near = near_pairs(ends[0], REACH)
    bonded = near.take(near.once)
    angles, angle_stiffness = angle_springs(ends[0], near)
    reach = (radii[bonded.first] + radii[bonded.second]) / _range(ends, bonded)[1]
    stiffness = np.maximum(
        STIFFNESS_EV_PER_ANG2 * np.minimum(reach**6, 1.0), STRETCH_EV_PER_ANG2 * bond_strengths(ends[0], bonded)
    )
    pairs, stiffness = bonded.joined(angles), np.concatenate([stiffness, angle_stiffness])
    shortest, longest = _range(ends, pairs)
    steady = longest - shortest < SAME_DISTANCE * shortest
    pairs, stiffness, shortest, longest = pairs.take(steady), stiffness[steady], shortest[steady], longest[steady]
    n_steady = len(shortest)
    opened, least, most = _opened_bonds(ends)
    valences = np.array([_valences(state, opened, least) for state in ends])
    firmest = np.zeros(len(template))
    for atoms in (opened.first, opened.second):
        np.maximum.at(firmest, atoms, STRETCH_EV_PER_ANG2 * bond_strength(template, opened, least))
    nothing, everything = np.zeros(len(least)), np.full(len(least), np.inf)
    pairs = pairs.joined(opened, opened)
    return ElasticNetwork(
        first=pairs.first,
        second=pairs.second,
        shifts_ang=pairs.offsets @ template.cell,
        home_ang=np.mean([s.positions for s in ends], axis=0),  # an atom that hops half a cell must not flip
        cell=template.cell,
        pbc=template.pbc,
        shortest_ang=np.concatenate([shortest, least, nothing]),
        longest_ang=np.concatenate([longest, everything, most]),
        stiffness_ev_per_ang2=np.concatenate(
            [
                stiffness,
                STRETCH_EV_PER_ANG2 * bond_strength(template, opened, least),
                STRETCH_EV_PER_ANG2 * bond_strength(template, opened, most),
            ]
        ),
        opened=n_steady + np.arange(len(least)),
        least_valence=valences.min(axis=0),
        most_valence=valences.max(axis=0),
        valence_stiffness_ev=firmest * ORDER_LENGTH_ANG**2,
    )


def _valences(state: Structure, bonds: Pairs, shortest_ang: FloatArray) -> FloatArray:
    """Sum of the orders of each atom's bonds, ``(n_atoms,)``."""
    order = np.exp((shortest_ang - np.linalg.norm(bonds.arms_ang(state), axis=1)) / ORDER_LENGTH_ANG)
    both = np.concatenate([bonds.first, bonds.second])
    return np.bincount(both, np.concatenate([order, order]), minlength=len(state)).astype(np.float64)


def _opened_bonds(ends: Sequence[Structure]) -> tuple[Pairs, FloatArray, FloatArray]:
    """Covalent bonds of some end states that are open in others, and their shortest and longest distance in Å: they may
    take any distance between, and are as stiff as it beyond."""
    found = Pairs.none()
    for state in ends:
        near = near_pairs(state, REACH)
        found = found.joined(near.take(near.once & (bond_strengths(state, near) > LEAST_BOND)))
    found = found.distinct()
    shortest, longest = _range(ends, found)
    opened = longest - shortest >= SAME_DISTANCE * shortest
    return found.take(opened), shortest[opened], longest[opened]


def _range(ends: Sequence[Structure], pairs: Pairs) -> tuple[FloatArray, FloatArray]:
    """Shortest and longest distance of each pair over the end states, Å."""
    lengths = np.array([np.linalg.norm(pairs.arms_ang(state), axis=1) for state in ends])
    return lengths.min(axis=0), lengths.max(axis=0)


def make_networks(ends: Sequence[Structure]) -> dict[bytes, ElasticNetwork]:
    """One network a set of atoms."""
    groups: dict[bytes, list[Structure]] = {}
    for structure in ends:
        groups.setdefault(network_key(structure), []).append(structure)
    return {key: make_network(group) for key, group in groups.items()}
