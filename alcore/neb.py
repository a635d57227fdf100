"""Nudged elastic band on any potential that evaluates all images in one batch.

Improved tangents (Henkelman and Jónsson, J. Chem. Phys. 113, 9978 (2000)), climbing image (Henkelman, Uberuaga and
Jónsson, J. Chem. Phys. 113, 9901 (2000)), L-BFGS over the whole band (Sheppard, Terrell and Henkelman, J. Chem. Phys.
128, 134106 (2008), there "global L-BFGS"), FIRE where that fails.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import find_mic
from ase.mep.neb import idpp_interpolate

from alcore.neighbours import neighbours
from alcore.optimisers import Fire, Lbfgs, stiffness_of
from alcore.protocols import Potential
from alcore.rigid import is_loose, rigid_motions, superimposed, without
from alcore.types import EndpointPair, FloatArray, Structure

Evaluated = tuple[FloatArray, FloatArray, FloatArray]
"""Positions, energies and forces of all images."""
FLAT_EV = 1e-10
"""Images whose energies differ by less have no uphill neighbour."""
RUNAWAY = 3.0
"""Times the mean distance of images, as it was when an image began to climb, that it may be from a neighbour: where
there is no saddle to climb to, it climbs for ever."""


@dataclass(frozen=True, kw_only=True)
class NebSpec:
    """How a band is relaxed; field names and units as in the run file. ``symmetry``: geometries that are images of each
    other share a label (``alcore.symmetry``)."""

    n_images: int = 7
    climb: bool = True
    fmax_ev_per_ang: float = 0.03
    spring_ev_per_ang2: float = 0.1
    interpolation: Literal["idpp", "linear"] = "idpp"
    climb_below_ev_per_ang: float = 0.25
    max_step_ang: float = 0.08
    max_steps: int = 600
    symmetry: bool = True

    @property
    def climbs_below(self) -> float:
        """Force in eV/Å below which an image climbs: never so small that the band is called converged before."""
        return max(self.climb_below_ev_per_ang, self.fmax_ev_per_ang)


DOUBT_EVERY = 2
"""Steps between two questions whether the potential still knows what it is doing; an L-BFGS step goes far."""
SUMMIT_FRACTION, SUMMIT_STEPS, SUMMIT_REACH_ANG = 0.2, 40, 0.2
"""Of the limit of the band, to which the climbing image is relaxed in the end; steps and movement it takes at most, and
the others after it: both are a few times what was ever needed."""


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Limits beyond which a relaxation is stopped: what lies there is neither physics nor worth a label.

    Attributes:
        min_distance_fraction: of the sum of covalent radii, for any two atoms.
        max_energy_ev: above the lower end state.
        min_energy_ev: below the lower end state.
        max_displacement_ang: of any atom from where the relaxation started.
    """

    min_distance_fraction: float = 0.6
    max_energy_ev: float = 15.0
    min_energy_ev: float = 2.0
    max_displacement_ang: float = 2.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Relaxed:
    """Result of a relaxation: ``positions`` ``(n_images, n_atoms, 3)`` in Å and how it ended (see ``types.Band``, also
    for ``minima``)."""

    positions: FloatArray
    energies_ev: FloatArray
    forces: FloatArray
    status: Literal["converged", "max_steps", "guarded"]
    reason: str
    climbing_image: int | None
    fmax_ev_per_ang: float
    n_steps: int
    minima: tuple[int, ...] = ()


