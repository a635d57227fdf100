"""Closed-form Bayesian linear regression of what the model leaves unexplained, on energies and forces at once.

E(x) = E_model(x) + φ(x)·w + c, with w ~ N(0, α⁻¹) and an offset c of wide prior; forces are −∂φ/∂x·w. The posterior is
Gaussian with covariance Σ = (α 1 + Φᵀ Λ Φ)⁻¹ (Bishop, *Pattern Recognition and Machine Learning*, eqs. 3.49–3.54), and
α and the force noise are those of highest evidence (eq. 3.86; the offset is profiled out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg, optimize

from alcore.types import FloatArray, IntArray

ENERGY_NOISE_EV = 1.0e-3
"""Noise of a reference energy, and the floor of what features can represent."""
NOISE_LENGTH_ANG = 0.05
"""What the features cannot represent in forces they cannot in energies either: energy noise per force noise."""
FORCE_NOISE_FLOOR = 5.0e-3
"""eV/Å; forces of a converged calculation are rarely better."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """Rows of the regression.

    Attributes:
        energy: features of each labelled structure, ``(n_labels, n_features)``.
        groups: composition each label belongs to (each has an offset of its own), ``(n_labels,)``.
        forces: −∂φ/∂x for every free coordinate of every label, ``(n_force_rows, n_features)``.
        energy_looseness, force_looseness: factor on the noise of each row, ``(n_labels,)`` and ``(n_force_rows,)``: a
            geometry far from any path need not be reproduced as well as one on it.
    """

    energy: FloatArray
    groups: IntArray
    forces: FloatArray
    energy_looseness: FloatArray | float = 1.0
    force_looseness: FloatArray | float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """A fitted correction.

    Attributes:
        weights: posterior mean for each member, ``(n_members, n_features)``.
        covariance: posterior covariance of the weights, ``(n_features, n_features)``.
        precision: α of the evidence.
        force_noise_ev_per_ang: force noise of the evidence.
        log_evidence: at these values.
    """

    weights: FloatArray
    covariance: FloatArray
    precision: float
    force_noise_ev_per_ang: float
    log_evidence: float

    def energy_covariance(self, features: FloatArray) -> FloatArray:
        """Posterior covariance of φ·w in eV² for ``features`` ``(n, n_features)``; only differences of energies mean
        something, so pass features relative to a common anchor."""
        return np.asarray(features @ self.covariance @ features.T)


def _whitened(design: Design, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Energy rows and values over their looseness, each composition's weighted mean (its offset) removed."""
    rows, residual = np.array(design.energy), np.array(values)
    loose = np.broadcast_to(design.energy_looseness, len(rows))
    for group in np.unique(design.groups):
        mine = design.groups == group
        weight = loose[mine] ** -2.0 / (loose[mine] ** -2.0).sum()
        rows[mine] -= weight @ rows[mine]
        residual[..., mine] -= (residual[..., mine] @ weight)[..., None]
    return rows / loose[:, None], residual / loose


def energy_noise_ev(force_noise_ev_per_ang: float) -> float:
    """Noise of an energy on a path, from that of the forces."""
    return float(np.hypot(ENERGY_NOISE_EV, NOISE_LENGTH_ANG * force_noise_ev_per_ang))


def fit_correction(
    design: Design,
    energy_residuals_ev: FloatArray,
    force_residuals: FloatArray,
    unseen_energy_residuals_ev: FloatArray,
    unseen_force_residuals: FloatArray,
    *,
    min_precision: float = 1e-4,
    max_precision: float = 100.0,
) -> Correction:
    """Fits one posterior mean a model, and one covariance for all.

    Args:
        design: the rows.
        energy_residuals_ev: label minus model, ``(n_models, n_labels)``.
        force_residuals: label minus model for the design's force rows in eV/Å, ``(n_models, n_force_rows)``.
        unseen_energy_residuals_ev, unseen_force_residuals: the same against a model that never saw the labels,
            ``(n_labels,)`` and ``(n_force_rows,)``. The evidence, hence every sigma, rests on these: residuals of
            labels a model was trained on are small for the wrong reason.
        min_precision: lower bound of α. Without one the evidence explains by huge weights what comes from beyond the
            model's reach; with it that becomes noise.
        max_precision: upper bound of α. Two end states at rest leave nothing to explain, and the evidence would then
            call a model that knows nothing perfect.
    """
    rows, unseen_energy = _whitened(design, unseen_energy_residuals_ev)
    force_loose = np.broadcast_to(design.force_looseness, len(design.forces))
    force_rows, unseen_force = design.forces / force_loose[:, None], unseen_force_residuals / force_loose
    gram_energy, gram_force = rows.T @ rows, force_rows.T @ force_rows
    moment_energy, moment_force = rows.T @ unseen_energy, force_rows.T @ unseen_force
    square_energy, square_force = float(unseen_energy @ unseen_energy), float(unseen_force @ unseen_force)
    n_features, n_forces, dof = rows.shape[1], len(force_rows), len(rows) - len(np.unique(design.groups))

    def precision_of(alpha: float, noise: float) -> FloatArray:
        return np.asarray(
            gram_energy / energy_noise_ev(noise) ** 2 + gram_force / noise**2 + alpha * np.eye(n_features)
        )

    def negative_log_evidence(log_hyper: FloatArray) -> float:
        alpha, noise = np.exp(log_hyper[0]), np.exp(log_hyper[1])
        energy_noise = energy_noise_ev(noise)
        factor = linalg.cho_factor(precision_of(alpha, noise), lower=True, overwrite_a=True)
        moment = moment_energy / energy_noise**2 + moment_force / noise**2
        misfit = square_energy / energy_noise**2 + square_force / noise**2 - moment @ linalg.cho_solve(factor, moment)
        log_det = 2 * np.log(np.diag(factor[0])).sum()
        log_noise = 2 * dof * np.log(energy_noise) + 2 * n_forces * log_hyper[1]
        return float(0.5 * (misfit + log_det - n_features * log_hyper[0] + log_noise))

    bounds = [(np.log(min_precision), np.log(max_precision)), (np.log(FORCE_NOISE_FLOOR), np.log(0.5))]
    best = min(
        (
            optimize.minimize(negative_log_evidence, [np.log(alpha), np.log(0.02)], bounds=bounds, method="L-BFGS-B")
            for alpha in (max(0.1, min_precision), min(10.0, max_precision))
        ),
        key=lambda result: float(result.fun),
    )
    alpha, noise = float(np.exp(best.x[0])), float(np.exp(best.x[1]))
    factor = linalg.cho_factor(precision_of(alpha, noise), lower=True)
    _, energies = _whitened(design, energy_residuals_ev)
    moment = energies @ rows / energy_noise_ev(noise) ** 2 + (force_residuals / force_loose) @ force_rows / noise**2
    return Correction(
        weights=linalg.cho_solve(factor, moment.T).T,
        covariance=linalg.cho_solve(factor, np.eye(n_features)),
        precision=alpha,
        force_noise_ev_per_ang=noise,
        log_evidence=-float(best.fun),
    )
