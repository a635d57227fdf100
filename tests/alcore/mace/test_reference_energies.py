"""E0s: absolute energies of another code come out right, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alcore.mace.models import freeze, trainable_copy
from alcore.mace.reference_energies import align
from alcore.mace.training import TrainSpec, fine_tune, predictions
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, Label

ZERO_EV = {13: -531.0, 79: -3012.5}
"""Of another code, an atom."""
ROUNDING_EV = 1e-6


@pytest.fixture(scope="module")
def labels(au_pair: EndpointPair, label_of: Callable[..., Label]) -> list[Label]:
    """Two compositions, with the zero of another code."""
    band = interpolate(au_pair, NebSpec(n_images=5))
    found = []
    for k in range(3):
        whole = au_pair.initial.moved(band[k])
        found += [label_of(whole), label_of(whole.take(np.arange(1, len(whole))))]
    shifts = [sum(ZERO_EV[int(z)] for z in label.structure.numbers) for label in found]
    return [
        replace(label, energy_ev=(label.energy_ev or 0.0) + shift) for label, shift in zip(found, shifts, strict=True)
    ]


def missing(model: Any, labels: list[Label]) -> Any:
    return np.array([label.energy_ev for label in labels]) - predictions(model, labels)[0]


def test_the_mean_of_each_composition_is_met(labels: list[Label], untrained_model: Any) -> None:
    member = fine_tune(
        untrained_model, Dataset(labels=tuple(labels)), TrainSpec(epochs=1), weights=np.ones(len(labels))
    )
    left = missing(member.model, labels)
    assert left[::2].mean() == pytest.approx(0.0, abs=ROUNDING_EV)
    assert left[1::2].mean() == pytest.approx(0.0, abs=ROUNDING_EV)
    assert member.told["e0s_from"].startswith("least squares")
    assert member.told["e0s"].keys() == {"Al", "Au"}


def test_what_is_learned_does_not_depend_on_the_zero(labels: list[Label], untrained_model: Any) -> None:
    moved = [replace(label, energy_ev=(label.energy_ev or 0.0) - 400.0 * len(label.structure)) for label in labels]
    spec = TrainSpec(epochs=1)
    one, other = (
        fine_tune(untrained_model, Dataset(labels=tuple(part)), spec, weights=np.ones(len(labels)))
        for part in (labels, moved)
    )
    assert other.force_rmse_ev_per_ang == pytest.approx(one.force_rmse_ev_per_ang, rel=1e-6)
    fall = missing(one.model, moved)
    assert fall == pytest.approx(
        np.array([-400.0 * len(label.structure) for label in labels]) + missing(one.model, labels)
    )


def test_isolated_atoms_are_taken_as_given(labels: list[Label], untrained_model: Any) -> None:
    given = {"Al": -530.0, "Au": -3010.0}
    spec = TrainSpec(epochs=1, e0s=given)
    member = fine_tune(untrained_model, Dataset(labels=tuple(labels)), spec, weights=np.ones(len(labels)))
    assert member.told["e0s"] == given
    assert member.model.atomic_energies_fn.atomic_energies.flatten().tolist() == [-530.0, -3010.0]
    left, n_atoms = missing(member.model, labels), np.array([len(label.structure) for label in labels])
    assert float(left @ n_atoms) == pytest.approx(0.0, abs=1e-4), "one number an atom takes what it can"
    again = align(member.model, labels, predictions(member.model, labels)[0], given)
    assert again["shift_ev_per_atom"] == pytest.approx(member.told["shift_ev_per_atom"]), "all of it, not the last step"


def test_in_single_precision_nothing_is_moved(labels: list[Label], untrained_model: Any) -> None:
    model = freeze(trainable_copy(untrained_model).to(torch.float32))
    before = model.atomic_energies_fn.atomic_energies.clone()
    told = align(model, labels, predictions(model, labels)[0], None)
    assert torch.equal(model.atomic_energies_fn.atomic_energies, before)
    assert "single precision" in told["e0s"]
