"""Symmetry: structures that a rotation, a translation and a renumbering of like atoms carry into each other.

The reference says the same about both, so that one label serves two geometries. Only operations that map the lattice
onto itself axis by axis count, each cell vector onto plus or minus one of equal length: those leave a mesh of k-points
(Gamma-centred or shifted, with as many divisions along equal axes) and the grid of a plane-wave code as they are.
Moments are taken as scalars: collinear, without spin-orbit coupling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np
from ase.geometry import complete_cell
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress

from alcore.endpoints import SAME_PLACE_ANG
from alcore.identity import label_key
from alcore.neighbours import neighbours
from alcore.types import BoolArray, Candidate, EndpointPair, FloatArray, IntArray, Label, Structure, frozen_array

EXACT_ANG = 1e-6
"""Two geometries nearer than this are one (as ``identity`` rounds them): a label is derived within it only."""
NEARLY_ANG, ROUNDED_ANG = 0.03, 1e-4
"""End states nearer to images of each other than this are made images: if both were relaxed on their own, and if they
may not be relaxed."""
LATTICE_ANG = 1e-5
"""How far a rotated lattice vector may lie from one of the lattice: what files round to, no more."""
REACH_ANG, N_NEAREST = 5.0, 24
"""An atom's surroundings: the distances of its nearest neighbours of each element, cut here and after so many."""
MOMENT_MU_B = 1e-6
N_PROBES = 4
"""Atoms that are looked at before all are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Isometry:
    """Atom ``i`` at ``x`` goes to ``rotation @ x + translation_ang``, which is where atom ``permutation[i]`` is.

    Attributes:
        rotation: proper or improper, ``(3, 3)``.
        translation_ang: ``(3,)``.
        permutation: ``(n_atoms,)``.
        largest_shift_ang: how far an atom lies from where the operation puts it, at most.
    """

    rotation: FloatArray
    translation_ang: FloatArray
    permutation: IntArray
    largest_shift_ang: float

    def vectors(self, values: FloatArray) -> FloatArray:
        """Polar vectors (forces) of the first structure's atoms, ``(n_atoms, 3)``, as those of the second's."""
        moved = np.empty_like(values)
        moved[self.permutation] = values @ self.rotation.T
        return moved

    def scalars(self, values: FloatArray) -> FloatArray:
        """Likewise one number an atom, ``(n_atoms,)``."""
        moved = np.empty_like(values)
        moved[self.permutation] = values
        return moved

    def stress(self, voigt: FloatArray) -> FloatArray:
        """Likewise the stress in ASE's Voigt order, ``(6,)``."""
        full = self.rotation @ voigt_6_to_full_3x3_stress(voigt) @ self.rotation.T
        return np.asarray(full_3x3_to_voigt_6_stress(full))

    def image(self, first: Structure, near: FloatArray) -> FloatArray:
        """``first``'s positions carried over, each in the cell where it is next to ``near``, both ``(n_atoms, 3)``."""
        moved = self.vectors(first.positions)
        moved[self.permutation] += self.translation_ang
        return np.asarray(near + _folded(moved - near, first))


def find_isometry(
    first: Structure,
    second: Structure,
    tolerance_ang: float,
    accept: Callable[[Isometry], bool] = lambda found: True,
) -> Isometry | None:
    """An operation that carries ``first`` into ``second``, every atom to within ``tolerance_ang`` of a like one.

    Atomic numbers, constraints, charge and initial moments must be carried over too, and the cells must be the same.
    Of several operations the first that is to ``accept`` is taken, the identical rotation before all others.
    """
    partners = _partners(first, second, tolerance_ang)
    if partners is None:
        return None
    choices = partners.sum(axis=1)
    order = np.argsort(choices, kind="stable")
    anchor, probes = order[0], order[:N_PROBES]
    for rotation in _rotations(first, second, partners, tolerance_ang):
        turned = first.positions @ rotation.T
        masks = _turned_masks(first.fixed, rotation)
        if masks is None:
            continue
        for there in np.flatnonzero(partners[anchor]):
            shift = second.positions[there] - turned[anchor]
            # the anchor itself may be off, and then all others are by as much
            if _match(turned[probes] + shift, second, partners[probes], 2 * tolerance_ang) is None:
                continue
            found = _settled(turned, shift, second, partners, tolerance_ang)
            if found is not None and (masks == second.fixed[found[1]]).all():
                shift, permutation, largest = found
                isometry = Isometry(
                    rotation=frozen_array(rotation),
                    translation_ang=frozen_array(shift),
                    permutation=frozen_array(permutation, np.int64),
                    largest_shift_ang=largest,
                )
                if accept(isometry):
                    return isometry
    return None


