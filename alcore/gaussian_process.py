"""A Gaussian process over the places of atoms that learns from energies and forces at a cost linear in the atoms.

The kernel is Matérn 5/2 in Cartesian coordinates, k(r) = s² (1 + ρ + ρ²/3) exp(-ρ) with ρ = √5 r/ℓ (Rasmussen and
Williams, *Gaussian Processes for Machine Learning*, eq. 4.17). Its derivatives depend on differences of places alone:
within the space those span, n labels need one dense matrix of n² rows; across it every coordinate is like any
other, and one matrix of n rows serves them all (after de Roos, Gessner and Hennig, ICML 2021). Of a span of many
directions only the widest are kept, so that n labels never need more than a fixed multiple of n rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from alcore.types import FloatArray

SPANNED = 1e-9
"""Singular values below this fraction of the largest span nothing."""
MAX_SPANNED = 20
"""Directions in which labels are told apart; along all others they are taken to lie at the same place."""


@dataclass(frozen=True, kw_only=True)
class Matern:
    """k(r): ``amplitude_ev`` is s, ``length_ang`` is ℓ over the norm of all coordinates together."""

    amplitude_ev: float
    length_ang: float

    def profile(self, distance_ang: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """k, and its first and second derivative by r²/2, each of the shape of ``distance_ang``."""
        rho = np.sqrt(5.0) * distance_ang / self.length_ang
        decay = self.amplitude_ev**2 * np.exp(-rho)
        slope = -5.0 / (3.0 * self.length_ang**2) * decay * (1 + rho)
        return decay * (1 + rho + rho**2 / 3), slope, 25.0 / (3.0 * self.length_ang**4) * decay


class LabelCovariance:
    """Covariance of the energies and forces observed at a set of places: kernel plus noise, factorised.

    Args:
        places: free coordinates of the labels in Å, ``(n_labels, n_coordinates)``; those of more than
            ``MAX_SPANNED + 1`` labels are projected on their widest directions.
        kernel: None for noise alone.
        energy_noise_ev, force_noise: of each label (the latter in eV/Å), ``(n_labels,)``.

    Attributes:
        log_det: of the whole matrix of ``n_labels * (1 + n_coordinates)`` rows.
        rows_within: of the one that is dense.
    """

    def __init__(
        self, places: FloatArray, kernel: Matern | None, energy_noise_ev: FloatArray, force_noise: FloatArray
    ) -> None:
        self.places, self.kernel = places, kernel
        self._energy_noise, self._force_noise = energy_noise_ev, force_noise
        n_coordinates = places.shape[1]
        if kernel is None:
            self.log_det = 2 * float(np.log(energy_noise_ev).sum() + n_coordinates * np.log(force_noise).sum())
            return
        offsets = places - places[0]
        _, singular, rows = np.linalg.svd(offsets, full_matrices=False)
        spanned = singular > SPANNED * max(float(singular.max(initial=0.0)), 1e-9)
        self._span = rows[spanned][:MAX_SPANNED].T
        self.places = places[0] + offsets @ self._span @ self._span.T
        within, across = self._matrices(offsets @ self._span, kernel)
        self._within, self._across = linalg.cholesky(within, lower=True), linalg.cholesky(across, lower=True)
        n_across = n_coordinates - self._span.shape[1]
        self.rows_within = len(within)
        self.log_det = 2 * float(np.log(np.diag(self._within)).sum() + n_across * np.log(np.diag(self._across)).sum())

    def _matrices(self, places: FloatArray, kernel: Matern) -> tuple[FloatArray, FloatArray]:
        """Energies and forces within the span, ``n (1 + m)`` rows; forces along a coordinate across it, ``n`` rows."""
        n_labels, m = places.shape
        gaps = places[:, None] - places[None]
        value, slope, bend = kernel.profile(np.linalg.norm(gaps, axis=2))
        within = np.zeros((n_labels * (1 + m),) * 2)
        within[:n_labels, :n_labels] = value + np.diag(self._energy_noise**2)
        within[:n_labels, n_labels:] = (slope[..., None] * gaps).reshape(n_labels, n_labels * m)
        within[n_labels:, :n_labels] = within[:n_labels, n_labels:].T
        forces = -slope[..., None, None] * np.eye(m) - bend[..., None, None] * gaps[..., :, None] * gaps[..., None, :]
        within[n_labels:, n_labels:] = forces.transpose(0, 2, 1, 3).reshape((n_labels * m,) * 2)
        within[n_labels:, n_labels:] += np.diag(np.repeat(self._force_noise**2, m))
        return within, -slope + np.diag(self._force_noise**2)

    def _split(self, energies: FloatArray, forces: FloatArray) -> tuple[FloatArray, FloatArray]:
        n_labels, _, n_columns = forces.shape
        within = np.einsum("dm,ndk->nmk", self._span, forces, optimize=True)
        across = forces - np.einsum("dm,nmk->ndk", self._span, within, optimize=True)
        return np.concatenate([energies, within.reshape(-1, n_columns)]), across.reshape(n_labels, -1)

    def whiten(self, energies: FloatArray, forces: FloatArray) -> FloatArray:
        """Columns in a basis where the covariance is the unit matrix, ``(n_rows, n_columns)``.

        Args:
            energies: ``(n_labels, n_columns)``.
            forces: ``(n_labels, n_coordinates, n_columns)``.
        """
        n_columns = energies.shape[1]
        if self.kernel is None:
            scaled = forces / self._force_noise[:, None, None]
            return np.concatenate([energies / self._energy_noise[:, None], scaled.reshape(-1, n_columns)])
        within, across = self._split(energies, forces)
        return np.concatenate(
            [
                linalg.solve_triangular(self._within, within, lower=True, check_finite=False),
                linalg.solve_triangular(self._across, across, lower=True, check_finite=False).reshape(-1, n_columns),
            ]
        )

    def solve(self, energies: FloatArray, forces: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The inverse times columns; shapes as in ``whiten``."""
        n_labels, n_columns = energies.shape
        if self.kernel is None:
            return energies / self._energy_noise[:, None] ** 2, forces / self._force_noise[:, None, None] ** 2
        within, across = self._split(energies, forces)
        within = linalg.cho_solve((self._within, True), within)
        across = linalg.cho_solve((self._across, True), across).reshape(forces.shape)
        inner = within[n_labels:].reshape(n_labels, -1, n_columns)
        return within[:n_labels], across + np.einsum("dm,nmk->ndk", self._span, inner, optimize=True)

    def crossed(self, places: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Covariance of the energies at other ``places`` ``(n, n_coordinates)`` with what was observed: energies
        ``(n, n_labels)`` and forces ``(n, n_labels, n_coordinates)``."""
        assert self.kernel is not None
        gaps = places[:, None] - self.places[None]
        value, slope, _ = self.kernel.profile(np.linalg.norm(gaps, axis=2))
        return value, slope[..., None] * gaps