def interpolate(pair: EndpointPair, spec: NebSpec) -> FloatArray:
    """Starting positions of all images, end states included, ``(n_images + 2, n_atoms, 3)``.

    End states are unwrapped already (``endpoints.unwrap``), so straight lines are the shortest ones. Image-dependent
    pair potential: Smidstrup et al., J. Chem. Phys. 140, 214106 (2014).
    """
    if pair.images:
        inner = [image.positions for image in pair.images]
        return np.array([pair.initial.positions, *inner, pair.final.positions])
    start, end = pair.initial.positions, pair.final.positions
    fractions = np.linspace(0, 1, spec.n_images + 2)[:, None, None]
    band = start + fractions * (end - start)
    if spec.interpolation == "idpp":
        images: list[Atoms] = [pair.initial.moved(p).to_atoms() for p in band]
        with warnings.catch_warnings():  # about NEB's default method, which plays no part here
            warnings.simplefilter("ignore")
            idpp_interpolate(images, traj=None, log=None, fmax=0.1, mic=bool(pair.initial.pbc.any()), steps=100)
        found = np.array([image.positions for image in images])
        if is_loose(pair.initial):
            found = np.array([superimposed(image, straight) for image, straight in zip(found, band, strict=True)])
        band = found
        band[0], band[-1] = start, end
    return band


def tangents(positions: FloatArray, energies: FloatArray) -> FloatArray:
    """Improved tangents of the interior images, normalised over all coordinates, ``(n_images - 2, n_atoms, 3)``."""
    return _tangents(positions[2:] - positions[1:-1], positions[1:-1] - positions[:-2], energies)


def _tangents(forward: FloatArray, backward: FloatArray, energies: FloatArray) -> FloatArray:
    up, down = energies[2:] - energies[1:-1], energies[:-2] - energies[1:-1]
    high, low = np.maximum(np.abs(up), np.abs(down)), np.minimum(np.abs(up), np.abs(down))
    rising = (energies[2:] > energies[1:-1]) & (energies[1:-1] > energies[:-2])
    falling = (energies[2:] < energies[1:-1]) & (energies[1:-1] < energies[:-2])
    ahead = np.where(rising, 1.0, np.where(falling, 0.0, np.where(energies[2:] > energies[:-2], high, low)))
    behind = np.where(falling, 1.0, np.where(rising, 0.0, np.where(energies[2:] > energies[:-2], low, high)))
    flat = high < FLAT_EV  # no direction is uphill: the chord between the neighbours
    ahead, behind = np.where(flat, 1.0, ahead), np.where(flat, 1.0, behind)
    tangent = ahead[:, None, None] * forward + behind[:, None, None] * backward
    return np.asarray(tangent / np.maximum(np.linalg.norm(tangent, axis=(1, 2), keepdims=True), 1e-12))


def neb_forces(
    positions: FloatArray,
    energies: FloatArray,
    forces: FloatArray,
    spring_ev_per_ang2: float,
    climbing_image: int | None,
    *,
    loose: bool = False,
) -> FloatArray:
    """NEB force on the interior images, ``(n_images - 2, n_atoms, 3)``, from potential forces of all images.

    Across a periodic boundary nothing needs wrapping: images are continuous along the band.

    Args:
        loose: the atoms can move as a whole at no cost (``rigid.is_loose``); what does that is left out.
    """
    motions = rigid_motions(positions[1:-1]) if loose else None
    forward = without(motions, positions[2:] - positions[1:-1])
    backward = without(motions, positions[1:-1] - positions[:-2])
    tangent, inner = _tangents(forward, backward, energies), without(motions, forces[1:-1])
    along = (inner * tangent).sum(axis=(1, 2), keepdims=True)
    ahead, behind = np.linalg.norm(forward, axis=(1, 2)), np.linalg.norm(backward, axis=(1, 2))
    spring = spring_ev_per_ang2 * (ahead - behind)[:, None, None] * tangent
    total = inner - along * tangent + spring + _unfolding(forward, backward, tangent, spring_ev_per_ang2)
    if climbing_image is not None:
        k = climbing_image - 1
        total[k] = inner[k] - 2 * along[k] * tangent[k]
    return np.asarray(total)


