"""Whether an answer can be believed at all: finite, of the right shape, of the same geometry, of sane forces."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.geometry import find_mic

from alcore.types import FloatArray, Structure
from calculators.measure import Measurement

GEOMETRY_TOLERANCE_ANG = 1e-4
"""Codes that write bohr with few digits round by less than this; a relaxation moves atoms by more."""


def reject_reason(structure: Structure, measurement: Measurement, max_force_ev_per_ang: float = 50.0) -> str | None:
    """Why this answer must not be learned from, or None.

    Args:
        structure: what was asked.
        measurement: what came back.
        max_force_ev_per_ang: the largest force on any atom, fixed ones included, that is still believed.
    """
    forces = np.asarray(measurement.forces)
    if forces.shape != (len(structure), 3):
        return f"forces have shape {forces.shape}, expected {(len(structure), 3)}"
    for numbers, positions, cell in measurement.geometries:
        if changed := geometry_change(structure, numbers, positions, cell):
            return changed
    if not np.isfinite(measurement.energy_ev):
        return f"the energy is {measurement.energy_ev}"
    if not np.isfinite(forces).all():
        return f"{int((~np.isfinite(forces)).any(axis=1).sum())} atoms have forces that are not finite"
    norms = np.linalg.norm(forces, axis=1)
    if norms.max() > max_force_ev_per_ang:
        return f"force of {norms.max():.1f} eV/Å on atom {norms.argmax()}, above {max_force_ev_per_ang:g} eV/Å"
    return None


def geometry_change(structure: Structure, numbers: Any, positions: FloatArray, cell: FloatArray) -> str | None:
    """What the calculator did to the geometry, or None; a shift by lattice vectors changes nothing."""
    if len(numbers) != len(structure):
        return f"the calculator returned {len(numbers)} atoms instead of {len(structure)}"
    if not np.array_equal(numbers, structure.numbers):
        return f"the calculator changed the order of the atoms, first at atom {np.argmax(numbers != structure.numbers)}"
    if not np.allclose(cell, structure.cell, rtol=0, atol=GEOMETRY_TOLERANCE_ANG):
        return f"the calculator changed the cell by up to {np.abs(cell - structure.cell).max():.4f} Å"
    displacements = positions - structure.positions
    if not np.isfinite(displacements).all():
        return "the calculator returned positions that are not finite"
    if np.abs(displacements).max() > GEOMETRY_TOLERANCE_ANG and structure.pbc.any():
        displacements, _ = find_mic(displacements, structure.cell, structure.pbc)
    moved = np.linalg.norm(displacements, axis=1)
    if moved.max() > GEOMETRY_TOLERANCE_ANG:
        return f"the calculator moved atom {moved.argmax()} by {moved.max():.4f} Å"
    return None
