"""Labels held against each other: an answer that is off by a keV looks as sound as any other on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist

from alcore.types import BoolArray, FloatArray, Label

SLACK_EV, SLACK_EV_PER_ATOM = 10.0, 0.5
"""Energy by which two geometries may differ whatever their forces: a barrier between them, another spin state."""
WORK_FACTOR = 5.0
"""How much more work than the forces at both places suggest may lie between them."""
MOST_COMPARED = 2000
"""Labels of the same atoms that choose the camp that is believed, the latest; older ones are only held against it."""


def vet(labels: Sequence[Label]) -> dict[str, str]:
    """Why some of these labels are not to be trusted, by key; nothing for those that are.

    Two labels of the same atoms agree if the energy between them is one that their forces could have done work for:
    ``|E_i - E_j| < slack + 5 |F| |r_i - r_j|``. Labels that agree, directly or through others, form a camp; the largest
    camp is believed. Where two camps are equally large nobody knows, and none of their labels is believed until more
    are there.

    Args:
        labels: all ``ok``; those of other atoms or another cell are never compared.
    """
    doubts: dict[str, str] = {}
    for group in _comparable(labels):
        doubts |= _doubts(group[-MOST_COMPARED:], group[:-MOST_COMPARED])
    return doubts


def _comparable(labels: Sequence[Label]) -> list[list[Label]]:
    """Labels of the same atoms in the same cell, in order."""
    groups: dict[tuple[bytes, bytes, float], list[Label]] = {}
    for label in labels:
        atoms = label.structure
        key = (atoms.numbers.tobytes(), np.rint(atoms.cell * 1e4).astype(np.int64).tobytes(), atoms.charge)
        groups.setdefault(key, []).append(label)
    return list(groups.values())


def _doubts(latest: Sequence[Label], older: Sequence[Label]) -> dict[str, str]:
    _, camp = connected_components(_agreement(latest, latest), directed=False)
    sizes = np.bincount(camp)
    largest = np.flatnonzero(sizes == sizes.max())
    energies = np.array([label.energy_ev for label in latest], dtype=float)
    if len(largest) > 1:
        reason = f"labels of the same atoms differ by {np.ptp(energies):.0f} eV and nothing tells which is wrong yet"
        return {label.key: reason for label in (*older, *latest)}
    sound = [int(k) for k in np.flatnonzero(camp == largest[0])]
    trusted = [latest[k] for k in sound]
    outside = [latest[int(k)] for k in np.flatnonzero(camp != largest[0])]
    for start in range(0, len(older), MOST_COMPARED):
        some = older[start : start + MOST_COMPARED]
        alone = ~_agreement(some, trusted).any(axis=1)
        outside += [some[int(k)] for k in np.flatnonzero(alone)]
    typical = float(np.median(energies[sound]))
    return {
        label.key: f"its energy is {float(label.energy_ev or 0.0) - typical:+.0f} eV from that of {len(trusted)} "
        "labels of the same atoms, which no force there explains"
        for label in outside
    }


def _agreement(some: Sequence[Label], others: Sequence[Label]) -> BoolArray:
    """Which labels could be of one energy surface, ``(n_some, n_others)``; all of the same atoms."""

    def columns(labels: Sequence[Label]) -> tuple[FloatArray, FloatArray, FloatArray]:
        forces = [np.linalg.norm(label.forces) for label in labels]  # type: ignore[arg-type]
        positions = np.array([label.structure.positions.ravel() for label in labels])
        return positions, np.array(forces), np.array([label.energy_ev for label in labels], dtype=float)

    (here, here_forces, here_ev), (there, there_forces, there_ev) = columns(some), columns(others)
    slack = max(SLACK_EV, SLACK_EV_PER_ATOM * len(some[0].structure))
    allowed = slack + WORK_FACTOR * np.maximum(here_forces[:, None], there_forces) * cdist(here, there)
    agreed: BoolArray = np.abs(here_ev[:, None] - there_ev) < allowed
    return agreed


def believed(labels: Mapping[str, Label], doubts: Mapping[str, str]) -> dict[str, Label]:
    """The same labels, those in doubt with the status ``rejected`` and the reason."""
    return {
        key: replace(label, status="rejected", reason=doubts[key]) if label.ok and key in doubts else label
        for key, label in labels.items()
    }
