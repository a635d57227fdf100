"""What a second head replays, so that a model does not forget what it knew while it learns a few labels.

Either labels of the foundation model's own data, from a file, or its own energies and forces on structures around the
task (mace-torch's ``pseudolabel_replay``): no reference call either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from alcore.dataset import read_labels
from alcore.errors import InputError
from alcore.identity import label_key
from alcore.mace.models import model_elements
from alcore.mace.surrogate import MaceSurrogate
from alcore.sampling import disturbed
from alcore.types import FloatArray, Label, Structure, frozen_array

KIND = "replay"
"""Fingerprint and calculator of what is replayed: never that of a reference."""


def pseudo_labels(model: Any, around: Sequence[Structure], count: int, rng: np.random.Generator) -> list[Label]:
    """``count`` strained and rattled copies of ``around`` in turn, with what ``model`` itself says of them."""
    places = [disturbed(around[k % len(around)], rng) for k in range(count)]
    return [_label(structure, *_answer(model, structure)) for structure in places]


def replay_file(path: Path, model: Any, count: int, rng: np.random.Generator, where: str) -> list[Label]:
    """``count`` labelled structures of a file (all, if it has no more), of elements the model knows.

    Args:
        path: frames with energies and forces (``alcore.dataset.read_labels``), of the level of theory of ``model``.
        model: what will replay them.
        count: how many at most, drawn by ``rng``.
        where: the key of the run file, for messages.

    Raises:
        InputError: unreadable, a frame without energy and forces, or none of elements the model knows.
    """
    labels = read_labels(path, fingerprint=KIND, calculator=KIND, where=where)
    known = set(model_elements(model))
    usable = [label for label in labels if known >= set(label.structure.numbers.tolist())]
    if not usable:
        symbols = ", ".join(chemical_symbols[z] for z in sorted(known))
        raise InputError(f"no frame of {path.name} has only {symbols}", where=where, mend="give another replay file")
    chosen = np.sort(rng.permutation(len(usable))[:count])
    return [usable[int(k)] for k in chosen]


def _answer(model: Any, structure: Structure) -> tuple[float, FloatArray]:
    energies, forces = MaceSurrogate(prior=model).evaluate(structure, structure.positions[None])
    return float(energies[0]), forces[0]


def _label(structure: Structure, energy_ev: float, forces: FloatArray) -> Label:
    return Label(
        key=label_key(structure, KIND),
        structure=structure,
        status="ok",
        fingerprint=KIND,
        calculator=KIND,
        energy_ev=energy_ev,
        forces=frozen_array(forces),
    )
