"""Bad pairs are refused with the atom's name; good ones take the shortest way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms, FixBondLengths
from ase.io import write

from alcore.endpoints import make_pair, read_atoms, read_band, relax_end_state
from alcore.errors import EndpointError, InputError
from alcore.types import EndpointPair, FloatArray, Structure

HOP_ANG = 2.5527
"""Nearest-neighbour distance of copper at a = 3.61 Å."""


@pytest.fixture
def vacancy() -> tuple[Atoms, Atoms]:
    """31 copper atoms; atom 0 hops into the vacancy at the origin."""
    crystal = bulk("Cu", "fcc", a=3.61, cubic=True) * (2, 2, 2)
    del crystal[0]
    final = crystal.copy()
    final.positions[0] = 0.0
    return crystal, final


def _composition(initial: Atoms, final: Atoms) -> None:
    final.numbers[3] = 47


def _order(initial: Atoms, final: Atoms) -> None:
    initial.numbers[3] = final.numbers[5] = 47


def _cell(initial: Atoms, final: Atoms) -> None:
    final.cell[1, 1] += 0.05


def _pbc(initial: Atoms, final: Atoms) -> None:
    final.pbc = (True, True, False)


def _constraints(initial: Atoms, final: Atoms) -> None:
    initial.set_constraint(FixAtoms([7]))


def _other_constraint(initial: Atoms, final: Atoms) -> None:
    initial.set_constraint(FixBondLengths([[0, 1]]))


def _overlap(initial: Atoms, final: Atoms) -> None:
    final.positions[4] = final.positions[9] + 0.3


def _coincide(initial: Atoms, final: Atoms) -> None:
    initial.positions[4] = initial.positions[9]


def _identical(initial: Atoms, final: Atoms) -> None:
    final.positions[:] = initial.positions


def _identical_but_for_a_lattice_vector(initial: Atoms, final: Atoms) -> None:
    final.positions[:] = initial.positions
    final.positions[3] += initial.cell[0]


def _fixed_moves(initial: Atoms, final: Atoms) -> None:
    for atoms in (initial, final):
        atoms.set_constraint(FixAtoms([0, 12]))


def _all_fixed(initial: Atoms, final: Atoms) -> None:
    final.positions[0] = initial.positions[0] + 0.06
    for atoms in (initial, final):
        atoms.set_constraint(FixAtoms(range(len(atoms))))


def _three_swapped(initial: Atoms, final: Atoms) -> None:
    final.positions[[10, 11, 12]] = final.positions[[11, 12, 10]]


def _two_swapped(initial: Atoms, final: Atoms) -> None:
    final.positions[[10, 13]] = final.positions[[13, 10]]


BAD = {
    "composition": (_composition, "composition"),
    "order": (_order, "atom 3 is Ag and then Cu"),
    "cell": (_cell, "cell vector b by 0.050"),
    "pbc": (_pbc, "periodicity"),
    "constraints": (_constraints, "atom 7 is fixed in one"),
    "unsupported constraint": (_other_constraint, "FixBondLengths"),
    "overlap": (_overlap, "atoms 4 (Cu) and 9 (Cu) of the final state are 0.5"),
    "atoms at one place": (_coincide, "atoms 4 (Cu) and 9 (Cu) of the initial state are 0.00"),
    "identical": (_identical, "same structure"),
    "identical up to a lattice vector": (_identical_but_for_a_lattice_vector, "same structure"),
    "fixed atom moves": (_fixed_moves, "atom 0 is fixed but moves"),
    "all fixed": (_all_fixed, "every atom is fixed"),
    "three like atoms swapped": (_three_swapped, "10, 11, 12"),
    "two like atoms swapped": (_two_swapped, "10, 13"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pairs_are_refused_by_name(case: str, vacancy: tuple[Atoms, Atoms]) -> None:
    spoil, says = BAD[case]
    spoil(*vacancy)
    with pytest.raises(EndpointError) as caught:
        make_pair("hop", *vacancy)
    text = str(caught.value)
    assert says in text
    assert text.startswith("hop")
    assert caught.value.mend
    assert "\n" not in text


def test_a_good_pair_takes_the_shortest_way(vacancy: tuple[Atoms, Atoms]) -> None:
    initial, final = vacancy
    final.positions[0] += initial.cell[0] - initial.cell[2]  # the same place in another cell
    final.positions[5] -= initial.cell[1]
    pair = make_pair("hop", initial, final)
    moved = np.linalg.norm(pair.final.positions - pair.initial.positions, axis=1)
    assert moved[0] == pytest.approx(HOP_ANG, abs=1e-3)
    np.testing.assert_allclose(moved[1:], 0.0, atol=1e-9)


def test_a_molecule_is_turned_and_shifted_but_not_wrapped() -> None:
    initial = molecule("H2O")
    final = initial.copy()
    final.positions[1] += [0.0, 0.0, 5.0]
    distances = final.get_all_distances()
    final.rotate(70, (1, 2, 3))
    final.positions += 4.0
    pair = make_pair("hop", initial, final)
    np.testing.assert_allclose(pair.final.to_atoms().get_all_distances(), distances, atol=1e-9)
    np.testing.assert_allclose(pair.final.positions.mean(axis=0), pair.initial.positions.mean(axis=0), atol=1e-9)
    moved = np.linalg.norm(pair.final.positions - pair.initial.positions)
    assert moved < np.linalg.norm(final.positions - final.positions.mean(axis=0) - initial.positions)


def test_a_molecule_that_only_turned_is_the_same_structure() -> None:
    initial = molecule("NH3")
    final = initial.copy()
    final.rotate(50, (1, 2, 3))
    with pytest.raises(EndpointError, match="same structure"):
        make_pair("hop", initial, final)


def test_an_interstitialcy_is_no_swap(vacancy: tuple[Atoms, Atoms]) -> None:
    """An atom takes another's place, which moves on: like atoms follow each other, and that is a real mechanism."""
    initial, final = vacancy
    distances = np.linalg.norm(initial.positions - initial.positions[0], axis=1)
    second = int(np.argsort(distances)[1])
    final.positions[second] = initial.positions[0]
    pair = make_pair("hop", initial, final)
    assert np.count_nonzero(np.linalg.norm(pair.final.positions - pair.initial.positions, axis=1) > 1.0) == 2