def _settled(
    turned: FloatArray, shift: FloatArray, second: Structure, partners: BoolArray, tolerance_ang: float
) -> tuple[FloatArray, IntArray, float] | None:
    """The mean translation, the permutation and the largest shift left, if that is within the tolerance.

    Along an axis with fixed coordinates these say how far it goes: an image made by this operation leaves them where
    they are. A molecule may be turned by any angle, which the free atoms may be a little off in: there the fixed ones
    have to fit by themselves.
    """
    permutation = _match(turned + shift, second, partners, 2 * tolerance_ang)
    if permutation is None or len(set(permutation.tolist())) < len(permutation):
        return None
    off, held = _folded(second.positions[permutation] - turned - shift, second), second.fixed[permutation]
    of_held = (off * held).sum(axis=0) / np.maximum(held.sum(axis=0), 1)
    shift = shift + np.where(held.any(axis=0), of_held, off.mean(axis=0))
    left = _folded(second.positions[permutation] - turned - shift, second)
    if not second.cell.any() and np.abs(left * held).max() > EXACT_ANG:
        return None
    largest = float(np.linalg.norm(left, axis=1).max())
    return (shift, permutation, largest) if largest <= tolerance_ang else None


def _match(places: FloatArray, second: Structure, partners: BoolArray, tolerance_ang: float) -> IntArray | None:
    """The nearest possible partner of each place, or None if one has none near enough; a row of ``partners`` each."""
    matched = np.empty(len(places), dtype=np.int64)
    for k, place in enumerate(places):
        possible = np.flatnonzero(partners[k])
        distances = np.linalg.norm(_folded(second.positions[possible] - place, second), axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] > tolerance_ang:
            return None
        matched[k] = possible[nearest]
    return matched


def _folded(vectors: FloatArray, structure: Structure) -> FloatArray:
    """Vectors less the lattice vectors nearest to them; exact for those much shorter than the cell."""
    if not structure.pbc.any():
        return vectors
    cell = np.array(complete_cell(structure.cell))
    whole = np.rint(vectors @ np.linalg.inv(cell)) * structure.pbc
    return np.asarray(vectors - whole @ cell)


def _turned_masks(fixed: BoolArray, rotation: FloatArray) -> BoolArray | None:
    """Which coordinates are fixed after the rotation; None if one that is fixed does not become a coordinate."""
    partly = fixed[fixed.any(axis=1) & ~fixed.all(axis=1)]
    axes = np.abs(rotation) > 1 - 1e-6
    if partly.any() and not axes[:, partly.any(axis=0)].any(axis=0).all():
        return None
    return np.where(fixed.all(axis=1, keepdims=True), True, fixed @ axes.T)


def _partners(first: Structure, second: Structure, tolerance_ang: float) -> BoolArray | None:
    """Which atoms of ``second`` each of ``first`` could become, ``(n_atoms, n_atoms)``; None if it cannot be at all.

    Moving every atom by the tolerance changes each sorted distance by twice as much at most, and so their means.
    """
    alike = (
        np.array_equal(np.sort(first.numbers), np.sort(second.numbers))
        and np.array_equal(first.pbc, second.pbc)
        and np.abs(first.cell - second.cell).max() <= LATTICE_ANG
        and first.charge == second.charge
    )
    if not alike:
        return None
    slack = 2 * tolerance_ang + 1e-9
    here, there = _surroundings(first), _surroundings(second)
    for z in np.unique(first.numbers):
        means = here[first.numbers == z].mean(axis=0) - there[second.numbers == z].mean(axis=0)
        if np.abs(means).max() > slack:
            return None
    mine, theirs = (np.zeros(len(s)) if s.magnetic_moments is None else s.magnetic_moments for s in (first, second))
    possible = first.numbers[:, None] == second.numbers
    possible &= first.fixed.sum(axis=1)[:, None] == second.fixed.sum(axis=1)
    possible &= np.abs(mine[:, None] - theirs) <= MOMENT_MU_B
    for column in range(here.shape[1]):
        possible &= np.abs(here[:, column, None] - there[:, column]) <= slack
    return possible if possible.any(axis=1).all() and possible.any(axis=0).all() else None


