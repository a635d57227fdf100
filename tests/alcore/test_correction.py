"""The closed-form correction: it finds known weights, and its sigma is a posterior's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alcore.correction import ENERGY_NOISE_EV, Correction, Design, energy_noise_ev, fit_correction
from alcore.types import FloatArray

N_FEATURES = 12


def _problem(
    seed: int, n_labels: int = 10, force_noise: float = 0.01, rows_a_label: int = 9
) -> tuple[Design, FloatArray, FloatArray, FloatArray]:
    """Random rows, the weights behind them, and what energies and forces they give."""
    rng = np.random.default_rng(seed)
    design = Design(
        energy=rng.standard_normal((n_labels, N_FEATURES)),
        groups=np.zeros(n_labels, dtype=np.int64),
        forces=rng.standard_normal((rows_a_label * n_labels, N_FEATURES)),
    )
    weights = rng.standard_normal(N_FEATURES)
    energies = design.energy @ weights + ENERGY_NOISE_EV * rng.standard_normal(n_labels)
    forces = design.forces @ weights + force_noise * rng.standard_normal(len(design.forces))
    return design, weights, energies, forces


def _fit(design: Design, energies: FloatArray, forces: FloatArray) -> Correction:
    return fit_correction(design, energies[None], forces[None], energies, forces)


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_known_weights_are_recovered_within_their_posterior(seed: int) -> None:
    design, weights, energies, forces = _problem(seed)
    found = _fit(design, energies, forces)
    deviation = found.weights[0] - weights
    chi2 = float(deviation @ np.linalg.solve(found.covariance, deviation)) / N_FEATURES
    assert chi2 < 5.0
    assert np.abs(deviation).max() < 0.02
    assert 0.003 < found.force_noise_ev_per_ang < 0.03
    assert 0.1 < found.precision < 10.0


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.floats(-1000, 1000), st.floats(-1000, 1000))
def test_offset_of_a_composition_does_not_matter(seed: int, first: float, second: float) -> None:
    design, _, energies, forces = _problem(seed)
    design = replace(design, groups=np.repeat([0, 1], 5))
    shifted = energies + np.repeat([first, second], 5)
    plain, moved = _fit(design, energies, forces), _fit(design, shifted, forces)
    np.testing.assert_allclose(moved.weights, plain.weights, atol=1e-5)
    np.testing.assert_allclose(np.diag(moved.covariance), np.diag(plain.covariance), rtol=0.02)


def test_posterior_solves_the_normal_equations() -> None:
    """Bishop, eqs. 3.53 and 3.54, with the offset taken out by centring."""
    design, _, energies, forces = _problem(3)
    found = _fit(design, energies, forces)
    rows = design.energy - design.energy.mean(axis=0)
    target = energies - energies.mean()
    energy_noise = energy_noise_ev(found.force_noise_ev_per_ang)
    precision = (
        found.precision * np.eye(N_FEATURES)
        + rows.T @ rows / energy_noise**2
        + design.forces.T @ design.forces / found.force_noise_ev_per_ang**2
    )
    np.testing.assert_allclose(np.linalg.inv(precision), found.covariance, rtol=1e-6, atol=1e-14)
    moment = rows.T @ target / energy_noise**2 + design.forces.T @ forces / found.force_noise_ev_per_ang**2
    np.testing.assert_allclose(np.linalg.solve(precision, moment), found.weights[0], atol=1e-8)


def test_energies_are_interpolated_within_their_noise() -> None:
    design, _, energies, forces = _problem(1, n_labels=6)
    found = _fit(design, energies, forces)
    fitted = design.energy @ found.weights[0]
    np.testing.assert_allclose(fitted - fitted[0], energies - energies[0], atol=4 * ENERGY_NOISE_EV)


def test_sigma_falls_with_labels_and_is_noise_at_one() -> None:
    design, _, energies, forces = _problem(2, n_labels=8, rows_a_label=1)
    probe = np.random.default_rng(0).standard_normal((5, N_FEATURES))
    sigmas = []
    for n in (2, 4, 8):
        part = Design(energy=design.energy[:n], groups=design.groups[:n], forces=design.forces[:n])
        found = _fit(part, energies[:n], forces[:n])
        sigmas.append(np.sqrt(np.diag(found.energy_covariance(probe - design.energy[0]))))
        at_label = found.energy_covariance(design.energy[[1]] - design.energy[0])[0, 0]
        assert np.sqrt(at_label) < 2 * energy_noise_ev(found.force_noise_ev_per_ang)
    assert sigmas[0].mean() > sigmas[1].mean() > sigmas[2].mean()


def test_a_loose_label_counts_less() -> None:
    """The same contradiction pulls a tight label's fit further than a loose one's."""
    design, _, energies, forces = _problem(4)
    wrong = energies + np.where(np.arange(len(energies)) == 0, 0.1, 0.0)
    pulled = []
    for looseness in (1.0, 10.0):
        loose = replace(design, energy_looseness=np.where(np.arange(len(energies)) == 0, looseness, 1.0))
        pulled.append(np.linalg.norm(_fit(loose, wrong, forces).weights - _fit(loose, energies, forces).weights))
    assert pulled[1] < 0.5 * pulled[0]


def test_sigma_rests_on_residuals_of_a_model_that_saw_no_label() -> None:
    """A member that fits its own labels does not make the correction sure of itself."""
    design, _, energies, forces = _problem(4)
    honest = fit_correction(design, energies[None], forces[None], energies, forces)
    trained = fit_correction(design, 0.01 * energies[None], 0.01 * forces[None], energies, forces)
    np.testing.assert_allclose(trained.covariance, honest.covariance)
    np.testing.assert_allclose(trained.weights, 0.01 * honest.weights, atol=1e-10)


def test_each_model_has_weights_of_its_own() -> None:
    design, _, energies, forces = _problem(5)
    both = fit_correction(design, np.stack([energies, -energies]), np.stack([forces, -forces]), energies, forces)
    np.testing.assert_allclose(both.weights[0], -both.weights[1], atol=1e-10)
    assert both.weights.shape == (2, N_FEATURES)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_evidence_finds_the_size_of_the_weights(scale: float) -> None:
    design, _, energies, forces = _problem(6, n_labels=20)
    small = _fit(design, scale * energies, scale * forces)
    assert small.precision == pytest.approx(scale**-2, rel=2.0)


def test_one_label_is_enough_to_begin() -> None:
    design, _, energies, forces = _problem(7, n_labels=1)
    found = _fit(design, energies, forces)
    assert np.isfinite(found.weights).all()
    assert (np.linalg.eigvalsh(found.covariance) > 0).all()


def test_what_only_huge_weights_could_explain_becomes_noise() -> None:
    """Features that hardly tell two places apart, and forces that differ there."""
    rng = np.random.default_rng(0)
    design = Design(
        energy=np.zeros((2, N_FEATURES)),
        groups=np.zeros(2, dtype=np.int64),
        forces=0.001 * rng.standard_normal((9, N_FEATURES)),
    )
    energies, forces = np.zeros(2), design.forces @ (30.0 * rng.standard_normal(N_FEATURES))
    free = _fit(design, energies, forces)
    bound = fit_correction(design, energies[None], forces[None], energies, forces, min_precision=10.0)
    assert np.abs(free.weights).max() > 10.0
    assert np.abs(bound.weights).max() < 1.0
    assert free.force_noise_ev_per_ang < 0.01
    assert bound.force_noise_ev_per_ang == pytest.approx(np.sqrt(np.mean(forces**2)), rel=0.2)
