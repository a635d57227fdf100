"""Closed-form Bayesian correction of what the model leaves unexplained, fitted to energies and forces at once.

E(x) = E_model(x) + φ(x)·w + g(x) + c: w is Gaussian, g a Gaussian process over the places of the atoms (or none), c an
offset for each composition. All is Gaussian, so the posterior is closed (Rasmussen and Williams, *Gaussian Processes
for Machine Learning*, section 2.7; without g Bishop, *Pattern Recognition and Machine Learning*, eqs. 3.49 to 3.54).
The few hyper-parameters are those of highest evidence under broad log-normal priors (Bishop, section 3.5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from scipy import linalg, optimize

from alcore.gaussian_process import LabelCovariance, Matern
from alcore.types import FloatArray, IntArray

ENERGY_NOISE_EV = 1.0e-3
"""Noise of a reference energy, and the floor of what features can represent."""
NOISE_LENGTH_ANG = 0.05
"""What the features cannot represent in forces they cannot in energies either: energy noise per force noise."""
FORCE_NOISE_FLOOR = 5.0e-3
"""eV/Å; forces of a converged calculation are rarely better."""
OFFSET_STD_EV = 100.0
"""Of a composition's offset from the mean of its residuals."""
WITHIN = 8.0
"""Spreads of its prior that a hyper-parameter may be away from its median: a guard of the arithmetic."""
COARSENING = 10.0
"""What the evidence is divided by before it sets the hyper-parameters: forces of one label are no independent witnesses
of a model that is never quite true, and taken for such they overrule the priors at once (a coarsened posterior: Miller
and Dunson, J. Am. Stat. Assoc. 114, 1113 (2019))."""
TOLERANCE = 1e-6
"""Relative, of the log evidence: far below the 1 by which it matters."""
STEP = 1e-4
"""Of finite differences, in spreads: smaller ones drown in the rounding of the evidence, and the search stops early."""


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """Prior of a positive number: its median and the spread of its logarithm."""

    median: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class HyperPriors:
    """What is known of the hyper-parameters before any label.

    Attributes:
        precision: α of the random features' weights, eV⁻².
        force_noise_ev_per_ang: noise of the forces, with what neither φ nor g can represent.
        amplitude_ev, length_ang: of g; None for no g.
    """

    precision: LogNormal = LogNormal(median=5.0, spread=0.5)
    force_noise_ev_per_ang: LogNormal = LogNormal(median=0.02, spread=1.0)
    amplitude_ev: LogNormal | None = None
    length_ang: LogNormal | None = None


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """The hyper-parameters themselves; names as in ``HyperPriors``, no g where ``amplitude_ev`` is 0."""

    precision: float
    force_noise_ev_per_ang: float
    amplitude_ev: float = 0.0
    length_ang: float = 1.0

    @property
    def kernel(self) -> Matern | None:
        """Of g."""
        return Matern(amplitude_ev=self.amplitude_ev, length_ang=self.length_ang) if self.amplitude_ev else None

    @property
    def energy_noise_ev(self) -> float:
        """Noise of an energy on a path, from that of the forces."""
        return float(np.hypot(ENERGY_NOISE_EV, NOISE_LENGTH_ANG * self.force_noise_ev_per_ang))


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """Labels of the same atoms in the same cell, as the regression sees them.

    Attributes:
        place: of each label in the data set, ``(n_labels,)``.
        coordinates: the free ones in Å, ``(n_labels, n_coordinates)``.
        energy: φ of each label, ``(n_labels, n_features)``.
        forces: −∂φ/∂x for every free coordinate, ``(n_labels, n_coordinates, n_features)``.
        groups: composition each label belongs to, numbered over the whole data set, ``(n_labels,)``.
        looseness: factor on the noise of each label, ``(n_labels,)``: a geometry far from any path need not be
            reproduced as well as one on it.
    """

    place: IntArray
    coordinates: FloatArray
    energy: FloatArray
    forces: FloatArray
    groups: IntArray
    looseness: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Local:
    """Posterior of g for one set of atoms.

    Attributes:
        covariance: of its observations.
        energy_columns, force_columns: inverse covariance times the columns of φ and of the offsets.
        energy_pull, force_pull: inverse covariance times what is left of the labels, ``(n_models, n_labels)`` and
            ``(n_models, n_labels, n_coordinates)``: g(x) is the crossed covariance times these.
    """

    covariance: LabelCovariance
    energy_columns: FloatArray
    force_columns: FloatArray
    energy_pull: FloatArray
    force_pull: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Correction:
    """A fitted correction.

    Attributes:
        weights: posterior mean of w for each model, ``(n_models, n_features)``.
        root: lower Cholesky factor of the posterior precision of w and the offsets.
        hyper: hyper-parameters of highest evidence.
        log_evidence: at these.
        local: posterior of g, one for each ``Observations``; empty without g.
    """

    weights: FloatArray
    root: FloatArray
    hyper: Hyper
    log_evidence: float
    local: tuple[Local, ...] = ()

    def energy_covariance(
        self, features: FloatArray, coordinates: FloatArray | None = None, local: Local | None = None
    ) -> FloatArray:
        """Posterior covariance in eV² of the energies relative to the first, ``(n, n)``.

        Args:
            features: φ, ``(n, n_features)``.
            coordinates: free ones in Å, ``(n, n_coordinates)``; needed with g only.
            local: of these atoms; None where none of their labels is known.
        """
        columns = np.zeros((len(features), len(self.root)))
        columns[:, : features.shape[1]] = features - features[:1]
        kernel, spread = self.hyper.kernel, np.zeros((len(features),) * 2)
        if kernel is not None and coordinates is not None:
            value = kernel.profile(np.linalg.norm(coordinates[:, None] - coordinates[None], axis=2))[0]
            spread = value - value[:1] - value[:, :1] + value[0, 0]
            if local is not None:
                energy, force = local.covariance.crossed(coordinates)
                energy, force = energy - energy[:1], force - force[:1]
                known = local.covariance.whiten(energy.T, force.transpose(1, 2, 0))
                spread -= known.T @ known
                columns -= energy @ local.energy_columns + np.tensordot(force, local.force_columns, axes=2)
        half = linalg.solve_triangular(self.root, columns.T, lower=True)
        return np.asarray(spread + half.T @ half)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Normal:
    """Normal equations at one set of hyper-parameters: the gram of whitened columns, their product with whitened
    targets ``(n_columns, n_targets)``, the targets' own squares, and log |covariance|."""

    gram: FloatArray
    moment: FloatArray
    square: FloatArray
    log_det: float