@lru_cache(maxsize=256)
def _surroundings(structure: Structure) -> FloatArray:
    """Sorted distances of the nearest neighbours of each element in Å, ``(n_atoms, n_elements * N_NEAREST)``."""
    i, j, d = neighbours("ijd", structure, structure.positions, REACH_ANG)
    elements = np.unique(structure.numbers)
    found = np.full((len(structure), len(elements), N_NEAREST), REACH_ANG)
    for k, z in enumerate(elements):
        mine = structure.numbers[j] == z
        order = np.lexsort((d[mine], i[mine]))
        atoms, distances = i[mine][order], d[mine][order]
        rank = np.arange(len(atoms)) - np.searchsorted(atoms, atoms)
        near = rank < N_NEAREST
        found[atoms[near], k, rank[near]] = distances[near]
    return found.reshape(len(structure), -1)


def _rotations(first: Structure, second: Structure, partners: BoolArray, tolerance_ang: float) -> Iterator[FloatArray]:
    """Rotations that may carry the structure over, the identity first."""
    if first.pbc.any() or first.cell.any():
        yield from lattice_rotations(first)
        return
    yield np.eye(3)
    yield from _molecule_rotations(first, second, partners, tolerance_ang)


def lattice_rotations(structure: Structure) -> list[FloatArray]:
    """Rotations, proper and improper, that carry each cell vector into plus or minus one of equal length and a periodic
    direction into a periodic one, the identity first, ``(3, 3)`` each."""
    cell = np.array(complete_cell(structure.cell))
    found = []
    for order, signs in product(permutations(range(3)), product((1.0, -1.0), repeat=3)):
        if not np.array_equal(structure.pbc, structure.pbc[list(order)]):
            continue
        turned = np.array(signs)[:, None] * cell[list(order)]
        # the rotation next to the linear map: the same but for what the cell's own digits are off
        left, _, right = np.linalg.svd(np.linalg.solve(cell, turned).T)
        rotation = left @ right
        if np.abs(cell @ rotation.T - turned).max() <= LATTICE_ANG:
            found.append(rotation)
    return found


def _molecule_rotations(
    first: Structure, second: Structure, partners: BoolArray, tolerance_ang: float
) -> Iterator[FloatArray]:
    """Rotations of a molecule: two atoms, seen from the centre of all, fix one but for a mirror.

    The atoms are those with the fewest possible partners; a linear molecule is turned about the shortest way.
    """
    here, there = (s.positions - s.positions.mean(axis=0) for s in (first, second))
    order = np.argsort(partners.sum(axis=1), kind="stable")
    away = [int(k) for k in order if np.linalg.norm(here[k]) > 0.3]
    if not away:
        return
    a = away[0]
    aside = [k for k in away if np.linalg.norm(np.cross(here[a], here[k])) > 0.3 * np.linalg.norm(here[a])]
    b = aside[0] if aside else None
    for c in np.flatnonzero(partners[a]):
        if b is None:
            yield from _frames(here[a], None, there[c], None)
            continue
        for d in np.flatnonzero(partners[b]):
            gap = np.linalg.norm(here[a] - here[b]) - np.linalg.norm(there[c] - there[d])
            if c != d and abs(gap) <= 2 * tolerance_ang + 1e-9:
                yield from _frames(here[a], here[b], there[c], there[d])


