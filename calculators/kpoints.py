"""How many k-points a spacing asks for."""

from __future__ import annotations

from typing import Any

import numpy as np


def grid_of_spacing(cell: Any, pbc: Any, spacing_per_ang: float) -> tuple[int, int, int]:
    """The fewest points along each reciprocal vector that are no farther apart than ``spacing_per_ang``.

    2π is included, as in VASP's KSPACING: a reciprocal vector is 2π/a long for a cubic cell of edge a.

    Args:
        cell: (3, 3), rows are the lattice vectors in Å.
        pbc: three booleans; a direction that is not periodic has one point.
        spacing_per_ang: in 1/Å, positive.
    """
    lengths = 2 * np.pi * np.linalg.norm(np.linalg.pinv(np.asarray(cell)).T, axis=1)
    counts = np.ceil(lengths / spacing_per_ang - 1e-6)  # a hair of slack, so that rounding never decides
    x, y, z = (max(1, int(n)) if periodic else 1 for n, periodic in zip(counts, pbc, strict=True))
    return x, y, z
