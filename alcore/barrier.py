"""Barriers of a band: climbing image, force-consistent spline, every extremum; and labels held against predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np
from ase.geometry import find_mic
from scipy.interpolate import CubicHermiteSpline
from scipy.signal import find_peaks

from alcore.types import Band, BarrierEstimate, Candidate, Extremum, FloatArray, Label, Residual

EXTREMUM_DEPTH_EV = 1e-3
"""Wiggles of the spline shallower than this are not reported as extrema."""
RIVAL_SIGMAS = 2.0
"""A saddle that lies more than this many of its sigmas below the highest one is not the highest."""


def tangential_slopes(band: Band) -> FloatArray:
    """dE/ds along the path at each image in eV/Å, ``(n_images,)``, from forces and central differences of positions."""
    steps = np.diff(band.positions, axis=0)
    if band.template.pbc.any():
        steps = np.array([find_mic(step, band.template.cell, band.template.pbc)[0] for step in steps])
    steps /= np.maximum(np.linalg.norm(steps, axis=(1, 2), keepdims=True), 1e-12)
    tangent = np.concatenate([steps[:1], steps[1:] + steps[:-1], steps[-1:]])
    tangent /= np.maximum(np.linalg.norm(tangent, axis=(1, 2), keepdims=True), 1e-12)
    free = ~band.template.fixed[None]
    return np.asarray(-(np.where(free, band.forces, 0.0) * tangent).sum(axis=(1, 2)))


def path_spline(band: Band) -> CubicHermiteSpline:
    """Energy (eV) over path coordinate (Å), through energies and tangential forces."""
    return CubicHermiteSpline(band.coordinate_ang, band.energies_ev, tangential_slopes(band))


def turning_points(spline: CubicHermiteSpline) -> FloatArray:
    """Path coordinates in Å where it is level, in order."""
    roots = spline.derivative().roots(extrapolate=False)
    return np.unique(roots[np.isfinite(roots)])


def find_extrema(band: Band) -> tuple[Extremum, ...]:
    """Every minimum and maximum of the spline between the end states, in order, without pairs shallower than 1 meV."""
    spline = path_spline(band)
    length = band.coordinate_ang[-1]
    curvature = spline.derivative(2)
    found = [
        Extremum(
            kind="maximum" if curvature(s) < 0 else "minimum",
            coordinate_ang=float(s),
            energy_ev=float(spline(s)),
            image=int(np.abs(band.coordinate_ang - s).argmin()),
        )
        for s in turning_points(spline)
        if 0.01 * length < s < 0.99 * length
    ]
    while len(found) > 1:
        depths = [abs(b.energy_ev - a.energy_ev) for a, b in pairwise(found)]
        k = int(np.argmin(depths))
        if depths[k] > EXTREMUM_DEPTH_EV:
            break
        del found[k : k + 2]
    return tuple(found)


def estimate_barrier(band: Band) -> BarrierEstimate:
    """Barriers of a band: the highest interior image against both ends, and the spline's maximum beside it."""
    top = int(band.energies_ev[1:-1].argmax()) + 1
    extrema = find_extrema(band)
    heights = [e.energy_ev for e in extrema if e.kind == "maximum"]
    return BarrierEstimate(
        forward_ev=float(band.energies_ev[top]),
        reverse_ev=float(band.energies_ev[top] - band.energies_ev[-1]),
        reaction_energy_ev=float(band.energies_ev[-1]),
        spline_forward_ev=float(max([*heights, band.energies_ev[top]])),
        sigma_ev=float(band.sigma_ev[top]),
        sigma_committee_ev=float(band.sigma_committee_ev[top]),
        sigma_posterior_ev=float(band.sigma_posterior_ev[top]),
        saddle_image=top,
        extrema=extrema,
    )


def doubtful_well(band: Band, tolerance_ev: float) -> int | None:
    """The image that lies furthest below both end states, if by more than the tolerance and not known to it.

    Such a well would move the barrier's foot; where nothing was labelled it is more often the surrogate's invention.
    """
    deepest = int(band.energies_ev[1:-1].argmin()) + 1
    depth = min(band.energies_ev[0], band.energies_ev[-1]) - band.energies_ev[deepest]
    return deepest if depth > tolerance_ev and band.sigma_ev[deepest] > tolerance_ev else None


def doubtful_rival(band: Band, tolerance_ev: float) -> int | None:
    """The top of another hump that may be the highest of all, within its uncertainty; None if none may.

    Whether the band is divided between the two plays no part: a dip too shallow for that parts two humps all the same,
    if it is no wiggle. A top known to the tolerance is no rival: whichever of the two is higher, the barrier is the
    same within it.
    """
    energies, sigma = band.energies_ev, band.sigma_ev
    tops = [int(k) for k in find_peaks(energies, prominence=EXTREMUM_DEPTH_EV)[0]]
    highest = max(tops, key=lambda k: energies[k], default=None)
    rivals = [
        k
        for k in tops
        if k != highest and sigma[k] > tolerance_ev and energies[k] + RIVAL_SIGMAS * sigma[k] > energies[tops].max()
    ]
    return max(rivals, key=lambda k: energies[k] + RIVAL_SIGMAS * sigma[k], default=None)


def held_against(candidate: Candidate, label: Label, initial: Label | None, generation: int) -> Residual | None:
    """The label against what was predicted before it; None if there was no prediction, or nothing to compare with."""
    if not label.ok or initial is None or not initial.ok:
        return None
    if candidate.energy_ev is None or label.energy_ev is None or initial.energy_ev is None:
        return None
    assert label.forces is not None
    return Residual(
        key=label.key,
        path=candidate.path,
        kind=candidate.kind,
        generation=generation,
        predicted_ev=candidate.energy_ev,
        labelled_ev=label.energy_ev - initial.energy_ev,
        sigma_committee_ev=candidate.sigma_committee_ev or 0.0,
        sigma_posterior_ev=candidate.sigma_posterior_ev or 0.0,
        sigma_ev=candidate.sigma_ev or 0.0,
        fmax_ev_per_ang=label.structure.free_fmax(label.forces),
        by_lead_ev=dict(candidate.by_lead_ev),
        image=candidate.image,
    )


def reference_barrier(saddle: Label | None, initial: Label | None) -> float | None:
    """Reference energy of the saddle minus that of the initial state in eV, where both are labelled."""
    if saddle is None or initial is None or not (saddle.ok and initial.ok):
        return None
    assert saddle.energy_ev is not None and initial.energy_ev is not None
    return saddle.energy_ev - initial.energy_ev


def label_fmax(label: Label | None) -> float | None:
    """Reference force on the free atoms of a label, eV/Å."""
    return None if label is None or not label.ok or label.forces is None else label.structure.free_fmax(label.forces)


def count_calls(before: Mapping[str, int], answered: Iterable[tuple[str, Label]]) -> dict[str, int]:
    """Evaluations of the reference by kind; a failed one counts under its kind and under ``failed``, one that
    was reused or derived by symmetry not at all.

    Args:
        before: counts up to the last generation.
        answered: kind and label of everything asked for since (one that failed and is asked again counts again).
    """
    counts = dict(before)
    for kind, label in answered:
        if label.reused or label.derived_from:
            continue
        counts[kind] = counts.get(kind, 0) + 1
        if not label.ok:
            counts["failed"] = counts.get("failed", 0) + 1
    return counts


def total_calls(counts: Mapping[str, int]) -> int:
    """All evaluations, failures included once."""
    return sum(n for kind, n in counts.items() if kind != "failed")
