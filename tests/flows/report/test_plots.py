"""Figures: they can be drawn at every stage of a run, and what is drawn is what the records hold."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from flows.report import plots
from flows.report.plots_statistics import coverage, draw_calibration, draw_parity, residuals_of

FIGURES = (plots.path_figure, plots.barrier_figure, plots.parity_figure, plots.calibration_figure)


def is_picture(data: bytes) -> bool:
    """A PNG with more than a white sheet on it."""
    image = np.asarray(Image.open(io.BytesIO(data)).convert("L"), dtype=float)
    return image.shape[0] > 400 and float(image.std()) > 1.0


@pytest.mark.parametrize("figure", FIGURES)
def test_figures_are_drawn(case: Any, figure: Any) -> None:
    before = dict(mpl.rcParams)
    assert is_picture(figure(*case))
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("n_generations", [0, 1, 2])
def test_figures_are_drawn_while_a_run_is_young(case: Any, n_generations: int) -> None:
    for figure in FIGURES:
        assert is_picture(figure(case.run, case.generations[:n_generations], case.labels))


def test_broken_numbers_do_not_break_figures(case: Any) -> None:
    last = case.generations[-1]
    record = last.paths[0]
    nothing = np.full(7, np.nan)
    for changes in ({"sigma_ev": nothing}, {"energies_ev": nothing}, {"coordinate_ang": np.zeros(7)}):
        broken = replace(record, band=replace(record.band, **changes), barrier_std_ev=float("nan"))
        generations = [*case.generations[:-1], replace(last, paths=(broken,))]
        assert is_picture(plots.path_figure(case.run, generations, case.labels))
        assert is_picture(plots.barrier_figure(case.run, generations, case.labels))


def test_curve_passes_through_the_images_with_their_slopes(case: Any) -> None:
    band = case.generations[-1].paths[0].band
    curve = plots.energy_curve(band)
    assert curve is not None
    grid, energy, sigma = curve
    at = np.searchsorted(grid, band.coordinate_ang)
    assert energy[at] == pytest.approx(band.energies_ev)
    assert sigma[at] == pytest.approx(band.sigma_ev, abs=1e-12)
    assert (sigma >= -1e-12).all()
    assert energy.max() == pytest.approx(band.energies_ev.max(), abs=0.002)


def test_path_figure_draws_reference_points_only_at_labelled_images(case: Any) -> None:
    axes = plots.draw_path(*case).axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    points = lines["reference (emt)"]
    record = case.generations[-1].paths[0]
    assert list(points.get_ydata()) == pytest.approx([0.0, record.verified_barrier_ev, 0.0], abs=2e-3)
    earlier = axes.collections[-1].get_offsets()
    assert len(earlier) == 3  # two of the first band, one of the second; the crashed one is no point


def test_barrier_figure_shows_each_generation(case: Any) -> None:
    axes = plots.draw_barrier(*case).axes
    line = next(line for line in axes[0].get_lines() if str(line.get_label()).startswith("surrogate"))
    expected = [g.paths[0].barrier.forward_ev for g in case.generations[1:]]
    assert list(line.get_ydata()) == pytest.approx(expected)
    calls = next(line for line in axes[1].get_lines() if str(line.get_label()).startswith("surrogate"))
    assert list(calls.get_xdata()) == [g.n_reference_calls for g in case.generations[1:]]


def test_parity_and_calibration_use_predictions_made_before_training(case: Any) -> None:
    residuals = residuals_of(case.generations, case.labels)
    assert [r.generation for r in residuals] == [1, 1, 2, 3]
    first, *others = residuals
    for source, left in ((others[-1].key, others), ("not of this run", residuals)):
        derived = {**case.labels, first.key: replace(case.labels[first.key], details={"equivalent_to": source})}
        assert residuals_of(case.generations, derived) == left
    assert "$n$ = 4" in draw_parity(*case).axes[0].texts[0].get_text()
    z = [r.error_ev / r.sigma_ev for r in residuals]
    drawn = [point for line in draw_calibration(*case).axes[0].get_lines()[1:] for point in line.get_ydata()]
    assert sorted(drawn) == pytest.approx(sorted(z))


def test_coverage_of_a_normal_law_is_nominal() -> None:
    z = np.random.default_rng(0).normal(size=4000)
    share, low, high = coverage(z, np.array([1.0, 2.0]))
    assert share == pytest.approx([0.6827, 0.9545], abs=0.02)
    assert (low < share).all()
    assert (share < high).all()


def test_a_divided_path_shows_its_wells_and_the_saddle_that_limits_the_rate(case: Any) -> None:
    last = case.generations[-1]
    record = last.paths[0]
    assert record.band is not None
    energies = np.array([0.0, 0.2, 0.05, 0.3, 0.2, 0.1, 0.1])
    band = replace(record.band, energies_ev=energies, minima=(2,))
    divided = [*case.generations[:-1], replace(last, paths=(replace(record, band=band),))]
    marks = {
        line.get_label(): line.get_ydata() for line in plots.draw_path(case.run, divided, case.labels).axes[0].lines
    }
    np.testing.assert_array_equal(marks["intermediate minima"], [0.05])
    np.testing.assert_array_equal(np.atleast_1d(marks["rate-limiting saddle (forward)"]), [0.3])
    plain = {line.get_label() for line in plots.draw_path(*case).axes[0].lines}
    assert "intermediate minima" not in plain
