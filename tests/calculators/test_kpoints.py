from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from alcore.types import FloatArray
from calculators.kpoints import grid_of_spacing

SPACINGS = st.floats(0.05, 3.0)
CELLS = arrays(float, (3, 3), elements=st.floats(-0.3, 0.3)).flatmap(
    lambda skew: st.tuples(*[st.floats(2.0, 30.0)] * 3).map(lambda edges: (np.eye(3) + skew) * np.array(edges)[:, None])
)
ALL = (True, True, True)


def edges(cell: FloatArray) -> FloatArray:
    """Lengths of the reciprocal vectors in 1/Å: 2π times area of the facing side over the volume."""
    a, b, c = cell
    sides = np.array([np.cross(b, c), np.cross(c, a), np.cross(a, b)])
    return np.asarray(2 * np.pi * np.linalg.norm(sides, axis=1) / abs(np.linalg.det(cell)))


def test_two_pi_is_included() -> None:
    assert grid_of_spacing(4.0 * np.eye(3), ALL, 0.25) == (7, 7, 7)  # 2π / 4 / 0.25 = 6.28
    assert grid_of_spacing(np.diag([2 * np.pi, 4 * np.pi, 1.0]), (True, True, False), 0.25) == (4, 2, 1)


@given(CELLS, SPACINGS)
def test_the_spacing_is_respected_in_each_direction_with_the_fewest_points(cell: FloatArray, spacing: float) -> None:
    assume(abs(np.linalg.det(cell)) > 1.0)
    grid = np.array(grid_of_spacing(cell, ALL, spacing))
    assert (edges(cell) / grid <= spacing * (1 + 1e-5)).all()
    more = grid > 1
    assert (edges(cell)[more] / (grid[more] - 1) > spacing * (1 - 1e-5)).all()


@given(CELLS, SPACINGS, SPACINGS)
def test_a_finer_spacing_never_gives_fewer_points(cell: FloatArray, one: float, other: float) -> None:
    assume(abs(np.linalg.det(cell)) > 1.0)
    fine, coarse = (np.array(grid_of_spacing(cell, ALL, spacing)) for spacing in sorted((one, other)))
    assert (fine >= coarse).all()


@given(CELLS, SPACINGS, st.integers(0, 10_000))
def test_turning_the_cell_changes_nothing(cell: FloatArray, spacing: float, seed: int) -> None:
    assume(abs(np.linalg.det(cell)) > 1.0)
    turned = cell @ Rotation.random(random_state=seed).as_matrix().T
    assert grid_of_spacing(turned, ALL, spacing) == grid_of_spacing(cell, ALL, spacing)


@pytest.mark.parametrize("pbc", [(False, True, True), (True, False, False), (False, False, False)])
def test_one_point_where_nothing_repeats(pbc: tuple[bool, bool, bool]) -> None:
    assert [n > 1 for n in grid_of_spacing(4.0 * np.eye(3), pbc, 0.2)] == list(pbc)
