"""Optimisers: downhill, never further than the cap, and quickly where curvatures differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alcore.optimisers import Fire, Lbfgs


def test_one_step_lowers_a_known_energy() -> None:
    """A sign that changed would climb: E = |x|² / 2, force -x."""
    x = np.array([[[1.0, -0.5, 0.2]]])
    fire = Fire(max_step=0.1)
    energies = [0.5 * float((x**2).sum())]
    for _ in range(200):
        x = x + fire.step(-x)
        energies.append(0.5 * float((x**2).sum()))
    assert energies[1] < energies[0]
    assert energies[-1] < 1e-6


@pytest.mark.parametrize("optimiser", [Fire, Lbfgs])
@given(size=st.floats(0.01, 1e6), cap=st.floats(0.01, 0.5))
def test_no_step_is_longer_than_the_cap(optimiser: type[Fire] | type[Lbfgs], size: float, cap: float) -> None:
    move = optimiser(max_step=cap).step(np.full((2, 3, 3), size))
    assert np.linalg.norm(move, axis=-1).max() <= cap * (1 + 1e-9)


def test_fast_steps_learn_the_curvature() -> None:
    """A quadratic with three curvatures: gone down in a handful of steps."""
    curvature = np.array([[[40.0, 2.0, 8.0]]])
    x = np.array([[[0.05, -0.08, 0.06]]])
    lbfgs = Lbfgs(max_step=0.2)
    for _ in range(12):
        x = x + lbfgs.step(-curvature * x)
    assert np.abs(x).max() < 1e-4
