"""Fitting a surrogate to labels: what is left over, what scales are found, and what two end states cannot say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from alcore.barrier import label_fmax
from alcore.correction import Hyper, Observations
from alcore.dataset import composition_groups
from alcore.mace import fitting
from alcore.mace.features import calm_basis
from alcore.mace.fitting import (
    AT_REST_EV_PER_ANG,
    CALM_TRAINED,
    CALM_UNTRAINED,
    LOOSE_FORCE_EV_PER_ANG,
    N_CALM,
    CorrectionName,
    hyper_priors,
    left_over,
    make_surrogate,
    model_residuals,
    with_correction,
    without_network,
)
from alcore.mace.network import make_networks
from alcore.mace.surrogate import MaceSurrogate, atoms_key
from alcore.neb import NebSpec, interpolate
from alcore.protocols import Potential
from alcore.types import Dataset, EndpointPair, FloatArray, Label, Structure

SCALE = 0.06
"""How near a few labels bring a scale: it shares the work with random features or g."""


@pytest.fixture(scope="module")
def band(au_pair: EndpointPair) -> FloatArray:
    return interpolate(au_pair, NebSpec(n_images=5))


@pytest.fixture(scope="module")
def rattled(au_pair: EndpointPair, band: FloatArray) -> list[Structure]:
    rng = np.random.default_rng(0)
    moved = np.where(au_pair.initial.fixed, 0.0, 0.05 * rng.standard_normal(band.shape))
    return [au_pair.initial.moved(place) for place in band + moved]


@pytest.fixture(scope="module")
def labels(rattled: list[Structure], label_of: Callable[..., Label]) -> tuple[Label, ...]:
    return tuple(label_of(rattled[image]) for image in (0, 2, 3, 6))


class _Sum:
    """A reference made of potentials and numbers that they are multiplied with."""

    def __init__(self, *terms: tuple[float, Potential]) -> None:
        self.terms = terms

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        parts = [(factor, *term.evaluate(template, positions)) for factor, term in self.terms]
        return sum(f * energies for f, energies, _ in parts), sum(f * forces for f, _, forces in parts)  # type: ignore[return-value]


def _label(potential: Potential, structure: Structure, key: str) -> Label:
    (energy,), (forces,) = potential.evaluate(structure, structure.positions[None])
    return Label(
        key=key,
        structure=structure,
        status="ok",
        fingerprint="f",
        calculator="model",
        energy_ev=float(energy) - 1234.5,
        forces=forces,
    )


def _labelled(potential: Potential, structures: Sequence[Structure]) -> Dataset:
    return Dataset(labels=tuple(_label(potential, s, f"{k:064x}") for k, s in enumerate(structures)))


def _make(
    model: Any, rattled: Sequence[Structure], correction: CorrectionName, pair: EndpointPair | None = None
) -> MaceSurrogate:
    """Over a trained model, or (given the hop) over an untrained one with the network of its end states."""
    networks = None if pair is None else make_networks([pair.initial, pair.final])
    rng = np.random.default_rng(0)
    return make_surrogate(model, rattled, rng, per_element=32, correction=correction, networks=networks)


def test_what_a_surrogate_is_made_of(
    untrained_model: Any, lively_model: Any, rattled: list[Structure], au_pair: EndpointPair
) -> None:
    for correction in ("none", "blr", "gp", "blr+gp"):
        trained = _make(lively_model, rattled, correction)
        untrained = _make(untrained_model, rattled, correction, au_pair)
        assert (bool(trained.networks), bool(untrained.networks)) == (False, True)
        for surrogate in (trained, untrained):
            assert (surrogate.features is not None) == ("blr" in correction)
            assert surrogate.correction is None
        assert (hyper_priors(correction).amplitude_ev is not None) == ("gp" in correction)


@pytest.mark.parametrize("with_network", [True, False])
def test_residuals_are_label_minus_model(
    with_network: bool,
    labels: tuple[Label, ...],
    rattled: list[Structure],
    lively_model: Any,
    untrained_model: Any,
    au_pair: EndpointPair,
) -> None:
    """The prior's first, then each member's; whatever correction there was is left out."""
    start = _make(lively_model, rattled, "blr+gp", au_pair if with_network else None)
    start = replace(start, members=(untrained_model,), lead="committee")
    fitted = with_correction(start, Dataset(labels=labels), "blr+gp")
    energies, forces = model_residuals(fitted, labels)
    assert energies.shape == (2, len(labels))
    for row, model in enumerate((lively_model, untrained_model)):
        alone = MaceSurrogate(prior=model, networks=start.networks)
        for k, label in enumerate(labels):
            energy, force = alone.evaluate(label.structure, label.structure.positions[None])
            assert label.energy_ev is not None
            assert label.forces is not None
            assert energies[row, k] == pytest.approx(label.energy_ev - energy[0], abs=1e-10)
            np.testing.assert_allclose(forces[k][row], (label.forces - force[0]).ravel(), atol=1e-10)
            assert left_over(alone, label)[0] == pytest.approx(energies[row, k], abs=1e-10)


def test_what_mace_learns_is_the_label_without_the_network(
    untrained_model: Any, labels: tuple[Label, ...], rattled: list[Structure], au_pair: EndpointPair
) -> None:
    surrogate = _make(untrained_model, rattled, "none", au_pair)
    bare = replace(surrogate, networks={})
    learned = without_network(surrogate, Dataset(labels=labels)).labels
    for label, less in zip(labels, learned, strict=True):
        energy, forces = left_over(surrogate, label)
        energy_left, forces_left = left_over(bare, less)
        assert energy_left == pytest.approx(energy, abs=1e-9)
        np.testing.assert_allclose(forces_left, forces, atol=1e-9)
        assert less.energy_ev != label.energy_ev
    for label, same in zip(labels, without_network(bare, Dataset(labels=labels)).labels, strict=True):
        assert same.energy_ev == label.energy_ev
        np.testing.assert_array_equal(same.forces, label.forces)


@pytest.mark.parametrize("correction", ["blr", "gp", "blr+gp"])
@pytest.mark.parametrize("wanted", [0.5, 1.6])
def test_the_scale_of_the_network_is_found(
    wanted: float, correction: CorrectionName, untrained_model: Any, rattled: list[Structure], au_pair: EndpointPair
) -> None:
    start = _make(untrained_model, rattled, correction, au_pair)
    bare = MaceSurrogate(prior=untrained_model)
    reference = _Sum((1.0 - wanted, bare), (wanted, replace(bare, networks=start.networks)))
    dataset = _labelled(reference, [rattled[k] for k in (0, 2, 3, 6)])
    found = with_correction(start, dataset, correction).describe()
    assert found["network_scale"] == pytest.approx(wanted, abs=SCALE)


@pytest.mark.parametrize("correction", ["blr", "gp", "blr+gp"])
def test_two_end_states_at_rest_say_nothing_of_the_path(
    correction: CorrectionName, lively_model: Any, rattled: list[Structure], au_pair: EndpointPair, band: FloatArray
) -> None:
    """A model that is right about them leaves nothing to explain, and is not called right everywhere for that."""
    start = _make(lively_model, rattled, correction)
    at_rest = _labelled(MaceSurrogate(prior=lively_model), [au_pair.initial, au_pair.final])
    found = with_correction(start, at_rest, correction)
    priors = hyper_priors(correction)
    assert found.correction is not None
    medians = {
        name: getattr(priors, name).median
        for name in ("precision", "force_noise_ev_per_ang", "amplitude_ev", "length_ang")
        if getattr(priors, name) is not None
    }
    assert found.correction.hyper == Hyper(**{name: pytest.approx(value) for name, value in medians.items()})
    far = band + np.array([0.0, 0.0, 1.5]) * ~au_pair.initial.fixed[-1:] * np.eye(len(band[0]))[-1][:, None]
    places = np.stack([au_pair.initial.positions, *far])
    assert found.posterior_sigma(au_pair.initial, places)[1:].min() > 0.1
    pulled = [
        replace(label, forces=label.forces + 2 * AT_REST_EV_PER_ANG * ~label.structure.fixed)
        for label in at_rest.labels
        if label.forces is not None
    ]
    informed = with_correction(start, Dataset(labels=tuple(pulled)), correction)
    assert informed.correction is not None
    assert informed.correction.hyper != found.correction.hyper


def test_forces_on_held_atoms_say_nothing(lively_model: Any, rattled: list[Structure], au_pair: EndpointPair) -> None:
    """They need not vanish at rest, and the correction is not asked to explain them."""
    start = _make(lively_model, rattled, "blr+gp")
    dataset = _labelled(MaceSurrogate(prior=lively_model), [au_pair.initial, rattled[2]])
    held = [
        replace(label, forces=label.forces + 3.0 * label.structure.fixed)
        for label in dataset.labels
        if label.forces is not None
    ]
    plain, other = (with_correction(start, d, "blr+gp") for d in (dataset, Dataset(labels=tuple(held))))
    for fitted in (plain, other):
        assert fitted.correction is not None
    positions = np.stack([s.positions for s in rattled])
    np.testing.assert_allclose(
        other.evaluate(au_pair.initial, positions)[0], plain.evaluate(au_pair.initial, positions)[0], atol=1e-9
    )


def test_data_of_other_atoms_have_a_g_of_their_own(
    lively_model: Any,
    rattled: list[Structure],
    au_pair: EndpointPair,
    labels: tuple[Label, ...],
    label_of: Callable[..., Label],
) -> None:
    """The bare slab's labels teach the linear part only, and their energies have a zero of their own."""
    whole = au_pair.initial
    slab = replace(whole, numbers=whole.numbers[:-1], positions=whole.positions[:-1], fixed=whole.fixed[:-1])
    start, positions = _make(lively_model, rattled, "blr+gp"), np.stack([s.positions for s in rattled])
    found = []
    for shift in (0.0, 500.0):
        given = Dataset(labels=(label_of(slab, energy_shift_ev=shift), *labels))
        assert composition_groups(given.labels).tolist() == [0, 1, 1, 1, 1]
        fitted = with_correction(start, given, "blr+gp")
        assert set(fitted.known) == {atoms_key(slab), atoms_key(whole)}
        assert [len(fitted.known[atoms_key(s)].local.covariance.places) for s in (slab, whole)] == [1, 4]
        found.append(fitted.evaluate(whole, positions)[0])
    np.testing.assert_allclose(np.diff(found[1]), np.diff(found[0]), atol=1e-5)


