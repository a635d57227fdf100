"""Layered tellurides: known crystals, small cells without overlaps, and no dopant in a gap."""

from __future__ import annotations

import numpy as np
import pytest
from ase.data import atomic_numbers

from alcore.errors import InputError
from alcore.neb import closest_contact
from alcore.neighbours import neighbours
from alcore.sampling import SampleSpec
from alcore.tellurides import HOSTS, quintuple_layers, tellurides
from alcore.types import Structure

ELEMENTS = ("Cr", "Sb", "Te")
STILL = SampleSpec(rattle_ang=(1e-6, 2e-6), strain=0.0, squeezed_fraction=0.0)
TE = atomic_numbers["Te"]


@pytest.fixture(scope="module")
def drawn() -> list[Structure]:
    return tellurides(ELEMENTS, 120, np.random.default_rng(1))


def test_every_element_in_small_cells_without_overlaps(drawn: list[Structure]) -> None:
    assert {int(z) for s in drawn for z in s.numbers} == {atomic_numbers[e] for e in ELEMENTS}
    assert all(4 <= len(s) <= 45 and s.pbc.all() for s in drawn)
    contacts = [closest_contact(s) for s in drawn]
    assert min(c[2] for c in contacts if c is not None) >= SampleSpec().min_contact


@pytest.mark.parametrize(("metal", "bonds"), [("Sb", (2.98, 3.17)), ("Bi", (3.07, 3.26))])
def test_a_metal_has_three_short_and_three_long_bonds(metal: str, bonds: tuple[float, float]) -> None:
    """Measured distances of the two crystals; 15 atoms in the hexagonal cell."""
    atoms = quintuple_layers(metal, 3)
    assert len(atoms) == 15
    assert atoms.get_volume() == pytest.approx(np.sqrt(0.75) * HOSTS[metal].a_ang ** 2 * HOSTS[metal].c_ang)
    structure = Structure.from_atoms(atoms)
    first, distance = neighbours("id", structure, structure.positions, 3.4)
    for site in np.flatnonzero(structure.numbers != TE):
        assert np.sort(distance[first == site]) == pytest.approx([bonds[0]] * 3 + [bonds[1]] * 3, abs=0.03)


def test_a_dopant_is_never_among_tellurium_of_two_layers() -> None:
    """Undisturbed: where there is a host, there are no more metal atoms than its own places, so none is in a gap."""
    for structure in tellurides(ELEMENTS, 200, np.random.default_rng(2), STILL):
        n_te = int((structure.numbers == TE).sum())
        n_metal = len(structure) - n_te
        if atomic_numbers["Sb"] in structure.numbers and n_te:
            n_layers_of_metal = 2 * round((n_te + 0.4) / 3)  # of three Te, one may be missing
            assert n_metal <= n_layers_of_metal


@pytest.mark.parametrize(
    ("elements", "match"),
    [(("Sb", "Te", "Cu"), "Cu is not known here"), (("Sb",), "Te and one of"), (("Te", "Cr"), "Te and one of")],
)
def test_elements_it_cannot_build_are_named(elements: tuple[str, ...], match: str) -> None:
    with pytest.raises(InputError, match=match):
        tellurides(elements, 1, np.random.default_rng(0))


def test_the_same_seed_gives_the_same_structures() -> None:
    first, again = (tellurides(ELEMENTS, 6, np.random.default_rng(4)) for _ in range(2))
    assert all((a.positions == b.positions).all() for a, b in zip(first, again, strict=True))
