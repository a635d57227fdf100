"""The Gaussian process over places: its factors are those of the dense covariance, derivative by derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alcore import gaussian_process
from alcore.gaussian_process import LabelCovariance, Matern
from alcore.types import FloatArray

KernelOf = Callable[[FloatArray, FloatArray, Matern], FloatArray]

RELATIVE = 1e-6
"""Condition numbers here reach 1e6, and autograd's root at distance zero is good to 1e-8."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Labels at random places, and numbers to try their covariance on."""

    covariance: LabelCovariance
    noise: FloatArray
    energies: FloatArray
    forces: FloatArray

    @property
    def columns(self) -> FloatArray:
        return np.concatenate([self.energies, self.forces.reshape(-1, self.energies.shape[1])])


@st.composite
def cases(draw: st.DrawFn, with_kernel: bool = True) -> Case:
    """1 to 6 labels of 1 to 8 coordinates: anywhere, on a line, or some of them at one place."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    n, d = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    places = rng.standard_normal((n, d))
    match draw(st.sampled_from(["anywhere", "line", "repeated", "one place"])):
        case "line":
            places = places[:1] + rng.standard_normal((n, 1)) * rng.standard_normal(d)
        case "repeated":
            places[-1] = places[0]
        case "one place":
            places[:] = places[0]
    kernel = Matern(amplitude_ev=draw(st.floats(0.05, 2.0)), length_ang=draw(st.floats(0.5, 4.0)))
    energy_noise, force_noise = rng.uniform(0.02, 0.1, n), rng.uniform(0.02, 0.1, n)
    return Case(
        covariance=LabelCovariance(places, kernel if with_kernel else None, energy_noise, force_noise),
        noise=np.concatenate([energy_noise, np.repeat(force_noise, d)]),
        energies=rng.standard_normal((n, 3)),
        forces=rng.standard_normal((n, d, 3)),
    )


def _assert_is_dense(case: Case, dense_kernel: KernelOf) -> None:
    places, kernel = case.covariance.places, case.covariance.kernel
    dense = np.diag(case.noise**2)
    if kernel:
        dense += dense_kernel(places, places, kernel)
    solved = np.linalg.solve(dense, case.columns)
    energies, forces = case.covariance.solve(case.energies, case.forces)
    size = float(np.abs(solved).max())
    np.testing.assert_allclose(energies, solved[: len(energies)], atol=RELATIVE * size)
    np.testing.assert_allclose(forces.reshape(-1, 3), solved[len(energies) :], atol=RELATIVE * size)
    white, product = case.covariance.whiten(case.energies, case.forces), case.columns.T @ solved
    np.testing.assert_allclose(white.T @ white, product, atol=RELATIVE * float(np.abs(product).max()))
    sign, log_det = np.linalg.slogdet(dense)
    assert sign == 1.0
    assert case.covariance.log_det == pytest.approx(log_det, abs=1e-5)


@settings(max_examples=60)
@given(cases())
def test_factors_are_those_of_the_dense_covariance(dense_kernel: KernelOf, case: Case) -> None:
    _assert_is_dense(case, dense_kernel)


@settings(max_examples=10)
@given(cases(with_kernel=False))
def test_without_a_kernel_there_is_noise_alone(dense_kernel: KernelOf, case: Case) -> None:
    _assert_is_dense(case, dense_kernel)


@settings(max_examples=15)
@given(cases(), st.integers(0, 10_000))
def test_other_places_covary_as_the_kernel_says(dense_kernel: KernelOf, case: Case, seed: int) -> None:
    known, kernel = case.covariance.places, case.covariance.kernel
    assert kernel is not None
    n, d = known.shape
    places = np.concatenate([known[0] + np.random.default_rng(seed).standard_normal((3, d)), known[:1]])
    energy, force = case.covariance.crossed(places)
    expected = dense_kernel(places, known, kernel)[: len(places)]
    np.testing.assert_allclose(energy, expected[:, :n], atol=1e-9)
    np.testing.assert_allclose(force.reshape(len(places), n * d), expected[:, n:], atol=1e-6)


@settings(max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_turning_all_coordinates_changes_nothing(seed: int, n_labels: int) -> None:
    """The split along the labels' span must not show."""
    rng = np.random.default_rng(seed)
    places, turn = rng.standard_normal((n_labels, 7)), np.linalg.qr(rng.standard_normal((7, 7)))[0]
    noise, kernel = np.full(n_labels, 0.05), Matern(amplitude_ev=0.5, length_ang=1.5)
    energies, forces = rng.standard_normal((n_labels, 1)), rng.standard_normal((n_labels, 7, 1))
    plain, turned = (LabelCovariance(p, kernel, noise, noise) for p in (places, places @ turn.T))
    energy, force = plain.solve(energies, forces)
    turned_energy, turned_force = turned.solve(energies, np.einsum("ij,njk->nik", turn, forces))
    np.testing.assert_allclose(turned_energy, energy, atol=1e-7 * np.abs(energy).max())
    np.testing.assert_allclose(turned_force, np.einsum("ij,njk->nik", turn, force), atol=1e-7 * np.abs(force).max())
    assert turned.log_det == pytest.approx(plain.log_det, abs=1e-8)


