"""Two atoms too close: ways there, and trainings that are held to the repulsion that was there before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alcore.mace.contacts import CLOSEST, LEAST_EV_PER_ANG, PRESSED, WALL_EV, anchors, approaches, ways_from
from alcore.mace.sanity import SanitySpec, calm_labels, contact_faults
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainSpec, fine_tune
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, FloatArray, Label, Structure

SPEC = TrainSpec()


@pytest.fixture(scope="module")
def dataset(au_pair: EndpointPair, label_of: Callable[..., Label]) -> Dataset:
    band = interpolate(au_pair, NebSpec(n_images=5))
    return Dataset(labels=tuple(label_of(au_pair.initial.moved(band[k])) for k in range(4)))


def test_approaches_go_straight_to_the_nearest_free_neighbour(dataset: Dataset) -> None:
    start = dataset.labels[0].structure
    ways = {way.name: way for way in approaches(start)}
    assert set(ways) == {"Al-Al", "Al-Au"}
    for way in ways.values():
        assert way.positions[0] == pytest.approx(start.positions)
        assert way.distance_ang[-1] == pytest.approx(CLOSEST * way.bond_ang)
        assert (np.diff(way.distance_ang) < 0).all()
        movers = np.flatnonzero((way.positions[-1] != start.positions).any(axis=1))
        assert len(movers) == 1
        assert not start.fixed[movers[0]].all()


def test_a_third_atom_is_not_passed() -> None:
    """Carbon dioxide's oxygens do not meet through the carbon."""
    line = Structure(
        numbers=[8, 6, 8],  # type: ignore[arg-type]
        positions=np.array([[-1.16, 0, 0], [0, 0, 0], [1.16, 0, 0]]),
        cell=np.zeros((3, 3)),
        pbc=np.zeros(3, bool),
        fixed=np.zeros((3, 3), bool),
    )
    assert [way.name for way in approaches(line)] == ["C-O"]


def test_pressed_is_closer_than_a_bond_and_before_the_wall(dataset: Dataset) -> None:
    (way, *_) = ways_from([dataset.labels[0].structure])
    flat = np.zeros(len(way.distance_ang))
    assert (way.distance_ang[way.pressed(flat)] < PRESSED * way.bond_ang).all()
    steep = np.where(way.distance_ang < 0.6 * way.bond_ang, 2 * WALL_EV, 0.0)
    behind = np.flatnonzero(steep)[1:]
    assert len(behind)
    assert not set(behind) & set(way.pressed(steep))
    assert len(way.pressed(steep)) == len(way.pressed(flat)) - len(behind)


def test_anchors_are_what_the_surface_says(dataset: Dataset, lively_model: Any) -> None:
    """The repulsion is how fast the energy rises on the way, or the least that two atoms have so close."""
    surface, step = MaceSurrogate(prior=lively_model), 1e-4
    held = anchors([dataset.labels[0].structure], surface.evaluate)
    assert held
    for anchor in held:
        places = anchor.structure.positions + step * np.array([[-1], [1]])[:, :, None] * anchor.away
        (near, far), _ = surface.evaluate(anchor.structure, places)
        assert anchor.repulsion_ev_per_ang == pytest.approx(max((near - far) / (2 * step), LEAST_EV_PER_ANG), rel=1e-4)
        assert np.linalg.norm(anchor.away) == pytest.approx(1.0)


def test_a_training_keeps_the_repulsion_it_is_held_to(
    dataset: Dataset, untrained_model: Any, label_of: Callable[..., Label]
) -> None:
    """Labels of rattled structures teach weights that know nothing but their pair repulsion to attract close atoms."""
    rng = np.random.default_rng(0)
    rattled = [x.structure.moved(x.structure.positions + _noise(x.structure, rng)) for x in 4 * dataset.labels]
    many = Dataset(labels=tuple(label_of(structure) for structure in rattled))
    starts = calm_labels(many.labels)
    held = anchors([starts[0].structure], MaceSurrogate(prior=untrained_model).evaluate)
    free, kept = (
        fine_tune(untrained_model, many, SPEC, weights=np.ones(len(many)), epochs=SPEC.fresh_epochs, anchors=given)
        for given in ((), held)
    )
    assert contact_faults(MaceSurrogate(prior=free.model).evaluate, starts, SanitySpec()), "or nothing had to be kept"
    assert not contact_faults(MaceSurrogate(prior=kept.model).evaluate, starts, SanitySpec())
    assert kept.force_rmse_ev_per_ang < 1.5 * free.force_rmse_ev_per_ang


def _noise(structure: Structure, rng: np.random.Generator) -> FloatArray:
    return np.where(structure.fixed, 0.0, 0.05 * rng.standard_normal(structure.positions.shape))
