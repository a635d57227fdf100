"""Probing one hop on the surrogate: settle its end states, relax its band, say how sure it is, pick what to label."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np

from alcore.barrier import estimate_barrier, label_fmax
from alcore.endpoints import relax_end_state
from alcore.neb import Guards, NebSpec, Relaxed, interpolate, path_coordinate
from alcore.protocols import Surrogate
from alcore.segments import relax_path
from alcore.selection import SelectSpec, select
from alcore.types import (
    Band,
    BarrierEstimate,
    Calibration,
    Candidate,
    CommitteePrediction,
    EndpointPair,
    FloatArray,
    Label,
    PathRecord,
    Structure,
)
from alcore.uncertainty import calibrated, of_lead, relative_sigmas

MAX_END_STATE_TRIES = 12
"""Relaxed end states that may be labelled for one hop before it is given up."""
DOUBT_EV, DOUBT_GROWTH = 0.2, 1.2
"""A relaxation stops where the raw sigma of an image exceeds this, and exceeds the starting band's by this factor."""
NO_GAIN_EV = 0.005
"""What an end state may lose by being relaxed further than the labels know."""
BESIDE_ANG = 0.002
"""Far enough for another calculation, near enough to be as relaxed as before."""
BACK = 0.5
"""Share of the way back to where an image came from, for each label in vain: collapsed atoms are not asked for ever."""
TRUSTED_ERROR_EV = 0.01
"""A band whose label was predicted within this is worth starting from again; any other starts from the interpolation,
or it might not move and its saddle, labelled already, would never be confirmed."""


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """How a hop is probed; ``end_state_fmax_ev_per_ang`` is the reference force below which an end state is settled."""

    neb: NebSpec = NebSpec()
    select: SelectSpec = SelectSpec()
    guards: Guards = Guards()
    end_state_fmax_ev_per_ang: float = 0.05
    calibration: Calibration = Calibration()


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """What a probe found.

    Attributes:
        candidates: what to label next.
        band, barrier: None while the end states are being settled.
        hopeless: why this hop cannot go on, or "".
    """

    candidates: tuple[Candidate, ...]
    band: Band | None = None
    barrier: BarrierEstimate | None = None
    hopeless: str = ""


def probe_path(
    pair: EndpointPair,
    surrogate: Surrogate,
    spec: ProbeSpec,
    *,
    initial: Label | None,
    final: Label | None,
    previous: PathRecord | None,
    end_state_tries: int,
    key_of: Callable[[Structure], str],
    asked: Set[str],
    failed: Set[str] = frozenset(),
) -> Probe:
    """Probes one hop.

    Args:
        pair: its end states as they stand.
        surrogate: as trained so far.
        spec: how.
        initial, final: reference labels of the end states as they stand, or None.
        previous: the hop's record of the last generation in which labels were held against predictions.
        end_state_tries: relaxed end states labelled so far.
        key_of: content key of a structure.
        asked: keys asked for so far.
        failed: those of them whose label is of no use.
    """

    def again(structure: Structure, home: FloatArray | None = None) -> Structure:
        return beside(structure, lambda place: key_of(place) in failed, home)

    unlabelled = [
        Candidate(
            path=pair.name,
            kind=kind,  # type: ignore[arg-type]
            image=image,
            structure=again(structure) if pair.relax else structure,
        )
        for kind, image, structure, label in (("initial", 0, pair.initial, initial), ("final", -1, pair.final, final))
        if label is None
    ]
    if unlabelled:
        return Probe(candidates=tuple(unlabelled))
    restless = [
        (side, image, structure)
        for side, image, structure, label in (("initial", 0, pair.initial, initial), ("final", -1, pair.final, final))
        if (label_fmax(label) or 0.0) > spec.end_state_fmax_ev_per_ang
    ]
    if restless:
        return _settle(
            pair,
            surrogate,
            spec,
            restless,
            end_state_tries,
            again=again,
            unasked=lambda place: key_of(place) not in asked,
        )
    start, minima = _start(pair, spec, previous)
    band, prediction = relaxed_band(pair, surrogate, spec, start, again, minima)
    inner = range(1, len(band.positions) - 1)
    if previous is not None and previous.saddle_key in {key_of(band.structure(k)) for k in inner}:
        # The band did not move, so its saddle could never be put to the test again: come to it another way.
        band, prediction = relaxed_band(pair, surrogate, spec, interpolate(pair, spec.neb), again)
    candidates = select(band, prediction, spec.select, key_of=key_of, labelled=asked, guards=spec.guards)
    candidates = [as_uncertain(candidate, prediction.lead, spec.calibration) for candidate in candidates]
    return Probe(candidates=tuple(candidates), band=band, barrier=estimate_barrier(band))


