"""Sigmas: differences, not absolutes; a factor that makes them honest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alcore.correction import ENERGY_NOISE_EV
from alcore.types import Calibration, CommitteePrediction, FloatArray, LabelKind, Residual
from alcore.uncertainty import OVER_TRAINED, OVER_UNTRAINED, calibrate, calibrated, combined, relative_sigmas


def _prediction(members: FloatArray, covariance: FloatArray | None = None) -> CommitteePrediction:
    n = members.shape[1]
    return CommitteePrediction(
        energies_ev=np.zeros(n),
        forces=np.zeros((n, 1, 3)),
        members_ev=members,
        by_lead_ev={},
        covariance_ev2=np.zeros((n, n)) if covariance is None else covariance,
    )


def _residual(error: float, sigma: float, kind: LabelKind = "saddle") -> Residual:
    return Residual(
        key="k",
        path="p",
        kind=kind,
        generation=1,
        predicted_ev=error,
        labelled_ev=0.0,
        sigma_committee_ev=0.6 * sigma,
        sigma_posterior_ev=0.8 * sigma,
        sigma_ev=0.0,
        fmax_ev_per_ang=0.0,
    )


def test_identical_members_have_no_spread_and_offsets_are_none() -> None:
    energies = np.array([0.0, 0.3, 0.1])
    for members in (np.stack([energies] * 3), np.stack([energies, energies + 100.0])):
        committee, posterior = relative_sigmas(_prediction(members))
        np.testing.assert_allclose(committee, 0.0, atol=1e-12)
        np.testing.assert_allclose(posterior, 0.0)


def test_spread_is_that_of_differences_with_one_degree_less() -> None:
    members = np.array([[0.0, 1.0], [0.5, 2.5]])
    committee, _ = relative_sigmas(_prediction(members))
    assert committee[1] == pytest.approx(np.std([1.0, 2.0], ddof=1))
    assert relative_sigmas(_prediction(members[:1]))[0].tolist() == [0.0, 0.0]
    assert relative_sigmas(_prediction(np.zeros((0, 2))))[0].tolist() == [0.0, 0.0]


@given(st.integers(0, 1000), st.integers(0, 3))
def test_posterior_is_that_of_the_difference(seed: int, anchor: int) -> None:
    root = np.random.default_rng(seed).standard_normal((4, 4))
    _, posterior = relative_sigmas(_prediction(np.zeros((0, 4)), root @ root.T), anchor)
    expected = np.linalg.norm(root - root[anchor], axis=1)
    np.testing.assert_allclose(posterior, expected, atol=1e-6)
    assert posterior[anchor] == 0.0


def test_parts_and_noise_add_in_quadrature() -> None:
    assert combined(0.03, 0.04) == pytest.approx(0.05, rel=1e-3)
    assert combined(0.0, 0.0) == pytest.approx(ENERGY_NOISE_EV)


@pytest.mark.parametrize("others", [OVER_TRAINED, OVER_UNTRAINED])
def test_without_residuals_of_its_own_a_run_relies_on_others_and_says_so(others: Calibration) -> None:
    found = calibrate([], others)
    assert (found.factor, found.n_residuals) == (others.factor, 0)
    assert found.source == (
        f"{others.factor:g} from {others.n_residuals} residuals of {others.source}, none of its own yet"
    )
    assert others.source in calibrate([_residual(0.0, 0.05)], others).source


@given(st.floats(1.0, 30.0), st.integers(0, 1000))
def test_many_residuals_find_their_own_scale(scale: float, seed: int) -> None:
    """The factor tends to the rms of |error| / sigma."""
    rng = np.random.default_rng(seed)
    scores = scale * rng.standard_normal(2000)
    found = calibrate([_residual(z * 0.05, 0.05) for z in scores])
    assert found.factor == pytest.approx(np.sqrt((scores**2).mean()), rel=0.03)
    assert found.n_residuals == 2000


def test_collapsed_atoms_do_not_make_every_saddle_uncertain() -> None:
    """One label of two atoms on top of each other, 24 sigma off, kept a run from being sure for fifteen labels."""
    sound = [_residual(0.05, 0.05)] * 3
    before, after = calibrate(sound), calibrate([*sound, _residual(-10.0, 0.4, "uncertain")])
    assert after.factor == before.factor
    assert after.astray > 2 * before.astray
    assert after.n_residuals == 4


def test_a_band_that_did_not_converge_has_a_factor_of_its_own() -> None:
    both = Calibration(factor=1.5, astray=4.0)
    assert calibrated(0.0, 0.1, both) == pytest.approx(0.15, rel=1e-3)
    assert calibrated(0.0, 0.1, both, astray=True) == pytest.approx(0.4, rel=1e-3)


def test_one_lucky_label_does_not_make_it_sure() -> None:
    lucky = calibrate([_residual(0.0, 0.05)], OVER_UNTRAINED).factor
    assert 0.8 * OVER_UNTRAINED.factor < lucky < OVER_UNTRAINED.factor
    assert calibrate([_residual(0.5, 0.05)]).factor > 4.0


@given(st.floats(0.5, 20.0), st.floats(0, 1), st.floats(0, 1))
def test_calibrated_sigma_is_never_below_the_raw_one_scaled(factor: float, committee: float, posterior: float) -> None:
    sigma = float(calibrated(committee, posterior, Calibration(factor=factor)))
    assert sigma >= factor * np.hypot(committee, posterior) * (1 - 1e-12)
    assert sigma > 0.0


def test_a_committee_is_forgiven_what_it_has_learned_since() -> None:
    """Far off before its first trainings, right ever after; a surface that is not trained anew is not."""

    def factor(lead: str) -> float:
        wrong, right = _residual(0.5, 1e-5), _residual(0.01, 0.01)
        told = [replace(r, by_lead_ev={lead: r.predicted_ev}) for r in (wrong, *[right] * 15)]
        return calibrate(told).factor

    assert factor("committee") < 2.0
    assert factor("prior") > 50.0


def test_a_prediction_that_stated_no_uncertainty_does_not_count() -> None:
    silent = _residual(0.5, 0.0)
    assert calibrate([silent]) == calibrate([])
    assert calibrate([silent, _residual(0.05, 0.05)]).factor == calibrate([_residual(0.05, 0.05)]).factor
