"""A path over intermediate wells: divided there, each segment with its own images and its own climbing image.

One band over two humps spends its images on both and climbs only one; a well that is relaxed by itself and two bands
that end in it give both saddles (Henkelman, Jóhannesson and Jónsson, in: Theoretical Methods in Condensed Phase
Chemistry, Kluwer (2000), on paths with intermediate minima).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from alcore.barrier import EXTREMUM_DEPTH_EV, find_extrema
from alcore.endpoints import relax_end_state
from alcore.neb import Guards, NebSpec, Relaxed, path_coordinate, relax_band, summit
from alcore.protocols import Potential
from alcore.types import Band, FloatArray, Structure

WELL_EV = 0.03
"""A well that is less deep than this, about kT at room temperature, holds nothing: the path is not divided there."""
KEPT_EV = 0.5 * WELL_EV
"""A division is given up only below this, so that a well at the limit does not come and go."""
SURE = 2.0
"""Nor is it where the depth is less than this many times its sigma: young surrogates invent wells."""
ONE_WELL_ANG = 0.3
"""Two minima between which no atom moves further are one."""
MAX_SEGMENTS = 6


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of a band between two neighbouring minima (end states, or wells at which it was divided).

    Attributes:
        start, saddle, end: images; the saddle is the highest one between the other two.
        forward_ev, reverse_ev: its height above the start and above the end.
        saddle_ev, sigma_ev: energy of the saddle relative to the initial state, and its calibrated sigma.
        span_ev: height of its saddle above the lowest minimum at or before it: what the way forward has to climb there
            (the energetic span, Kozuch and Shaik, Acc. Chem. Res. 44, 101 (2011)).
        rate_limiting: whether its span is the largest, so that it limits the rate forward; of spans that are alike,
            whether its saddle is the highest.
        highest: whether its saddle is the highest of the path: the one that is verified.
    """

    start: int
    saddle: int
    end: int
    forward_ev: float
    reverse_ev: float
    saddle_ev: float
    sigma_ev: float
    span_ev: float
    rate_limiting: bool
    highest: bool


