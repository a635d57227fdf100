"""Motions of a whole molecule, which cost no energy: a band must not use them to space its images.

In a molecule of which nothing is held, images turn as wholes for nothing; springs then sort them into orientations of
the two end states, and none is left on the barrier. So images are superimposed at the start, and what turns or shifts
them as wholes is taken out of steps between them and of their forces (Melander, Laasonen and Jónsson, J. Chem. Theory
Comput. 11, 1055 (2015), there with quaternions).
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.spatial.transform import Rotation

from alcore.types import FloatArray, Structure

LEAST_INERTIA_ANG = 1e-3
"""Shortest motion that is one: a linear molecule does not turn about its axis."""


def is_loose(structure: Structure) -> bool:
    """Whether the atoms can turn and shift as a whole at no cost: nothing is periodic and none is held.

    A single atom has no other motion: what it moves in is not seen.
    """
    return len(structure) > 1 and not structure.pbc.any() and not structure.fixed.any()


def superimposed(positions: FloatArray, target: FloatArray) -> FloatArray:
    """``positions`` ``(n_atoms, 3)`` turned and shifted as a whole, nearest to ``target`` in the mean square."""
    centre, home = positions.mean(axis=0), target.mean(axis=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal rotation is not uniquely")  # a linear molecule: any will do
        turn, _ = Rotation.align_vectors(target - home, positions - centre)
    return np.asarray(turn.apply(positions - centre) + home)


def rigid_motions(positions: FloatArray) -> FloatArray:
    """Orthonormal motions as a whole of each geometry.

    Args:
        positions: Å, ``(n_images, n_atoms, 3)``.

    Returns:
        ``(n_images, 6, n_atoms, 3)``; zeros in place of a motion that there is not.
    """
    n_images, n_atoms, _ = positions.shape
    about = positions - positions.mean(axis=1, keepdims=True)
    shifts = np.broadcast_to(np.eye(3)[None, :, None, :], (n_images, 3, n_atoms, 3))
    turns = np.cross(np.eye(3)[None, :, None, :], about[:, None])
    _, lengths, rows = np.linalg.svd(np.concatenate([shifts, turns], axis=1).reshape(n_images, 6, -1), False)
    return np.asarray(np.where(lengths[..., None] > LEAST_INERTIA_ANG, rows, 0.0).reshape(n_images, -1, n_atoms, 3))


def without(motions: FloatArray | None, vectors: FloatArray) -> FloatArray:
    """``vectors`` ``(n_images, n_atoms, 3)`` without their share of each image's motions; as they are for None."""
    if motions is None:
        return vectors
    shares = np.einsum("imax,iax->im", motions, vectors)
    return np.asarray(vectors - np.einsum("im,imax->iax", shares, motions))
