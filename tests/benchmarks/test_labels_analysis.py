"""The pure parts of the label benchmark's tables."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

sys.path.insert(0, str(Path(__file__).parent / "labels"))

from analysis import calls_cell, calls_of, errors_mev, fraction_cell, honesty, latest, wilson

counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_the_interval_of_a_fraction_is_wilsons(case: tuple[int, int]) -> None:
    hits, n = case
    known = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits, n) == pytest.approx((known.low, known.high), abs=1e-6)


def test_nothing_says_nothing_about_a_fraction() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        wilson(3, 2)


def run(**values: Any) -> dict[str, Any]:
    return {"case": "a", "variant": "default", "prior": "", "seed": 0, "calls": 5, "converged": True, **values}


def test_a_run_that_was_not_verified_is_worse_than_any_other() -> None:
    calls = [calls_of(run(calls=7)), calls_of(run(calls=3, converged=False)), calls_of(run(error="KeyError"))]
    assert calls == [7.0, math.inf, math.inf]
    assert calls_cell(calls) == "✗ (7–✗)"
    assert calls_cell([5.0, 6.0, math.inf]) == "6 (5–✗)"
    assert calls_cell([6.0, 6.0]) == "6"
    assert calls_cell([]) == ""


def test_only_the_latest_record_of_a_run_counts() -> None:
    kept = latest([run(calls=9), run(seed=1), run(calls=6), run(variant="batch-2")])
    assert [(r["variant"], r["seed"], r["calls"]) for r in kept] == [
        ("default", 0, 6),
        ("default", 1, 5),
        ("batch-2", 0, 5),
    ]


def residuals(scale: float, n: int = 2000) -> list[dict[str, float]]:
    """Gaussian errors ``scale`` times as large as stated."""
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.001, 0.1, n)
    error = scale * sigma * rng.standard_normal(n)
    return [{"predicted_ev": 0.5 + e, "labelled_ev": 0.5, "sigma_ev": s} for e, s in zip(error, sigma, strict=True)]


@pytest.mark.parametrize(("scale", "honest"), [(1.0, True), (1.5, False), (0.6, False)])
def test_sigmas_are_honest_where_errors_are_as_stated(scale: float, honest: bool) -> None:
    found = honesty(residuals(scale))
    assert found.n == 2000
    assert found.rms_z == pytest.approx(scale, rel=0.05)
    assert found.within_1 / found.n == pytest.approx(math.erf(1 / scale / math.sqrt(2)), abs=0.03)
    assert found.honest is honest


def test_without_residuals_nothing_is_claimed() -> None:
    found = honesty([])
    assert (found.n, found.within_1) == (0, 0)
    assert math.isnan(found.rms_z)
    assert fraction_cell(0, 0) == ""
    assert fraction_cell(2, 3) == "67 % (21–94)"


def test_errors_are_of_every_hop_that_has_a_barrier_and_a_truth() -> None:
    hops = {"one": {"error_ev": -0.002}, "two": {"error_ev": None}, "three": {"error_ev": 0.0005}}
    assert errors_mev([run(hops=hops), run(error="died")]) == pytest.approx([2.0, 0.5])
