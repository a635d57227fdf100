"""Structures to pre-train on, around the hops or any structures of a user's system; ``alcore.chemical_space`` has those
for any system.

None is relaxed, and all are drawn from the generator that is passed in. A teacher that is cheap labels them; the
reference is never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii

from alcore.neb import NebSpec, closest_contact, interpolate
from alcore.neighbours import neighbours
from alcore.types import EndpointPair, Structure


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """How far structures are moved from where they were built; each range is (lowest, highest).

    Attributes:
        rattle_ang: standard deviation of each free coordinate, drawn evenly in its logarithm.
        strain: largest component of the strain of a periodic cell.
        squeezed_fraction: share of structures with one bond compressed, which teaches repulsion.
        squeeze: to which fraction of its length.
        min_contact: of the sum of covalent radii; closer atoms are drawn anew.
    """

    rattle_ang: tuple[float, float] = (0.02, 0.2)
    strain: float = 0.03
    squeezed_fraction: float = 0.15
    squeeze: tuple[float, float] = (0.75, 0.95)
    min_contact: float = 0.6


@dataclass(frozen=True, kw_only=True)
class DefectSpec:
    """How often a structure is given a defect before it is moved.

    Attributes:
        vacancy_fraction: share of structures that miss a free atom.
        swap_fraction: share in which two free atoms of different elements change places.
    """

    vacancy_fraction: float = 0.15
    swap_fraction: float = 0.1


def around_hops(
    pairs: Sequence[EndpointPair], count: int, rng: np.random.Generator, spec: SampleSpec | None = None
) -> list[Structure]:
    """``count`` structures of the hops' own atoms: end states and images of the interpolated bands in turn, disturbed.

    Args:
        pairs: the hops; their end states are unwrapped (``endpoints.make_pair``).
        count: how many.
        rng: what is drawn, is drawn from it.
        spec: how far from the bands.
    """
    bands = [(pair.initial, interpolate(pair, NebSpec())) for pair in pairs]
    places = [start.moved(positions) for start, band in bands for positions in band]
    order = rng.permutation(len(places))
    return [disturbed(places[order[k % len(places)]], rng, spec) for k in range(count)]


def around_structures(
    structures: Sequence[Structure],
    count: int,
    rng: np.random.Generator,
    spec: SampleSpec | None = None,
    defects: DefectSpec | None = None,
) -> list[Structure]:
    """``count`` structures around these, each as often as the others: some with a vacancy or with two atoms of
    different elements exchanged, all disturbed.

    Args:
        structures: of the user's system; none of them need be relaxed.
        count: how many.
        rng: what is drawn, is drawn from it.
        spec: how far atoms and cells are moved.
        defects: how often there is a defect.
    """
    limits, often = spec or SampleSpec(), defects or DefectSpec()
    order = rng.permutation(len(structures))
    found = []
    for k in range(count):
        structure = structures[order[k % len(structures)]]
        drawn = rng.random()
        if drawn < often.vacancy_fraction:
            structure = vacated(structure, rng)
        elif drawn < often.vacancy_fraction + often.swap_fraction:
            structure = swapped(structure, rng)
        found.append(disturbed(structure, rng, limits))
    return found


def vacated(structure: Structure, rng: np.random.Generator) -> Structure:
    """Without one of its free atoms; the same where that would leave fewer than two."""
    free = np.flatnonzero(~structure.fixed.any(axis=1))
    if not len(free) or len(structure) < 3:
        return structure
    return structure.take(np.delete(np.arange(len(structure)), rng.choice(free)))


def swapped(structure: Structure, rng: np.random.Generator) -> Structure:
    """Two free atoms of different elements in each other's place; the same where all are of one element."""
    free = np.flatnonzero(~structure.fixed.any(axis=1))
    if len(set(structure.numbers[free].tolist())) < 2:
        return structure
    first = int(rng.choice(free))
    second = int(rng.choice(free[structure.numbers[free] != structure.numbers[first]]))
    positions = np.array(structure.positions)
    positions[[first, second]] = positions[[second, first]]
    return structure.moved(positions)


def disturbed(structure: Structure, rng: np.random.Generator, spec: SampleSpec | None = None) -> Structure:
    """The structure strained, rattled and now and then with one bond compressed; fixed coordinates only follow the
    strain. Where atoms would overlap, a smaller disturbance is drawn."""
    limits = spec or SampleSpec()
    squeezed = rng.random() < limits.squeezed_fraction
    for scale in (1.0, 0.7, 0.5, 0.3, 0.1):
        moved = rattled(strained(structure, scale * limits.strain, rng), scale * _amplitude(limits, rng), rng)
        if squeezed:
            moved = squeeze(moved, rng.uniform(*limits.squeeze), rng)
        contact = closest_contact(moved)
        if contact is None or contact[2] >= limits.min_contact:
            return moved
    return structure


def strained(structure: Structure, largest: float, rng: np.random.Generator) -> Structure:
    """Cell and atoms under a random symmetric strain, one half of it isotropic; the same where no axis is periodic."""
    if not structure.pbc.any():
        return structure
    shape = rng.uniform(-largest, largest, size=(3, 3))
    strain = 0.25 * (shape + shape.T) + 0.5 * rng.uniform(-largest, largest) * np.eye(3)
    strain[~structure.pbc] = strain[:, ~structure.pbc] = 0.0
    deformation = np.eye(3) + strain
    return Structure(
        numbers=structure.numbers,
        positions=structure.positions @ deformation,
        cell=structure.cell @ deformation,
        pbc=structure.pbc,
        fixed=structure.fixed,
        charge=structure.charge,
        magnetic_moments=structure.magnetic_moments,
    )


def rattled(structure: Structure, amplitude_ang: float, rng: np.random.Generator) -> Structure:
    """Free coordinates moved by normal noise of this standard deviation."""
    noise = rng.normal(scale=amplitude_ang, size=structure.positions.shape)
    return structure.moved(structure.positions + np.where(structure.fixed, 0.0, noise))


def squeeze(structure: Structure, fraction: float, rng: np.random.Generator) -> Structure:
    """A random free atom moved towards its nearest neighbour until their distance is ``fraction`` of what it was."""
    free = np.flatnonzero(~structure.fixed.any(axis=1))
    reach = 4.0 * float(covalent_radii[structure.numbers].max())
    i, d, vector = neighbours("idD", structure, structure.positions, reach)
    free = np.intersect1d(free, i)
    if not len(free):
        return structure
    atom = int(rng.choice(free))
    mine = np.flatnonzero(i == atom)
    nearest = mine[int(d[mine].argmin())]
    positions = np.array(structure.positions)
    positions[atom] += (1.0 - fraction) * vector[nearest]
    return structure.moved(positions)


def _amplitude(spec: SampleSpec, rng: np.random.Generator) -> float:
    low, high = np.log(spec.rattle_ang)
    return float(np.exp(rng.uniform(low, high)))
