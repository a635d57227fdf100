"""The closed-form correction: it finds known weights, and its sigma is a posterior's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg, stats

from alcore.correction import (
    ENERGY_NOISE_EV,
    FORCE_NOISE_FLOOR,
    OFFSET_STD_EV,
    Correction,
    Hyper,
    HyperPriors,
    LogNormal,
    Observations,
    fit_correction,
)
from alcore.gaussian_process import Matern
from alcore.types import FloatArray

N_FEATURES = 12
FREE = np.full(N_FEATURES, np.nan)
"""α rules every feature."""
FLAT = 0.005
"""The evidence has a flat maximum, and rounding moves where the search for it ends."""
BROAD = HyperPriors(
    precision=LogNormal(median=1.0, spread=2.0), force_noise_ev_per_ang=LogNormal(median=0.02, spread=1.0)
)
WITH_G = replace(BROAD, amplitude_ev=LogNormal(median=0.3, spread=0.5), length_ang=LogNormal(median=1.5, spread=0.3))


def _observations(energy: FloatArray, forces: FloatArray, first: int = 0, group: int = 0) -> Observations:
    n = len(energy)
    return Observations(
        place=np.arange(first, first + n),
        coordinates=np.zeros(forces.shape[:2]),
        energy=energy,
        forces=forces,
        groups=np.full(n, group),
        looseness=np.ones(n),
    )


def _problem(
    seed: int, n_labels: int = 10, force_noise: float = 0.01, n_coordinates: int = 9
) -> tuple[Observations, FloatArray, FloatArray, FloatArray]:
    """Random rows, the weights behind them, and what energies and forces they give."""
    rng = np.random.default_rng(seed)
    energy = rng.standard_normal((n_labels, N_FEATURES))
    block = _observations(energy, rng.standard_normal((n_labels, n_coordinates, N_FEATURES)))
    weights = rng.standard_normal(N_FEATURES)
    energies = block.energy @ weights + ENERGY_NOISE_EV * rng.standard_normal(n_labels)
    forces = block.forces @ weights + force_noise * rng.standard_normal((n_labels, n_coordinates))
    return block, weights, energies, forces


def _fit(
    block: Observations, energies: FloatArray, forces: FloatArray, priors: HyperPriors = BROAD, informed: bool = True
) -> Correction:
    return fit_correction([block], energies[None], [forces[None]], precisions=FREE, priors=priors, informed=informed)


def _covariance(found: Correction) -> FloatArray:
    """Of the weights."""
    whole = linalg.cho_solve((found.root, True), np.eye(len(found.root)))
    return np.asarray(whole[:N_FEATURES, :N_FEATURES])


@settings(max_examples=15)
@given(st.integers(0, 10_000))
def test_known_weights_are_recovered_within_their_posterior(seed: int) -> None:
    block, weights, energies, forces = _problem(seed)
    found = _fit(block, energies, forces)
    deviation = found.weights[0] - weights
    chi2 = float(deviation @ np.linalg.solve(_covariance(found), deviation)) / N_FEATURES
    assert chi2 < 5.0
    assert np.abs(deviation).max() < 0.02
    assert 0.003 < found.hyper.force_noise_ev_per_ang < 0.03
    assert 0.1 < found.hyper.precision < 10.0


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.floats(-1000, 1000), st.floats(-1000, 1000))
def test_offset_of_a_composition_does_not_matter(seed: int, first: float, second: float) -> None:
    block, _, energies, forces = _problem(seed)
    block = replace(block, groups=np.repeat([0, 1], 5))
    shifted = energies + np.repeat([first, second], 5)
    plain, moved = _fit(block, energies, forces), _fit(block, shifted, forces)
    np.testing.assert_allclose(moved.weights, plain.weights, atol=1e-5)
    np.testing.assert_allclose(np.diag(_covariance(moved)), np.diag(_covariance(plain)), rtol=FLAT)


def test_posterior_solves_the_normal_equations() -> None:
    """Bishop, eqs. 3.53 and 3.54, with the offset taken out by centring."""
    block, _, energies, forces = _problem(3)
    found = _fit(block, energies, forces)
    rows, target = block.energy - block.energy.mean(axis=0), energies - energies.mean()
    energy_noise, force_noise = found.hyper.energy_noise_ev, found.hyper.force_noise_ev_per_ang
    slopes = block.forces.reshape(-1, N_FEATURES)
    precision = (
        found.hyper.precision * np.eye(N_FEATURES)
        + rows.T @ rows / energy_noise**2
        + slopes.T @ slopes / force_noise**2
    )
    np.testing.assert_allclose(np.linalg.inv(precision), _covariance(found), rtol=1e-6, atol=1e-12)
    moment = rows.T @ target / energy_noise**2 + slopes.T @ forces.ravel() / force_noise**2
    np.testing.assert_allclose(np.linalg.solve(precision, moment), found.weights[0], atol=1e-8)


def test_energies_are_interpolated_within_their_noise() -> None:
    block, _, energies, forces = _problem(1, n_labels=6)
    found = _fit(block, energies, forces)
    fitted = block.energy @ found.weights[0]
    np.testing.assert_allclose(fitted - fitted[0], energies - energies[0], atol=4 * ENERGY_NOISE_EV)


def test_sigma_falls_with_labels_and_is_noise_at_one() -> None:
    block, _, energies, forces = _problem(2, n_labels=8, n_coordinates=1)
    probe = np.random.default_rng(0).standard_normal((5, N_FEATURES))
    sigmas = []
    for n in (2, 4, 8):
        found = _fit(_observations(block.energy[:n], block.forces[:n]), energies[:n], forces[:n])
        covariance = found.energy_covariance(np.concatenate([block.energy[:2], probe]))
        sigma = np.sqrt(np.diag(covariance))
        assert sigma[0] == 0.0
        assert sigma[1] < 2 * found.hyper.energy_noise_ev
        sigmas.append(sigma[2:])
    assert sigmas[0].mean() > sigmas[1].mean() > sigmas[2].mean()


def test_a_loose_label_counts_less() -> None:
    """The same contradiction pulls a tight label's fit further than a loose one's."""
    block, _, energies, forces = _problem(4)
    first = np.arange(len(energies)) == 0
    pulled = []
    for looseness in (1.0, 10.0):
        loose = replace(block, looseness=np.where(first, looseness, 1.0))
        wrong, right = (_fit(loose, energies + shift * first, forces) for shift in (0.1, 0.0))
        pulled.append(np.linalg.norm(wrong.weights - right.weights))
    assert pulled[1] < 0.5 * pulled[0]


@pytest.mark.parametrize("priors", [BROAD, WITH_G], ids=["linear", "with g"])
def test_sigma_rests_on_residuals_of_the_first_model(priors: HyperPriors) -> None:
    """A member that fits its own labels does not make the correction sure of itself."""
    block, _, energies, forces = _problem(4, n_labels=4)
    block = replace(block, coordinates=np.random.default_rng(4).standard_normal((4, 9)))
    alone = _fit(block, energies, forces, priors)
    both = fit_correction(
        [block],
        np.stack([energies, 0.01 * energies]),
        [np.stack([forces, 0.01 * forces])],
        precisions=FREE,
        priors=priors,
    )
    assert both.hyper == alone.hyper
    np.testing.assert_array_equal(both.root, alone.root)
    np.testing.assert_allclose(both.weights[0], alone.weights[0], atol=1e-10)
    np.testing.assert_allclose(both.weights[1], 0.01 * alone.weights[0], atol=1e-10)
    for mine, theirs in zip(both.local, alone.local, strict=True):
        np.testing.assert_allclose(mine.force_pull[1], 0.01 * theirs.force_pull[0], atol=1e-9)
        np.testing.assert_allclose(mine.energy_pull[1], 0.01 * theirs.energy_pull[0], atol=1e-9)


def test_each_model_has_weights_of_its_own() -> None:
    block, _, energies, forces = _problem(5)
    both = fit_correction(
        [block], np.stack([energies, -energies]), [np.stack([forces, -forces])], precisions=FREE, priors=BROAD
    )
    np.testing.assert_allclose(both.weights[0], -both.weights[1], atol=1e-10)
    assert both.weights.shape == (2, N_FEATURES)


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_evidence_finds_the_size_of_the_weights(scale: float) -> None:
    block, _, energies, forces = _problem(6, n_labels=20)
    found = _fit(block, scale * energies, scale * forces)
    assert 1 / 3 < found.hyper.precision * scale**2 < 3


@pytest.mark.parametrize("priors", [BROAD, WITH_G], ids=["linear", "with g"])
def test_one_label_is_enough_to_begin(priors: HyperPriors) -> None:
    block, _, energies, forces = _problem(7, n_labels=1)
    found = _fit(block, energies, forces, priors)
    assert np.isfinite(found.weights).all()
    assert (np.linalg.eigvalsh(_covariance(found)) > 0).all()


def test_what_only_huge_weights_could_explain_becomes_noise() -> None:
    """Features that hardly tell two places apart, and forces that differ there."""
    rng = np.random.default_rng(0)
    block = _observations(np.zeros((2, N_FEATURES)), 0.001 * rng.standard_normal((2, 9, N_FEATURES)))
    energies, forces = np.zeros(2), block.forces @ (30.0 * rng.standard_normal(N_FEATURES))
    free = _fit(block, energies, forces, replace(BROAD, precision=LogNormal(median=1e-3, spread=0.1)))
    bound = _fit(block, energies, forces, replace(BROAD, precision=LogNormal(median=10.0, spread=0.1)))
    assert np.abs(free.weights).max() > 10.0
    assert np.abs(bound.weights).max() < 1.0
    assert free.hyper.force_noise_ev_per_ang < 0.02
    assert bound.hyper.force_noise_ev_per_ang == pytest.approx(np.sqrt(np.mean(forces**2)), rel=0.3)


def test_uninformed_labels_leave_the_medians() -> None:
    """Nothing to explain: the evidence would call the model perfect, and is not asked."""
    block, _, energies, forces = _problem(8, n_labels=40)
    asked, spared = (_fit(block, 0 * energies, 0 * forces, WITH_G, informed=informed) for informed in (True, False))
    assert spared.hyper == Hyper(precision=1.0, force_noise_ev_per_ang=0.02, amplitude_ev=0.3, length_ang=1.5)
    assert asked.hyper.precision > 10.0
    assert asked.hyper.amplitude_ev < 0.25
    probe = np.random.default_rng(0).standard_normal((2, N_FEATURES))
    sigma = [float(np.sqrt(fit.energy_covariance(probe)[1, 1])) for fit in (asked, spared)]
    assert sigma[1] > 1.5 * sigma[0]


def test_forces_are_never_believed_to_be_perfect() -> None:
    block, _, energies, forces = _problem(9, n_labels=20, force_noise=0.0)
    certain = replace(BROAD, force_noise_ev_per_ang=LogNormal(median=1e-4, spread=1.0))
    assert _fit(block, energies, forces, certain).hyper.force_noise_ev_per_ang == pytest.approx(FORCE_NOISE_FLOOR)


@pytest.mark.parametrize("wanted", [0.8, 1.4])
def test_a_scale_is_found_beside_random_features(wanted: float) -> None:
    """One column is what the model itself says, with a prior of its own, and the truth is a multiple of it."""
    rng = np.random.default_rng(10)
    energy, forces = rng.standard_normal((4, N_FEATURES)), rng.standard_normal((4, 9, N_FEATURES))
    block = _observations(
        np.append(energy, 10 * energy[:, :1], axis=1), np.append(forces, 9 * forces[..., 1:2], axis=2)
    )
    energies, slopes = ((wanted - 1.0) * column[..., -1] for column in (block.energy, block.forces))
    found = fit_correction(
        [block], energies[None], [slopes[None]], precisions=np.append(FREE, 0.3**-2), priors=HyperPriors()
    )
    assert 1.0 + found.weights[0, -1] == pytest.approx(wanted, abs=0.03)
    silent = fit_correction(
        [block], energies[None], [slopes[None]], precisions=np.append(FREE, 1e9), priors=HyperPriors()
    )
    assert abs(silent.weights[0, -1]) < 1e-3, "its precision is its own, not α"


# --- against the Gaussian posterior in one dense matrix ---------------------------------------------------------------


KernelOf = Callable[[FloatArray, FloatArray, Matern], FloatArray]


class Dense:
    """Everything that was observed and asked as one Gaussian vector: Φ w + offset + g + noise."""

    def __init__(
        self, blocks: Sequence[Observations], found: Correction, precisions: FloatArray, dense_kernel: KernelOf
    ) -> None:
        self.kernel_of, self.blocks, hyper = dense_kernel, blocks, found.hyper
        self.hyper = hyper
        self.prior = np.diag(1.0 / np.where(np.isnan(precisions), hyper.precision, precisions))
        n_groups = 1 + max(int(block.groups.max()) for block in blocks)
        self.rows = np.concatenate([self._rows(block) for block in blocks])
        groups = np.concatenate([self._groups(block, n_groups) for block in blocks])
        noise = [
            np.concatenate(
                [
                    hyper.energy_noise_ev * block.looseness,
                    np.repeat(hyper.force_noise_ev_per_ang * block.looseness, block.coordinates.shape[1]),
                ]
            )
            for block in blocks
        ]
        self.whole = self.rows @ self.prior @ self.rows.T + OFFSET_STD_EV**2 * groups @ groups.T
        self.whole += np.diag(np.concatenate(noise) ** 2)
        if hyper.kernel:
            kernels = [dense_kernel(block.coordinates, block.coordinates, hyper.kernel) for block in blocks]
            self.whole += linalg.block_diag(*kernels)

    @staticmethod
    def _rows(block: Observations) -> FloatArray:
        return np.concatenate([block.energy, block.forces.reshape(block.coordinates.size, block.energy.shape[1])])

    @staticmethod
    def _groups(block: Observations, n_groups: int) -> FloatArray:
        flat = np.zeros((block.coordinates.size, n_groups))
        return np.concatenate([np.eye(n_groups)[block.groups], flat])

    def posterior(
        self, target: FloatArray, features: FloatArray, coordinates: FloatArray, which: int
    ) -> tuple[FloatArray, FloatArray]:
        """Mean and covariance of φ·w + g at ``coordinates`` of the atoms of block ``which``, relative to the first."""
        n, crossed = len(features), features @ self.prior @ self.rows.T
        own = features @ self.prior @ features.T
        if self.hyper.kernel:
            start = sum(block.coordinates.size + len(block.place) for block in self.blocks[:which])
            known = self.blocks[which].coordinates
            crossed[:, start : start + known.size + len(known)] += self.kernel_of(
                coordinates, known, self.hyper.kernel
            )[:n]
            own = own + self.kernel_of(coordinates, coordinates, self.hyper.kernel)[:n, :n]
        solved = np.linalg.solve(self.whole, np.concatenate([crossed, target[None]]).T)
        covariance = own - crossed @ solved[:, :n]
        relative = np.eye(n) - np.eye(n)[:1]
        return relative @ crossed @ solved[:, n], relative @ covariance @ relative.T


def _two_blocks(seed: int, n_features: int) -> tuple[list[Observations], FloatArray, list[FloatArray]]:
    """Two sets of atoms; the labels of the first are of one composition, those of the second of another."""
    rng = np.random.default_rng(seed)
    blocks, forces = [], []
    for places, d, group in (([0, 3, 1], 4, 0), ([2, 4], 6, 1)):
        n = len(places)
        blocks.append(
            Observations(
                place=np.array(places),
                coordinates=0.7 * rng.standard_normal((n, d)),
                energy=rng.standard_normal((n, n_features)),
                forces=rng.standard_normal((n, d, n_features)),
                groups=np.full(n, group),
                looseness=rng.uniform(1.0, 2.0, n),
            )
        )
        forces.append(0.5 * rng.standard_normal((n, d)))
    return blocks, 0.3 * rng.standard_normal(5), forces


def _target(blocks: Sequence[Observations], energies: FloatArray, forces: Sequence[FloatArray]) -> FloatArray:
    """What is observed, each composition's energies without their mean."""
    parts = []
    for block, force in zip(blocks, forces, strict=True):
        mine = energies[block.place]
        parts.append(np.concatenate([mine - mine.mean(), force.ravel()]))
    return np.concatenate(parts)


