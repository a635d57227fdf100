"""Two atoms brought closer than any bond: where a surface must repel them, and what a training is held to there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols, covalent_radii

from alcore.neb import Guards
from alcore.neighbours import neighbours
from alcore.types import FloatArray, IntArray, Structure

Evaluate = Callable[[Structure, FloatArray], tuple[FloatArray, FloatArray]]
"""As ``alcore.protocols.Potential.evaluate``."""
REACH_ANG = 5.0
"""Farthest pair that is brought together: about the cutoff, so that the model sees both atoms all along."""
BONDED, PRESSED, NO_BOND = 1.3, 0.85, 0.7
"""Sums of covalent radii. Atoms nearer than the first are bonded already: what they gain by relaxing (EMT: 0.8 eV
around an atom squeezed in) they have gained before the second. Others may form a bond, but none is shorter than the
third (N2: 0.77)."""
CLOSEST, CLEAR = 0.45, Guards().min_distance_fraction
"""Sums of covalent radii: to which two atoms are brought, well inside what ends every relaxation; and that which any
third atom must be away."""
WALL_EV = 10.0
"""Above the start; what lies behind so much is out of reach."""
N_POINTS = 14
"""Of an approach."""
LEAST_EV_PER_ANG = 0.5
"""Repulsion of two atoms closer than any bond, where a surface knows of less."""
MAX_TRIES = 50
"""Pairs of the same elements that are looked at for one whose way is clear."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Approach:
    """One atom on its way to another.

    Attributes:
        name: of the two elements.
        template: the atoms.
        positions: Å, ``(n_points, n_atoms, 3)``, the first as they were.
        distance_ang: of the two, falling, ``(n_points,)``.
        bond_ang: sum of their covalent radii.
    """

    name: str
    template: Structure
    positions: FloatArray
    distance_ang: FloatArray
    bond_ang: float

    def pressed(self, energies_ev: FloatArray) -> IntArray:
        """Where the two are closer than any bond, and not behind a wall."""
        wall = np.flatnonzero(energies_ev > energies_ev[0] + WALL_EV)
        reached = np.arange(len(energies_ev)) <= (wall[0] if len(wall) else len(energies_ev))
        within = PRESSED if self.distance_ang[0] < BONDED * self.bond_ang else NO_BOND
        return np.flatnonzero(reached & (self.distance_ang < within * self.bond_ang))


def approaches(structure: Structure) -> list[Approach]:
    """For every two elements the closest two atoms of theirs of which one may move to the other with no third in the
    way: distances from the present one to ``CLOSEST``, by equal factors."""
    radii, numbers = covalent_radii[structure.numbers], structure.numbers
    i, j, vector, distance = neighbours("ijDd", structure, structure.positions, REACH_ANG)
    loose = structure.fixed.sum(axis=1) < 3
    usable = (i != j) & loose[i] & (distance > CLOSEST * (radii[i] + radii[j]))
    kinds: dict[tuple[int, int], list[int]] = {}
    for k in sorted(np.flatnonzero(usable).tolist(), key=lambda k: float(distance[k])):
        kinds.setdefault((min(numbers[i[k]], numbers[j[k]]), max(numbers[i[k]], numbers[j[k]])), []).append(k)
    found = []
    for kind, places in kinds.items():
        for k in places[:MAX_TRIES]:
            bond = float(radii[i[k]] + radii[j[k]])
            lengths = np.geomspace(distance[k], CLOSEST * bond, N_POINTS)
            steps = (1.0 - lengths / distance[k])[:, None] * vector[k]
            third = (i == i[k]) & (j != i[k]) & (np.arange(len(i)) != k)  # its own copies move with it
            gaps = np.linalg.norm(vector[third] - steps[:, None], axis=2) / (radii[i[k]] + radii[j[third]])
            if gaps.size and gaps.min() < CLEAR:
                continue
            positions = np.repeat(structure.positions[None], N_POINTS, axis=0)
            positions[:, i[k]] += steps
            name = "-".join(chemical_symbols[z] for z in kind)
            found.append(
                Approach(name=name, template=structure, positions=positions, distance_ang=lengths, bond_ang=bond)
            )
            break
    return found


def ways_from(structures: Sequence[Structure]) -> list[Approach]:
    """Those of the first structure that has one for each two elements."""
    ways: dict[str, Approach] = {}
    for structure in structures:
        for way in approaches(structure):
            ways.setdefault(way.name, way)
    return list(ways.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Anchor:
    """A place where one atom is too close to another.

    Attributes:
        structure: the atoms there.
        away: unit vector on that atom, away from the other, zero on all others, ``(n_atoms, 3)``.
        repulsion_ev_per_ang: force along it, at least.
    """

    structure: Structure
    away: FloatArray
    repulsion_ev_per_ang: float


def anchors(structures: Sequence[Structure], evaluate: Evaluate) -> list[Anchor]:
    """Places behind any bond, each with the repulsion that ``evaluate`` has there, and ``LEAST_EV_PER_ANG`` at least: a
    training that is held to this cannot undo what no label tells of."""
    found = []
    for way in ways_from(structures):
        energies, forces = evaluate(way.template, way.positions)
        away = way.positions[0] - way.positions[-1]
        away /= np.linalg.norm(away)
        repulsion = np.sum(forces * away, axis=(1, 2))
        for k in way.pressed(energies):
            if np.isfinite(repulsion[k]):
                place = way.template.moved(way.positions[k])
                found.append(
                    Anchor(structure=place, away=away, repulsion_ev_per_ang=max(float(repulsion[k]), LEAST_EV_PER_ANG))
                )
    return found