def _frames(a: FloatArray, b: FloatArray | None, c: FloatArray, d: FloatArray | None) -> Iterator[FloatArray]:
    """The proper and the improper rotation that carry the plane of ``a`` and ``b`` into that of ``c`` and ``d``."""

    def frame(along: FloatArray, beside: FloatArray | None) -> FloatArray:
        x = along / np.linalg.norm(along)
        other = np.eye(3)[int(np.abs(x).argmin())] if beside is None else beside
        z = np.cross(x, other)
        z /= np.linalg.norm(z)
        return np.array([x, np.cross(z, x), z])

    before, after = frame(a, b), frame(c, d)
    for mirror in (1.0, -1.0):
        yield after.T @ np.diag([1.0, 1.0, mirror]) @ before


def derived_label(structure: Structure, known: Iterable[Label]) -> Label | None:
    """What the reference would say about ``structure``, from the first of the ``known`` labels that it is the exact
    image of; None if there is none.

    Only labels that the reference computed itself serve, and only good ones.
    """
    for label in known:
        if not label.ok or label.derived_from or label.key != label_key(label.structure, label.fingerprint):
            continue
        found = find_isometry(label.structure, structure, EXACT_ANG)
        if found is None:
            continue
        assert label.forces is not None
        moments, stress = label.magnetic_moments, label.stress
        return replace(
            label,
            key=label_key(structure, label.fingerprint),
            structure=structure,
            forces=frozen_array(found.vectors(label.forces)),
            stress=None if stress is None else frozen_array(found.stress(stress)),
            magnetic_moments=None if moments is None else frozen_array(found.scalars(moments)),
            folder="",
            seconds=0.0,
            reused=False,
            details=_origin(label, found),
        )
    return None


def _origin(label: Label, operation: Isometry) -> dict[str, Any]:
    """What a derived label says of itself: the calculator's facts stay, what belongs to one calculation goes."""
    kept = {name: label.details[name] for name in ("calculator", "code_version", "settings") if name in label.details}
    return kept | {
        "equivalent_to": label.key,
        "operation": {
            "rotation": operation.rotation.tolist(),
            "translation_ang": operation.translation_ang.tolist(),
            "permutation": operation.permutation.tolist(),
        },
    }


def first_of_its_kind(structures: Sequence[Structure]) -> list[int]:
    """For each structure the index of the first that it is an exact image of, its own where there is none."""
    leaders: list[int] = []
    for k, structure in enumerate(structures):
        same = (j for j in dict.fromkeys(leaders) if find_isometry(structures[j], structure, EXACT_ANG) is not None)
        leaders.append(next(same, k))
    return leaders


def symmetric_ends(candidates: Sequence[Candidate], pair: EndpointPair) -> tuple[tuple[Candidate, ...], str]:
    """The candidates, an end state that is nearly the image of the other one replaced by its exact image, where that is
    another place.

    The other one is the initial state among the candidates, or the end state as it stands. Given positions that may not
    be relaxed are taken for images only if no atom moves by more than rounding.

    Returns:
        the candidates, and a line for a person, "" if nothing changed.
    """
    tolerance = NEARLY_ANG if pair.relax else ROUNDED_ANG
    ends = {c.image: c for c in candidates if c.kind in ("initial", "final", "endpoint")}
    if not ends:
        return tuple(candidates), ""
    side = -1 if -1 in ends else 0
    standing = pair.initial if side else pair.final
    other = ends[0].structure if side and 0 in ends else standing
    mine = ends[side]

    def hops(found: Isometry) -> bool:
        """Whether anything but the crystal as a whole moves from the other state to its image."""
        moved = _folded(found.image(other, mine.structure.positions) - other.positions, other)
        return bool(np.linalg.norm(moved - moved.mean(axis=0), axis=1).max() > SAME_PLACE_ANG)

    found = find_isometry(other, mine.structure, tolerance, hops)
    if found is None or found.largest_shift_ang <= EXACT_ANG:
        return tuple(candidates), ""
    place = mine.structure.moved(found.image(other, mine.structure.positions))
    names = ("final", "initial") if side else ("initial", "final")
    said = (
        f"the {names[0]} state is the image of the {names[1]} one within {found.largest_shift_ang:.1g} Å "
        "and is made exactly that: one label serves both"
    )
    return tuple(replace(c, structure=place) if c is mine else c for c in candidates), said