def _unfolding(forward: FloatArray, backward: FloatArray, tangent: FloatArray, spring: float) -> FloatArray:
    """The springs' force across the tangent where the band turns back on itself, which on flat ground nothing hinders.

    After Jónsson, Mills and Jacobsen (1998), eq. 15 of their chapter in *Classical and Quantum Dynamics in Condensed
    Phase Simulations*, with a switch that leaves bends of less than 90 degrees alone: those may be the path's own.
    """
    lengths = np.linalg.norm(forward, axis=(1, 2)) * np.linalg.norm(backward, axis=(1, 2))
    cosine = (forward * backward).sum(axis=(1, 2)) / np.maximum(lengths, 1e-12)
    pull = spring * (forward - backward)
    across = pull - (pull * tangent).sum(axis=(1, 2), keepdims=True) * tangent
    return np.asarray((np.minimum(cosine, 0.0) ** 2)[:, None, None] * across)


def guard_reason(
    template: Structure, positions: FloatArray, energies: FloatArray, start: FloatArray, guards: Guards
) -> str:
    """Why these geometries are out of bounds, or "" if they are sound.

    Args:
        energies: of the geometries, the first and the last being the end states.
        start: where the relaxation began, same shape as ``positions``.
    """
    if not np.isfinite(energies).all() or not np.isfinite(positions).all():
        return "energies or positions are not finite"
    relative = energies - min(energies[0], energies[-1])
    if relative.max() > guards.max_energy_ev:
        image, rise = int(relative.argmax()), float(relative.max())
        return f"image {image} rose {rise:.1f} eV above the lower end state (limit {guards.max_energy_ev:g})"
    if relative.min() < -guards.min_energy_ev:
        image, fall = int(relative.argmin()), -float(relative.min())
        return f"image {image} fell {fall:.1f} eV below the lower end state (limit {guards.min_energy_ev:g})"
    moved = np.linalg.norm(positions - start, axis=2)
    if moved.max() > guards.max_displacement_ang:
        image, atom = divmod(int(moved.argmax()), moved.shape[1])
        return f"atom {atom} of image {image} moved {moved.max():.2f} Å (limit {guards.max_displacement_ang:g})"
    for image, place in enumerate(positions):
        contact = closest_contact(template.moved(place))
        if contact is not None and contact[2] < guards.min_distance_fraction:
            i, j, ratio = contact
            return f"atoms {i} and {j} of image {image} are at {ratio:.2f} of their covalent radii's sum"
    return ""


def closest_contact(structure: Structure) -> tuple[int, int, float] | None:
    """The two atoms closest relative to the sum of their covalent radii, and that ratio; None for fewer than two atoms
    (periodic copies of an atom count)."""
    radii = covalent_radii[structure.numbers]
    reach = 2.0 * float(radii.max())
    i, j, distance = neighbours("ijd", structure, structure.positions, reach)
    if not len(i):
        return None
    ratio = distance / (radii[i] + radii[j])
    k = int(ratio.argmin())
    return int(i[k]), int(j[k]), float(ratio[k])


def relax_band(
    potential: Potential,
    template: Structure,
    start: FloatArray,
    spec: NebSpec,
    guards: Guards | None = None,
    doubt: Callable[[FloatArray], str] | None = None,
) -> Relaxed:
    """Relaxes the interior images, first without, then with a climbing image; a guard stops it at the last sound band.

    Args:
        potential: evaluates all images at once.
        template: the atoms (fixed coordinates stay).
        start: all images, end states included, ``(n_images, n_atoms, 3)`` in Å.
        spec: limits and springs.
        guards: bounds of what is sound.
        doubt: says why a band can no longer be trusted, or ""; asked every few steps. What it doubts is returned as it
            is: sound, but at the edge of what the potential knows, which is where a label teaches most.
    """
    relaxed = _relaxed(potential, template, start, spec, guards or Guards(), doubt)
    if relaxed.status != "converged" or relaxed.climbing_image is None:
        return relaxed
    return _on_summit(potential, template, relaxed, relaxed.climbing_image, spec)


