"""The elastic network: it holds the host, leaves the hopping atom free, and does not mind wrapped atoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alcore.mace.network import make_network, make_networks, network_key
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
