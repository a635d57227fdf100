"""A saddle that does not stay on its path from one generation to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from ase.geometry import find_mic

from alcore.types import Band, FloatArray, PathRecord, Structure

FAR_ANG = 1.0
"""Two saddles further from each other than this, over all free atoms, are not one that was refined."""
OFF_PATH_ANG = 0.5
"""A saddle further than this from a path lies on another one."""
FLIPS = 3
"""Jumps in a row, each back to where the saddle had been two generations before, that are called flipping."""


def drift(records: Sequence[PathRecord], tolerance_ev: float) -> str:
    """What the saddles of a hop's generations say about its path, as a clause for a person; "" if nothing.

    A saddle has jumped if it lies more than ``FAR_ANG`` from the one before and that one lies off the new path, while
    both labels contradicted their predictions: two humps of one path that take turns are no jump.

    Args:
        records: the hop's records in order; the last is what the clause is about.
        tolerance_ev: a label contradicts its prediction if it is further off than this.
    """
    refuted = [record for record in records if _refuted(record, tolerance_ev)]
    if len(refuted) < 2 or refuted[-1] is not records[-1]:
        return ""
    jumps = [_jump(before, after) for before, after in pairwise(refuted)]
    if jumps[-1] is None:
        return ""
    flips = 0
    for k in range(len(refuted) - 1, 1, -1):
        if jumps[k - 1] is None or _apart(refuted[k - 2], refuted[k]) >= OFF_PATH_ANG:
            break
        flips += 1
    if flips >= FLIPS - 1:
        return "the band flips between two paths: give a band, or more images"
    return f"the saddle jumped {jumps[-1]:.1f} Å to another path"


def _refuted(record: PathRecord, tolerance_ev: float) -> bool:
    """Whether its saddle was labelled, and not as predicted."""
    mine = (r for r in record.residuals if r.key == record.saddle_key)
    return record.band is not None and record.barrier is not None and any(abs(r.error_ev) > tolerance_ev for r in mine)


def _jump(before: PathRecord, after: PathRecord) -> float | None:
    """How far (Å) the saddle went, if to another path."""
    assert before.band is not None and after.band is not None
    far = _apart(before, after)
    off = min(_off_path(_saddle(before), after.band), _off_path(_saddle(after), before.band))
    return far if far > FAR_ANG and off > OFF_PATH_ANG else None


def _saddle(record: PathRecord) -> FloatArray:
    assert record.band is not None and record.barrier is not None
    return np.asarray(record.band.positions[record.barrier.saddle_image])


def _apart(one: PathRecord, other: PathRecord) -> float:
    """Distance of the two saddles over all free coordinates, Å."""
    return float(np.linalg.norm(_between(one.initial, _saddle(one), _saddle(other))))


def _between(template: Structure, start: FloatArray, end: FloatArray) -> FloatArray:
    """Shortest displacement of every free coordinate, ``(n_atoms, 3)``."""
    step = end - start
    if template.pbc.any():
        step = find_mic(step, template.cell, template.pbc)[0]
    return np.where(template.fixed, 0.0, step)


def _off_path(place: FloatArray, band: Band) -> float:
    """Distance of a geometry from the broken line through the images, Å."""
    nearest = np.inf
    for start, end in pairwise(band.positions):
        line, gap = _between(band.template, start, end), _between(band.template, start, place)
        along = np.clip(float((line * gap).sum()) / max(float((line**2).sum()), 1e-12), 0.0, 1.0)
        nearest = min(nearest, float(np.linalg.norm(gap - along * line)))
    return float(nearest)