def as_uncertain(candidate: Candidate, lead: str, calibration: Calibration) -> Candidate:
    """The candidate with the sigma that its label will be held against: whoever asks where a model is least certain
    also finds where it is most wrong, so those have a factor of their own."""
    if candidate.kind != "uncertain":
        return candidate
    committee = of_lead(candidate.sigma_committee_ev or 0.0, lead)
    sigma = calibrated(committee, candidate.sigma_posterior_ev or 0.0, calibration, astray=True)
    return replace(candidate, sigma_ev=float(sigma))


def beside(structure: Structure, spoiled: Callable[[Structure], bool], home: FloatArray | None = None) -> Structure:
    """The structure itself, or, where asking for it brought no good label, a place near it that was not asked yet.

    First the free atoms move by about ``BESIDE_ANG``: a calculation that fails at one geometry often works at the next.
    Where that was of no use either, they go back towards ``home``, further each time.

    Args:
        structure: the place.
        spoiled: whether a place brought no good label.
        home: positions from which a relaxation came to this place, ``(n_atoms, 3)`` in Å, or None.
    """
    place, tries = structure, 0
    while spoiled(place):
        tries += 1
        moves = np.random.default_rng(tries).normal(scale=BESIDE_ANG, size=structure.positions.shape)
        if home is not None:
            moves += min(BACK * (tries - 1), 1.0) * (home - structure.positions)
        place = structure.moved(structure.positions + np.where(structure.fixed, 0.0, moves))
    return place


def _settle(
    pair: EndpointPair,
    surrogate: Surrogate,
    spec: ProbeSpec,
    restless: list[tuple[str, int, Structure]],
    tries: int,
    *,
    again: Callable[[Structure], Structure],
    unasked: Callable[[Structure], bool],
) -> Probe:
    """End states whose reference force is too large, relaxed on the surrogate, as candidates."""
    names = " and ".join(side for side, _, _ in restless)
    limit = spec.end_state_fmax_ev_per_ang
    if not pair.relax:
        return Probe(
            candidates=(),
            hopeless=f"reference force on the {names} state above {limit:g} eV/Å and relax_endpoints is false",
        )
    if tries >= MAX_END_STATE_TRIES:
        return Probe(
            candidates=(),
            hopeless=f"the {names} state still has a force above {limit:g} eV/Å after {tries} relaxations",
        )
    candidates = []
    for side, image, structure in restless:
        relaxed = relax_end_state(
            surrogate, structure, 0.3 * limit, guards=spec.guards, doubt=_unlikely(surrogate, structure)
        )
        place = structure.moved(relaxed.positions[0])
        other = pair.final if side == "initial" else pair.initial
        if np.abs(place.positions - other.positions).max() < 0.1:
            return Probe(
                candidates=(),
                hopeless=f"the {side} state relaxes into the other one: it is no minimum; give one beyond it",
            )
        place = again(place)
        if unasked(place):
            candidates.append(
                Candidate(path=pair.name, kind="endpoint", image=image, structure=place, forces=relaxed.forces[0])
            )
    if not candidates:
        return Probe(candidates=(), hopeless=f"the {names} state cannot be relaxed further on the surrogate")
    return Probe(candidates=tuple(candidates))


def _unlikely(surrogate: Surrogate, start: Structure) -> Callable[[FloatArray, float], str]:
    """Stops a relaxation where sigma of the energy it gained exceeds that gain: beyond, it may as well be lost."""

    def doubt(positions: FloatArray, gain_ev: float) -> str:
        sigma = float(surrogate.posterior_sigma(start, np.concatenate([start.positions[None], positions]))[1])
        return f"± {sigma:.3f} eV" if sigma > max(gain_ev, NO_GAIN_EV) else ""

    return doubt


