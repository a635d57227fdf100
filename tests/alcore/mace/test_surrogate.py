"""The surrogate: forces are gradients, energies are invariant, and the correction is a posterior."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alcore.barrier import label_fmax
from alcore.mace.fitting import LOOSE_FORCE_EV_PER_ANG, make_surrogate, with_correction
from alcore.mace.models import build_model
from alcore.mace.network import make_networks
from alcore.mace.surrogate import MaceSurrogate, atoms_key, free_coordinates
from alcore.neb import NebSpec, interpolate
from alcore.types import Dataset, EndpointPair, FloatArray, Label, Structure
from alcore.uncertainty import relative_sigmas

FORCE_EV_PER_ANG = 2e-5
"""Central differences with steps of 1e-4 Å."""
LABEL_NOISE_EV = 6e-3  # 1 meV and what the features miss, looser where the reference forces are large
EVIDENCE_EV = 1e-4
"""The evidence has a flat maximum, found to about this much in energies."""
FEATURES = 48
CORRECTED = ["corrected", "committee", "gp", "both", "gp_committee"]
WITH_G = ["gp", "both", "gp_committee"]


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


@pytest.fixture(scope="module")
def labels(au_pair: EndpointPair, band: FloatArray, label_of: Callable[..., Label]) -> tuple[Label, ...]:
    return tuple(label_of(au_pair.initial.moved(band[image])) for image in (0, 2, 3, 6))


@pytest.fixture(scope="module")
def bare(au_pair: EndpointPair, band: FloatArray, untrained_model: Any) -> MaceSurrogate:
    rng = np.random.default_rng(0)
    return make_surrogate(untrained_model, _samples(au_pair, band, rng), rng, per_element=FEATURES, networks={})


def _samples(pair: EndpointPair, band: FloatArray, rng: np.random.Generator) -> list[Structure]:
    return [pair.initial.moved(p + 0.05 * rng.standard_normal(p.shape)) for p in band]


@pytest.fixture(scope="module")
def gp(au_pair: EndpointPair, untrained_model: Any, labels: tuple[Label, ...]) -> MaceSurrogate:
    """g and nothing else over an untrained prior."""
    start = make_surrogate(untrained_model, [au_pair.initial], np.random.default_rng(0), correction="gp", networks={})
    return with_correction(start, Dataset(labels=labels), "gp")


@pytest.fixture(scope="module")
def both(au_pair: EndpointPair, band: FloatArray, lively_model: Any, labels: tuple[Label, ...]) -> MaceSurrogate:
    """Random features and g, over a trained prior whose scale is free."""
    rng = np.random.default_rng(0)
    samples = _samples(au_pair, band, rng)
    start = make_surrogate(lively_model, samples, rng, per_element=8, correction="blr+gp")
    return with_correction(start, Dataset(labels=labels), "blr+gp")


@pytest.fixture(scope="module")
def gp_committee(
    au_pair: EndpointPair, untrained_model: Any, labels: tuple[Label, ...], lively_model: Any, other_model: Any
) -> MaceSurrogate:
    """Over an elastic network whose scale is free, members that lead, each with a g of its own."""
    members = tuple(_cut(model, untrained_model) for model in (lively_model, other_model))
    networks = make_networks([au_pair.initial, au_pair.final])
    start = make_surrogate(untrained_model, [], np.random.default_rng(0), correction="gp", networks=networks)
    return with_correction(replace(start, members=members, lead="committee"), Dataset(labels=labels), "gp")


@pytest.fixture(scope="module")
def corrected(bare: MaceSurrogate, labels: tuple[Label, ...]) -> MaceSurrogate:
    return with_correction(bare, Dataset(labels=labels), "blr")


@pytest.fixture(scope="module")
def committee(bare: MaceSurrogate, labels: tuple[Label, ...], lively_model: Any, other_model: Any) -> MaceSurrogate:
    """Two members that disagree and lead; each has a correction of its own."""
    members = tuple(_cut(model, bare.prior) for model in (lively_model, other_model))
    return with_correction(replace(bare, members=members, lead="committee"), Dataset(labels=labels), "blr")


def _cut(model: Any, like: Any) -> Any:
    """A model of ``like``'s elements with non-zero readouts taken from ``model``'s."""
    twin = build_model([int(z) for z in like.atomic_numbers], 11)
    with torch.no_grad():
        for mine, theirs in zip(twin.readouts, model.readouts, strict=True):
            last = "linear_2" if hasattr(mine, "linear_2") else "linear"
            getattr(mine, last).weight.copy_(0.1 * getattr(theirs, last).weight)
    return twin


@pytest.mark.parametrize("which", CORRECTED)
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


@pytest.mark.parametrize("which", ["bare", *CORRECTED])
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
    few, many = (with_correction(bare, Dataset(labels=chosen), "blr") for chosen in ((labels[0], labels[3]), labels))
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
        with_correction(bare, Dataset(labels=chosen), "blr").predict(au_pair.initial, band) for chosen in (labels, high)
    )
    np.testing.assert_allclose(
        high_prediction.energies_ev - high_prediction.energies_ev[0],
        low_prediction.energies_ev - low_prediction.energies_ev[0],
        atol=EVIDENCE_EV,
    )
    np.testing.assert_allclose(high_prediction.forces, low_prediction.forces, atol=10 * EVIDENCE_EV)
    np.testing.assert_allclose(high_prediction.covariance_ev2, low_prediction.covariance_ev2, rtol=0.005, atol=1e-8)


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
    alone = with_correction(bare, Dataset(labels=labels), "blr")
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


# --- g ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WITH_G)
def test_g_is_the_crossed_covariance_times_its_pull(
    which: str, request: pytest.FixtureRequest, au_pair: EndpointPair, band: FloatArray
) -> None:
    """What torch evaluates is what numpy fitted, for every model."""
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    assert surrogate.correction is not None
    template = au_pair.initial
    known = surrogate.known[atoms_key(template)]
    by_energy, by_force = known.local.covariance.crossed(free_coordinates(template, band, known.home_ang))
    phi = np.array([surrogate.feature_rows(template.moved(place))[0] for place in band])
    models = (surrogate.prior, *surrogate.members)
    for row, (model, energies) in enumerate(zip(models, _of_all(surrogate, template, band), strict=True)):
        alone = replace(surrogate, prior=model, members=(), lead="prior", correction=None)
        g = by_energy @ known.local.energy_pull[row]
        g = g + np.tensordot(by_force, known.local.force_pull[row], axes=2)
        expected = alone.evaluate(template, band)[0] + phi @ surrogate.correction.weights[row] + g
        np.testing.assert_allclose(energies, expected, atol=1e-8)
        assert np.ptp(g) > 1e-4


def _of_all(surrogate: MaceSurrogate, template: Structure, positions: FloatArray) -> FloatArray:
    prediction = surrogate.predict(template, positions)
    return np.concatenate([prediction.by_lead_ev["prior"][None], prediction.members_ev])


def test_g_does_not_pull_at_atoms_that_are_all_free_together(
    au_pair: EndpointPair, untrained_model: Any, labels: tuple[Label, ...], band: FloatArray
) -> None:
    """A crystal without a fixed atom must not drift: energies do not change when all of it moves, so forces add up to
    nothing."""
    freed = [replace(s, fixed=np.zeros_like(s.fixed)) for s in (au_pair.initial, *(lab.structure for lab in labels))]
    moved = [s.moved(s.positions + 0.1 * k) for k, s in enumerate(freed[1:])]
    known = tuple(replace(label, structure=place) for label, place in zip(labels, moved, strict=True))
    start = make_surrogate(untrained_model, [freed[0]], np.random.default_rng(0), correction="gp", networks={})
    surrogate = with_correction(start, Dataset(labels=known), "gp")
    energies, forces = surrogate.evaluate(freed[0], np.concatenate([band, band + 0.3]))
    np.testing.assert_allclose(energies[: len(band)], energies[len(band) :], atol=1e-9)
    assert np.abs(forces).max() > 0.1
    np.testing.assert_allclose(forces.sum(axis=1), 0.0, atol=1e-9)


@pytest.mark.parametrize("which", CORRECTED)
def test_an_atom_a_lattice_vector_away_is_the_same_atom(
    which: str, request: pytest.FixtureRequest, au_pair: EndpointPair, band: FloatArray
) -> None:
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    cell, wrapped = au_pair.initial.cell, band.copy()
    wrapped[1:, 12] += cell[0]
    wrapped[2:, 10] -= 2 * cell[1] - cell[0]
    wrapped[3:, 0] += cell[1]
    plain, moved = surrogate.predict(au_pair.initial, band), surrogate.predict(au_pair.initial, wrapped)
    np.testing.assert_allclose(moved.energies_ev, plain.energies_ev, atol=1e-7)
    np.testing.assert_allclose(moved.forces, plain.forces, atol=1e-6)
    np.testing.assert_allclose(moved.members_ev, plain.members_ev, atol=1e-7)
    np.testing.assert_allclose(moved.covariance_ev2, plain.covariance_ev2, atol=1e-8)


@pytest.mark.parametrize("which", ["gp", "both"])
def test_a_hop_of_half_a_cell_does_not_flip(which: str, request: pytest.FixtureRequest, au_pair: EndpointPair) -> None:
    """The gold atom ends half a lattice vector from where it began; g must not tear there."""
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    step = au_pair.final.positions - au_pair.initial.positions
    places = au_pair.final.positions + np.array([-1e-3, 0.0, 1e-3])[:, None, None] * step
    before, at, beyond = surrogate.evaluate(au_pair.initial, places)[0]
    assert before == pytest.approx(at, abs=1e-4)
    assert beyond == pytest.approx(at, abs=1e-4)
    sigma = surrogate.posterior_sigma(au_pair.initial, places)
    assert sigma.max() < 1e-3


def _looseness(labels: tuple[Label, ...]) -> FloatArray:
    return np.array([1.0 + (label_fmax(label) or 0.0) / LOOSE_FORCE_EV_PER_ANG for label in labels])


@pytest.mark.parametrize("which", WITH_G)
def test_g_reproduces_labels_to_their_noise(
    which: str, request: pytest.FixtureRequest, au_pair: EndpointPair, labels: tuple[Label, ...]
) -> None:
    """Energies and forces; a label far from rest is fitted more loosely."""
    surrogate: MaceSurrogate = request.getfixturevalue(which)
    assert surrogate.correction is not None
    hyper = surrogate.correction.hyper
    energies, forces = surrogate.evaluate(au_pair.initial, np.array([label.structure.positions for label in labels]))
    truth = np.array([label.energy_ev for label in labels])
    free = ~au_pair.initial.fixed
    loose = _looseness(labels)
    off = np.abs((energies - energies[0]) - (truth - truth[0]))
    assert (off < 4 * loose * hyper.energy_noise_ev).all()
    for force, label, factor in zip(forces, labels, loose, strict=True):
        assert label.forces is not None
        assert np.sqrt(((force - label.forces)[free] ** 2).mean()) < 2 * factor * hyper.force_noise_ev_per_ang
    assert hyper.force_noise_ev_per_ang < 0.1


def test_sigma_of_g_grows_with_distance_and_falls_at_labels(
    gp: MaceSurrogate,
    au_pair: EndpointPair,
    labels: tuple[Label, ...],
    band: FloatArray,
    label_of: Callable[..., Label],
) -> None:
    direction = np.where(au_pair.initial.fixed, 0.0, np.random.default_rng(5).standard_normal(band[0].shape))
    direction /= np.linalg.norm(direction)
    away = au_pair.initial.positions + np.linspace(0.0, 2.0, 6)[:, None, None] * direction
    sigma = gp.posterior_sigma(au_pair.initial, away)
    assert sigma[0] == 0.0
    assert (np.diff(sigma) > 0).all()
    at_labels = gp.posterior_sigma(au_pair.initial, np.array([label.structure.positions for label in labels]))
    assert gp.correction is not None
    noise = gp.correction.hyper.energy_noise_ev * _looseness(labels)
    assert (at_labels[1:] < np.hypot(noise[1:], noise[0])).all(), "a measurement leaves no more than its own noise"
    assert at_labels.max() < 0.1 * sigma[-1]
    learned = with_correction(gp, Dataset(labels=(*labels, label_of(au_pair.initial.moved(away[3])))), "gp")
    assert learned.posterior_sigma(au_pair.initial, away)[3] < 0.2 * sigma[3]


def test_atoms_without_a_label_have_no_g(gp: MaceSurrogate, au_pair: EndpointPair, band: FloatArray) -> None:
    """The slab without its gold: its model and nothing more, as uncertain as before any label."""
    whole = au_pair.initial
    slab = replace(whole, numbers=whole.numbers[:-1], positions=whole.positions[:-1], fixed=whole.fixed[:-1])
    energies, forces = gp.evaluate(slab, band[:, :-1])
    bare_energies, bare_forces = replace(gp, correction=None, known={}).evaluate(slab, band[:, :-1])
    np.testing.assert_array_equal(energies, bare_energies)
    np.testing.assert_array_equal(forces, bare_forces)
    away = slab.positions + np.array([0.0, 20.0])[:, None, None] * ~slab.fixed
    assert gp.correction is not None
    expected = 2**0.5 * gp.correction.hyper.amplitude_ev
    assert gp.posterior_sigma(slab, away)[1] == pytest.approx(expected, rel=1e-3)