def test_a_label_that_was_wrapped_is_that_of_the_same_place(
    lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...]
) -> None:
    """Two labels of one geometry, the second with atoms on other sides of the cell."""
    again, cell = labels[1].structure, labels[1].structure.cell
    away = np.arange(len(again))[:, None] % 3 * cell[0] - np.arange(len(again))[:, None] % 2 * cell[1]
    start, positions, found = _make(lively_model, rattled, "gp"), np.stack([s.positions for s in rattled]), []
    for shift in (0.0, 1.0):
        twin = replace(labels[1], key="f" * 64, structure=again.moved(again.positions + shift * away))
        fitted = with_correction(start, Dataset(labels=(*labels, twin)), "gp")
        (known,) = fitted.known.values()
        np.testing.assert_allclose(known.local.covariance.places[4], known.local.covariance.places[1], atol=1e-9)
        found.append(fitted.predict(rattled[0], positions))
    np.testing.assert_allclose(found[1].energies_ev, found[0].energies_ev, atol=1e-4)
    np.testing.assert_allclose(found[1].covariance_ev2, found[0].covariance_ev2, rtol=0.005, atol=1e-8)


def test_no_label_no_correction(lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...]) -> None:
    start = _make(lively_model, rattled, "blr+gp")
    fitted = with_correction(start, Dataset(labels=labels), "blr+gp")
    for undone in (
        with_correction(fitted, Dataset(labels=()), "blr+gp"),
        with_correction(fitted, Dataset(labels=labels), "none"),
    ):
        assert undone.correction is None
        assert not undone.known
    assert set(fitted.rows) == {label.key for label in labels}


