"""Labels held against each other: an answer that is off by a keV looks as sound as any other on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse.csgraph import connected_components

from alcore.types import BoolArray, Label

SLACK_EV, SLACK_EV_PER_ATOM = 10.0, 0.5
"""Energy by which two geometries may differ whatever their forces: a barrier between them, another spin state."""
WORK_FACTOR = 5.0
"""How much more work than the forces at both places suggest may lie between them."""
MOST_COMPARED = 500
"""Labels of the same atoms that are held against each other, the latest."""


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
        doubts |= _doubts(group[-MOST_COMPARED:])
    return doubts


def _comparable(labels: Sequence[Label]) -> list[list[Label]]:
    """Labels of the same atoms in the same cell, in order."""
    groups: dict[tuple[bytes, bytes, float], list[Label]] = {}
    for label in labels:
        atoms = label.structure
        key = (atoms.numbers.tobytes(), np.rint(atoms.cell * 1e4).astype(np.int64).tobytes(), atoms.charge)
        groups.setdefault(key, []).append(label)
    return list(groups.values())


def _doubts(labels: Sequence[Label]) -> dict[str, str]:
    _, camp = connected_components(_agreement(labels), directed=False)
    sizes = np.bincount(camp)
    if len(sizes) == 1:
        return {}
    largest = np.flatnonzero(sizes == sizes.max())
    energies = np.array([label.energy_ev for label in labels], dtype=float)
    believed = camp == largest[0]
    if len(largest) > 1:
        reason = (
            f"labels of the same atoms differ by up to {np.ptp(energies):.0f} eV and nothing tells which is wrong yet"
        )
        return {label.key: reason for label in labels}
    typical = float(np.median(energies[believed]))
    return {
        label.key: f"its energy is {energy - typical:+.0f} eV from that of {sizes.max()} labels of the same atoms, "
        "which no force there explains"
        for label, energy, sound in zip(labels, energies, believed, strict=True)
        if not sound
    }


def _agreement(labels: Sequence[Label]) -> BoolArray:
    """Which labels could be of one energy surface, ``(n_labels, n_labels)``."""
    n_atoms = len(labels[0].structure)
    positions = np.array([label.structure.positions.ravel() for label in labels])
    forces = np.array([np.linalg.norm(label.forces) for label in labels])  # type: ignore[arg-type]
    energies = np.array([label.energy_ev for label in labels], dtype=float)
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    slack = max(SLACK_EV, SLACK_EV_PER_ATOM * n_atoms)
    allowed = slack + WORK_FACTOR * np.maximum(forces[:, None], forces) * distances
    agreed: BoolArray = np.abs(energies[:, None] - energies) < allowed
    return agreed


def believed(labels: Mapping[str, Label], doubts: Mapping[str, str]) -> dict[str, Label]:
    """The same labels, those in doubt with the status ``rejected`` and the reason."""
    return {
        key: replace(label, status="rejected", reason=doubts[key]) if label.ok and key in doubts else label
        for key, label in labels.items()
    }
