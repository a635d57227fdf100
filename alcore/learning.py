"""How well a potential does on labels it has not seen, and subsets of labels for a learning curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alcore.dataset import centred, composition_groups
from alcore.errors import InputError
from alcore.protocols import Potential
from alcore.types import Dataset, Label


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Errors of a potential on labels it has not seen.

    Attributes:
        force_rmse_ev_per_ang: over all force components, those of fixed atoms included.
        energy_rmse_ev_per_atom: of energies relative to the mean of their composition, since absolute energies are not
            learned; a label that is the only one of its composition does not count. NaN if none counts.
        n_labels: how many there were.
    """

    force_rmse_ev_per_ang: float
    energy_rmse_ev_per_atom: float
    n_labels: int


def judge(potential: Potential, labels: Sequence[Label]) -> Judgement:
    """``potential`` held against ``labels``, which may differ in composition, cell and size.

    Raises:
        InputError: there is no label, or one without energy and forces.
    """
    if not labels or any(label.energy_ev is None or label.forces is None for label in labels):
        raise InputError("nothing to judge by", where="labels", mend="give labels with energies and forces")
    energy_errors, force_errors = [], []
    for label in labels:
        energies, forces = potential.evaluate(label.structure, label.structure.positions[None])
        energy_errors.append(float(energies[0]) - float(label.energy_ev or 0.0))
        force_errors.append((forces[0] - label.forces).ravel())
    groups = composition_groups(labels)
    n_atoms = np.array([len(label.structure) for label in labels])
    per_atom = (centred(np.array(energy_errors), groups) / n_atoms)[np.bincount(groups)[groups] > 1]
    return Judgement(
        force_rmse_ev_per_ang=float(np.sqrt(np.mean(np.concatenate(force_errors) ** 2))),
        energy_rmse_ev_per_atom=float(np.sqrt(np.mean(per_atom**2))) if len(per_atom) else float("nan"),
        n_labels=len(labels),
    )


def nested_subsets(dataset: Dataset, sizes: Sequence[int], seed: int) -> list[Dataset]:
    """A subset of each size, in the order of ``sizes``; every smaller one is part of every larger one, and the same
    seed draws the same.

    Raises:
        InputError: a size is not positive or exceeds the labels there are.
    """
    if wrong := [size for size in sizes if not 0 < size <= len(dataset)]:
        raise InputError(f"no subset of {wrong[0]} of {len(dataset)} labels", where="sizes", mend="choose others")
    order = np.random.default_rng(seed).permutation(len(dataset))
    return [Dataset(labels=tuple(dataset.labels[int(k)] for k in order[:size])) for size in sizes]
