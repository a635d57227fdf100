"""Which images deserve a label."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np

from alcore.barrier import doubtful_well
from alcore.neb import Guards, closest_contact
from alcore.types import Band, Candidate, CommitteePrediction, LabelKind, Structure
from alcore.uncertainty import of_lead


@dataclass(frozen=True, kw_only=True)
class SelectSpec:
    """Field names as in the run file; ``well_tolerance_ev`` is the barrier's tolerance."""

    strategy: Literal["saddle+uncertainty", "uncertainty"] = "saddle+uncertainty"
    labels_per_generation: int = 1
    well_tolerance_ev: float = 0.01


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

    Before the saddle comes a well below both ends that no label supports. Each pick conditions the posterior of the
    others on itself, so a batch spreads over the band (greedy variance reduction, Krause et al., JMLR 9, 235 (2008)). A
    band that did not converge has no saddle worth a label: there the most uncertain image comes first, since labelling
    the highest one stalls the loop.

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
        variance[:] -= np.outer(column, column) / (pivot + 1e-6)

    top = int(band.energies_ev[1:-1].argmax()) + 1
    has_saddle = band.energies_ev[top] > max(band.energies_ev[0], band.energies_ev[-1])
    well = doubtful_well(band, spec.well_tolerance_ev)
    if band.converged and well in open_images:
        take(well, "uncertain")
    elif spec.strategy == "saddle+uncertainty" and band.converged and has_saddle and top in open_images:
        take(top, "saddle")
    while open_images and len(picked) < spec.labels_per_generation:
        scores = {k: float(max(variance[k, k], 0.0) + spread[k]) for k in open_images}
        take(max(scores, key=lambda k: scores[k]), "uncertain")
    return picked


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