def fit_correction(
    observations: Sequence[Observations],
    energies_ev: FloatArray,
    forces: Sequence[FloatArray],
    *,
    precisions: FloatArray,
    priors: HyperPriors,
    informed: bool = True,
) -> Correction:
    """Fits one posterior mean a model, and one covariance for all.

    Args:
        observations: the labels, by what atoms they are of.
        energies_ev: label minus model, ``(n_models, n_labels)``. The first model never saw the labels: the evidence,
            hence every sigma, rests on its residuals, since those of labels a model was trained on are small for the
            wrong reason.
        forces: likewise in eV/Å, ``(n_models, n_labels, n_coordinates)`` for each of ``observations``.
        precisions: of each feature's weight, ``(n_features,)``; NaN where α rules.
        priors: of the hyper-parameters.
        informed: False where the labels cannot say how wrong the model may be (two end states at rest leave nothing
            to explain, and the evidence would call a model that knows nothing perfect): the medians are taken.
    """
    observations = [_with_offsets(block, observations) for block in observations]
    energies_ev = _centred(energies_ev, observations)
    n_offsets = observations[0].energy.shape[1] - len(precisions)
    precisions = np.concatenate([precisions, np.full(n_offsets, OFFSET_STD_EV**-2.0)])
    pure = _grams(observations, energies_ev[:1], [force[:1] for force in forces]) if not priors.amplitude_ev else None
    hyper, log_evidence = _best(
        priors,
        lambda hyper: _log_evidence(
            hyper,
            precisions,
            pure(hyper) if pure else _normal(hyper, observations, energies_ev[:1], [force[:1] for force in forces]),
        ),
        max_iterations=25 if informed else 0,
    )
    normal = _normal(hyper, observations, energies_ev, forces)
    root = linalg.cholesky(normal.gram + np.diag(_diagonal(precisions, hyper)), lower=True)
    weights = linalg.cho_solve((root, True), normal.moment).T
    return Correction(
        weights=weights[:, : weights.shape[1] - n_offsets],
        root=root,
        hyper=hyper,
        log_evidence=log_evidence,
        local=_locals(hyper, observations, energies_ev, forces, weights) if hyper.kernel else (),
    )


