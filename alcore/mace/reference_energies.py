"""Absolute energies of a trained model: its atoms' own energies (E0s), which training relative energies leaves open.

Another code's or pseudopotential's zero differs by a number an element, so that is all that is fitted: least squares
over the labels' compositions, the smallest change that does it, as mace-torch's ``--E0s estimated`` does. Nothing a
band sees depends on it; models that leave al-loop do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from alcore.mace.models import model_elements
from alcore.teaching import atom_counts
from alcore.types import FloatArray, Label


def align(
    model: Any, labels: Sequence[Label], energies_ev: FloatArray, isolated_ev: Mapping[str, float] | None
) -> dict[str, Any]:
    """Changes the E0s of ``model``, in place, so that its energies are those of the labels in the mean.

    Args:
        model: of one head, in float64: in single precision large E0s would drown what is learned.
        labels: what it has learned.
        energies_ev: what it says of them, ``(n_labels,)``.
        isolated_ev: energies of isolated atoms by symbol, which become the E0s; what the labels then still miss goes
            into an energy that is the same for every atom. None: fitted, starting from the model's own.

    Returns:
        What was done, for the record.
    """
    if next(model.parameters()).dtype != torch.float64:
        return {"e0s": "left as they were: single precision"}
    elements = model_elements(model)
    counts = atom_counts(labels, elements)
    missing = np.array([label.energy_ev for label in labels], dtype=float) - energies_ev
    own = model.atomic_energies_fn.atomic_energies
    before = own.detach().cpu().numpy().reshape(-1)
    told: dict[str, Any] = {"e0s_from": "least squares over the labels, from those of the starting model"}
    if isolated_ev is None:
        now = before + np.linalg.lstsq(counts, missing, rcond=None)[0]
    else:
        now = np.array([isolated_ev[chemical_symbols[z]] for z in elements])
        n_atoms, left = counts.sum(axis=1), missing - counts @ (now - before)
        shift = model.scale_shift.shift
        shift += float(n_atoms @ left / (n_atoms @ n_atoms))
        told = {"e0s_from": "isolated atoms, as given", "shift_ev_per_atom": float(shift.reshape(-1)[0])}
    own.copy_(own.new_tensor(now).reshape(own.shape))
    return {"e0s": {chemical_symbols[z]: float(e) for z, e in zip(elements, now, strict=True)}, **told}
