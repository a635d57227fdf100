"""When a hop is done: the reference calculator says so, or the budget does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from alcore.barrier import doubtful_rival, doubtful_well, path_spline, turning_points
from alcore.drift import drift
from alcore.types import Band, BarrierEstimate, Decision, PathRecord


@dataclass(frozen=True, kw_only=True)
class StopSpec:
    """Field names and units as in the run file."""

    barrier_tolerance_ev: float = 0.01
    saddle_fmax_ev_per_ang: float = 0.05
    max_generations: int = 15
    max_labels: int = 60


MARGIN_EV = 1e-3
"""A rise of the band that is smaller is none."""
FALL_EV = 0.03
"""An end state relaxed to the force limit may lie this much above its minimum, many atoms together."""


def decide(record: PathRecord, spec: StopSpec, earlier: Sequence[PathRecord] = ()) -> Decision:
    """Whether one hop is settled by this generation's labels.

    Converged needs all of: the band converged on the surrogate; its saddle image labelled, and the label within the
    tolerance of what was predicted before; the reference force on that saddle and on both end states below its limit;
    the saddle above both ends by more than its uncertainty; the calibrated uncertainty of the barrier below the
    tolerance; no other hump that might be higher.

    Args:
        record: what this generation found.
        spec: limits.
        earlier: the hop's records before it, in order: they tell whether its saddle drifts.
    """
    missing = unmet(record, spec)
    if not missing:
        return Decision(stop=True, code="converged", reason=_confirmed(record))
    settled = _downhill(record, spec) or _barrierless(record, spec)
    moved = drift([*earlier, record], spec.barrier_tolerance_ev)
    return settled or Decision(stop=False, code="continue", reason="; ".join([*missing, *([moved] if moved else [])]))


def unmet(record: PathRecord, spec: StopSpec) -> list[str]:
    """What still stands between this hop and *converged*, in words; empty if nothing does."""
    force, tolerance = spec.saddle_fmax_ev_per_ang, spec.barrier_tolerance_ev
    missing = []
    for name, fmax in (("initial", record.initial_fmax_ev_per_ang), ("final", record.final_fmax_ev_per_ang)):
        if fmax is None or fmax > force:
            missing.append(
                f"the {name} state has no label" if fmax is None else f"force on the {name} state {fmax:.3f} eV/Å"
            )
    if record.band is None or record.barrier is None:
        return [*missing, "no band yet"]
    if doubtful_well(record.band, tolerance) is not None:
        missing.append("a well below the end states is not confirmed")
    if record.band.converged and (rival := doubtful_rival(record.band, tolerance)) is not None:
        sigma = 1e3 * record.band.sigma_ev[rival]
        missing.append(f"the saddle at image {rival}, ± {sigma:.0f} meV, may be the highest")
    if not record.band.converged:
        missing.append(f"band not converged ({record.band.reason})")
    saddle = next((r for r in record.residuals if r.key == record.saddle_key), None)
    if saddle is None:
        missing.append("saddle not labelled")
    else:
        if abs(saddle.error_ev) > tolerance:
            missing.append(f"saddle predicted {1e3 * abs(saddle.error_ev):.0f} meV off")
        if saddle.fmax_ev_per_ang > force:
            missing.append(f"force on the saddle {saddle.fmax_ev_per_ang:.3f} eV/Å")
    if record.barrier_std_ev is None or record.barrier_std_ev > tolerance:
        missing.append(
            "barrier uncertainty unknown"
            if record.barrier_std_ev is None
            else f"barrier uncertainty {1e3 * record.barrier_std_ev:.0f} meV"
        )
    margin = record.barrier_std_ev or 0.0
    if min(record.barrier.forward_ev, record.barrier.reverse_ev) <= margin:
        between = _rise(record.barrier) > margin
        missing.append(
            f"no image on the saddle, {1e3 * _rise(record.barrier):.0f} meV high between two of them: give more images"
            if between
            else "no saddle above both end states"
        )
    return missing


def _confirmed(record: PathRecord) -> str:
    assert (
        record.verified_barrier_ev is not None
        and record.saddle_fmax_ev_per_ang is not None
        and record.barrier_std_ev is not None
    )
    return (
        f"the reference confirms {record.verified_barrier_ev:.3f} ± {record.barrier_std_ev:.3f} eV "
        f"(force on the saddle {record.saddle_fmax_ev_per_ang:.3f} eV/Å)"
    )


def _rise(barrier: BarrierEstimate) -> float:
    """How far the path rises above the higher end state (eV), between images too."""
    return min(barrier.spline_forward_ev, barrier.spline_forward_ev - barrier.reaction_energy_ev)


def _barrierless(record: PathRecord, spec: StopSpec) -> Decision | None:
    """Barrierless only if the whole band is known to the tolerance and nothing rises above both ends beyond that, be it
    between two images."""
    band, barrier = record.band, record.barrier
    if (
        band is None
        or barrier is None
        or not band.converged
        or record.initial_fmax_ev_per_ang is None
        or record.final_fmax_ev_per_ang is None
    ):
        return None
    settled = max(record.initial_fmax_ev_per_ang, record.final_fmax_ev_per_ang) <= spec.saddle_fmax_ev_per_ang
    known = float(np.max(band.sigma_ev)) < spec.barrier_tolerance_ev
    if settled and known and _rise(barrier) <= float(band.sigma_ev[barrier.saddle_image]):
        side, other = ("initial", "final") if barrier.forward_ev < barrier.reverse_ev else ("final", "initial")
        return Decision(
            stop=True,
            code="barrierless",
            reason=f"nothing rises above both end states by more than its uncertainty: from the {side} state it goes "
            f"downhill to the {other} one; if a barrier is expected, give a band or another {side} state",
        )
    return None


def _downhill(record: PathRecord, spec: StopSpec) -> Decision | None:
    """An end state from which the band falls, without a rise, to an image that the reference puts below it.

    Its force may vanish all the same: it then stands on a saddle or a ridge, often one of symmetry.
    """
    band = record.band
    if band is None or not band.converged:
        return None
    last = len(band.energies_ev) - 1
    for residual in record.residuals:
        if residual.image is None or not 0 < residual.image < last:
            continue
        for side, image in (("initial", residual.image), ("final", last - residual.image)):
            found = _fall(band if side == "initial" else _reversed(band), image, residual.labelled_ev, spec)
            if found is not None:
                return Decision(
                    stop=True,
                    code="end_state_not_minimum",
                    reason=f"the {side} state is no minimum: image {residual.image}, {found[0]:.2f} Å along the band, "
                    f"lies {1e3 * found[1]:.0f} meV below it by the reference and nothing rises between; relax the "
                    f"{side} state from a slightly displaced geometry, or give that image as the {side} state",
                )
    return None


def _fall(band: Band, image: int, labelled_ev: float, spec: StopSpec) -> tuple[float, float] | None:
    """How far along the band (Å) and how far down (eV) the labelled image lies, if all the way there is downhill.

    Args:
        band: as seen from the end state, which is its first image.
        image: the labelled one.
        labelled_ev: reference energy relative to the initial state of the hop.
        spec: a fall has to exceed its tolerance, and ``FALL_EV``.
    """
    spline, reach = path_spline(band), band.coordinate_ang[image]
    level = turning_points(spline)  # a minimum may hide between two images
    way = spline(np.union1d(band.coordinate_ang[: image + 1], level[level < reach]))
    drop = float(band.energies_ev[0]) - labelled_ev
    rise = float((way - np.minimum.accumulate(way)).max())
    if drop <= max(FALL_EV, spec.barrier_tolerance_ev) or rise > MARGIN_EV:
        return None
    return float(reach - band.coordinate_ang[0]), drop


def _reversed(band: Band) -> Band:
    """The band as seen from the final state; energies keep their zero."""
    return replace(
        band,
        positions=band.positions[::-1],
        energies_ev=band.energies_ev[::-1],
        forces=band.forces[::-1],
        coordinate_ang=band.coordinate_ang[-1] - band.coordinate_ang[::-1],
    )


def budget(n_calls: int, spec: StopSpec) -> Decision | None:
    """The other end of a run: its reference calls spent."""
    if n_calls >= spec.max_labels:
        return Decision(
            stop=True, code="label_budget", reason=f"{n_calls} reference calls spent (limit {spec.max_labels})"
        )
    return None


def n_generations(records: Sequence[PathRecord]) -> int:
    """Generations after the first in which a hop asked for labels, the first being that of the end states; those in
    which it waited for its turn do not count."""
    return sum(bool(record.label_keys) for record in records) - 1


def hop_budget(records: Sequence[PathRecord], spec: StopSpec) -> Decision | None:
    """The other end of a hop, from all its records: its generations spent."""
    if (generation := n_generations(records)) >= spec.max_generations:
        return Decision(
            stop=True,
            code="generation_budget",
            reason=f"{generation} generations after the end states (limit {spec.max_generations})",
        )
    return None


def overall(paths: Sequence[PathRecord], spent: Decision | None) -> Decision:
    """The run's decision from its hops' and the budget's."""
    if all(p.decision.stop for p in paths):
        codes = [p.decision.code for p in paths]
        code = codes[0] if len(set(codes)) == 1 else next(c for c in codes if c != "converged")
        return Decision(stop=True, code=code, reason="; ".join(f"{p.path}: {p.decision.reason}" for p in paths))
    if spent is not None:
        return spent
    return Decision(
        stop=False,
        code="continue",
        reason="; ".join(f"{p.path}: {p.decision.reason}" for p in paths if not p.decision.stop),
    )
