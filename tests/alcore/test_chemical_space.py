"""Structures over a chemical space: every element and every kind of site, at their own volumes, never overlapping."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from ase.data import chemical_symbols

from alcore.chemical_space import CHARGES, atomic_volume_ang3, metals, pairs, salts
from alcore.errors import InputError
from alcore.neb import closest_contact
from alcore.neighbours import neighbours
from alcore.sampling import SampleSpec
from alcore.types import Structure

METALS = ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt")
SALTS = ("Li", "Na", "K", "Mg", "F", "Cl", "O")
STILL = SampleSpec(rattle_ang=(1e-6, 2e-6), strain=0.0, squeezed_fraction=0.0)


@pytest.fixture(scope="module")
def of_metals() -> list[Structure]:
    return metals(METALS, 150, np.random.default_rng(1))


@pytest.fixture(scope="module")
def of_salts() -> list[Structure]:
    return salts(SALTS, 80, np.random.default_rng(1))


def _has_vacuum(structure: Structure) -> bool:
    heights = np.sort(structure.positions[:, 2])
    return bool(structure.cell[2, 2] - heights[-1] + heights[0] > 7.0)


def _charge(structure: Structure) -> int:
    return sum(CHARGES[chemical_symbols[z]] for z in structure.numbers)


@pytest.mark.parametrize(("elements", "fixture"), [(METALS, "of_metals"), (SALTS, "of_salts")])
def test_every_element_in_small_cells_without_overlaps(
    elements: tuple[str, ...], fixture: str, request: pytest.FixtureRequest
) -> None:
    structures = request.getfixturevalue(fixture)
    seen = {chemical_symbols[z] for s in structures for z in s.numbers}
    assert seen == set(elements)
    assert all(6 <= len(s) <= 65 and s.pbc.all() for s in structures)
    contacts = [closest_contact(s) for s in structures]
    assert min(c[2] for c in contacts if c is not None) >= SampleSpec().min_contact
    assert len({(*s.numbers.tolist(), *s.positions.ravel().tolist()) for s in structures}) == len(structures)


def test_bulk_and_surfaces_pure_and_alloyed(of_metals: list[Structure]) -> None:
    kinds = Counter((_has_vacuum(s), len(set(s.numbers.tolist())) > 1) for s in of_metals)
    assert all(kinds[vacuum, alloy] >= 10 for vacuum in (True, False) for alloy in (True, False))


def test_a_pure_metal_is_at_its_own_volume_and_packed() -> None:
    """Cu, undisturbed: perfect crystals at 11.8 Å³ an atom, defects around them by an atom or two; most nearest
    neighbours are those of fcc or hcp (2.553 Å) or of bcc at that volume (2.482 Å)."""
    structures = metals(("Cu",), 60, np.random.default_rng(2), STILL)
    own = atomic_volume_ang3("Cu")
    atoms_too_many = [
        len(s) - abs(np.linalg.det(s.cell)) / own for s in structures if not _has_vacuum(s)
    ]  # -2, -1, 0 or 1
    assert np.allclose(atoms_too_many, np.round(atoms_too_many), atol=0.01)
    assert set(np.round(atoms_too_many).astype(int)) == {-2, -1, 0, 1}
    nearest = np.array([neighbours("d", s, s.positions, 3.5)[0].min() for s in structures])
    packed = np.isclose(nearest, 2.553, atol=0.005) | np.isclose(nearest, 2.482, atol=0.005)
    assert packed.mean() > 0.6


def test_adatoms_touch_the_surface_and_nothing_floats(of_metals: list[Structure]) -> None:
    for structure in of_metals:
        counts = np.bincount(neighbours("i", structure, structure.positions, 4.0)[0], minlength=len(structure))
        assert counts.min() >= 1


def test_salts_are_neutral_but_for_one_missing_or_added_ion(of_salts: list[Structure]) -> None:
    charges = Counter(_charge(s) for s in of_salts)
    assert charges[0] >= 20
    assert set(charges) <= {-2, -1, 0, 1, 2}
    assert len(charges) > 2


def test_neighbours_in_a_salt_have_opposite_charges() -> None:
    for structure in salts(SALTS, 40, np.random.default_rng(4), STILL):
        if _charge(structure):
            continue  # an ion is missing, or one too many stands between the others
        first, second, distance = neighbours("ijd", structure, structure.positions, 3.6)
        charge = np.array([CHARGES[chemical_symbols[z]] for z in structure.numbers])
        nearest = [second[first == k][distance[first == k].argmin()] for k in range(len(structure))]
        assert (charge * charge[nearest] < 0).all()


@pytest.mark.parametrize(
    ("make", "elements", "match"),
    [
        (metals, ("Cu", "H"), "H has no simple crystal"),
        (salts, ("Na", "Cu"), "Cu is no known ion"),
        (salts, ("Na", "Li"), "cations and anions are both needed"),
    ],
)
def test_elements_it_cannot_build_are_named(make: object, elements: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        make(elements, 1, np.random.default_rng(0))  # type: ignore[operator]


def test_the_same_seed_gives_the_same_structures() -> None:
    for make, elements in ((metals, METALS), (salts, SALTS)):
        first, again = (make(elements, 5, np.random.default_rng(8)) for _ in range(2))
        assert all((a.positions == b.positions).all() for a, b in zip(first, again, strict=True))


def test_pairs_are_of_every_two_elements_within_reach() -> None:
    found = pairs(("Cu", "Au", "Li"), 2, np.random.default_rng(0), (0.3, 0.5))
    kinds = Counter(tuple(sorted(s.numbers.tolist())) for s in found)
    assert kinds == dict.fromkeys([(3, 3), (29, 29), (79, 79), (3, 29), (3, 79), (29, 79)], 2)
    contacts = [closest_contact(s) for s in found]
    assert all(c is not None and 0.3 <= c[2] <= 0.5 for c in contacts)
