"""Random cosine features of MACE's node descriptors: the basis of the closed-form correction.

For an atom of element z with standardised invariant descriptor d, and random frequencies ω_r and phases b_r,
ψ_r = sqrt(2/R) cos(ω_r·d + b_r) approximates a kernel (Rahimi and Recht, NIPS 2007): a mixture of Gaussians of many
length scales. A structure's feature vector holds, for each element, the sum of ψ over its atoms, so energies that are
linear in it are extensive, smooth and invariant under permutation, translation and rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alcore.types import FloatArray, IntArray, Structure

LENGTH_SCALES = (2.0, 6.0)
"""Drawn log-uniformly between these, in units of sqrt(descriptor dimensions): short ones tell environments apart, long
ones carry far; 1 alone needs a quarter more labels than 2 or 4."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomFeatures:
    """Frequencies, phases and standardisation, one block an element.

    Attributes:
        elements: atomic numbers, in block order.
        mean, scale: of the descriptors, ``(n_elements, n_descriptors)``.
        omega: ``(n_elements, n_descriptors, n_random)``, already divided by the length scale.
        phase: ``(n_elements, n_random)``.
        basis: what the sums over atoms are multiplied by, ``(n_features, n_features)``: see ``calm_basis``.
    """

    elements: tuple[int, ...]
    mean: torch.Tensor
    scale: torch.Tensor
    omega: torch.Tensor
    phase: torch.Tensor
    basis: torch.Tensor

    @property
    def n_features(self) -> int:
        return int(self.phase.numel())

    def of_nodes(self, descriptors: torch.Tensor, element_index: torch.Tensor) -> torch.Tensor:
        """ψ of each atom placed in its element's block, ``(n_nodes, n_elements * n_random)``."""
        n_random = self.phase.shape[1]
        out = torch.zeros((len(descriptors), self.n_features), dtype=descriptors.dtype, device=descriptors.device)
        for block in range(len(self.elements)):
            rows = torch.nonzero(element_index == block).squeeze(1)
            if len(rows):
                centred = (descriptors[rows] - self.mean[block]) / self.scale[block]
                waves = torch.cos(centred @ self.omega[block] + self.phase[block]) * (2.0 / n_random) ** 0.5
                columns = torch.arange(block * n_random, (block + 1) * n_random, device=descriptors.device)
                out = out.index_put((rows[:, None], columns[None, :]), waves)
        return out

    def derivative(
        self, descriptors: torch.Tensor, jacobian: torch.Tensor, element_index: torch.Tensor
    ) -> torch.Tensor:
        """∂φ/∂x, ``(n_directions, n_features)``, from ∂d/∂x, ``(n_directions, n_nodes, n_descriptors)``."""
        n_random = self.phase.shape[1]
        out = torch.zeros((len(jacobian), self.n_features), dtype=descriptors.dtype, device=descriptors.device)
        for block in range(len(self.elements)):
            columns = slice(block * n_random, (block + 1) * n_random)
            slope = self.omega[block] / self.scale[block][:, None]
            for node in torch.nonzero(element_index == block).squeeze(1).tolist():
                centred = (descriptors[node] - self.mean[block]) / self.scale[block]
                waves = torch.sin(centred @ self.omega[block] + self.phase[block]) * (2.0 / n_random) ** 0.5
                out[:, columns] -= (jacobian[:, node] @ slope) * waves
        return out


def calm_basis(jacobian: FloatArray, share: float) -> FloatArray:
    """A basis in which weights of equal size mean forces of about equal size, ``(n_features, n_features)``.

    Independent weights of the features themselves allow any function whose energy is small; explaining one label then
    brings forces of several eV/Å beside it. The precision of the weights is therefore that of the features' own, plus,
    for a ``share``, the mean square force that they make over typical geometries (a Sobolev norm, as in Tikhonov
    regularisation); both have unit mean. The basis is the inverse square root of that precision.

    Args:
        jacobian: ∂φ/∂x over some geometries, ``(n_rows, n_features)``.
        share: from 0 (the features themselves) up to below 1.
    """
    n_features = jacobian.shape[1]
    power = jacobian.T @ jacobian
    power *= n_features / max(float(np.trace(power)), 1e-12)
    values, vectors = np.linalg.eigh((1 - share) * np.eye(n_features) + share * power)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def invariant_columns(model: Any) -> list[int]:
    """Columns of ``node_feats`` that are invariant under rotation, over all layers."""
    columns, start = [], 0
    for product in model.products:
        irreps = product.linear.irreps_out
        for (multiplicity, irrep), piece in zip(irreps, irreps.slices(), strict=True):
            if irrep.l == 0 and irrep.p == 1:
                columns += list(range(start + piece.start, start + piece.start + multiplicity))
        start += irreps.dim
    return columns


def make_features(
    descriptors: FloatArray,
    numbers: Sequence[int] | IntArray,
    rng: np.random.Generator,
    *,
    per_element: int = 256,
    like: torch.Tensor,
) -> RandomFeatures:
    """Features standardised on a sample of environments.

    Args:
        descriptors: invariant descriptors of sample atoms, ``(n_samples, n_descriptors)``.
        numbers: their atomic numbers, ``(n_samples,)``.
        rng: draws frequencies and phases.
        per_element: random features an element.
        like: a tensor of the wanted type and device.
    """
    numbers_array = np.asarray(numbers)
    elements = tuple(sorted({int(z) for z in numbers_array}))
    n_descriptors = descriptors.shape[1]
    means, scales, omegas, phases = [], [], [], []
    for z in elements:
        mine = descriptors[numbers_array == z]
        # A descriptor that hardly varies for this element must not be blown up into noise.
        scale = np.maximum(mine.std(axis=0), 0.05 * max(float(mine.std(axis=0).max()), 1e-6))
        means.append(mine.mean(axis=0))
        scales.append(scale)
        lengths = np.exp(rng.uniform(np.log(LENGTH_SCALES[0]), np.log(LENGTH_SCALES[1]), per_element)) * np.sqrt(
            n_descriptors
        )
        omegas.append(rng.standard_normal((n_descriptors, per_element)) / lengths)
        phases.append(rng.uniform(0, 2 * np.pi, per_element))
    return RandomFeatures(
        elements=elements,
        mean=like.new_tensor(np.array(means)),
        scale=like.new_tensor(np.array(scales)),
        omega=like.new_tensor(np.array(omegas)),
        phase=like.new_tensor(np.array(phases)),
        basis=torch.eye(len(elements) * per_element, dtype=like.dtype, device=like.device),
    )


def element_index(template: Structure, features: RandomFeatures, n_images: int) -> torch.Tensor:
    """Block of each node of a batch, ``(n_images * n_atoms,)``; -1 for an element without a block."""
    place = {z: k for k, z in enumerate(features.elements)}
    return torch.as_tensor(np.tile([place.get(int(z), -1) for z in template.numbers], n_images))