def _relaxed(
    potential: Potential,
    template: Structure,
    start: FloatArray,
    spec: NebSpec,
    limits: Guards,
    doubt: Callable[[FloatArray], str] | None,
) -> Relaxed:
    positions = np.array(start)
    energies, forces = potential.evaluate(template, positions)
    sound = (positions.copy(), energies, forces)
    optimiser: Lbfgs | Fire = Lbfgs(spec.max_step_ang, stiffness_of(template))
    climb = _Climb(spec)
    fmax, reason, status, step = float("inf"), "", "max_steps", 0

    for step in range(spec.max_steps + 1):
        force, fmax = _pushed(template, positions, energies, forces, spec, climb.image)
        if climb.starts(sound, fmax):
            optimiser.new_forces()
            force, fmax = _pushed(template, positions, energies, forces, spec, climb.image)
        elif climb.runs_away(positions):
            positions, energies, forces = climb.taken_back()
            optimiser = Lbfgs(spec.max_step_ang, stiffness_of(template))
            force, fmax = _pushed(template, positions, energies, forces, spec, None)
        if fmax < spec.fmax_ev_per_ang:
            status = "converged"
            break
        if step == spec.max_steps:
            reason = f"force {fmax:.3f} eV/Å after {step} steps (limit {spec.fmax_ev_per_ang:g})"
            break
        if isinstance(optimiser, Lbfgs) and optimiser.stalled(fmax):
            optimiser = Fire(spec.max_step_ang)
        positions[1:-1] += optimiser.step(force)
        energies, forces = energies.copy(), forces.copy()
        energies[1:-1], forces[1:-1] = potential.evaluate(template, positions[1:-1])
        reason = guard_reason(template, positions, energies, start, limits)
        if reason:
            positions, energies, forces = (array.copy() for array in sound)
            if isinstance(optimiser, Lbfgs):  # its step may have been too bold
                optimiser, reason = Fire(spec.max_step_ang), ""
                continue
            status = "guarded"
            break
        sound = (positions.copy(), energies, forces)
        if doubt is not None and step % DOUBT_EVERY == 0 and (reason := doubt(positions)):
            status = "guarded"
            break
    return Relaxed(
        positions=positions,
        energies_ev=energies,
        forces=forces,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        climbing_image=climb.image,
        fmax_ev_per_ang=fmax,
        n_steps=step,
    )


def _pushed(
    template: Structure,
    positions: FloatArray,
    energies: FloatArray,
    forces: FloatArray,
    spec: NebSpec,
    climbing: int | None,
) -> tuple[FloatArray, float]:
    """The forces of the band on what may move, and the largest on an atom."""
    force = neb_forces(positions, energies, forces, spec.spring_ev_per_ang2, climbing, loose=is_loose(template))
    force = np.where(template.fixed, 0.0, force)
    return force, float(np.linalg.norm(force, axis=2).max())


class _Climb:
    """Which image climbs, and the band as it was before the first one did."""

    def __init__(self, spec: NebSpec) -> None:
        self.allowed, self.below = spec.climb, spec.climbs_below
        self.image: int | None = None
        self.before: Evaluated | None = None

    def starts(self, band: Evaluated, fmax: float) -> bool:
        """Whether another image climbs from here on."""
        top = summit(band[1])
        if not self.allowed or top in (None, self.image) or fmax >= self.below:
            return False
        self.image, self.before = top, self.before or band
        return True

    def runs_away(self, positions: FloatArray) -> bool:
        """Whether the climbing image has left the others behind."""
        if self.image is None or self.before is None:
            return False
        mean = float(np.linalg.norm(np.diff(self.before[0], axis=0), axis=(1, 2)).mean())
        gaps = np.linalg.norm(positions[[self.image - 1, self.image + 1]] - positions[self.image], axis=(1, 2))
        return float(gaps.max()) > RUNAWAY * mean

    def taken_back(self) -> Evaluated:
        """The band as it was; nothing climbs any more."""
        assert self.before is not None
        self.allowed, self.image = False, None
        positions, energies, forces = self.before
        return positions.copy(), energies.copy(), forces.copy()


