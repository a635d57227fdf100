"""The elastic network: it holds the host, leaves the hopping atom free, and does not mind wrapped atoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from hypothesis import given
from hypothesis import strategies as st

from alcore.endpoints import make_pair
from alcore.mace.network import lattice_wraps, make_network, make_networks, network_key
from alcore.types import EndpointPair, FloatArray, Structure

FINITE_DIFFERENCE_TOLERANCE = 1e-6


def _energies(pair: EndpointPair, positions: FloatArray) -> FloatArray:
    network = make_network([pair.initial, pair.final])
    return np.asarray(network.energies(torch.tensor(positions)).detach().numpy())


def test_end_states_are_near_rest_and_strain_costs(au_pair: EndpointPair) -> None:
    rest = _energies(au_pair, au_pair.initial.positions[None])[0]
    rng = np.random.default_rng(0)
    rattled = au_pair.initial.positions + 0.1 * rng.standard_normal((len(au_pair.initial), 3))
    assert 0 <= rest < 0.05
    assert _energies(au_pair, rattled[None])[0] > rest + 0.1


def test_the_hopper_has_no_spring_that_would_hold_it_back(au_pair: EndpointPair) -> None:
    """Springs whose length differs between the end states would make the final state high: there are none."""
    ends = _energies(au_pair, np.stack([au_pair.initial.positions, au_pair.final.positions]))
    assert ends[1] == pytest.approx(ends[0], abs=0.02)


def test_lattice_vectors_do_not_matter(au_pair: EndpointPair) -> None:
    """An atom that hops half a cell sits on the edge of wrapping; neither it nor a wrapped atom changes the energy."""
    cell = au_pair.initial.cell
    for state in (au_pair.initial, au_pair.final):
        nudged = state.positions + 1e-3
        wrapped = nudged.copy()
        wrapped[0] += cell[0]
        wrapped[5] -= cell[1]
        plain, moved = _energies(au_pair, np.stack([nudged, wrapped]))
        assert moved == pytest.approx(plain, abs=1e-9)


def test_forces_are_the_gradient(au_pair: EndpointPair) -> None:
    network = make_network([au_pair.initial, au_pair.final])
    rng = np.random.default_rng(1)
    place = au_pair.initial.positions + 0.05 * rng.standard_normal((len(au_pair.initial), 3))
    positions = torch.tensor(place[None], requires_grad=True)
    (gradient,) = torch.autograd.grad(network.energies(positions).sum(), positions)
    step = 1e-5
    for atom, axis in ((12, 0), (11, 2), (9, 1)):
        up, down = place.copy(), place.copy()
        up[atom, axis] += step
        down[atom, axis] -= step
        high, low = _energies(au_pair, np.stack([up, down]))
        assert float(gradient[0, atom, axis]) == pytest.approx(
            (high - low) / (2 * step), abs=FINITE_DIFFERENCE_TOLERANCE
        )


def test_an_isolated_atom_has_no_spring() -> None:
    lonely = Structure(
        numbers=[29], positions=[[0.0, 0.0, 0.0]], cell=np.zeros((3, 3)), pbc=[False] * 3, fixed=np.zeros((1, 3))
    )
    network = make_network([lonely])
    assert len(network.first) == 0
    assert float(network.energies(torch.zeros(2, 1, 3)).sum()) == 0.0


def test_hops_in_one_host_share_a_network(au_pair: EndpointPair) -> None:
    assert list(make_networks([au_pair.initial, au_pair.final])) == [network_key(au_pair.initial)]


@given(
    st.integers(0, 10_000),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from([0.5, 0.75]),
)
def test_wraps_are_whole_lattice_vectors_and_are_found(seed: int, pbc: list[bool], beyond: float) -> None:
    """In a cell of any shape; along an open direction an atom is where it is."""
    rng = np.random.default_rng(seed)
    cell = 5 * np.eye(3) + rng.uniform(-1, 1, (3, 3))
    home = 10 * rng.standard_normal((4, 3))
    near = rng.uniform(-1, 1, (2, 4, 3)) * np.where(pbc, min(beyond, 1 - beyond) - 0.01, 5.0)
    whole = np.where(pbc, rng.integers(-3, 4, (2, 4, 3)), 0)
    found = lattice_wraps(home + (near + whole) @ cell, home, cell, np.array(pbc), beyond=beyond)
    np.testing.assert_allclose(found, whole @ cell, atol=1e-9)


def test_an_atom_within_reach_of_home_is_not_wrapped() -> None:
    cell, pbc = 4 * np.eye(3), np.array([True] * 3)
    places = np.array([[[1.96, -1.96, 2.04]], [[2.96, -2.96, 3.04]]])
    np.testing.assert_array_equal(lattice_wraps(places, np.zeros((1, 3)), cell, pbc)[0], [[0, 0, 4]])
    np.testing.assert_array_equal(lattice_wraps(places, np.zeros((1, 3)), cell, pbc, beyond=0.75)[1], [[0, 0, 4]])


def test_a_cell_without_a_third_vector_can_be_unwrapped() -> None:
    cell, pbc = np.diag([4.0, 4.0, 0.0]), np.array([True, True, False])
    found = lattice_wraps(np.array([[[4.3, -8.1, 77.0]]]), np.zeros((1, 3)), cell, pbc)
    np.testing.assert_allclose(found, [[[4.0, -8.0, 0.0]]])


def _proton_transfer() -> EndpointPair:
    """A proton between two fluorides."""
    initial = Atoms("FFH", positions=[[0, 0, 0], [2.4, 0, 0], [0.95, 0, 0]])
    final = initial.copy()
    final.positions[2, 0] = 1.45
    return make_pair("hop", initial, final, charge=-1.0)


def test_a_bond_that_opens_costs_nothing_in_the_end_states_and_is_kept_between_them() -> None:
    pair = _proton_transfer()
    middle = (pair.initial.positions + pair.final.positions) / 2
    nearer = middle * [0.96, 1, 1]  # the fluorides come together, as they do
    nearer[:, 0] += middle[2, 0] - nearer[2, 0]
    lost = middle + np.array([[0, 0, 0], [0, 0, 0], [0, 0.6, 0]])
    torn = pair.initial.positions - np.array([[0.3, 0, 0], [0, 0, 0], [0, 0, 0]])
    ends = _energies(pair, np.stack([pair.initial.positions, pair.final.positions]))
    np.testing.assert_allclose(ends, 0.0, atol=1e-9)
    straight, contracted, aside, open_at_both = _energies(pair, np.stack([middle, nearer, lost, torn]))
    assert contracted < straight < 1.0  # no wall between the two states
    assert aside > straight + 0.5
    assert open_at_both > 0.5


def test_forces_on_what_opens_and_closes_are_the_gradient() -> None:
    pair = _proton_transfer()
    place = (pair.initial.positions + pair.final.positions) / 2 + 0.05 * np.random.default_rng(3).standard_normal(
        (3, 3)
    )
    positions = torch.tensor(place[None], requires_grad=True)
    network = make_network([pair.initial, pair.final])
    (gradient,) = torch.autograd.grad(network.energies(positions).sum(), positions)
    step = 1e-5
    for atom in range(3):
        moved = np.zeros((3, 3))
        moved[atom, 1] = step
        up, down = _energies(pair, np.stack([place + moved, place - moved]))
        assert float(gradient[0, atom, 1]) == pytest.approx((up - down) / (2 * step), abs=1e-5)


def test_a_molecule_turns_for_nothing_and_bends_at_a_cost() -> None:
    atoms = molecule("CH3CH2OH")
    twisted = atoms.copy()
    oxygen = int(np.flatnonzero(atoms.numbers == 8)[0])
    proton = min(np.flatnonzero(atoms.numbers == 1), key=lambda k: float(atoms.get_distance(int(k), oxygen)))
    carbons = sorted(np.flatnonzero(atoms.numbers == 6), key=lambda k: float(atoms.get_distance(int(k), oxygen)))
    twisted.set_dihedral(int(carbons[1]), int(carbons[0]), oxygen, int(proton), 62, indices=[proton])
    pair = make_pair("hop", atoms, twisted)
    network = make_network([pair.initial, pair.final])
    turned = atoms.copy()
    turned.rotate(40, (1, 2, 3))
    bent = atoms.copy()
    bent.set_angle(int(carbons[1]), int(carbons[0]), oxygen, 15, indices=[oxygen, proton], add=True)
    free, costly = network.energies(torch.tensor(np.stack([turned.positions, bent.positions]))).tolist()
    assert free == pytest.approx(0.0, abs=1e-9)
    assert costly > 0.1