def _with_offsets(block: Observations, observations: Sequence[Observations]) -> Observations:
    """A column for each composition after the features."""
    n_groups = 1 + max(int(other.groups.max()) for other in observations)
    flat = np.zeros((*block.forces.shape[:2], n_groups))
    return Observations(
        place=block.place,
        coordinates=block.coordinates,
        energy=np.concatenate([block.energy, np.eye(n_groups)[block.groups]], axis=1),
        forces=np.concatenate([block.forces, flat], axis=2),
        groups=block.groups,
        looseness=block.looseness,
    )


def _centred(energies_ev: FloatArray, observations: Sequence[Observations]) -> FloatArray:
    """Without each composition's mean: the offsets need only know what differs from it."""
    groups = np.zeros(energies_ev.shape[1], dtype=np.int64)
    for block in observations:
        groups[block.place] = block.groups
    centred = np.array(energies_ev)
    for group in np.unique(groups):
        centred[:, groups == group] -= centred[:, groups == group].mean(axis=1, keepdims=True)
    return centred


def _covariance(hyper: Hyper, block: Observations) -> LabelCovariance:
    return LabelCovariance(
        block.coordinates,
        hyper.kernel,
        hyper.energy_noise_ev * block.looseness,
        hyper.force_noise_ev_per_ang * block.looseness,
    )


def _normal(
    hyper: Hyper, observations: Sequence[Observations], energies_ev: FloatArray, forces: Sequence[FloatArray]
) -> _Normal:
    n_columns, n_models = observations[0].energy.shape[1], len(energies_ev)
    gram, moment = np.zeros((n_columns, n_columns)), np.zeros((n_columns, n_models))
    square, log_det = np.zeros(n_models), 0.0
    for block, force in zip(observations, forces, strict=True):
        covariance = _covariance(hyper, block)
        columns = covariance.whiten(block.energy, block.forces)
        target = covariance.whiten(energies_ev[:, block.place].T, np.moveaxis(force, 0, 2))
        gram += columns.T @ columns
        moment += columns.T @ target
        square += (target**2).sum(axis=0)
        log_det += covariance.log_det
    return _Normal(gram=gram, moment=moment, square=square, log_det=log_det)


def _grams(
    observations: Sequence[Observations], energies_ev: FloatArray, forces: Sequence[FloatArray]
) -> Callable[[Hyper], _Normal]:
    """``_normal`` without g for many hyper-parameters: there the noise is but a factor on energies and on forces."""
    unit = Hyper(precision=1.0, force_noise_ev_per_ang=1.0)
    calm = [np.zeros_like(force) for force in forces]
    still = [_without(block, forces=np.zeros_like(block.forces)) for block in observations]
    flat = [_without(block, energy=np.zeros_like(block.energy)) for block in observations]
    of_energy = _normal(unit, still, energies_ev, calm)
    of_forces = _normal(unit, flat, np.zeros_like(energies_ev), forces)

    def normal(hyper: Hyper) -> _Normal:
        energy = (unit.energy_noise_ev / hyper.energy_noise_ev) ** 2
        force = hyper.force_noise_ev_per_ang**-2.0
        return _Normal(
            gram=energy * of_energy.gram + force * of_forces.gram,
            moment=energy * of_energy.moment + force * of_forces.moment,
            square=energy * of_energy.square + force * of_forces.square,
            log_det=sum(_covariance(hyper, block).log_det for block in observations),
        )

    return normal


