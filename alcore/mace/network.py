"""An elastic network between atoms that stay neighbours: what two end states say about the host before any label.

E = Σ ½ k d², over pairs whose distance is nearly the same in all end states; d is how far a pair lies outside the range
of its distances there, so the network is silent in the end states themselves. k falls as the sixth power of distance
(after Tirion, Phys. Rev. Lett. 77, 1905 (1996); Yang, Song and Jernigan, PNAS 106, 12347 (2009)). It keeps a soft host
together while nothing is known yet; the correction and the committee learn what it leaves unexplained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import covalent_radii
from ase.geometry import complete_cell

from alcore.neighbours import neighbours
from alcore.types import BoolArray, FloatArray, IntArray, Structure

STIFFNESS_EV_PER_ANG2 = 2.0
"""Of a bond as long as the sum of covalent radii: between a metal's and a covalent crystal's."""
REACH = 1.7
"""Longest pair, in sums of covalent radii; (1/1.7)⁶ is 4 % of a bond's stiffness."""
SAME_DISTANCE = 0.1
"""Largest relative change of a pair's distance between end states."""


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
        return (0.5 * positions.new_tensor(self.stiffness_ev_per_ang2) * (short + long) ** 2).sum(dim=1)


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
    first_state = ends[0]
    radii = covalent_radii[first_state.numbers]
    i, j, offsets, distance = neighbours("ijSd", first_state, first_state.positions, REACH * 2 * float(radii.max()))
    bonded = (distance < REACH * (radii[i] + radii[j])) & ((i < j) | ((i == j) & _upper(offsets)))
    i, j, shifts = i[bonded], j[bonded], offsets[bonded] @ first_state.cell
    lengths = np.array([np.linalg.norm(s.positions[j] + shifts - s.positions[i], axis=1) for s in ends])
    shortest, longest = lengths.min(axis=0), lengths.max(axis=0)
    steady = longest - shortest < SAME_DISTANCE * shortest
    stiffness = STIFFNESS_EV_PER_ANG2 * ((radii[i] + radii[j]) / longest) ** 6
    return ElasticNetwork(
        first=i[steady],
        second=j[steady],
        shifts_ang=shifts[steady],
        home_ang=np.mean([s.positions for s in ends], axis=0),  # an atom that hops half a cell must not flip
        cell=first_state.cell,
        pbc=first_state.pbc,
        shortest_ang=shortest[steady],
        longest_ang=longest[steady],
        stiffness_ev_per_ang2=np.minimum(stiffness, STIFFNESS_EV_PER_ANG2)[steady],
    )


def make_networks(ends: Sequence[Structure]) -> dict[bytes, ElasticNetwork]:
    """One network a set of atoms."""
    groups: dict[bytes, list[Structure]] = {}
    for structure in ends:
        groups.setdefault(network_key(structure), []).append(structure)
    return {key: make_network(group) for key, group in groups.items()}


def _upper(offsets: IntArray) -> BoolArray:
    """True for one of each pair of opposite lattice offsets (an atom and its own image)."""
    lead = np.array([next((x for x in row if x), 0) for row in offsets])
    return np.asarray(lead > 0)
