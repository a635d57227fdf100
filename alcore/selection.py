"""Which images deserve a label.

Strategies: ``saddle+uncertainty``; ``uncertainty``, without the saddle; ``barrier-variance``, the label that tells most
about the height of the highest image, whichever that is; ``random``, to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alcore.barrier import doubtful_rival, doubtful_well
from alcore.neb import Guards, closest_contact
from alcore.types import Band, Candidate, CommitteePrediction, FloatArray, LabelKind, Structure
from alcore.uncertainty import of_lead

Strategy = Literal["saddle+uncertainty", "uncertainty", "barrier-variance", "random"]
N_DRAWS = 2000
"""Bands drawn from the posterior to see which image is the highest: its chance is known within 1 %."""
NOISE_EV2 = 1e-6
"""Variance of a label's energy."""


@dataclass(frozen=True, kw_only=True)
class SelectSpec:
    """Field names as in the run file; ``well_tolerance_ev`` is the barrier's tolerance, ``seed`` that of the strategy
    ``random``."""

    strategy: Strategy = "saddle+uncertainty"
    labels_per_generation: int = 1
    hops_per_generation: int = 1
    well_tolerance_ev: float = 0.01
    seed: int = 0


def select(
    band: Band,
    prediction: CommitteePrediction,
    spec: SelectSpec,
    *,
    key_of: Callable[[Structure], str],
    labelled: Set[str],
    guards: Guards | None = None,
) -> list[Candidate]:
    """The saddle if the band is converged and has one, then the most uncertain images, greedily.

    Before the saddle come a well below both ends that no label supports, and the top of another hump that may be the
    highest and is known less. Each pick conditions the posterior of the
    others on itself, so a batch spreads over the band (greedy variance reduction, Krause et al., JMLR 9, 235 (2008)). A
    band that did not converge has no saddle worth a label: there the most uncertain image comes first, since labelling
    the highest one stalls the loop. With ``barrier-variance`` a band that converged and has a saddle is asked by
    ``barrier_gain`` instead; with ``random`` any open image of any band will do.

    Args:
        band: the probed band.
        prediction: what the surrogate says of its images.
        spec: how many, and in which order.
        key_of: content key of a structure.
        labelled: keys that were asked for before, failed ones included: never asked again.
        guards: what counts as unphysical.

    Returns:
        at most ``labels_per_generation`` candidates; none if every image is labelled or unphysical.
    """
    limits = guards or Guards()
    keys = {k: key_of(band.structure(k)) for k in range(1, len(band.positions) - 1)}
    open_images = [k for k, key in keys.items() if key not in labelled and _sound(band.structure(k), limits)]
    variance = np.array(prediction.covariance_ev2)
    spread = np.square(of_lead(band.sigma_committee_ev, prediction.lead))
    picked: list[Candidate] = []

    def take(image: int, kind: LabelKind) -> None:
        picked.append(candidate(band, prediction, image, kind))
        open_images.remove(image)
        column = variance[:, image].copy()
        pivot = max(float(column[image]), 1e-12)
        variance[:] -= np.outer(column, column) / (pivot + NOISE_EV2)

    top = int(band.energies_ev[1:-1].argmax()) + 1
    has_saddle = band.converged and bool(band.energies_ev[top] > max(band.energies_ev[0], band.energies_ev[-1]))
    well = doubtful_well(band, spec.well_tolerance_ev)
    rival = doubtful_rival(band, spec.well_tolerance_ev) if band.converged else None
    if spec.strategy != "random" and band.converged and well in open_images:
        take(well, "uncertain")
    elif spec.strategy != "random" and rival in open_images and band.sigma_ev[rival] > band.sigma_ev[top]:
        take(rival, "uncertain")
    room = len(picked) < spec.labels_per_generation
    if spec.strategy == "saddle+uncertainty" and has_saddle and room and top in open_images:
        take(top, "saddle")
    rng = np.random.default_rng([spec.seed, len(labelled)])
    while open_images and len(picked) < spec.labels_per_generation:
        if spec.strategy == "random":
            best = int(rng.choice(open_images))
        else:
            tells = spec.strategy == "barrier-variance" and has_saddle
            scores = barrier_gain(band, variance, spread) if tells else np.maximum(np.diag(variance), 0.0) + spread
            best = max(open_images, key=lambda k: float(scores[k]))
        take(best, "saddle" if best == top and has_saddle else "uncertain")
    return picked


def whose_turn(sigmas_ev: Mapping[str, float], spec: SelectSpec) -> list[str]:
    """The hops that ask for labels in this generation: the least certain first.

    Its label teaches the others most, and a hop that is certain by the time it asks is confirmed by one label.

    Args:
        sigmas_ev: calibrated sigma of each open hop's barrier.
        spec: how many may ask.
    """
    return sorted(sigmas_ev, key=lambda name: -sigmas_ev[name])[: spec.hops_per_generation]


def barrier_gain(band: Band, covariance_ev2: FloatArray, spread_ev2: FloatArray) -> FloatArray:
    """How much the variance of the barrier B = max E − E₀ is expected to fall by a label at each image, eV²,
    ``(n_images,)``.

    The variance of a Gaussian's projection on one energy: Cov(B, E_k)² / (Var E_k + noise), where
    Cov(B, E_k) = Σ_j P(image j is the highest) Cov(E_j, E_k) (Siegel, J. Am. Stat. Assoc. 88, 77 (1993)). Were the
    highest image certain, its own label would always be the best.

    Args:
        band: its energies are the mean, its calibrated sigmas scale the covariance.
        covariance_ev2: of the energies relative to the initial state, uncalibrated, ``(n_images, n_images)``.
        spread_ev2: variance of each that the covariance does not hold, ``(n_images,)``.
    """
    raw = covariance_ev2 + np.diag(spread_ev2)
    sigma = np.sqrt(np.maximum(np.diag(raw), 1e-12))
    stated = np.hypot(band.sigma_posterior_ev, np.sqrt(spread_ev2))
    scale = np.divide(band.sigma_ev, stated, out=np.ones_like(stated), where=stated > 0)
    covariance = raw * np.outer(scale, scale)
    values, vectors = np.linalg.eigh(covariance)
    normal = np.random.default_rng(0).standard_normal((N_DRAWS, len(sigma)))
    drawn = band.energies_ev + normal @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    highest = np.bincount(drawn[:, 1:-1].argmax(axis=1) + 1, minlength=len(sigma)) / N_DRAWS
    shared = covariance @ highest
    return np.asarray(shared**2 / (np.maximum(np.diag(covariance), 0.0) + NOISE_EV2))


def candidate(band: Band, prediction: CommitteePrediction, image: int, kind: LabelKind) -> Candidate:
    """Image ``image`` with everything that was predicted for it, relative to the initial state."""
    return Candidate(
        path=band.path,
        kind=kind,
        image=image,
        structure=band.structure(image),
        energy_ev=float(band.energies_ev[image]),
        sigma_committee_ev=float(band.sigma_committee_ev[image]),
        sigma_posterior_ev=float(band.sigma_posterior_ev[image]),
        sigma_ev=float(band.sigma_ev[image]),
        forces=band.forces[image],
        by_lead_ev={name: float(values[image] - values[0]) for name, values in prediction.by_lead_ev.items()},
    )


def _sound(structure: Structure, guards: Guards) -> bool:
    contact = closest_contact(structure)
    return contact is None or contact[2] >= guards.min_distance_fraction