def _start(pair: EndpointPair, spec: ProbeSpec, previous: PathRecord | None) -> tuple[FloatArray, tuple[int, ...]]:
    """The last band and where it was divided if it was sound and well predicted, otherwise a fresh interpolation."""
    if previous is not None and previous.band is not None and previous.band.converged:
        ends = previous.band.positions[[0, -1]]
        same = np.allclose(ends[0], pair.initial.positions) and np.allclose(ends[1], pair.final.positions)
        errors = [abs(r.error_ev) for r in previous.residuals]
        if same and errors and max(errors) < TRUSTED_ERROR_EV:
            return previous.band.positions, previous.band.minima
    return interpolate(pair, spec.neb), ()


def _doubt(pair: EndpointPair, surrogate: Surrogate, start: FloatArray) -> Callable[[FloatArray], str]:
    """Stops a relaxation that leaves what the labels know: posterior sigma above a floor and above the start's."""

    def largest(positions: FloatArray) -> tuple[int, float]:
        sigma = surrogate.posterior_sigma(pair.initial, positions)
        return int(sigma.argmax()), float(sigma.max())

    limit = max(DOUBT_EV, DOUBT_GROWTH * largest(start)[1])

    def doubt(positions: FloatArray) -> str:
        image, sigma = largest(positions)
        return f"image {image} left what the labels know: ± {sigma:.2f} eV" if sigma > limit else ""

    return doubt


def relaxed_band(
    pair: EndpointPair,
    surrogate: Surrogate,
    spec: ProbeSpec,
    start: FloatArray,
    again: Callable[[Structure, FloatArray], Structure] = lambda structure, home: structure,
    minima: Sequence[int] = (),
) -> tuple[Band, CommitteePrediction]:
    """The band relaxed on the surrogate, with every image's uncertainty relative to the initial state.

    Args:
        pair, surrogate, spec: see ``probe_path``.
        start: where the images start, Å, ``(n_images, n_atoms, 3)``.
        again: moves an image, towards where it started, if asking for it as it is would be of no use.
        minima: images of ``start`` at which it is divided.
    """

    def unsure(two: FloatArray) -> float:
        prediction = surrogate.predict(pair.initial, two)
        committee, posterior = relative_sigmas(prediction)
        return float(calibrated(of_lead(committee, prediction.lead), posterior, spec.calibration)[1])

    doubt = _doubt(pair, surrogate, start)
    relaxed: Relaxed = relax_path(
        surrogate, pair.initial, start, spec.neb, spec.guards, doubt, minima=minima, unsure=unsure
    )
    n_images = len(relaxed.positions)
    homes = start[np.linspace(0, len(start) - 1, n_images).round().astype(int)]  # a divided path has more images
    inner = [
        again(pair.initial.moved(place), home).positions
        for place, home in zip(relaxed.positions[1:-1], homes[1:-1], strict=True)
    ]
    positions = np.stack([relaxed.positions[0], *inner, relaxed.positions[-1]])
    prediction = surrogate.predict(pair.initial, positions)
    committee, posterior = relative_sigmas(prediction)
    lost = relaxed.status != "converged"
    sigma = calibrated(of_lead(committee, prediction.lead), posterior, spec.calibration, astray=lost)
    sigma[0] = 0.0  # the initial state is the zero of energy
    band = Band(
        path=pair.name,
        template=pair.initial,
        positions=positions,
        energies_ev=prediction.energies_ev - prediction.energies_ev[0],
        forces=prediction.forces,
        sigma_committee_ev=committee,
        sigma_posterior_ev=posterior,
        sigma_ev=sigma,
        coordinate_ang=path_coordinate(pair.initial, positions),
        status=relaxed.status,
        reason=relaxed.reason,
        climbing_image=relaxed.climbing_image,
        fmax_ev_per_ang=relaxed.fmax_ev_per_ang,
        n_steps=relaxed.n_steps,
        minima=relaxed.minima,
    )
    return band, prediction
