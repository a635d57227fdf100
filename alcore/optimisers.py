"""Optimisers over all coordinates at once: L-BFGS without line search, and FIRE for where it leads nowhere.

L-BFGS as Sheppard, Terrell and Henkelman use it for bands, J. Chem. Phys. 128, 134106 (2008); FIRE: Bitzek et al.,
Phys. Rev. Lett. 97, 170201 (2006). Both take forces that need not be a gradient.
"""

from __future__ import annotations

import numpy as np

from alcore.covalent import stiffest_bond_ev_per_ang2
from alcore.types import FloatArray, Structure

STIFFNESS_EV_PER_ANG2 = 15.0
"""First guess of the curvature where no covalent bond is stiffer: that of a metal's (8 to 30 converge alike)."""
LEAST_CURVATURE_EV_PER_ANG2 = 1e-3
LBFGS_MEMORY, LBFGS_PATIENCE = 20, 30
"""Steps that are remembered, and steps without a smaller force after which FIRE goes on."""


def stiffness_of(template: Structure) -> float:
    """First guess of the curvature, eV/Å²."""
    return max(STIFFNESS_EV_PER_ANG2, stiffest_bond_ev_per_ang2(template))


class Lbfgs:
    """L-BFGS over all images at once, without line search, with a cap on the longest atomic step.

    Two-loop recursion of Nocedal and Wright, Numerical Optimization, algorithm 7.4. NEB forces are no gradient: a pair
    that shows no positive curvature clears the memory, and ``stalled`` says when to hand over to FIRE.
    """

    def __init__(self, max_step: float, stiffness_ev_per_ang2: float = STIFFNESS_EV_PER_ANG2) -> None:
        self.max_step, self.stiffness_ev_per_ang2 = max_step, stiffness_ev_per_ang2
        self.pairs: list[tuple[FloatArray, FloatArray]] = []
        self.last: tuple[FloatArray, FloatArray] | None = None
        self.best, self.since_best = float("inf"), 0

    def new_forces(self) -> None:
        """The forces are of another kind from now on (an image climbs): do not compare them with those before."""
        self.last, self.best, self.since_best = None, float("inf"), 0

    def stalled(self, fmax: float) -> bool:
        """Whether the force (eV/Å) has not fallen below its best for ``LBFGS_PATIENCE`` steps."""
        self.since_best = 0 if fmax < self.best else self.since_best + 1
        self.best = min(self.best, fmax)
        return self.since_best >= LBFGS_PATIENCE

    def step(self, force: FloatArray) -> FloatArray:
        """Displacement for ``force``, same shape."""
        if self.last is not None:
            moved, change = self.last[0], self.last[1] - force
            curved = float((moved * change).sum()) > LEAST_CURVATURE_EV_PER_ANG2 * float((moved**2).sum())
            self.pairs = [*self.pairs[1 - LBFGS_MEMORY :], (moved, change)] if curved else []
        move, weights = force.copy(), []
        for moved, change in reversed(self.pairs):
            weights.append(float((moved * move).sum()) / float((moved * change).sum()))
            move = move - weights[-1] * change
        move = move / self.stiffness_ev_per_ang2
        for (moved, change), weight in zip(self.pairs, reversed(weights), strict=True):
            move = move + moved * (weight - float((change * move).sum()) / float((moved * change).sum()))
        longest = float(np.linalg.norm(move, axis=-1).max())
        move = move * min(1.0, self.max_step / max(longest, 1e-12))
        self.last = (move, force.copy())
        return np.asarray(move)


class Fire:
    """FIRE with a cap on the longest atomic step; velocities are its only state."""

    def __init__(self, max_step: float, dt: float = 0.1, dt_max: float = 1.0) -> None:
        self.max_step, self.dt, self.dt_max = max_step, dt, dt_max
        self.alpha, self.downhill = 0.1, 0
        self.velocity: FloatArray | None = None

    def new_forces(self) -> None:
        """Nothing to forget: the next step puts the velocity right."""

    def step(self, force: FloatArray) -> FloatArray:
        """Displacement for ``force``, same shape."""
        if self.velocity is None:
            self.velocity = np.zeros_like(force)
        power = float((force * self.velocity).sum())
        if power > 0:
            speed, push = np.linalg.norm(self.velocity), max(float(np.linalg.norm(force)), 1e-12)
            self.velocity = (1 - self.alpha) * self.velocity + self.alpha * speed * force / push
            self.downhill += 1
            if self.downhill > 5:
                self.dt, self.alpha = min(1.1 * self.dt, self.dt_max), 0.99 * self.alpha
        elif np.any(self.velocity):
            self.velocity = np.zeros_like(force)
            self.dt, self.alpha, self.downhill = 0.5 * self.dt, 0.1, 0
        self.velocity = self.velocity + self.dt * force
        move = self.dt * self.velocity
        longest = float(np.linalg.norm(move, axis=-1).max())
        return np.asarray(move * min(1.0, self.max_step / max(longest, 1e-12)))