def test_atoms_that_are_all_held_can_be_labelled(
    lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...]
) -> None:
    """Data of single points, where nothing may move, next to a hop's."""
    held = replace(labels[0].structure, fixed=np.ones_like(labels[0].structure.fixed))
    data = Dataset(labels=(replace(labels[0], key="e" * 64, structure=held), *labels))
    fitted = with_correction(_make(lively_model, rattled, "blr+gp"), data, "blr+gp")
    assert fitted.known[atoms_key(held)].local.covariance.places.shape == (1, 0)
    assert np.isfinite(fitted.evaluate(rattled[0], rattled[0].positions[None])[0]).all()


def test_a_frame_without_constraints_teaches_the_hop_that_has_some(
    lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...]
) -> None:
    """What OUTCAR and vasprun.xml give: the same atoms, none held. Not where a held atom has moved."""
    assert labels[1].structure.fixed.any()
    loose = replace(labels[1].structure, fixed=np.zeros_like(labels[1].structure.fixed))
    known = (labels[0], replace(labels[1], key="f" * 64, structure=loose), *labels[2:])
    fitted, wanted = (
        with_correction(_make(lively_model, rattled, "gp"), Dataset(labels=given), "gp") for given in (known, labels)
    )
    places = np.stack([structure.positions for structure in rattled])
    found, exact = (s.posterior_sigma(rattled[0], places) for s in (fitted, wanted))
    np.testing.assert_allclose(found, exact, rtol=1e-3, atol=1e-5)
    elsewhere = replace(known[1], structure=loose.moved(loose.positions + 0.01))
    other = with_correction(_make(lively_model, rattled, "gp"), Dataset(labels=(labels[0], elsewhere)), "gp")
    assert set(other.known) == {atoms_key(labels[0].structure), atoms_key(loose)}


