"""Batched graphs: the same numbers as ASE's MACECalculator, whatever the periodicity."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms

from alcore.mace.graphs import batch_graph
from alcore.mace.surrogate import MaceSurrogate
from alcore.types import FloatArray, Structure

ENERGY_EV = 1e-8
FORCE_EV_PER_ANG = 1e-7
KINDS = (
    "crystal",
    "primitive cell, smaller than the cutoff",
    "slab",
    "slab outside its cell",
    "slab without third vector",
    "molecule without cell",
    "atoms outside the cell",
)


@pytest.fixture(scope="module")
def mace_calculator(lively_model: Any) -> Any:
    from mace.calculators import MACECalculator

    return MACECalculator(models=[lively_model], device="cpu", default_dtype="float64")


@pytest.mark.parametrize("kind", KINDS)
def test_batch_agrees_with_ase_calculator(
    kind: str, geometries: dict[str, tuple[Structure, FloatArray]], lively_model: Any, mace_calculator: Any
) -> None:
    template, positions = geometries[kind]
    energies, forces = MaceSurrogate(prior=lively_model).evaluate(template, positions)
    for image, place in enumerate(positions):
        atoms = Atoms(numbers=template.numbers, positions=place, cell=template.cell, pbc=template.pbc)
        atoms.calc = mace_calculator
        assert energies[image] == pytest.approx(atoms.get_potential_energy(), abs=ENERGY_EV)
        np.testing.assert_allclose(forces[image], atoms.get_forces(), atol=FORCE_EV_PER_ANG)


def test_images_of_a_batch_do_not_see_each_other(geometries: dict[str, tuple[Structure, FloatArray]]) -> None:
    template, positions = geometries["slab"]
    graph = batch_graph(template, positions, elements=[13], r_max_ang=5.0)
    sender, receiver = graph["edge_index"]
    assert (graph["batch"][sender] == graph["batch"][receiver]).all()
    assert graph["ptr"].tolist() == [0, 12, 24, 36]


@pytest.mark.parametrize("kind", KINDS)
def test_edges_are_all_pairs_within_the_cutoff(kind: str, geometries: dict[str, tuple[Structure, FloatArray]]) -> None:
    """Against ASE's own neighbour list, which is another algorithm."""
    from ase.neighborlist import neighbor_list

    template, positions = geometries[kind]
    graph = batch_graph(template, positions[:1], elements=sorted(set(template.numbers.tolist())), r_max_ang=5.0)
    sender, receiver = graph["edge_index"]
    vectors = (graph["positions"][receiver] - graph["positions"][sender] + graph["shifts"]).detach().numpy()
    lengths = np.sort(np.linalg.norm(vectors, axis=1))
    atoms = Atoms(numbers=template.numbers, positions=positions[0], cell=template.cell, pbc=template.pbc)
    np.testing.assert_allclose(lengths, np.sort(neighbor_list("d", atoms, 5.0)), atol=1e-9)
