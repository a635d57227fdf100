"""Spin states along a band: a label that fell into another one lies on another energy surface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from alcore.types import Band, Label

JUMP_MU_B = 0.5
"""Change of an atom's moment between neighbouring labels that is called a jump. Along a smooth path moments change by
hundredths; an electron that flips changes them by one or two."""
NEAR_ANG = 0.5
"""Labels farther from the band than this (all atoms together) say nothing about it."""


@dataclass(frozen=True, kw_only=True)
class SpinJump:
    """Two neighbouring labels of a path whose final moments differ.

    Attributes:
        before, after: their keys, in the order of the path.
        coordinates_ang: where along the band they lie.
        atom: the one whose moment changes most.
        moments_mu_b: its moment before and after.
        total_mu_b: total moment before and after.
    """

    before: str
    after: str
    coordinates_ang: tuple[float, float]
    atom: int
    moments_mu_b: tuple[float, float]
    total_mu_b: tuple[float, float]

    def __str__(self) -> str:
        (here, there), (old, new) = self.coordinates_ang, self.moments_mu_b
        return (
            f"the spin state jumps between {here:.2f} and {there:.2f} Å of the path: moment of atom {self.atom} "
            f"{old:+.2f} → {new:+.2f} μ_B, total {self.total_mu_b[0]:+.2f} → {self.total_mu_b[1]:+.2f} μ_B"
        )


def spin_jumps(band: Band, labels: Sequence[Label], threshold_mu_b: float = JUMP_MU_B) -> list[SpinJump]:
    """Where the final magnetic moments of neighbouring labels near a band differ.

    A global flip of all moments is the same state and no jump.

    Args:
        band: the band the labels are sorted along, each at its nearest image.
        labels: those with moments, ``ok`` ones only; of each place the one nearest to the band counts.
        threshold_mu_b: smallest change of an atom's moment.
    """
    nearest: dict[int, tuple[float, Label]] = {}
    for label in labels:
        if not label.ok or label.magnetic_moments is None or len(label.structure) != len(band.template):
            continue
        distances = np.linalg.norm(
            (band.positions - label.structure.positions).reshape(len(band.positions), -1), axis=1
        )
        image = int(distances.argmin())
        if distances[image] < min(NEAR_ANG, nearest.get(image, (np.inf,))[0]):
            nearest[image] = (float(distances[image]), label)
    path = [(float(band.coordinate_ang[image]), nearest[image][1]) for image in sorted(nearest)]
    jumps = (_jump(*left, *right) for left, right in pairwise(path))
    return [jump for jump in jumps if abs(jump.moments_mu_b[1] - jump.moments_mu_b[0]) > threshold_mu_b]


def _jump(here: float, before: Label, there: float, after: Label) -> SpinJump:
    assert before.magnetic_moments is not None
    assert after.magnetic_moments is not None
    old, new = before.magnetic_moments, after.magnetic_moments
    if np.abs(new + old).max() < np.abs(new - old).max():  # the mirror image of a spin state is that spin state
        new = -new
    atom = int(np.abs(new - old).argmax())
    return SpinJump(
        before=before.key,
        after=after.key,
        coordinates_ang=(here, there),
        atom=atom,
        moments_mu_b=(float(old[atom]), float(new[atom])),
        total_mu_b=(float(old.sum()), float(new.sum())),
    )


def path_jumps(band: Band | None, keys: Sequence[str], labels: Mapping[str, Label]) -> list[SpinJump]:
    """Those of a hop's labels (``keys``) along its band; none without a band."""
    return [] if band is None else spin_jumps(band, [labels[key] for key in dict.fromkeys(keys) if key in labels])
