"""The surrogate: forces are gradients, energies are invariant, and the correction is a posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from alcore.mace.models import build_model
from alcore.mace.surrogate import MaceSurrogate, make_surrogate, model_residuals, with_correction
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, FloatArray, Label, Structure
from alcore.uncertainty import relative_sigmas

FORCE_EV_PER_ANG = 2e-5
"""Central differences with steps of 1e-4 Å."""
LABEL_NOISE_EV = 6e-3  # 1 meV and what the features miss, looser where the reference forces are large
EVIDENCE_EV = 1e-4
"""The evidence has a flat maximum, found to about this much in energies."""
FEATURES = 48


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


@pytest.fixture(scope="module")
def labels(au_pair: EndpointPair, band: FloatArray, label_of: Callable[..., Label]) -> tuple[Label, ...]:
    return tuple(label_of(au_pair.initial.moved(band[image])) for image in (0, 2, 3, 6))


@pytest.fixture(scope="module")
def bare(au_pair: EndpointPair, band: FloatArray, untrained_model: Any) -> MaceSurrogate:
    rng = np.random.default_rng(0)
    samples = [au_pair.initial.moved(p + 0.05 * rng.standard_normal(p.shape)) for p in band]
    return make_surrogate(untrained_model, samples, rng, per_element=FEATURES)


@pytest.fixture(scope="module")
def corrected(bare: MaceSurrogate, labels: tuple[Label, ...]) -> MaceSurrogate:
    return with_correction(bare, Dataset(labels=labels))


@pytest.fixture(scope="module")
def committee(bare: MaceSurrogate, labels: tuple[Label, ...], lively_model: Any, other_model: Any) -> MaceSurrogate:
    """Two members that disagree and lead; each has a correction of its own."""
    members = tuple(_cut(model, bare.prior) for model in (lively_model, other_model))
    return with_correction(replace(bare, members=members, lead="committee"), Dataset(labels=labels))


def _cut(model: Any, like: Any) -> Any:
    """A model of ``like``'s elements with non-zero readouts taken from ``model``'s."""
    import torch

    twin = build_model([int(z) for z in like.atomic_numbers], 11)
    with torch.no_grad():
        for mine, theirs in zip(twin.readouts, model.readouts, strict=True):
            last = "linear_2" if hasattr(mine, "linear_2") else "linear"
            getattr(mine, last).weight.copy_(0.1 * getattr(theirs, last).weight)
    return twin


@pytest.mark.parametrize("which", ["corrected", "committee"])
def test_force_is_minus_gradient_of_energy(
    which: str, request: pytest.FixtureRequest, au_pair: EndpointPair, band: FloatArray
) -> None:
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    rng = np.random.default_rng(1)
    place = band[2] + 0.05 * rng.standard_normal(band[2].shape)
    direction = rng.standard_normal((4, *place.shape))
    direction /= np.linalg.norm(direction, axis=(1, 2), keepdims=True)
    step = 1e-4
    shifted = np.concatenate([place + step * direction, place - step * direction])
    energies, _ = surrogate.evaluate(au_pair.initial, shifted)
    _, forces = surrogate.evaluate(au_pair.initial, place[None])
    slopes = (energies[:4] - energies[4:]) / (2 * step)
    np.testing.assert_allclose(slopes, -(forces[0] * direction).sum(axis=(1, 2)), atol=FORCE_EV_PER_ANG)
    assert np.abs(slopes).max() > 0.01


@pytest.mark.parametrize("which", ["bare", "corrected", "committee"])
def test_evaluate_and_predict_agree(
    which: str, request: pytest.FixtureRequest, au_pair: EndpointPair, band: FloatArray
) -> None:
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    energies, forces = surrogate.evaluate(au_pair.initial, band)
    prediction = surrogate.predict(au_pair.initial, band)
    np.testing.assert_allclose(prediction.energies_ev, energies, atol=1e-8)
    np.testing.assert_allclose(prediction.forces, forces, atol=1e-8)
    assert prediction.members_ev.shape == (len(surrogate.members), len(band))
    np.testing.assert_array_equal(prediction.by_lead_ev[surrogate.lead], prediction.energies_ev)
    single = [float(surrogate.evaluate(au_pair.initial, place[None])[0][0]) for place in band]
    np.testing.assert_allclose(single, energies, atol=1e-8)


def test_energy_is_invariant_under_translation_rotation_and_permutation(
    corrected: MaceSurrogate, au_pair: EndpointPair, band: FloatArray
) -> None:
    place = band[3]
    turn, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((3, 3)))
    order = np.random.default_rng(3).permutation(len(place))
    (energy,), (force,) = corrected.evaluate(au_pair.initial, place[None])
    (moved,), _ = corrected.evaluate(au_pair.initial, place[None] + np.array([0.3, -7.0, 1.1]))
    turned_atoms = replace(au_pair.initial, cell=au_pair.initial.cell @ turn.T)
    (turned,), (turned_force,) = corrected.evaluate(turned_atoms, (place @ turn.T)[None])
    mixed_atoms = replace(au_pair.initial, numbers=au_pair.initial.numbers[order], positions=place[order])
    (mixed,), (mixed_force,) = corrected.evaluate(mixed_atoms, place[order][None])
    assert moved == pytest.approx(energy, abs=1e-7)
    assert turned == pytest.approx(energy, abs=1e-7)
    assert mixed == pytest.approx(energy, abs=1e-7)
    np.testing.assert_allclose(turned_force, force @ turn.T, atol=1e-6)
    np.testing.assert_allclose(mixed_force, force[order], atol=1e-6)


def test_feature_rows_are_gradients_of_features(bare: MaceSurrogate, au_pair: EndpointPair, band: FloatArray) -> None:
    structure = au_pair.initial.moved(band[1])
    _, rows = bare.feature_rows(structure)
    step = 1e-4
    for atom, axis in ((0, 2), (5, 0), (len(structure) - 1, 1)):
        shift = np.zeros((len(structure), 3))
        shift[atom, axis] = step
        ahead, _ = bare.feature_rows(structure.moved(structure.positions + shift))
        behind, _ = bare.feature_rows(structure.moved(structure.positions - shift))
        np.testing.assert_allclose(rows[3 * atom + axis], -(ahead - behind) / (2 * step), atol=1e-5)


def test_posterior_mean_interpolates_the_labels(
    corrected: MaceSurrogate, au_pair: EndpointPair, labels: tuple[Label, ...]
) -> None:
    energies, forces = corrected.evaluate(au_pair.initial, np.array([label.structure.positions for label in labels]))
    truth = np.array([label.energy_ev for label in labels])
    np.testing.assert_allclose(energies - energies[0], truth - truth[0], atol=LABEL_NOISE_EV)
    free = ~au_pair.initial.fixed
    for force, label in zip(forces, labels, strict=True):
        assert label.forces is not None
        assert np.sqrt(((force - label.forces)[free] ** 2).mean()) < 0.1


def test_sigma_is_noise_at_labels_and_shrinks_with_them(
    bare: MaceSurrogate, au_pair: EndpointPair, labels: tuple[Label, ...], band: FloatArray
) -> None:
    """Shrinks at fixed hyperparameters; the evidence may widen them again."""
    few, many = (with_correction(bare, Dataset(labels=chosen)) for chosen in ((labels[0], labels[3]), labels))
    sigma_many = relative_sigmas(many.predict(au_pair.initial, band))[1]
    sigma_few = relative_sigmas(few.predict(au_pair.initial, band))[1]
    assert sigma_many[[0, 2, 3, 6]].max() < LABEL_NOISE_EV
    assert sigma_few[6] < LABEL_NOISE_EV
    assert sigma_few[3] > 5 * LABEL_NOISE_EV
    assert sigma_many.max() < sigma_few.max()
    assert sigma_many[0] == 0.0


def test_absolute_energies_do_not_matter(
    bare: MaceSurrogate, au_pair: EndpointPair, labels: tuple[Label, ...], band: FloatArray
) -> None:
    """Codes and pseudopotentials differ by thousands of eV an atom."""
    high = tuple(replace(label, energy_ev=(label.energy_ev or 0.0) + 1000.0) for label in labels)
    low_prediction, high_prediction = (
        with_correction(bare, Dataset(labels=chosen)).predict(au_pair.initial, band) for chosen in (labels, high)
    )
    np.testing.assert_allclose(
        high_prediction.energies_ev - high_prediction.energies_ev[0],
        low_prediction.energies_ev - low_prediction.energies_ev[0],
        atol=EVIDENCE_EV,
    )
    np.testing.assert_allclose(high_prediction.forces, low_prediction.forces, atol=10 * EVIDENCE_EV)
    np.testing.assert_allclose(high_prediction.covariance_ev2, low_prediction.covariance_ev2, rtol=0.01, atol=1e-8)


def test_identical_members_have_no_spread(
    bare: MaceSurrogate, labels: tuple[Label, ...], au_pair: EndpointPair, band: FloatArray
) -> None:
    twin = _cut(bare.prior, bare.prior)
    same = with_correction(replace(bare, members=(twin, twin, twin)), Dataset(labels=labels))
    committee_sigma, _ = relative_sigmas(same.predict(au_pair.initial, band))
    np.testing.assert_allclose(committee_sigma, 0.0, atol=1e-9)


def test_members_that_differ_have_spread_away_from_the_labels(
    committee: MaceSurrogate, au_pair: EndpointPair, band: FloatArray
) -> None:
    sigma, _ = relative_sigmas(committee.predict(au_pair.initial, band))
    assert sigma[0] == 0.0
    assert sigma[4] > 0.0


def test_sigmas_rest_on_the_prior_not_on_members(
    bare: MaceSurrogate, committee: MaceSurrogate, labels: tuple[Label, ...], au_pair: EndpointPair, band: FloatArray
) -> None:
    alone = with_correction(bare, Dataset(labels=labels))
    np.testing.assert_allclose(
        committee.predict(au_pair.initial, band).covariance_ev2,
        alone.predict(au_pair.initial, band).covariance_ev2,
        atol=1e-12,
    )


def test_posterior_alone_is_that_of_the_prediction(
    bare: MaceSurrogate, au_pair: EndpointPair, labels: tuple[Label, ...], band: FloatArray
) -> None:
    fitted = with_correction(bare, Dataset(labels=labels))
    whole = relative_sigmas(fitted.predict(au_pair.initial, band))[1]
    np.testing.assert_allclose(fitted.posterior_sigma(au_pair.initial, band), whole, atol=1e-12)
    assert not bare.posterior_sigma(au_pair.initial, band).any()


def test_residuals_are_label_minus_model(labels: tuple[Label, ...], bare: MaceSurrogate) -> None:
    free = [np.flatnonzero(~label.structure.fixed.ravel()) for label in labels]
    energies, forces = model_residuals(bare, labels, free)
    for k, label in enumerate(labels):
        energy, force = bare.evaluate(label.structure, label.structure.positions[None])
        assert label.energy_ev is not None
        assert energies[0, k] == pytest.approx(label.energy_ev - energy[0])
    assert label.forces is not None
    np.testing.assert_allclose(forces[0][-len(free[-1]) :], (label.forces - force[0]).ravel()[free[-1]], atol=1e-10)


def test_zero_of_another_composition_does_not_matter(
    bare: MaceSurrogate,
    labels: tuple[Label, ...],
    au_pair: EndpointPair,
    band: FloatArray,
    label_of: Callable[..., Label],
) -> None:
    """Data of the bare slab teach forces; their energies have a zero of their own."""
    whole = au_pair.initial
    slab = replace(whole, numbers=whole.numbers[:-1], positions=whole.positions[:-1], fixed=whole.fixed[:-1])
    found = []
    for shift in (0.0, 500.0):
        given = (*labels, label_of(slab, energy_shift_ev=shift))
        energies = with_correction(bare, Dataset(labels=given)).evaluate(whole, band)[0]
        found.append(energies - energies[0])
    np.testing.assert_allclose(found[1], found[0], atol=EVIDENCE_EV)
    truth = np.array([label.energy_ev for label in labels])
    np.testing.assert_allclose(found[0][[0, 2, 3, 6]], truth - truth[0], atol=LABEL_NOISE_EV)


def test_elements_without_features_are_left_to_the_model(
    lively_model: Any, geometries: dict[str, tuple[Structure, FloatArray]]
) -> None:
    """Data of an element that no hop contains: nothing breaks, and the correction has nothing to say."""
    copper, places = geometries["crystal"]
    water, water_places = geometries["molecule without cell"]
    samples = [copper.moved(p) for p in places]
    surrogate = make_surrogate(lively_model, samples, np.random.default_rng(0), per_element=8)
    phi, rows = surrogate.feature_rows(water.moved(water_places[0]))
    assert phi.shape == (8,)
    assert rows.shape == (9, 8)
    assert not phi.any()
    assert not rows.any()