@pytest.mark.parametrize("priors", [BROAD, WITH_G], ids=["linear", "with g"])
@pytest.mark.parametrize("n_features", [0, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_posterior_is_the_dense_gaussian_posterior(
    priors: HyperPriors, n_features: int, seed: int, dense_kernel: KernelOf
) -> None:
    """Mean, covariance and evidence (Rasmussen and Williams, eqs. 2.25, 2.26 and 2.30)."""
    blocks, energies, forces = _two_blocks(seed, n_features)
    precisions = np.where(np.arange(n_features) == n_features - 1, 2.0, np.nan)
    found = fit_correction(blocks, energies[None], [f[None] for f in forces], precisions=precisions, priors=priors)
    dense, target = Dense(blocks, found, precisions, dense_kernel), _target(blocks, energies, forces)
    expected = stats.multivariate_normal(cov=dense.whole).logpdf(target) + 0.5 * len(target) * np.log(2 * np.pi)
    assert found.log_evidence == pytest.approx(expected, abs=1e-4)
    rng = np.random.default_rng(seed + 100)
    for which, block in enumerate(blocks):
        coordinates = np.concatenate([0.7 * rng.standard_normal((3, block.coordinates.shape[1])), block.coordinates])
        features = np.concatenate([rng.standard_normal((3, n_features)), block.energy])
        mean, covariance = dense.posterior(target, features, coordinates, which)
        local = found.local[which] if found.local else None
        energy = features @ found.weights[0]
        if local is not None:
            by_energy, by_force = local.covariance.crossed(coordinates)
            energy = energy + by_energy @ local.energy_pull[0] + np.tensordot(by_force, local.force_pull[0], axes=2)
        np.testing.assert_allclose(energy - energy[0], mean, atol=1e-6)
        np.testing.assert_allclose(found.energy_covariance(features, coordinates, local), covariance, atol=1e-7)
    assert bool(found.local) == (priors is WITH_G)


def test_g_is_as_uncertain_as_its_prior_where_no_label_is_known() -> None:
    blocks, energies, forces = _two_blocks(2, 3)
    found = fit_correction(
        blocks, energies[None], [f[None] for f in forces], precisions=np.full(3, np.nan), priors=WITH_G
    )
    apart = 100.0 * np.eye(3)
    covariance = found.energy_covariance(np.zeros((3, 3)), apart)
    expected = found.hyper.amplitude_ev**2 * np.array([[0.0, 0, 0], [0, 2, 1], [0, 1, 2]])
    np.testing.assert_allclose(covariance, expected, atol=1e-9)
    assert not found.energy_covariance(np.zeros((3, 3))).any(), "without places there is no g"
