"""The band of a molecule: nothing turns it as a whole, and stiff bonds do not shake it apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import molecule

from alcore.endpoints import make_pair, relax_end_state
from alcore.mace.network import make_network
from alcore.neb import NebSpec, interpolate, neb_forces, relax_band
from alcore.rigid import superimposed
from alcore.types import EndpointPair, FloatArray, Structure


class Springs:
    """Bonds, angles and dihedrals of a molecule between two states, and no barrier between them."""

    def __init__(self, pair: EndpointPair) -> None:
        self.network = make_network([pair.initial, pair.final])

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        places = torch.tensor(positions, requires_grad=True)
        energies = self.network.energies(places)
        (gradient,) = torch.autograd.grad(energies.sum(), places)
        return np.asarray(energies.detach().numpy()), -np.asarray(gradient.numpy())


@pytest.fixture(scope="module")
def ethanol() -> EndpointPair:
    """Its hydroxyl group turns from anti to gauche."""
    initial = molecule("CH3CH2OH")
    final = initial.copy()
    final.set_dihedral(0, 1, 2, 3, 62, indices=[3])
    return make_pair("hop", initial, final)


@pytest.mark.parametrize("seed", range(4))
def test_where_there_is_no_saddle_no_image_climbs_for_ever(ethanol: EndpointPair, seed: int) -> None:
    start = interpolate(ethanol, NebSpec())
    start[1:-1] += 0.1 * np.random.default_rng(seed).standard_normal(start[1:-1].shape)
    found = relax_band(Springs(ethanol), ethanol.initial, start, NebSpec())
    assert found.status == "converged"
    assert found.energies_ev.max() < 0.1


def test_the_first_steps_suit_the_stiffest_bond(ethanol: EndpointPair) -> None:
    """An O-H bond is five times as stiff as a metal's: a step made for that throws it to and fro."""
    found = relax_band(Springs(ethanol), ethanol.initial, interpolate(ethanol, NebSpec()), NebSpec())
    assert found.status == "converged"
    assert found.n_steps < 40


class Tblite:
    """GFN1-xTB behind ``alcore.protocols.Potential``."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        tblite = pytest.importorskip("tblite.ase")
        energies, forces = [], []
        for place in positions:
            atoms = template.moved(place).to_atoms()
            atoms.calc = tblite.TBLite(method="GFN1-xTB", verbosity=0)
            energies.append(atoms.get_potential_energy())
            forces.append(atoms.get_forces())
        return np.array(energies), np.array(forces)


@pytest.mark.parametrize("climbing", [None, 3])
def test_nothing_turns_or_shifts_an_image_of_a_molecule_as_a_whole(ethanol: EndpointPair, climbing: int | None) -> None:
    """Else springs sort images into orientations of the two end states, and none is left on the barrier."""
    rng = np.random.default_rng(0)
    start = interpolate(ethanol, NebSpec())
    start = start + 0.2 * rng.standard_normal(start.shape)
    energies, forces = rng.standard_normal(len(start)), rng.standard_normal(start.shape)
    found = neb_forces(start, energies, forces, 1.0, climbing, loose=True)
    np.testing.assert_allclose(found.sum(axis=1), 0.0, atol=1e-9)
    np.testing.assert_allclose(np.cross(start[1:-1], found).sum(axis=1), 0.0, atol=1e-9)
    bound = neb_forces(start, energies, forces, 1.0, climbing)
    assert np.abs(np.cross(start[1:-1], bound).sum(axis=1)).max() > 0.1


def test_the_band_of_a_molecule_has_the_barrier_of_its_calculator(ethanol: EndpointPair) -> None:
    potential = Tblite()
    ends = [
        ethanol.initial.moved(relax_end_state(potential, state, 0.02).positions[0])
        for state in (ethanol.initial, ethanol.final)
    ]
    pair = make_pair("hop", *(state.to_atoms() for state in ends))
    found = relax_band(potential, pair.initial, interpolate(pair, NebSpec()), NebSpec())
    assert found.status == "converged"
    steps = np.linalg.norm(np.diff(found.positions, axis=0), axis=(1, 2))
    aligned = [
        float(np.linalg.norm(superimposed(after, before) - before))
        for before, after in zip(found.positions[:-1], found.positions[1:], strict=True)
    ]
    np.testing.assert_allclose(steps, aligned, rtol=0.05, atol=5e-3)
    assert steps.max() < 2 * steps.mean()
    assert found.energies_ev.max() - found.energies_ev[0] == pytest.approx(0.0165, abs=2e-3)