def segments(band: Band) -> tuple[Segment, ...]:
    """The segments of a band in order; a band that was not divided is one."""
    energies = band.energies_ev
    stretches = list(pairwise([0, *band.minima, len(energies) - 1]))
    tops = [int(energies[start + 1 : end].argmax()) + start + 1 for start, end in stretches]
    lowest = np.minimum.accumulate(energies[[start for start, _ in stretches]])
    spans = energies[tops] - lowest
    highest = int(np.argmax(energies[tops]))
    limiting = highest if spans.max() - spans[highest] < EXTREMUM_DEPTH_EV else int(np.argmax(spans))
    return tuple(
        Segment(
            start=start,
            saddle=top,
            end=end,
            forward_ev=float(energies[top] - energies[start]),
            reverse_ev=float(energies[top] - energies[end]),
            saddle_ev=float(energies[top]),
            sigma_ev=float(band.sigma_ev[top]),
            span_ev=float(spans[k]),
            rate_limiting=k == limiting,
            highest=k == highest,
        )
        for k, ((start, end), top) in enumerate(zip(stretches, tops, strict=True))
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Task:
    """What stays the same while a path is relaxed; see ``relax_path``."""

    potential: Potential
    template: Structure
    spec: NebSpec
    guards: Guards
    doubt: Callable[[FloatArray], str] | None
    unsure: Callable[[FloatArray], float]


def relax_path(
    potential: Potential,
    template: Structure,
    start: FloatArray,
    spec: NebSpec,
    guards: Guards | None = None,
    doubt: Callable[[FloatArray], str] | None = None,
    *,
    minima: Sequence[int] = (),
    unsure: Callable[[FloatArray], float] = lambda pair: 0.0,
) -> Relaxed:
    """``neb.relax_band``, segment by segment, divided at every well that the relaxed band turns out to pass.

    Args:
        potential, template, start, spec, guards, doubt: see ``neb.relax_band``.
        minima: images of ``start`` at which it is divided already. Each is relaxed again; where it falls into one of
            its neighbours, or its well is gone, the band is made whole.
        unsure: sigma of the energy difference between two geometries, ``(2, n_atoms, 3)`` in Å to eV.

    Returns:
        the whole path with ``minima``, converged if every segment is. Where a division brings doubt, the divided path
        comes back as it was then, since a label there is what settles it; where it does not converge, which no label
        need change, the converged path as it was before comes back, and ``reason`` says so.
    """
    task = _Task(
        potential=potential, template=template, spec=spec, guards=guards or Guards(), doubt=doubt, unsure=unsure
    )
    marks = [0, *minima, len(start) - 1]
    parts = _settled([np.array(start[a : b + 1]) for a, b in pairwise(marks)], task)
    n_steps = 0
    before: Relaxed | None = None
    for _ in range(2 * MAX_SEGMENTS):
        done = _relaxed(parts, task)
        n_steps += sum(part.n_steps for part in done)
        found = _joined(done, n_steps)
        if found.status == "max_steps" and before is not None:
            return _undivided(before, found)
        if found.status != "converged":
            return found
        parts = _without_shallow(done, task) or []
        before = None if parts else found
        parts = parts or _divided(done, task) or []
        if not parts:
            return found
    return found


def _relaxed(parts: Sequence[FloatArray], task: _Task) -> list[Relaxed]:
    """Each part relaxed by itself, whatever becomes of the others; doubts are asked about the whole path."""
    done: list[Relaxed] = []
    for k, part in enumerate(parts):
        others = ([relaxed.positions for relaxed in done], parts[k + 1 :])

        def doubt(positions: FloatArray, others: tuple[Sequence[FloatArray], Sequence[FloatArray]] = others) -> str:
            assert task.doubt is not None
            return task.doubt(_whole([*others[0], positions, *others[1]]))

        done.append(
            relax_band(
                task.potential, task.template, part, task.spec, task.guards, None if task.doubt is None else doubt
            )
        )
    return done


def _whole(parts: Sequence[FloatArray]) -> FloatArray:
    """Parts as one array; where two meet, the shared image once."""
    return np.concatenate([parts[0], *(part[1:] for part in parts[1:])])


def _joined(done: Sequence[Relaxed], n_steps: int) -> Relaxed:
    """The whole path; it stands as badly as the worst of its segments."""
    offsets = np.cumsum([0, *(len(part.positions) - 1 for part in done)])
    bad = next((k for k, part in enumerate(done) if part.status != "converged"), None)
    highest = int(np.argmax([part.energies_ev.max() for part in done]))
    climbing = done[highest].climbing_image
    reason = "" if bad is None else done[bad].reason
    return Relaxed(
        positions=_whole([part.positions for part in done]),
        energies_ev=_whole([part.energies_ev for part in done]),
        forces=_whole([part.forces for part in done]),
        status="converged" if bad is None else done[bad].status,
        reason=f"segment {bad + 1}: {reason}" if bad is not None and len(done) > 1 else reason,
        climbing_image=None if climbing is None else climbing + int(offsets[highest]),
        fmax_ev_per_ang=max(part.fmax_ev_per_ang for part in done),
        n_steps=n_steps,
        minima=tuple(int(k) for k in offsets[1:-1]),
    )


def _settled(parts: list[FloatArray], task: _Task) -> list[FloatArray]:
    """The wells between the parts relaxed again; a well that is one no more joins the parts beside it."""
    kept = parts[:1]
    for part in parts[1:]:
        well = _well(kept[-1][-1], [kept[-1][0], *(other[0] for other in kept[:-1]), parts[-1][-1]], task)
        if well is None:
            kept[-1] = resampled(_whole([kept[-1], part]), task.spec.n_images)
        else:
            after = part.copy()
            kept[-1][-1] = after[0] = well
            kept.append(after)
    return kept


def _well(place: FloatArray, known: Sequence[FloatArray], task: _Task) -> FloatArray | None:
    """The minimum that ``place`` relaxes into, ``(n_atoms, 3)``; None if it finds none, or one that is known."""
    relaxed = relax_end_state(
        task.potential, task.template.moved(place), 0.5 * task.spec.fmax_ev_per_ang, guards=task.guards
    )
    found = relaxed.positions[0]
    old = min(float(np.linalg.norm(found - other, axis=1).max()) for other in known)
    return found if relaxed.status == "converged" and old > ONE_WELL_ANG else None


def _without_shallow(done: Sequence[Relaxed], task: _Task) -> list[FloatArray] | None:
    """The parts with the shallowest division undone, or None if every one is deep enough."""
    depths = [_depth(before, after) for before, after in pairwise(done)]
    if not depths or min(depths) >= KEPT_EV:
        return None
    k = int(np.argmin(depths))
    parts = [part.positions for part in done]
    return [*parts[:k], resampled(_whole(parts[k : k + 2]), task.spec.n_images), *parts[k + 2 :]]


def _undivided(before: Relaxed, tried: Relaxed) -> Relaxed:
    """The path as it was before a division of it that did not converge."""
    nearest = {int(np.linalg.norm(before.positions - tried.positions[k], axis=(1, 2)).argmin()) for k in tried.minima}
    wells = ", ".join(str(image) for image in sorted(nearest - set(before.minima)))
    return replace(before, n_steps=tried.n_steps, reason=f"not divided at the well by image {wells}: {tried.reason}")


def _depth(before: Relaxed, after: Relaxed) -> float:
    """How deep the well between two parts is in eV; 0 where one of them has no saddle of its own."""
    tops = [part.energies_ev[top] for part in (before, after) if (top := summit(part.energies_ev)) is not None]
    return float(min(tops) - after.energies_ev[0]) if len(tops) == 2 else 0.0


def _divided(done: Sequence[Relaxed], task: _Task) -> list[FloatArray] | None:
    """The parts with one more division, at the deepest well that any of them passes; None if there is none to trust."""
    if len(done) >= MAX_SEGMENTS:
        return None
    parts = [part.positions for part in done]
    known = [parts[0][0], *(part[-1] for part in parts)]
    wells = [(depth, k, image) for k, part in enumerate(done) for depth, image in _wells(part, task)]
    for _, k, image in sorted(wells, reverse=True):
        place = _well(parts[k][image], known, task)
        if place is not None:
            before, after = (np.array(piece) for piece in (parts[k][: image + 1], parts[k][image:]))
            before[-1] = after[0] = place
            halves = [resampled(piece, task.spec.n_images) for piece in (before, after)]
            return [*parts[:k], *halves, *parts[k + 1 :]]
    return None


def _wells(part: Relaxed, task: _Task) -> list[tuple[float, int]]:
    """Depth in eV and image of the wells between two maxima that are deep, and surely so."""
    n = len(part.positions)
    band = Band(
        path="",
        template=task.template,
        positions=part.positions,
        energies_ev=part.energies_ev - part.energies_ev[0],
        forces=part.forces,
        sigma_committee_ev=np.zeros(n),
        sigma_posterior_ev=np.zeros(n),
        sigma_ev=np.zeros(n),
        coordinate_ang=path_coordinate(task.template, part.positions),
        status=part.status,
    )
    found = []
    extrema = find_extrema(band)
    for before, well, after in zip(extrema, extrema[1:], extrema[2:], strict=False):
        lower = min(before, after, key=lambda e: e.energy_ev)
        depth = lower.energy_ev - well.energy_ev
        if well.kind != "minimum" or depth < WELL_EV or not 0 < well.image < n - 1:
            continue
        if depth > SURE * task.unsure(part.positions[[lower.image, well.image]]):
            found.append((depth, well.image))
    return found


def resampled(positions: FloatArray, n_images: int) -> FloatArray:
    """``n_images`` images evenly along the same broken line between the same ends, ``(n_images + 2, n_atoms, 3)``."""
    lengths = np.linalg.norm(np.diff(positions, axis=0), axis=(1, 2))
    travelled = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.linspace(0.0, travelled[-1], n_images + 2)
    index = np.clip(np.searchsorted(travelled, wanted, side="right") - 1, 0, len(lengths) - 1)
    fraction = (wanted - travelled[index]) / np.maximum(lengths[index], 1e-12)
    line = positions[index] + fraction[:, None, None] * (positions[index + 1] - positions[index])
    line[0], line[-1] = positions[0], positions[-1]
    return np.asarray(line)
