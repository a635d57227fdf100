"""Bands and labels as the report sees them: forces along the path, and labelled frames at their place on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase.geometry import find_mic

from alcore.identity import geometry_bytes
from alcore.types import Band, FloatArray, GenerationRecord, Label, PathRecord, Residual


@dataclass(frozen=True, kw_only=True, eq=False)
class PathForces:
    """Surrogate forces of a band, split along and across its path.

    Attributes:
        tangential_ev_per_ang: force along the path (minus the slope of the energy), ``(n_images,)``.
        perpendicular_fmax_ev_per_ang: largest atomic norm of the rest, on coordinates that may move,
            ``(n_images,)``.
    """

    tangential_ev_per_ang: FloatArray
    perpendicular_fmax_ev_per_ang: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledFrame:
    """One label asked for by one hop.

    Attributes:
        number: 1 for the first label of the run.
        label: what the reference calculator answered.
        path, generation: who asked for it, and when; "" and -1 for structures the user brought along.
        kind: why, or "unknown".
        image: its place in the band of that generation, or None.
        coordinate_ang: path coordinate of that image in that generation's band, or None.
        energy_ev: reference energy relative to the label of the hop's initial state as it stands last, or None.
        residual: the prediction it was held against, or None.
    """

    number: int
    label: Label
    path: str = ""
    generation: int = -1
    kind: str = "unknown"
    image: int | None = None
    coordinate_ang: float | None = None
    energy_ev: float | None = None
    residual: Residual | None = None


def path_names(generations: Sequence[GenerationRecord]) -> list[str]:
    """Names of the hops, in the order in which they first appear."""
    return list(dict.fromkeys(record.path for generation in generations for record in generation.paths))


def path_records(generations: Sequence[GenerationRecord], path: str) -> list[tuple[GenerationRecord, PathRecord]]:
    """Every record of one hop, oldest first; a settled hop that is only carried along adds none."""
    found: list[tuple[GenerationRecord, PathRecord]] = []
    for generation in generations:
        for record in generation.paths:
            carried = found and found[-1][1].decision.stop and not record.label_keys and not record.residuals
            if record.path == path and not carried:
                found.append((generation, record))
    return found


def last_probed(generations: Sequence[GenerationRecord], path: str) -> PathRecord | None:
    """The newest record of a hop that holds a band, or None while its end states are being settled."""
    probed = [record for _, record in path_records(generations, path) if record.band is not None]
    return probed[-1] if probed else None


def path_forces(band: Band) -> PathForces:
    """Forces of ``band`` along the bisecting tangent (one-sided at the ends), and across it."""
    steps = np.diff(band.positions, axis=0)
    template = band.template
    if template.pbc.any():
        flat, _ = find_mic(steps.reshape(-1, 3), template.cell, template.pbc)
        steps = flat.reshape(steps.shape)
    units = np.array([step / (np.linalg.norm(step) or 1.0) for step in steps])
    tangents = np.concatenate([units[:1], units[1:] + units[:-1], units[-1:]])
    tangents = np.array([tangent / (np.linalg.norm(tangent) or 1.0) for tangent in tangents])
    tangential = np.einsum("iax,iax->i", band.forces, tangents)
    rest = band.forces - tangential[:, None, None] * tangents
    return PathForces(
        tangential_ev_per_ang=tangential,
        perpendicular_fmax_ev_per_ang=np.array([template.free_fmax(forces) for forces in rest]),
    )


def initial_energy_ev(generations: Sequence[GenerationRecord], labels: Mapping[str, Label], path: str) -> float | None:
    """Reference energy of a hop's initial state as it stands last: the zero of all energies of that hop."""
    for _, record in reversed(path_records(generations, path)):
        label = labels.get(record.initial_label)
        if label is not None and label.ok:
            return label.energy_ev
    return None


def labels_of_band(band: Band, labels: Mapping[str, Label]) -> dict[int, Label]:
    """Sound labels at exactly the geometries of a band's images, by image."""
    known = {geometry_bytes(label.structure): label for label in labels.values() if label.ok}
    keys = (geometry_bytes(band.structure(image)) for image in range(len(band.positions)))
    return {image: known[key] for image, key in enumerate(keys) if key in known}


def _place(record: PathRecord, label: Label) -> int | None:
    """Which image of that generation's band a label sits on: by geometry, else because it labels an end state."""
    if record.band is None:
        return None
    key = geometry_bytes(label.structure)
    last = len(record.band.positions) - 1
    for image in range(last + 1):
        if geometry_bytes(record.band.structure(image)) == key:
            return image
    return {record.initial_label: 0, record.final_label: last}.get(label.key)


def labelled_frames(generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> Iterator[LabelledFrame]:
    """Every label asked for, in the order it was asked; structures the user brought along come first."""
    asked = {key for generation in generations for record in generation.paths for key in record.label_keys}
    brought = [label for key, label in labels.items() if key not in asked]
    number = 0
    for label in brought:
        number += 1
        yield LabelledFrame(number=number, label=label, kind="data")
    kinds: dict[str, str] = {}
    for generation in generations:
        kinds.update(generation.kinds)
    zeros = {path: initial_energy_ev(generations, labels, path) for path in path_names(generations)}
    for generation in generations:
        for record in generation.paths:
            residuals = {residual.key: residual for residual in record.residuals}
            for key in dict.fromkeys(record.label_keys):
                if key not in labels:
                    continue
                label = labels[key]
                number += 1
                zero = zeros[record.path]
                image = _place(record, label)
                known = label.ok and label.energy_ev is not None and zero is not None
                yield LabelledFrame(
                    number=number,
                    label=label,
                    path=record.path,
                    generation=generation.index,
                    kind=kinds.get(key, "unknown"),
                    image=image,
                    coordinate_ang=None
                    if image is None or record.band is None
                    else float(record.band.coordinate_ang[image]),
                    energy_ev=float(label.energy_ev) - float(zero) if known else None,  # type: ignore[arg-type]
                    residual=residuals.get(key),
                )