@pytest.mark.parametrize("over_network", [True, False])
def test_weights_are_as_calm_as_the_prior_allows(
    over_network: bool, lively_model: Any, rattled: list[Structure], au_pair: EndpointPair
) -> None:
    made = _make(lively_model, rattled, "blr", au_pair if over_network else None)
    assert made.features is not None
    plain = replace(made.features, basis=torch.eye(made.features.n_features, dtype=torch.float64))
    chosen = [rattled[k] for k in np.unique(np.linspace(0, len(rattled) - 1, N_CALM).round().astype(int))]
    rough = replace(made, features=plain, networks={})
    forces = np.concatenate([rough.feature_rows(s)[1][~s.fixed.ravel()] for s in chosen])
    share = CALM_UNTRAINED if over_network else CALM_TRAINED
    np.testing.assert_allclose(made.features.basis.numpy(), calm_basis(forces, share), atol=1e-8)


def test_a_geometry_far_from_any_path_is_fitted_loosely(
    lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Observations] = []
    keep = fitting.fit_correction

    def watched(blocks: Sequence[Observations], *given: Any, **more: Any) -> Any:
        seen.extend(blocks)
        return keep(blocks, *given, **more)

    monkeypatch.setattr(fitting, "fit_correction", watched)
    with_correction(_make(lively_model, rattled, "blr"), Dataset(labels=labels), "blr")
    wanted = [1 + (label_fmax(label) or 0.0) / LOOSE_FORCE_EV_PER_ANG for label in labels]
    assert seen[0].looseness.tolist() == pytest.approx(wanted)
    assert max(wanted) > 2 * min(wanted)


@pytest.mark.parametrize(("fmax", "looseness"), [(0.0, 1.0), (1.0, 2.0), (10.0, 11.0), (20.0, 81.0), (50.0, 1251.0)])
def test_collapsed_atoms_are_hardly_fitted_at_all(labels: tuple[Label, ...], fmax: float, looseness: float) -> None:
    """One such label among others set the scale of everything: ten more were needed to mend that."""
    pull = np.zeros_like(labels[0].structure.positions)
    pull[-1, 2] = fmax
    label = replace(labels[0], forces=pull)
    assert fitting.looseness_of(label) == pytest.approx(looseness)


def test_an_atom_that_hops_more_than_half_a_cell_is_not_unwrapped(
    lively_model: Any, rattled: list[Structure], labels: tuple[Label, ...]
) -> None:
    """Its labels' places span the hop; one that was wrapped by a whole cell lies where it was."""
    first = labels[0].structure
    edge = np.linalg.norm(first.cell[0])
    for share, span in ((0.6, 0.6), (1.0, 0.0)):
        far = first.positions.copy()
        far[-1] += share * first.cell[0]
        data = Dataset(labels=(labels[0], replace(labels[1], key="d" * 64, structure=first.moved(far))))
        fitted = with_correction(_make(lively_model, rattled, "gp"), data, "gp")
        places = fitted.known[atoms_key(first)].local.covariance.places
        assert np.linalg.norm(places[1] - places[0]) == pytest.approx(span * edge, abs=1e-6)


def test_the_sign_of_a_cells_zero_does_not_matter(labels: tuple[Label, ...]) -> None:
    structure = labels[0].structure
    mirrored = replace(structure, cell=np.where(structure.cell == 0.0, -0.0, structure.cell))
    assert atoms_key(mirrored) == atoms_key(structure)
    assert atoms_key(replace(structure, charge=1.0)) != atoms_key(structure)
