"""What a teacher says about structures, and what of it can be learned from.

A teacher is not the reference: a cheap potential or a universal one. Calculators are injected; none is known here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alcore.identity import label_key
from alcore.protocols import Labeler
from alcore.types import Candidate, FloatArray, Label, LabelRequest, Structure

REWEIGHTINGS = 30
Answer = tuple[float, FloatArray]
"""Energy in eV and forces in eV/Å, ``(n_atoms, 3)``."""


class BatchTeacher(Protocol):
    """A teacher that is asked about many structures at once, in this process."""

    name: str

    def __call__(self, structures: Sequence[Structure]) -> Sequence[Answer | None]:
        """An answer for each structure, in order; None where it has none."""
        ...


Teacher = Labeler | BatchTeacher


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Labels beyond these are removed.

    Attributes:
        max_force_ev_per_ang: of any atom.
        max_energy_ev_per_atom: distance of the energy from the sum of the atoms' own energies.
    """

    max_force_ev_per_ang: float = 20.0
    max_energy_ev_per_atom: float = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Lessons:
    """What the teacher said, sound or not, in the order asked.

    Attributes:
        labels: one a structure.
        teacher, fingerprint: who.
        seconds: that it took.
    """

    labels: tuple[Label, ...]
    teacher: str
    fingerprint: str
    seconds: float = 0.0


def teach(structures: Sequence[Structure], teacher: Teacher) -> Lessons:
    """The teacher's labels of ``structures``."""
    began = time.perf_counter()
    fingerprint = getattr(teacher, "fingerprint", teacher.name)
    keys = [label_key(structure, fingerprint) for structure in structures]
    if hasattr(teacher, "label"):
        candidates = [Candidate(path="pretraining", kind="data", image=0, structure=s) for s in structures]
        labels = teacher.label(
            [LabelRequest(key=k, candidate=c, generation=0) for k, c in zip(keys, candidates, strict=True)]
        )
    else:
        labels = [
            Label(
                key=key,
                structure=structure,
                status="ok" if answer else "crashed",
                fingerprint=fingerprint,
                calculator=teacher.name,
                energy_ev=answer[0] if answer else None,
                forces=answer[1] if answer else None,
            )
            for key, structure, answer in zip(keys, structures, teacher(structures), strict=True)
        ]
    return Lessons(
        labels=tuple(labels),
        teacher=teacher.name,
        fingerprint=fingerprint,
        seconds=time.perf_counter() - began,
    )


def sound_labels(labels: Sequence[Label], limits: Limits) -> tuple[list[Label], dict[str, int]]:
    """Those that can be learned, and why how many of the others cannot."""
    faults = [_fault(label, limits) for label in labels]
    kept = [label for label, fault in zip(labels, faults, strict=True) if not fault]
    removed = Counter(fault for fault in faults if fault)
    if kept:
        elements = sorted({int(z) for label in kept for z in label.structure.numbers})
        away = _energy_residuals(kept, elements)
        near = [label for label, far in zip(kept, away, strict=True) if far <= limits.max_energy_ev_per_atom]
        if len(near) < len(kept):
            removed["energy out of bounds"] = len(kept) - len(near)
        kept = near
    return kept, dict(removed)


def _energy_residuals(labels: Sequence[Label], elements: Sequence[int]) -> FloatArray:
    """How far each energy lies from the sum of its atoms' own, eV an atom, ``(n_labels,)``.

    The atoms' energies are those of least absolute error (by reweighting least squares), so that a wild label does not
    draw them to itself and make the others look wrong.
    """
    counts = atom_counts(labels, elements)
    sizes = counts.sum(axis=1)
    shares, per_atom = counts / sizes[:, None], np.array([label.energy_ev for label in labels], dtype=float) / sizes
    residuals = np.ones(len(labels))
    for _ in range(REWEIGHTINGS):
        root = 1.0 / np.sqrt(np.maximum(residuals, 1e-3))
        own = np.linalg.lstsq(root[:, None] * shares, root * per_atom, rcond=None)[0]
        residuals = np.abs(shares @ own - per_atom)
    return np.asarray(residuals)


def _fault(label: Label, limits: Limits) -> str:
    if not label.ok:
        return label.status
    if label.forces is None or label.forces.shape != (len(label.structure), 3) or label.energy_ev is None:
        return "no energy or forces"
    if not (np.isfinite(label.energy_ev) and np.isfinite(label.forces).all()):
        return "not finite"
    if np.linalg.norm(label.forces, axis=1).max() > limits.max_force_ev_per_ang:
        return "force out of bounds"
    return ""


def atomic_energies(labels: Sequence[Label], elements: Sequence[int]) -> FloatArray:
    """Energy an atom of each element adds, eV, ``(n_elements,)``: least squares over compositions; the solution of
    least norm where they do not determine it."""
    energies = np.array([label.energy_ev for label in labels], dtype=float)
    return np.asarray(np.linalg.lstsq(atom_counts(labels, elements), energies, rcond=None)[0])


def atom_counts(labels: Sequence[Label], elements: Sequence[int]) -> FloatArray:
    """Atoms of each element in each structure, ``(n_labels, n_elements)``."""
    return np.array([[float((label.structure.numbers == z).sum()) for z in elements] for label in labels])