def test_profile_holds_the_derivatives_by_half_the_squared_distance() -> None:
    kernel, distance, step = Matern(amplitude_ev=0.7, length_ang=1.3), np.linspace(0.2, 5.0, 20), 1e-5
    half = distance**2 / 2
    ahead, behind = (kernel.profile(np.sqrt(2 * (half + sign * step))) for sign in (1, -1))
    value, slope, bend = kernel.profile(distance)
    np.testing.assert_allclose(slope, (ahead[0] - behind[0]) / (2 * step), atol=1e-7)
    np.testing.assert_allclose(bend, (ahead[1] - behind[1]) / (2 * step), atol=1e-7)
    assert kernel.profile(np.zeros(1))[0][0] == pytest.approx(0.7**2)
    assert (np.diff(value) < 0).all()


def test_labels_without_a_coordinate_have_energies() -> None:
    """All atoms held: the same place twice."""
    noise = np.full(2, 0.1)
    held = LabelCovariance(np.zeros((2, 0)), Matern(amplitude_ev=0.5, length_ang=1.0), noise, noise)
    energy, force = held.solve(np.array([[1.0], [0.0]]), np.zeros((2, 0, 1)))
    np.testing.assert_allclose(energy[:, 0], np.linalg.solve([[0.26, 0.25], [0.25, 0.26]], [1.0, 0.0]))
    assert force.shape == (2, 0, 1)
    assert held.log_det == pytest.approx(np.log(0.26**2 - 0.25**2))


def test_energy_and_slope_of_one_place_carry_along_the_slope() -> None:
    """What Taylor says near a label, and no word far from it."""
    kernel, noise = Matern(amplitude_ev=1.0, length_ang=2.0), np.full(1, 1e-4)
    label = LabelCovariance(np.zeros((1, 3)), kernel, noise, noise)
    energy, force = label.solve(np.array([[0.3]]), np.array([[[0.5], [0.0], [-0.2]]]))
    near, far = np.array([[0.01, 0.0, 0.02]]), np.array([[50.0, 0.0, 0.0]])
    found = [float((e @ energy + np.tensordot(f, force, axes=2)).item()) for e, f in map(label.crossed, (near, far))]
    assert found[0] == pytest.approx(0.3 - 0.5 * 0.01 + 0.2 * 0.02, abs=5e-4)
    assert found[1] == pytest.approx(0.0, abs=1e-6)


def test_many_labels_along_a_path_need_few_directions() -> None:
    """60 labels of a curved path and a little about it: one of them held out is predicted as with all directions."""
    rng = np.random.default_rng(5)
    along = np.linspace(0.0, 3.0, 60)
    path = np.stack([along, np.sin(along), 0.3 * along**2, *np.zeros((57, 60))], axis=1)
    places = path + 0.01 * rng.standard_normal(path.shape)
    kernel = Matern(amplitude_ev=0.5, length_ang=1.5)
    noise = np.full(60, 0.005)
    slope = np.array([0.5, -0.3, 0.2] + 57 * [0.0])
    energies = np.sin(places @ slope)
    forces = -np.cos(places @ slope)[:, None] * slope
    predicted = {}
    for kept in (gaussian_process.MAX_SPANNED, 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gaussian_process, "MAX_SPANNED", kept)
            covariance = LabelCovariance(places[1:], kernel, noise[1:], noise[1:])
        assert covariance.rows_within == 59 * (1 + min(kept, 58))
        pull, push = covariance.solve(energies[1:, None], forces[1:, :, None])
        value, slopes = covariance.crossed(places[:1])
        predicted[kept] = float((value @ pull)[0, 0] + np.einsum("pnd,ndk->pk", slopes, push)[0, 0])
    few, all_ = predicted.values()
    assert few == pytest.approx(all_, abs=2e-3)
    assert few == pytest.approx(energies[0], abs=0.01)
