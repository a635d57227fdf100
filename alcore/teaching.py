"""What a teacher says about structures, and what of it can be learned from.

A teacher is not the reference: a cheap potential or a universal one. Calculators are injected; none is known here.
"""

from __future__ import annotations

import io
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from alcore.files import write_whole
from alcore.identity import label_key
from alcore.protocols import Labeler
from alcore.types import Candidate, FloatArray, Label, LabelRequest, Structure

REWEIGHTINGS = 30
WRITE_EVERY_S = 2.0
"""Seconds of answers that are lost at most, besides those being computed, when a teacher is killed."""
Answer = tuple[float, FloatArray]
"""Energy in eV and forces in eV/Å, ``(n_atoms, 3)``."""


class BatchTeacher(Protocol):
    """A teacher that is asked about many structures at once, in this process."""

    @property
    def name(self) -> str: ...

    def __call__(self, structures: Sequence[Structure], /) -> Sequence[Answer | None]:
        """An answer for each structure, in order; None where it has none."""
        ...


Teacher = Labeler | BatchTeacher


class KeptTeacher:
    """A teacher whose answers are kept on disk, in chunks, and never asked for again: not after an interruption, and
    not by another training. Where it has no answer, it is asked again next time.

    Attributes:
        name, fingerprint: the teacher's.
        n_known: structures of the last call whose answers were on disk.
        seconds: that all answers of the last call took when they were asked for, whenever that was.

    Args:
        teacher: who is asked, ``batch_size`` structures at once if it has one, else one by one.
        folder: where answers are kept; it must exist. What others keep there stays.
        tell: hears how many answers there are so far, and of how many structures.
    """

    def __init__(self, teacher: BatchTeacher, folder: Path, tell: Callable[[int, int], None] = lambda _n, _of: None):
        self.name = teacher.name
        self.fingerprint: str = getattr(teacher, "fingerprint", teacher.name)
        self.n_known, self.seconds = 0, 0.0
        self._teacher, self._folder, self._tell = teacher, folder, tell
        self._batch_size = int(getattr(teacher, "batch_size", 1))

    def __call__(self, structures: Sequence[Structure]) -> list[Answer | None]:
        """An answer for each structure, in order; None where there is none. What is there when this is interrupted, is
        kept.

        Raises:
            OSError: the disk does not take them.
        """
        keys = [label_key(structure, self.fingerprint) for structure in structures]
        kept = _read_answers(self._folder)
        answers: dict[str, Answer | None] = {}
        self.seconds = 0.0
        for key, structure in zip(keys, structures, strict=True):
            if key in kept and kept[key][1].shape == (len(structure), 3):
                answers[key], self.seconds = kept[key][:2], self.seconds + kept[key][2]
        self.n_known = sum(key in answers for key in keys)
        wanted = list({k: s for k, s in zip(keys, structures, strict=True) if k not in answers}.items())
        self._tell(self.n_known, len(keys))
        fresh: list[tuple[str, Answer, float]] = []
        written = time.perf_counter()
        try:
            for start in range(0, len(wanted), self._batch_size):
                batch = wanted[start : start + self._batch_size]
                began = time.perf_counter()
                found = self._teacher([structure for _, structure in batch])
                ended = time.perf_counter()
                self.seconds += ended - began
                for (key, _), answer in zip(batch, found, strict=True):
                    answers[key] = answer
                    fresh += [(key, answer, (ended - began) / len(batch))] if answer else []
                self._tell(self.n_known + start + len(batch), len(keys))
                if ended - written > WRITE_EVERY_S:
                    _write_answers(self._folder, fresh)
                    fresh, written = [], time.perf_counter()
        finally:
            _write_answers(self._folder, fresh)
        return [answers[key] for key in keys]


def _write_answers(folder: Path, answers: Sequence[tuple[str, Answer, float]]) -> None:
    """One file more, named by its first key; it is there whole or not at all."""
    if not answers:
        return
    content = io.BytesIO()
    np.savez_compressed(
        content,
        keys=np.array([key for key, _, _ in answers]),
        energies_ev=np.array([answer[0] for _, answer, _ in answers]),
        sizes=np.array([len(answer[1]) for _, answer, _ in answers]),
        forces=np.concatenate([np.asarray(answer[1], dtype=float) for _, answer, _ in answers]),
        seconds=np.array([seconds for _, _, seconds in answers]),
    )
    write_whole(folder / f"{answers[0][0][:16]}.npz", content.getvalue())


def _read_answers(folder: Path) -> dict[str, tuple[float, FloatArray, float]]:
    """Energy in eV, forces in eV/Å and seconds by key; a file that cannot be read holds nothing."""
    found = {}
    for file in sorted(folder.glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as told:
                forces = np.split(told["forces"], np.cumsum(told["sizes"])[:-1])
                rows = zip(told["keys"].tolist(), told["energies_ev"].tolist(), forces, told["seconds"], strict=True)
                found.update({key: (float(ev), np.asarray(f, float), float(s)) for key, ev, f, s in rows})
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            continue
    return found


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