def _without(
    block: Observations, *, energy: FloatArray | None = None, forces: FloatArray | None = None
) -> Observations:
    values = {f.name: getattr(block, f.name) for f in fields(block)}
    changes = {name: value for name, value in (("energy", energy), ("forces", forces)) if value is not None}
    return Observations(**{**values, **changes})


def _diagonal(precisions: FloatArray, hyper: Hyper) -> FloatArray:
    return np.where(np.isnan(precisions), hyper.precision, precisions)


def _log_evidence(hyper: Hyper, precisions: FloatArray, normal: _Normal) -> float:
    diagonal = _diagonal(precisions, hyper)
    root = linalg.cholesky(normal.gram + np.diag(diagonal), lower=True, check_finite=False)
    explained = linalg.solve_triangular(root, normal.moment[:, 0], lower=True, check_finite=False)
    misfit = normal.square[0] - explained @ explained
    log_det = normal.log_det + 2 * np.log(np.diag(root)).sum() - np.log(diagonal).sum()
    return float(-0.5 * (misfit + log_det))


def _best(priors: HyperPriors, log_evidence: Callable[[Hyper], float], *, max_iterations: int) -> tuple[Hyper, float]:
    """Hyper-parameters of highest evidence times prior, and the evidence there; the medians for no iteration."""
    known = {f.name: getattr(priors, f.name) for f in fields(priors) if getattr(priors, f.name) is not None}
    medians = np.log([prior.median for prior in known.values()])
    spreads = np.array([prior.spread for prior in known.values()])

    def hyper(away: FloatArray) -> Hyper:
        values = dict(zip(known, np.exp(medians + spreads * away).tolist(), strict=True))
        values["force_noise_ev_per_ang"] = max(values["force_noise_ev_per_ang"], FORCE_NOISE_FLOOR)
        return Hyper(**values)

    if not max_iterations:
        medians_only = hyper(np.zeros(len(known)))
        return medians_only, log_evidence(medians_only)
    lowest = dict.fromkeys(known, -WITHIN)  # the floor is a bound, not a kink in what is searched
    noise = priors.force_noise_ev_per_ang
    lowest["force_noise_ev_per_ang"] = float(
        np.clip(np.log(FORCE_NOISE_FLOOR / noise.median) / noise.spread, -WITHIN, WITHIN)
    )
    found = optimize.minimize(
        lambda away: 0.5 * float(away @ away) - log_evidence(hyper(away)) / COARSENING,
        np.zeros(len(known)),
        bounds=[(lowest[name], WITHIN) for name in known],
        method="L-BFGS-B",
        options={"maxiter": max_iterations, "eps": STEP, "ftol": TOLERANCE},
    )
    best = hyper(found.x)
    return best, COARSENING * (0.5 * float(found.x @ found.x) - float(found.fun))


def _locals(
    hyper: Hyper,
    observations: Sequence[Observations],
    energies_ev: FloatArray,
    forces: Sequence[FloatArray],
    weights: FloatArray,
) -> tuple[Local, ...]:
    found = []
    for block, force in zip(observations, forces, strict=True):
        covariance = _covariance(hyper, block)
        energy_columns, force_columns = covariance.solve(block.energy, block.forces)
        energy_pull, force_pull = covariance.solve(
            energies_ev[:, block.place].T - block.energy @ weights.T,
            np.moveaxis(force, 0, 2) - block.forces @ weights.T,
        )
        found.append(
            Local(
                covariance=covariance,
                energy_columns=energy_columns,
                force_columns=force_columns,
                energy_pull=energy_pull.T,
                force_pull=np.moveaxis(force_pull, 2, 0),
            )
        )
    return tuple(found)