def _on_summit(potential: Potential, template: Structure, relaxed: Relaxed, climbing: int, spec: NebSpec) -> Relaxed:
    """The same band with the climbing image alone relaxed on, to a fifth of the band's limit.

    Its label is what confirms the barrier, so what is left of the surrogate's own force must not count against it. The
    others follow it, until they are relaxed beside it too; the band as it was comes back where either fails.
    """
    near = slice(climbing - 1, climbing + 2)
    positions, energies, forces = (
        np.array(values[near]) for values in (relaxed.positions, relaxed.energies_ev, relaxed.forces)
    )
    optimiser, loose = Lbfgs(0.5 * spec.max_step_ang, stiffness_of(template)), is_loose(template)
    limit = SUMMIT_FRACTION * spec.fmax_ev_per_ang
    for _ in range(SUMMIT_STEPS):
        force = np.where(template.fixed, 0.0, neb_forces(positions, energies, forces, 0.0, 1, loose=loose)[0])
        fmax = float(np.linalg.norm(force, axis=1).max())
        if fmax < limit:
            break
        positions[1] += optimiser.step(force)
        energies[1:2], forces[1:2] = potential.evaluate(template, positions[1:2])
    moved = float(np.abs(positions[1] - relaxed.positions[climbing]).max())
    if fmax >= limit or moved > SUMMIT_REACH_ANG or energies[1] < max(energies[0], energies[2]):
        return relaxed

    def refined(values: FloatArray, found: FloatArray) -> FloatArray:
        whole = values.copy()
        whole[climbing] = found[1]
        return whole

    found = replace(
        relaxed,
        positions=refined(relaxed.positions, positions),
        energies_ev=refined(relaxed.energies_ev, energies),
        forces=refined(relaxed.forces, forces),
    )
    return _beside_summit(potential, template, found, climbing, spec) or relaxed


def _beside_summit(
    potential: Potential, template: Structure, band: Relaxed, climbing: int, spec: NebSpec
) -> Relaxed | None:
    """The band with its climbing image held where it is and the others relaxed to the limit; None if they do not get
    there, or one of them rises above it."""
    positions, energies, forces = (np.array(values) for values in (band.positions, band.energies_ev, band.forces))
    others = np.delete(np.arange(1, len(positions) - 1), climbing - 1)
    optimiser = Lbfgs(0.5 * spec.max_step_ang, stiffness_of(template))
    for step in range(SUMMIT_STEPS + 1):
        force = neb_forces(positions, energies, forces, spec.spring_ev_per_ang2, climbing, loose=is_loose(template))
        force = np.where(template.fixed, 0.0, force)
        fmax = float(np.linalg.norm(force, axis=2).max())
        moved = float(np.abs(positions - band.positions).max())
        if fmax < spec.fmax_ev_per_ang or step == SUMMIT_STEPS or moved > SUMMIT_REACH_ANG:
            break
        positions[others] += optimiser.step(force[others - 1])
        energies[others], forces[others] = potential.evaluate(template, positions[others])
    if fmax >= spec.fmax_ev_per_ang or moved > SUMMIT_REACH_ANG or summit(energies) != climbing:
        return None
    return replace(band, positions=positions, energies_ev=energies, forces=forces, fmax_ev_per_ang=fmax)


def summit(energies: FloatArray) -> int | None:
    """The highest interior image, if it lies above both end states."""
    top = int(energies[1:-1].argmax()) + 1
    return top if energies[top] > max(energies[0], energies[-1]) else None


def path_coordinate(template: Structure, positions: FloatArray) -> FloatArray:
    """Cumulative length along the band in Å, ``(n_images,)``; minimum image where periodic."""
    steps = np.diff(positions, axis=0)
    if template.pbc.any():
        steps = np.array([find_mic(step, template.cell, template.pbc)[0] for step in steps])
    return np.concatenate([[0.0], np.cumsum(np.linalg.norm(steps, axis=(1, 2)))])
