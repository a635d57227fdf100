"""The data set: only labels of status ``ok``, all of one level of theory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms

from alcore.errors import InputError
from alcore.files import read_file
from alcore.identity import label_key
from alcore.types import Dataset, FloatArray, IntArray, Label, Structure, frozen_array


def grow(dataset: Dataset, labels: Iterable[Label]) -> Dataset:
    """``dataset`` and those of ``labels`` that are ``ok`` and new, in order.

    Raises:
        InputError: a label of another fingerprint: two levels of theory must not meet in one training head.
    """
    known = {label.key for label in dataset.labels}
    grown = list(dataset.labels)
    for label in labels:
        if not label.ok or label.key in known:
            continue
        if grown and label.fingerprint != grown[0].fingerprint:
            raise InputError(
                f"labels of two levels of theory meet: {grown[0].calculator} ({grown[0].fingerprint[:8]}) and "
                f"{label.calculator} ({label.fingerprint[:8]})",
                where="data",
                mend="give data of the run's own calculator and settings",
            )
        known.add(label.key)
        grown.append(label)
    return Dataset(labels=tuple(grown))


def composition_groups(labels: Sequence[Label]) -> IntArray:
    """Which composition each label is of, numbered in order of appearance, ``(n_labels,)``: only energies of the same
    composition and charge can be compared."""
    compositions = [(label.structure.charge, *sorted(label.structure.numbers.tolist())) for label in labels]
    numbered = {composition: k for k, composition in enumerate(dict.fromkeys(compositions))}
    return np.array([numbered[composition] for composition in compositions])


def centred(values: FloatArray, groups: IntArray, weights: FloatArray | None = None) -> FloatArray:
    """``values`` relative to the (weighted) mean of their group, ``(n,)`` like all three."""
    share = np.ones(len(values)) if weights is None else weights
    means = np.bincount(groups, share * values) / np.maximum(np.bincount(groups, share), np.finfo(float).tiny)
    return values - means[groups]


def read_labels(path: Path, *, fingerprint: str, calculator: str, where: str) -> list[Label]:
    """Labelled structures a user brings along, taken to be of the run's own level of theory unless they say otherwise.

    Energies and forces are ``REF_energy``/``REF_forces`` (as ``al-loop export`` writes them) or what ASE reads from the
    file (vasprun.xml, OUTCAR, pw.x output, …), the force-consistent energy where there is one.

    Args:
        path: any file of frames ASE reads.
        fingerprint, calculator: of the run's reference calculator.
        where: the key of the run file, for messages.

    Raises:
        InputError: no such file, unreadable, a frame without energy and forces, or of another fingerprint.
    """
    return [
        _label_of(frame, k, path, fingerprint, calculator, where) for k, frame in enumerate(read_file(path, where, ":"))
    ]


def _label_of(frame: Atoms, k: int, path: Path, fingerprint: str, calculator: str, where: str) -> Label:
    results = frame.calc.results if frame.calc is not None else {}
    energy = frame.info.get("REF_energy", results.get("free_energy", results.get("energy")))
    forces = frame.arrays.get("REF_forces", results.get("forces"))
    if energy is None or forces is None:
        raise InputError(
            f"frame {k} of {path.name} has no energy and forces", where=where, mend="give REF_energy and REF_forces"
        )
    if not (np.isfinite(energy) and np.isfinite(forces).all()):
        raise InputError(
            f"frame {k} of {path.name} has an energy or force that is not finite", where=where, mend="remove it"
        )
    theirs = str(frame.info.get("fingerprint", fingerprint))
    if theirs != fingerprint:
        raise InputError(
            f"frame {k} of {path.name} is of another level of theory ({frame.info.get('calculator', theirs[:8])})",
            where=where,
            mend=f"give labels of {calculator} with the run's settings",
        )
    structure = Structure.from_atoms(frame, charge=float(frame.info.get("charge", 0.0)))
    # A frame that does not say which calculator made it is learned from, but never stands in for a reference label.
    proven = frame.info.get("fingerprint") is not None
    return Label(
        key=label_key(structure, fingerprint if proven else f"{fingerprint}, unproven"),
        structure=structure,
        status="ok",
        fingerprint=fingerprint,
        calculator=calculator,
        energy_ev=float(energy),
        forces=frozen_array(forces),
        folder=str(path.parent),
        details={"source": path.name, "frame": k},
    )
