"""Neighbour lists of structures with any periodicity, cell or none."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.geometry import complete_cell

from alcore.types import FloatArray, Structure


def neighbours(quantities: str, template: Structure, positions: FloatArray, cutoff_ang: float) -> tuple[Any, ...]:
    """``matscipy``'s neighbour list (``"ijSd"`` and so on, an array each) of ``template``'s atoms at ``positions`` (Å).

    Along open directions the cell is made long enough to hold all atoms, because the list bins atoms by the cell.
    """
    from matscipy.neighbours import neighbour_list

    cell = np.array(complete_cell(template.cell))
    extent = float(np.ptp(positions, axis=0).max()) + 2 * cutoff_ang
    for axis in np.flatnonzero(~template.pbc):
        cell[axis] *= max(1.0, extent / np.linalg.norm(cell[axis]))
    found = neighbour_list(quantities, positions=positions, cell=cell, pbc=template.pbc, cutoff=cutoff_ang)
    return tuple(found) if len(quantities) > 1 else (found,)
