from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT
from hypothesis import given
from hypothesis import strategies as st

from alcore.types import Structure
from calculators.base import Inspection
from calculators.measure import measure, plain_array, plain_values

COPPER = Structure.from_atoms(bulk("Cu", cubic=True))


class Spun(EMT):
    """EMT that ends with these results besides its own."""

    def __init__(self, **extra: Any) -> None:
        super().__init__()
        self.extra = extra

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results.update(self.extra)


def test_final_moments_and_their_total() -> None:
    answer = measure(lambda: Spun(magmoms=np.array([1.0, -0.5, 0.0, 0.0]), magmom=0.5), COPPER)
    assert answer.magnetic_moments.tolist() == [1.0, -0.5, 0.0, 0.0]
    assert answer.total_magnetic_moment == 0.5
    plain = measure(EMT, COPPER)
    assert (plain.status, plain.magnetic_moments, plain.total_magnetic_moment) == ("ok", None, None)


@pytest.mark.parametrize("extra", [{"magmoms": [1.0]}, {"magmoms": "many"}, {"magmom": [1, 2]}, {"magmom": np.nan}])
def test_moments_that_make_no_sense_are_left_out(extra: dict[str, Any]) -> None:
    answer = measure(lambda: Spun(**extra), COPPER)
    assert (answer.status, answer.magnetic_moments, answer.total_magnetic_moment) == ("ok", None, None)


def test_the_energy_is_that_of_the_forces() -> None:
    answer = measure(lambda: Spun(energy=1.0, free_energy=2.0), COPPER)
    assert (answer.energy_ev, answer.energy_kind) == (2.0, "force-consistent")


@pytest.mark.parametrize(
    ("inspect", "status", "reason"),
    [
        (lambda _: Inspection(converged=True), "ok", ""),
        (lambda _: Inspection(converged=np.bool_(False), reason="60 of 60 steps"), "unconverged", "60 of 60 steps"),
        (lambda _: Inspection(converged=False), "unconverged", "the output says that it has not converged"),
        (lambda _: None, "crashed", "the output cannot be read"),
        (lambda _: 1 / 0, "crashed", "the output cannot be read: ZeroDivisionError: division by zero"),
    ],
)
def test_what_the_output_says(inspect: Callable[[Any], Any], status: str, reason: str) -> None:
    answer = measure(EMT, COPPER, inspect)
    assert answer.status == status
    assert reason in answer.reason


def test_an_output_explains_a_crash_and_does_not_hide_it() -> None:
    def crash() -> Any:
        raise RuntimeError("exit code 1")

    class Crashing(EMT):
        calculate = property(lambda self: crash())

    told = measure(Crashing, COPPER, lambda _: Inspection(reason="the cell is too small"))
    assert (told.status, told.reason) == ("crashed", "the cell is too small")
    assert measure(Crashing, COPPER, lambda _: Inspection(converged=False)).status == "unconverged"
    unreadable = measure(Crashing, COPPER, lambda _: 1 / 0)  # type: ignore[arg-type,return-value]
    assert (unreadable.status, unreadable.reason) == ("crashed", "RuntimeError: exit code 1")
    assert measure(crash, COPPER, lambda _: Inspection(converged=False)).status == "crashed", "there was no calculator"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ("SCF did not converge in 60 steps", "unconverged"),
        ("convergence NOT achieved after 100 iterations", "unconverged"),
        ("failed to reach convergence: unconverged density", "unconverged"),
        ("convergence has failed", "unconverged"),
        ("the geometry has converged. No licence", "crashed"),
        ("cannot open POTCAR", "crashed"),
    ],
)
def test_an_error_that_speaks_of_convergence(said: str, status: str) -> None:
    def fail() -> Any:
        raise ValueError(said)

    assert measure(fail, COPPER).status == status


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.sampled_from([np.float32(0.5), np.int64(3), np.bool_(True), np.arange(3), 1j, Structure]),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)  # fmt: skip


@given(VALUES)
def test_notes_become_plain_and_stay_so(value: Any) -> None:
    plain = plain_values(value)
    assert json.loads(json.dumps(plain)) == plain == plain_values(plain)


def test_arrays_are_plain_or_nothing() -> None:
    assert plain_array([1, 2, 3], (3,)).tolist() == [1.0, 2.0, 3.0]
    for wrong in (None, [1, 2], [1, 2, np.inf], [[1], [2, 3], []], ["a", "b", "c"]):
        assert plain_array(wrong, (3,)) is None
