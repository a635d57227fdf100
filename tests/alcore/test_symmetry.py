"""Images of a structure are found, labels follow them, and nothing is derived where the symmetry is broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from hypothesis import given
from hypothesis import strategies as st

from alcore.identity import label_key
from alcore.symmetry import (
    EXACT_ANG,
    NEARLY_ANG,
    derived_label,
    find_isometry,
    first_of_its_kind,
    lattice_rotations,
    symmetric_ends,
)
from alcore.types import Candidate, EndpointPair, FloatArray, Label, LabelKind, Structure

SAME_EV, SAME_EV_PER_ANG = 1e-6, 1e-5


def crystal() -> Structure:
    atoms = bulk("NaCl", "rocksalt", a=5.64, cubic=True) * (2, 1, 1)
    atoms.rattle(0.05, seed=3)
    return Structure.from_atoms(atoms)


def slab() -> Structure:
    atoms = fcc100("Al", size=(2, 2, 3), vacuum=5.0)
    add_adsorbate(atoms, "Au", 1.7, "hollow")
    atoms.pbc = (True, True, False)
    atoms.set_constraint(FixAtoms(mask=[a.tag > 1 for a in atoms]))
    atoms.rattle(0.05, seed=4)
    return Structure.from_atoms(atoms)


def hexagonal() -> Structure:
    atoms = fcc111("Cu", size=(3, 3, 2), vacuum=5.0, orthogonal=False)
    del atoms[12]
    atoms.rattle(0.05, seed=5)
    return Structure.from_atoms(atoms)


def ethanol() -> Structure:
    return Structure.from_atoms(molecule("CH3CH2OH"))


DECORATED = {"crystal": crystal(), "slab": slab(), "hexagonal": hexagonal(), "molecule": ethanol()}


def carried(
    structure: Structure, rotation: FloatArray, shift: FloatArray, order: np.ndarray, shake: FloatArray | float = 0.0
) -> Structure:
    """``structure`` rotated, shifted and renumbered (atom ``i`` becomes atom ``order[i]``), folded into the cell."""
    back = np.argsort(order)
    moments = structure.magnetic_moments
    places = (structure.positions @ rotation.T + shift)[back] + shake
    atoms = Atoms(numbers=structure.numbers[back], positions=places, cell=structure.cell, pbc=structure.pbc)
    if structure.pbc.any():
        atoms.wrap()
    return replace(
        structure,
        numbers=structure.numbers[back],
        positions=atoms.positions,
        fixed=structure.fixed[back],
        magnetic_moments=None if moments is None else moments[back],
    )


def some_rotation(structure: Structure, rng: np.random.Generator) -> FloatArray:
    if not structure.pbc.any():
        return np.asarray(np.linalg.qr(rng.normal(size=(3, 3)))[0])  # proper or not
    return lattice_rotations(structure)[rng.integers(len(lattice_rotations(structure)))]


def unfolded(vectors: FloatArray, structure: Structure) -> FloatArray:
    if not structure.pbc.any():
        return vectors
    fractions = np.linalg.solve(structure.cell.T, vectors.T).T
    return np.asarray((fractions - np.rint(fractions) * structure.pbc) @ structure.cell)


@pytest.mark.parametrize("kind", DECORATED)
@given(seed=st.integers(0, 10**6))
def test_what_was_carried_over_is_found_again(kind: str, seed: int) -> None:
    """Any operation of the lattice, any shift, any numbering; what is found carries every atom to its partner."""
    structure, rng = DECORATED[kind], np.random.default_rng(seed)
    other = carried(
        structure, some_rotation(structure, rng), rng.normal(size=3) * 3, rng.permutation(len(structure.numbers))
    )
    found = find_isometry(structure, other, EXACT_ANG)
    assert found is not None
    assert found.largest_shift_ang < EXACT_ANG
    np.testing.assert_array_equal(other.numbers[found.permutation], structure.numbers)
    np.testing.assert_array_equal(other.fixed[found.permutation], structure.fixed)
    there = structure.positions @ found.rotation.T + found.translation_ang
    assert np.abs(unfolded(there - other.positions[found.permutation], structure)).max() < EXACT_ANG
    np.testing.assert_allclose(found.image(structure, other.positions), other.positions, atol=EXACT_ANG)


@pytest.mark.parametrize("kind", DECORATED)
@given(seed=st.integers(0, 10**6), tolerance=st.sampled_from([EXACT_ANG, 1e-3, NEARLY_ANG]))
def test_one_atom_moved_by_more_than_the_tolerance_is_another_structure(kind: str, seed: int, tolerance: float) -> None:
    """The others follow it by the n-th part at most, so that twice the tolerance is too far."""
    structure, rng = DECORATED[kind], np.random.default_rng(seed)
    shake = np.zeros((len(structure), 3))
    direction = rng.normal(size=3)
    shake[rng.integers(len(structure))] = 2.5 * tolerance * direction / np.linalg.norm(direction)
    order = rng.permutation(len(structure.numbers))
    other = carried(structure, np.eye(3), rng.normal(size=3), order, shake)
    assert find_isometry(structure, other, tolerance) is None
    assert find_isometry(structure, other, 4 * tolerance) is not None


def test_another_cell_charge_element_or_constraint_is_another_structure() -> None:
    here = slab()
    numbers, cell, fixed = here.numbers.copy(), here.cell.copy(), here.fixed.copy()
    numbers[0], cell[2, 2], fixed[0] = 28, cell[2, 2] + 1e-3, ~fixed[0]
    for change in ({"numbers": numbers}, {"cell": cell}, {"fixed": fixed}, {"charge": 1.0}):
        assert find_isometry(here, replace(here, **change), 0.01) is None  # type: ignore[arg-type]
    assert find_isometry(here, replace(here), 0.01) is not None


def test_axes_of_unequal_length_and_open_directions_are_not_mixed() -> None:
    cube = Structure.from_atoms(bulk("Cu", cubic=True))
    assert len(lattice_rotations(cube)) == 48
    assert len(lattice_rotations(replace(cube, pbc=(True, True, False)))) == 16  # type: ignore[arg-type]
    assert len(lattice_rotations(Structure.from_atoms(bulk("Cu", cubic=True) * (2, 1, 1)))) == 16
    # of the hexagonal plane's twelve operations those that carry each axis into plus or minus an axis
    assert len(lattice_rotations(hexagonal())) == 8


def test_a_coordinate_that_is_fixed_turns_with_the_structure() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    first = Structure.from_atoms(atoms)
    quarter = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    other = carried(first, quarter, np.zeros(3), np.arange(4))
    along_x, along_y = first.fixed.copy(), first.fixed.copy()
    along_x[0, 0], along_y[0, 1] = True, True
    assert find_isometry(replace(first, fixed=along_x), replace(other, fixed=along_y), EXACT_ANG) is not None
    assert find_isometry(replace(first, fixed=along_x), replace(other, fixed=along_x), EXACT_ANG) is None


def test_hundreds_of_like_atoms_are_searched(emt: Any) -> None:
    """A vacancy among 107: twelve ways to take, and the forces that follow are the ones there are."""
    first, last = vacancy(3)
    found = find_isometry(first, last, EXACT_ANG)
    assert found is not None
    _, (here, there) = emt.evaluate(first, np.array([first.positions, last.positions]))
    np.testing.assert_allclose(found.vectors(here), there, atol=SAME_EV_PER_ANG)


def vacancy(n: int, shake_ang: float = 0.0) -> tuple[Structure, Structure]:
    """End states of a vacancy hop in ``n`` cubed cubic cells of copper, not relaxed; all atoms moved the same way."""
    crystal = bulk("Cu", "fcc", a=3.61, cubic=True) * (n, n, n)
    step = crystal.positions[int(np.argsort(crystal.get_distances(0, range(len(crystal)), mic=True))[1])]
    hop = crystal.get_distance(0, int(np.abs(crystal.positions - step).sum(axis=1).argmin()), mic=True, vector=True)
    first = crystal[1:]
    moved = int(np.abs(first.positions - step).sum(axis=1).argmin())
    last = first.copy()
    last.positions[moved] -= hop
    last.rattle(shake_ang, seed=2)
    return Structure.from_atoms(first), Structure.from_atoms(last)


def labelled(structure: Structure, label_of: Callable[..., Label], **more: Any) -> Label:
    return replace(label_of(structure), **more)


def test_a_derived_label_is_what_the_reference_says(label_of: Callable[..., Label]) -> None:
    """Energy, forces and stress against EMT itself, at an image by a rotation, a shift and a renumbering."""
    atoms = bulk("Cu", cubic=True) * (2, 2, 1)
    atoms.rattle(0.1, seed=6)
    atoms.numbers[3] = 28
    atoms.set_initial_magnetic_moments(np.where(atoms.numbers == 28, 0.6, 0.0))
    here = Structure.from_atoms(atoms)
    rng = np.random.default_rng(8)
    there = carried(here, lattice_rotations(here)[9], rng.normal(size=3), rng.permutation(len(here)))
    known, real = (labelled(s, label_of, stress=stress_of(s)) for s in (here, there))
    known = replace(known, magnetic_moments=np.arange(len(here)) * 0.01, folder="/somewhere", seconds=9.0)
    derived = derived_label(there, [known])
    assert derived is not None
    assert derived.energy_ev == pytest.approx(real.energy_ev, abs=SAME_EV)
    np.testing.assert_allclose(derived.forces, real.forces, atol=SAME_EV_PER_ANG)
    np.testing.assert_allclose(derived.stress, real.stress, atol=1e-9)
    assert derived.magnetic_moments is not None
    assert derived.magnetic_moments[derived.details["operation"]["permutation"][5]] == pytest.approx(0.05)
    assert (derived.key, derived.derived_from) == (label_key(there, known.fingerprint), known.key)
    assert (derived.folder, derived.seconds, derived.reused) == ("", 0.0, False)


def stress_of(structure: Structure) -> FloatArray:
    atoms = structure.to_atoms()
    atoms.calc = EMT()
    return np.asarray(atoms.get_stress())


def test_only_a_good_label_that_was_computed_gives_others(label_of: Callable[..., Label]) -> None:
    first, last = vacancy(2)
    known = label_of(first)
    assert derived_label(last, [known]) is not None
    for useless in (
        replace(known, status="rejected"),
        replace(known, key="of unknown origin"),
        replace(known, details={"equivalent_to": "another"}),
    ):
        assert derived_label(last, [useless]) is None


def test_moments_that_break_the_symmetry_forbid_it() -> None:
    """Up and down in layers along x: the hop along x changes sublattices, the one within a layer does not."""
    crystal = bulk("Fe", "fcc", a=3.6, cubic=True) * (2, 2, 2)
    up = np.where(np.rint(crystal.positions[:, 0] / 1.8) % 2 == 0, 2.0, -2.0)

    def hop(step: tuple[float, float, float]) -> tuple[Structure, Structure]:
        there = int(np.linalg.norm(crystal.positions - 1.8 * np.array(step), axis=1).argmin())
        order = [k for k in range(len(crystal)) if k not in (0, there)]
        places = crystal.positions[[*order, there]], crystal.positions[[*order, 0]]
        # the atom that hops keeps its moment
        moments = up[[*order, there]]
        one, two = (Atoms("Fe31", positions=p, cell=crystal.cell, pbc=True) for p in places)
        return Structure.from_atoms(one, magnetic_moments=moments), Structure.from_atoms(two, magnetic_moments=moments)

    for step, within in (((0, 1, 1), True), ((1, 1, 0), False)):
        first, last = hop(step)
        bare = replace(first, magnetic_moments=None), replace(last, magnetic_moments=None)
        assert find_isometry(*bare, EXACT_ANG) is not None
        assert (find_isometry(first, last, EXACT_ANG) is not None) is within


def test_the_first_of_each_kind_is_asked() -> None:
    first, last = vacancy(2)
    other = first.moved(first.positions + np.eye(31, 3) * 0.01)
    assert first_of_its_kind([first, other, last, other]) == [0, 1, 0, 1]


def ends(pair: EndpointPair, kind: LabelKind = "endpoint") -> list[Candidate]:
    both = ((0, pair.initial), (-1, pair.final))
    return [Candidate(path=pair.name, kind=kind, image=image, structure=s) for image, s in both]


def test_end_states_that_are_nearly_images_become_images() -> None:
    first, last = vacancy(2, shake_ang=0.005)
    pair = EndpointPair(name="hop", initial=first, final=last)
    (start, end), said = symmetric_ends(ends(pair), pair)
    assert start.structure is first
    assert find_isometry(first, end.structure, EXACT_ANG) is not None
    assert 0 < np.abs(end.structure.positions - last.positions).max() < NEARLY_ANG
    assert "one label serves both" in said
    # one that stands and one that is asked again: the latter follows
    (end,), _ = symmetric_ends(ends(pair)[1:], pair)
    assert find_isometry(first, end.structure, EXACT_ANG) is not None
    (start,), _ = symmetric_ends(ends(pair)[:1], pair)
    assert find_isometry(last, start.structure, EXACT_ANG) is not None


def test_given_positions_are_not_moved() -> None:
    first, last = vacancy(2, shake_ang=0.005)
    pair = EndpointPair(name="hop", initial=first, final=last, relax=False)
    candidates, said = symmetric_ends(ends(pair, "initial"), pair)
    assert [c.structure for c in candidates] == [first, last]
    assert said == ""


def test_nothing_follows_where_the_surroundings_differ(au_pair: EndpointPair, label_of: Callable[..., Label]) -> None:
    """The same hop beside a substituted atom of the middle layer, or a moment there that does not come along."""
    numbers, moments = au_pair.initial.numbers.copy(), np.zeros(len(au_pair.initial))
    numbers[4], moments[4] = 79, 1.0
    assert derived_label(au_pair.final, [label_of(au_pair.initial)]) is not None
    for change in ({"numbers": numbers}, {"magnetic_moments": moments}):
        first, last = (replace(s, **change) for s in (au_pair.initial, au_pair.final))  # type: ignore[arg-type]
        assert derived_label(last, [label_of(first)]) is None
        assert find_isometry(first, last, NEARLY_ANG) is None


def test_open_and_periodic_directions_are_told_apart() -> None:
    """Across 10 Å of vacuum no atom sees the difference, but a calculation does."""
    here = slab()
    assert find_isometry(here, replace(here, pbc=(True, True, True)), 0.01) is None  # type: ignore[arg-type]


def test_fixed_atoms_stay_where_they_are(au_pair: EndpointPair) -> None:
    """The free ones of the final state are all off to one side: the image is not shifted half the way after them."""
    off = np.where(au_pair.final.fixed, 0.0, 0.01 + np.random.default_rng(0).normal(scale=0.008, size=(1, 3)))
    pair = replace(au_pair, final=au_pair.final.moved(au_pair.final.positions + off))
    (start, end), said = symmetric_ends(ends(pair), pair)
    assert "one label serves both" in said
    fixed = pair.initial.fixed
    assert np.abs((end.structure.positions - pair.final.positions)[fixed]).max() < EXACT_ANG
    assert find_isometry(start.structure, end.structure, EXACT_ANG) is not None


@pytest.mark.parametrize("noise_ang", [0.0, 0.005])
def test_fixed_atoms_of_a_molecule_fit_exactly_or_not_at_all(noise_ang: float) -> None:
    """A molecule can be turned by any angle, and the free atoms must not turn those that are fixed."""
    here = ethanol()
    fixed = here.fixed.copy()
    fixed[:3] = True
    here, rng = replace(here, fixed=fixed), np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    shake = np.where(fixed, 0.0, rng.normal(scale=noise_ang, size=fixed.shape))
    other = carried(here, rotation, np.ones(3), np.arange(len(here)), shake)
    found = find_isometry(here, other, NEARLY_ANG)
    assert (found is None) is (noise_ang > 0)
    if found is not None:
        assert np.abs((found.image(here, other.positions) - other.positions)[fixed]).max() < EXACT_ANG


def test_a_hop_is_not_made_the_state_it_began_in() -> None:
    """Two atoms in a cell: half of a small step each way is within the tolerance of no step at all."""
    atoms = Atoms("CO", positions=[[0, 0, 0], [2.0, 0.3, 0.2]], cell=[4, 5, 6], pbc=True)
    first = Structure.from_atoms(atoms)
    atoms.positions[1, 0] += 0.058
    pair = EndpointPair(name="hop", initial=first, final=Structure.from_atoms(atoms))
    assert find_isometry(pair.initial, pair.final, NEARLY_ANG) is not None
    (_, end), said = symmetric_ends(ends(pair), pair)
    assert said == ""
    np.testing.assert_array_equal(end.structure.positions, pair.final.positions)