def test_a_band_is_unwrapped_image_by_image(vacancy: tuple[Atoms, Atoms]) -> None:
    initial, final = vacancy
    inner = []
    for fraction in (0.25, 0.5, 0.75):
        image = initial.copy()
        image.positions[0] += fraction * (final.positions[0] - initial.positions[0])
        image.wrap(eps=0.3)
        image.positions[0] += image.cell[1]
        inner.append(image)
    pair = make_pair("hop", initial, final, inner=inner)
    steps = np.diff(
        np.array([pair.initial.positions, *(i.positions for i in pair.images), pair.final.positions]), axis=0
    )
    assert np.linalg.norm(steps, axis=2).max() == pytest.approx(HOP_ANG / 4, abs=1e-3)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"paths\.0\.initial: no such file"):
        read_atoms(tmp_path / "missing.xyz", "paths.0.initial")
    (tmp_path / "broken.xyz").write_text("not\nreally\n")
    with pytest.raises(InputError, match=r"broken\.xyz cannot be read"):
        read_atoms(tmp_path / "broken.xyz", "paths.0.initial")
    write(tmp_path / "short.extxyz", [molecule("H2O")] * 2)
    with pytest.raises(InputError, match="fewer than three"):
        read_band(tmp_path / "short.extxyz", "paths.0.band")
    with pytest.raises(InputError, match="no such file"):
        read_band(tmp_path / "missing.xyz", "paths.0.band")
    write(tmp_path / "whole.extxyz", [molecule("H2O")] * 3)
    assert len(read_band(tmp_path / "whole.extxyz", "paths.0.band")) == 3


def test_relaxing_an_end_state_finds_its_minimum(au_pair: EndpointPair, emt: Any) -> None:
    rng = np.random.default_rng(3)
    free = ~au_pair.initial.fixed
    start = au_pair.initial.moved(
        au_pair.initial.positions + np.where(free, 0.05 * rng.standard_normal(free.shape), 0.0)
    )
    found = relax_end_state(emt, start, 0.01)
    assert found.status == "converged"
    assert found.fmax_ev_per_ang < 0.01
    np.testing.assert_allclose(found.positions[0][~free], au_pair.initial.positions[~free])
    energy, _ = emt.evaluate(au_pair.initial, au_pair.initial.positions[None])
    assert found.energies_ev[0] == pytest.approx(energy[0], abs=2e-3)


def test_relaxing_an_end_state_ends_where_it_is_doubted(au_pair: EndpointPair, emt: Any) -> None:
    up = au_pair.initial.positions.copy()
    up[-1, 2] += 0.2
    gains: list[float] = []

    def doubt(positions: FloatArray, gain_ev: float) -> str:
        gains.append(gain_ev)
        return "far enough" if gain_ev > 0.01 else ""

    found = relax_end_state(emt, au_pair.initial.moved(up), 0.01, doubt=doubt)
    assert (found.status, found.reason) == ("guarded", "far enough")
    energies, _ = emt.evaluate(au_pair.initial, np.stack([up, found.positions[0]]))
    assert gains[-1] == pytest.approx(energies[0] - energies[1])
    assert gains[-1] > 0.01 >= max(gains[:-1], default=0.0)


def test_relaxing_stops_where_it_makes_no_sense() -> None:
    class Downhill:
        """A slope without end."""

        def evaluate(self, template: Structure, positions: Any) -> Any:
            forces = np.zeros_like(positions)
            forces[:, 0, 0] = 5.0
            return -5.0 * positions[:, 0, 0], forces

    start = Structure.from_atoms(Atoms("Cu2", positions=[[0, 0, 0], [0, 2.5, 0]]))
    found = relax_end_state(Downhill(), start, 0.01)
    assert found.status == "guarded"
    assert np.linalg.norm(found.positions[0] - start.positions, axis=1).max() <= 1.0


Spoil = Callable[[Atoms, Atoms], None]
