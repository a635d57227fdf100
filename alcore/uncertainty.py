"""From raw spreads to an honest sigma.

Two raw sigmas are kept apart: the committee's spread and the correction's posterior. They are combined in quadrature
and multiplied by one factor, learned from the loop's own residuals: each label is predicted before it is trained on,
so |error| / sigma is a fair test. The label noise is added after that. The factor is the scale of the posterior of a
Gaussian error model with an inverse-gamma prior (Gelman et al., *Bayesian Data Analysis*, sec. 2.6) that other runs
have set, so a run with few residuals of its own relies on theirs, and one lucky label does not make it small. Bands
that did not converge, and images asked for because they are the least certain, have a factor of their own: what a model
says of collapsed atoms tells nothing of its saddles, and where it is least certain it is most wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alcore.correction import ENERGY_NOISE_EV
from alcore.types import Calibration, CommitteePrediction, FloatArray, Residual

ASTRAY = 5.5
"""The factor of what was asked because it was uncertain, over any starting model: too few (20) to tell them apart."""
OVER_TRAINED = Calibration(factor=1.0, astray=ASTRAY, n_residuals=34, source="other runs from trained models")
OVER_UNTRAINED = Calibration(factor=1.3, astray=ASTRAY, n_residuals=113, source="other runs from untrained models")
"""What makes at least two thirds of the residuals of the benchmark's development half (``tests/benchmarks/labels``) lie
within one sigma, over a trained starting model and over an untrained one, where errors have heavier tails."""
FORGETTING = 0.8
"""Of its weight that a committee's residual keeps when the next one comes: it was trained anew since. One that began
40 of its sigmas off would else never be sure again. (On the development half no coverage changes by more than 1 %.)"""
WILD = 5.0
"""Times the factor of other runs that a committee's residual counts as at most: members that have learned next to
nothing agree on it (hundreds of sigmas were seen), which tells nothing of what they say later."""
OTHERS_WEIGHT = 3.0
"""Residuals of its own that a run holds against those of others: hops differ more than their labels do."""


def relative_sigmas(prediction: CommitteePrediction, anchor: int = 0) -> tuple[FloatArray, FloatArray]:
    """Committee and posterior sigma (uncalibrated, eV) of each energy relative to image ``anchor``, ``(n_images,)``."""
    covariance = prediction.covariance_ev2
    variance = np.diag(covariance) + covariance[anchor, anchor] - 2 * covariance[anchor]
    posterior = np.sqrt(np.maximum(variance, 0.0))
    members = prediction.members_ev
    if len(members) < 2:
        return np.zeros(members.shape[1]), posterior
    return (members - members[:, [anchor]]).std(axis=0, ddof=1), posterior


def of_lead(committee_ev: FloatArray | float, lead: str) -> FloatArray:
    """The committee's spread where the committee leads, else zero: it says nothing about a surface it is no part of."""
    return np.multiply(committee_ev, lead == "committee")


def combined(committee_ev: FloatArray | float, posterior_ev: FloatArray | float) -> FloatArray:
    """Raw sigma: both parts and the label noise in quadrature, eV."""
    return np.asarray(np.sqrt(np.square(committee_ev) + np.square(posterior_ev) + ENERGY_NOISE_EV**2))


def calibrate(residuals: Sequence[Residual], others: Calibration = OVER_UNTRAINED) -> Calibration:
    """The factors that make ``residuals`` look Gaussian; the more there are, the less what ``others`` found counts.

    A prediction that stated no uncertainty (a bare model, before there is a committee) tells nothing of its honesty.
    """
    stated = [r for r in residuals if of_lead(r.sigma_committee_ev, r.lead) > 0 or r.sigma_posterior_ev > 0]
    scores = np.array(
        [r.error_ev / float(combined(of_lead(r.sigma_committee_ev, r.lead), r.sigma_posterior_ev)) for r in stated]
    )
    is_astray = np.array([r.kind == "uncertain" for r in stated], dtype=bool)
    keeps = np.array([FORGETTING if r.by_lead_ev and r.lead == "committee" else 1.0 for r in stated])
    factor, astray = (
        _scale(scores[mine], keeps[mine], theirs)
        for mine, theirs in ((~is_astray, others.factor), (is_astray, others.astray))
    )
    theirs = f"{others.factor:g} from {others.n_residuals} residuals of {others.source}"
    if not len(scores):
        return Calibration(factor=factor, astray=astray, n_residuals=0, source=f"{theirs}, none of its own yet")
    rms = float(np.sqrt((scores**2).mean()))
    return Calibration(
        factor=factor,
        astray=astray,
        n_residuals=len(scores),
        source=f"{len(scores)} residuals of its own (rms z {rms:.1f}) and {theirs}",
    )


def _scale(scores: FloatArray, keeps: FloatArray, others_factor: float) -> float:
    """``keeps``: what is left of a residual's weight when the next one comes, ``(n_residuals,)``."""
    weights = keeps ** np.arange(len(scores))[::-1]
    bounded = np.where(keeps < 1, np.minimum(np.abs(scores), WILD * others_factor), scores)
    total = OTHERS_WEIGHT * others_factor**2 + float((weights * bounded**2).sum())
    return float(np.sqrt(total / (OTHERS_WEIGHT + weights.sum())))


def calibrated(
    committee_ev: FloatArray | float,
    posterior_ev: FloatArray | float,
    calibration: Calibration,
    *,
    astray: bool = False,
) -> FloatArray:
    """Calibrated sigma in eV. The factor corrects the model's own sigmas; the label noise is what it is, and stays.

    Args:
        astray: of a band that did not converge, or of what is asked because it is uncertain.
    """
    spread = np.hypot(committee_ev, posterior_ev)
    return np.asarray(np.hypot((calibration.astray if astray else calibration.factor) * spread, ENERGY_NOISE_EV))
