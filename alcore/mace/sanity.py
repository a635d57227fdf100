"""What a trained MACE must pass before the loop uses it; one that does not is given up for the last good one.

Errors on labels say little of how a model behaves in use: Stocker, Gasteiger, Becker, Günnemann and Margraf, Mach.
Learn.: Sci. Technol. 3, 045010 (2022); Fu et al., "Forces are not enough", Trans. Mach. Learn. Res. (2023). So besides
its labels (compared with the last good model too) a model is asked for a short run and for close contacts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import units

from alcore.dataset import centred, composition_groups
from alcore.mace.contacts import Approach, Evaluate, ways_from
from alcore.mace.fitting import looseness_of
from alcore.mace.surrogate import MaceSurrogate
from alcore.mace.training import predictions
from alcore.neb import Guards, closest_contact
from alcore.types import Dataset, FloatArray, IntArray, Label, Structure, frozen_array

MASS_U = 1.0
"""Of every atom of a run: what is visited in equilibrium does not depend on masses, and beside a hydrogen the others
would hardly move in so few steps."""


@dataclass(frozen=True, kw_only=True)
class SanitySpec:
    """Limits; each lies between what sound trainings reached and what broken models did.

    Attributes:
        energy_rmse_ev, energy_rmse_share: of energies relative to their composition's mean, the larger of the first
            and of the second times their spread. 30 meV is below what a barrier is wanted to (1 kcal/mol). Trainings
            from scratch left shares of 0.001 to 0.14; a model that knows nothing leaves 1.
        force_rmse_ev_per_ang, force_rmse_share: likewise of the forces and their root mean square: shares of 0.12
            to 0.38 were seen, and up to 0.19 eV/Å after two labels near rest.
        regression_factor: by which errors may exceed the last good model's on the labels that it reproduced: the
            bootstrap's weights are drawn anew for each training, and with them errors went from 15 to 33 meV.
        regression_energy_ev, regression_force_ev_per_ang: what that model's errors are taken to be at least, so that
            nothing below 40 meV (1 kcal/mol) counts.
        max_runs: of molecular dynamics, each of another composition.
        n_steps, step_fs: of a run. With all atoms as light as hydrogen this is two periods of a metal's fastest
            phonon, and ten steps a period of the stiffest bond.
        temperature_k: of the velocities drawn; half of it remains where the atoms begin at rest.
        max_drift_ev_per_atom: by which total energy may change, an eighth of an atom's kinetic energy. Below
            0.1 meV was seen for a slab of metal, 1 to 5 for EMT under large forces; more as atoms fell into a hole.
        max_displacement_ang: of any atom in a run, as in a relaxation's guards; a free one goes 0.3 Å along an axis.
        min_distance_fraction: of the sum of covalent radii, between any two atoms of a run, likewise.
        max_fall_ev: by which the energy may fall once two atoms are closer than any bond, from the start or from what
            it had risen to: EMT lies above the start there, models with holes of 0.9 to 4.8 eV were seen.
    """

    energy_rmse_ev: float = 0.03
    energy_rmse_share: float = 0.2
    force_rmse_ev_per_ang: float = 0.25
    force_rmse_share: float = 0.5
    regression_factor: float = 2.0
    regression_energy_ev: float = 0.02
    regression_force_ev_per_ang: float = 0.1
    max_runs: int = 2
    n_steps: int = 50
    step_fs: float = 0.4
    temperature_k: float = 300.0
    max_drift_ev_per_atom: float = 0.005
    max_displacement_ang: float = Guards().max_displacement_ang
    min_distance_fraction: float = Guards().min_distance_fraction
    max_fall_ev: float = 0.5


def faults(
    model: Any,
    dataset: Dataset,
    spec: SanitySpec,
    *,
    before: Any | None = None,
    rng: np.random.Generator,
    backdrop: Evaluate | None = None,
) -> list[str]:
    """A line for every check that ``model`` fails; empty if it may be used.

    Args:
        model: frozen.
        dataset: what it was trained on: energies and forces that it should reproduce by itself.
        spec: limits.
        before: the last good model, which is gone back to otherwise; None where there is none.
        rng: of the velocities.
        backdrop: evaluates ``model`` together with all that lies under it (an elastic network, which ``dataset`` then
            lacks); runs and approaches follow it. None where nothing does.
    """
    labels = dataset.labels
    if not labels:
        return []
    found = predictions(model, labels)
    beneath = _beneath(found, labels, backdrop)
    broken = [
        not (np.isfinite(e) and np.isfinite(f).all()) for part in (found, beneath) for e, f in zip(*part, strict=True)
    ]
    if any(broken):
        return [f"energies or forces of {sum(broken)} of {len(labels)} labels are not finite"]
    whole = [_with(label, *part) for label, *part in zip(labels, *beneath, strict=True)]
    errors = _Errors.of(labels, found, whole)
    starts = calm_labels(whole)
    follow = backdrop or MaceSurrogate(prior=model).evaluate
    lines = [*label_faults(errors, spec), *contact_faults(follow, starts, spec, _instead(follow, model, before))]
    if before is not None:
        lines += regression_faults(errors, _Errors.of(labels, predictions(before, labels), whole), spec)
    runs = [run_fault(follow, start.structure, spec, rng) for start in starts[: spec.max_runs]]
    return [*lines, *(line for line in runs if line)]


# --- labels ---------------------------------------------------------------------------------------------------------

Predicted = tuple[FloatArray, list[FloatArray]]
"""As ``training.predictions``."""


def _beneath(bare: Predicted, labels: Sequence[Label], backdrop: Evaluate | None) -> Predicted:
    """What lies under the model, which says ``bare``, at each label."""
    energies, forces = np.zeros_like(bare[0]), [np.zeros_like(less) for less in bare[1]]
    if backdrop is not None:
        for k, label in enumerate(labels):
            energy, force = backdrop(label.structure, label.structure.positions[None])
            energies[k], forces[k] = energy[0] - bare[0][k], force[0] - bare[1][k]
    return energies, forces


def _with(label: Label, energy_ev: float, forces: FloatArray) -> Label:
    assert label.energy_ev is not None and label.forces is not None
    return replace(label, energy_ev=label.energy_ev + energy_ev, forces=frozen_array(label.forces + forces))


def _instead(follow: Evaluate, model: Any, other: Any | None) -> Evaluate | None:
    """``follow`` with the other model in the model's place."""
    if other is None:
        return None
    mine, theirs = (MaceSurrogate(prior=m).evaluate for m in (model, other))

    def evaluate(template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        (e, f), (e_mine, f_mine), (e_theirs, f_theirs) = (each(template, positions) for each in (follow, mine, theirs))
        return e - e_mine + e_theirs, f - f_mine + f_theirs

    return evaluate


@dataclass(frozen=True, kw_only=True, eq=False)
class _Errors:
    """A model's errors and the scales they are held against, an entry a label.

    Attributes:
        energies_ev: label minus model; absolute zeros differ.
        mean_square: squared force error in eV²/Å², mean over components.
        true_ev: energy, what lies under the model included.
        true_mean_square: of the forces, likewise.
        weights: labels far from any path need not be reproduced as well as others (``fitting.looseness_of``).
        groups: composition.
    """

    energies_ev: FloatArray
    mean_square: FloatArray
    true_ev: FloatArray
    true_mean_square: FloatArray
    weights: FloatArray
    groups: IntArray

    @classmethod
    def of(cls, labels: Sequence[Label], found: Predicted, whole: Sequence[Label]) -> _Errors:
        """Of what was ``found`` for ``labels``; ``whole`` are the labels with what lies under the model."""
        return cls(
            energies_ev=np.array([label.energy_ev for label in labels], dtype=float) - found[0],
            mean_square=np.array([_mean_square(x.forces, f) for x, f in zip(labels, found[1], strict=True)]),
            true_ev=np.array([x.energy_ev or 0.0 for x in whole]),
            true_mean_square=np.array([_mean_square(x.forces, 0.0) for x in whole]),
            weights=np.array([looseness_of(x) ** -2.0 for x in whole]),
            groups=composition_groups(labels),
        )

    def take(self, which: IntArray) -> _Errors:
        """Those of some labels."""
        return _Errors(**{name: values[which] for name, values in vars(self).items()})

    @property
    def energy_rmse_ev(self) -> float:
        return self._spread(self.energies_ev)

    @property
    def energy_spread_ev(self) -> float:
        return self._spread(self.true_ev)

    @property
    def force_rmse(self) -> float:
        return float(np.sqrt(np.average(self.mean_square, weights=self.weights)))

    @property
    def force_rms(self) -> float:
        return float(np.sqrt(np.average(self.true_mean_square, weights=self.weights)))

    def _spread(self, values: FloatArray) -> float:
        """Root mean square around the composition's mean; 0 where each label is the only one of its composition."""
        compared = np.bincount(self.groups)[self.groups] > 1
        if not compared.any():
            return 0.0
        square = centred(values, self.groups, self.weights)[compared] ** 2
        return float(np.sqrt(np.average(square, weights=self.weights[compared])))


def _mean_square(forces: FloatArray | None, found: FloatArray | float) -> float:
    assert forces is not None
    return float(np.mean((forces - found) ** 2))


def label_faults(errors: _Errors, spec: SanitySpec) -> list[str]:
    """Relative energies and forces of the labels it was trained on."""
    lines = []
    energy_limit = max(spec.energy_rmse_ev, spec.energy_rmse_share * errors.energy_spread_ev)
    if errors.energy_rmse_ev > energy_limit:
        lines.append(
            f"energies of its own labels are off by {1e3 * errors.energy_rmse_ev:.0f} meV (limit "
            f"{1e3 * energy_limit:.0f}; they spread over {1e3 * errors.energy_spread_ev:.0f})"
        )
    force_limit = max(spec.force_rmse_ev_per_ang, spec.force_rmse_share * errors.force_rms)
    if errors.force_rmse > force_limit:
        lines.append(
            f"forces of its own labels are off by {errors.force_rmse:.2f} eV/Å (limit {force_limit:.2f}; they are "
            f"{errors.force_rms:.2f} in size)"
        )
    return lines


def regression_faults(errors: _Errors, before: _Errors, spec: SanitySpec) -> list[str]:
    """Labels that the last good model reproduced (their forces, which need no common zero), compared with it."""
    limits = np.maximum(spec.force_rmse_ev_per_ang, spec.force_rmse_share * np.sqrt(before.true_mean_square))
    kept = np.flatnonzero(np.sqrt(before.mean_square) <= limits)
    if not len(kept) or not np.isfinite(before.energies_ev[kept]).all():
        return []
    now, then, lines = errors.take(kept), before.take(kept), []
    if now.energy_rmse_ev > spec.regression_factor * max(then.energy_rmse_ev, spec.regression_energy_ev):
        lines.append(
            f"regression: energies of {len(kept)} labels are off by {1e3 * now.energy_rmse_ev:.0f} meV, before by "
            f"{1e3 * then.energy_rmse_ev:.0f}"
        )
    if now.force_rmse > spec.regression_factor * max(then.force_rmse, spec.regression_force_ev_per_ang):
        lines.append(
            f"regression: forces of {len(kept)} labels are off by {now.force_rmse:.2f} eV/Å, before by "
            f"{then.force_rmse:.2f}"
        )
    return lines


def calm_labels(labels: Sequence[Label]) -> list[Label]:
    """The label of the lowest energy of each composition, the largest composition first."""
    groups = composition_groups(labels)
    order = np.argsort(-np.bincount(groups), kind="stable")
    return [
        min((labels[int(k)] for k in np.flatnonzero(groups == group)), key=lambda label: label.energy_ev or 0.0)
        for group in order
    ]


# --- a short run ----------------------------------------------------------------------------------------------------


def run_fault(evaluate: Evaluate, start: Structure, spec: SanitySpec, rng: np.random.Generator) -> str:
    """What goes wrong in a few steps at constant energy (velocity Verlet: Swope et al., J. Chem. Phys. 76, 637 (1982)),
    or ""."""
    free = ~start.fixed
    n_free = int(free.any(axis=1).sum())
    if not n_free:
        return ""
    velocity = np.where(free, rng.normal(scale=np.sqrt(units.kB * spec.temperature_k / MASS_U), size=free.shape), 0.0)
    if free.all():
        velocity -= velocity.mean(axis=0)
    contact = closest_contact(start)
    nearest = min(spec.min_distance_fraction, 0.9 * contact[2] if contact else np.inf)
    step, positions = spec.step_fs * units.fs, np.array(start.positions)
    energy, force = evaluate(start, positions[None])
    first = float(energy[0]) + 0.5 * MASS_U * float((velocity**2).sum())
    name = f"run of {start.to_atoms().get_chemical_formula()} at {spec.temperature_k:g} K"
    for k in range(1, spec.n_steps + 1):
        velocity += 0.5 * step / MASS_U * np.where(free, force[0], 0.0)
        positions += step * velocity
        why = _place_fault(start, positions, nearest, spec)
        if why:
            return f"{name}: {why} after {k} steps"
        energy, force = evaluate(start, positions[None])
        velocity += 0.5 * step / MASS_U * np.where(free, force[0], 0.0)
        drift = abs(float(energy[0]) + 0.5 * MASS_U * float((velocity**2).sum()) - first) / n_free
        if not drift <= spec.max_drift_ev_per_atom:  # not a number is no better
            limit = 1e3 * spec.max_drift_ev_per_atom
            return f"{name}: total energy drifted by {1e3 * drift:.0f} meV/atom after {k} steps (limit {limit:g})"
    return ""


def _place_fault(start: Structure, positions: FloatArray, nearest: float, spec: SanitySpec) -> str:
    moved = np.linalg.norm(positions - start.positions, axis=1)
    if not moved.max() <= spec.max_displacement_ang:
        return f"atom {int(moved.argmax())} moved {moved.max():.1f} Å (limit {spec.max_displacement_ang:g})"
    contact = closest_contact(start.moved(positions))
    if contact is not None and contact[2] < nearest:
        return f"atoms {contact[0]} and {contact[1]} came to {contact[2]:.2f} of their covalent radii's sum"
    return ""


# --- close contacts -------------------------------------------------------------------------------------------------


def contact_faults(
    evaluate: Evaluate, starts: Sequence[Label], spec: SanitySpec, before: Evaluate | None = None
) -> list[str]:
    """Pairs of elements that attract each other where they must not; what ``before`` does as well is no reason to go
    back to it."""
    lines = []
    for way in ways_from([start.structure for start in starts]):
        why = _approach_fault(way, evaluate, spec)
        if why and not (before and _approach_fault(way, before, spec)):
            lines.append(f"{way.name} contact: {why}")
    return lines


def _approach_fault(way: Approach, evaluate: Evaluate, spec: SanitySpec) -> str:
    energies = evaluate(way.template, way.positions)[0]
    if not np.isfinite(energies).all():
        return "energies are not finite"
    pressed = np.isin(np.arange(len(energies)), way.pressed(energies))
    highest = np.where(pressed, energies, energies[0])
    fall = np.where(pressed, np.maximum.accumulate(highest) - energies, -np.inf)
    if fall.max() > spec.max_fall_ev:
        where = way.distance_ang[fall.argmax()]
        return f"energy falls by {fall.max():.1f} eV on the way to {where:.2f} Å (limit {spec.max_fall_ev:g})"
    return ""
