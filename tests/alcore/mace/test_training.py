"""Fine-tuning: the loss falls, relative energies are fitted, broken labels stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alcore.errors import TrainingError
from alcore.mace.models import weights_sha256
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import TrainedMember, TrainSpec, fine_tune
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, Label

SPEC = TrainSpec()
RELATIVE_EV = 0.06
"""After the first training on four labels that span 1 eV; 0.03 was seen."""
WARM_EV = 0.02
"""After the second, which starts from its weights; 0.011 was seen."""


@pytest.fixture(scope="module")
def dataset(au_pair: EndpointPair, label_of: Callable[..., Label]) -> Dataset:
    band = interpolate(au_pair, NebSpec(n_images=5))
    return Dataset(labels=tuple(label_of(au_pair.initial.moved(band[k])) for k in (0, 1, 2, 3)))


@pytest.fixture(scope="module")
def trained(dataset: Dataset, untrained_model: Any) -> TrainedMember:
    return fine_tune(untrained_model, dataset, SPEC, weights=np.ones(4), epochs=SPEC.fresh_epochs)


def _relative_errors(model: Any, dataset: Dataset) -> Any:
    truth = np.array([label.energy_ev for label in dataset.labels])
    energies = np.array(
        [MaceSurrogate(prior=model).evaluate(x.structure, x.structure.positions[None])[0][0] for x in dataset.labels]
    )
    error = energies - truth
    return error - error.mean()


def test_relative_energies_are_fitted(trained: TrainedMember, dataset: Dataset, untrained_model: Any) -> None:
    before, after = (np.sqrt((_relative_errors(m, dataset) ** 2).mean()) for m in (untrained_model, trained.model))
    assert before > 0.2
    assert after < RELATIVE_EV
    assert trained.energy_rmse_ev == pytest.approx(after, rel=1e-6)


def test_what_is_reported_is_what_was_done(trained: TrainedMember, untrained_model: Any, dataset: Dataset) -> None:
    assert trained.epochs == SPEC.fresh_epochs
    assert trained.learning_rate == SPEC.learning_rate
    assert not any(p.requires_grad for p in trained.model.parameters())
    assert weights_sha256(trained.model) != weights_sha256(untrained_model)
    errors = []
    for label in dataset.labels:
        _, force = MaceSurrogate(prior=trained.model).evaluate(label.structure, label.structure.positions[None])
        errors.append(force[0] - label.forces)
    assert trained.force_rmse_ev_per_ang == pytest.approx(float(np.sqrt(np.mean(np.square(errors)))), rel=1e-6)


def test_warm_training_starts_where_the_last_ended(trained: TrainedMember, dataset: Dataset) -> None:
    again = fine_tune(trained.model, dataset, SPEC, weights=np.ones(4), epochs=SPEC.warm_epochs)
    assert again.epochs == SPEC.warm_epochs
    assert again.energy_rmse_ev < WARM_EV
    assert again.energy_rmse_ev < trained.energy_rmse_ev
    assert again.force_rmse_ev_per_ang < trained.force_rmse_ev_per_ang


def test_absolute_energies_and_other_compositions_do_not_matter(dataset: Dataset, untrained_model: Any) -> None:
    """Each composition has a zero of its own: shifting one by 500 eV changes nothing."""
    without_au = [
        replace(
            x.structure,
            numbers=x.structure.numbers[:-1],
            positions=x.structure.positions[:-1],
            fixed=x.structure.fixed[:-1],
        )
        for x in dataset.labels[:2]
    ]
    others = tuple(
        replace(x, key=x.key[::-1], structure=s, forces=x.forces[:-1] if x.forces is not None else None)
        for x, s in zip(dataset.labels, without_au, strict=False)
    )
    mixed = Dataset(labels=(*dataset.labels[:2], *others))
    shifted = Dataset(
        labels=(*dataset.labels[:2], *(replace(x, energy_ev=(x.energy_ev or 0.0) + 500.0) for x in others))
    )
    spec = TrainSpec(epochs=3)
    plain, moved = (fine_tune(untrained_model, d, spec, weights=np.ones(4)) for d in (mixed, shifted))
    assert moved.energy_rmse_ev == pytest.approx(plain.energy_rmse_ev, rel=1e-6)
    assert moved.force_rmse_ev_per_ang == pytest.approx(plain.force_rmse_ev_per_ang, rel=1e-6)


@pytest.mark.parametrize("what", ["energy_ev", "forces"])
def test_labels_that_are_not_finite_stop_the_training(what: str, dataset: Dataset, untrained_model: Any) -> None:
    first = dataset.labels[0]
    broken = (
        replace(first, energy_ev=float("nan"))
        if what == "energy_ev"
        else replace(first, forces=np.full((len(first.structure), 3), np.inf))
    )
    with pytest.raises(TrainingError, match="not finite"):
        fine_tune(
            untrained_model,
            Dataset(labels=(broken, *dataset.labels[1:])),
            TrainSpec(epochs=2),
            weights=np.ones(4),
        )


def test_a_training_that_runs_away_ends_with_the_best_it_had(dataset: Dataset, untrained_model: Any) -> None:
    spec = TrainSpec(epochs=20, learning_rate=1e30)
    member = fine_tune(untrained_model, dataset, spec, weights=np.ones(4))
    assert member.epochs < spec.epochs
    assert np.isfinite(member.energy_rmse_ev)
    assert member.told["epochs"] == member.epochs
