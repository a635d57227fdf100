"""Figures that judge the surrogate's statements: predictions against labels, stated sigmas against errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from alcore.types import FloatArray, GenerationRecord, Label, Residual, RunRecord
from flows.report.style import BLUE, FAINT, GREY, INK, KINDS, new_figure, panel, say, styled, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_SIGMA_EV = 1e-6
"""An initial state's own energy is zero by definition: residuals stated more surely than this say nothing."""


def residuals_of(generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> list[Residual]:
    """All labels that were held against a prediction with an uncertainty, in order; as for the calibration, none that
    follows by symmetry from another one of the run (``LoopState.independent``)."""
    found = [
        residual
        for generation in generations
        for record in generation.paths
        for residual in record.residuals
        if residual.key not in labels or labels[residual.key].derived_from not in labels
    ]
    return [
        r for r in found if np.isfinite([r.predicted_ev, r.labelled_ev, r.sigma_ev]).all() and r.sigma_ev > MIN_SIGMA_EV
    ]


def coverage(z: FloatArray, n_sigma: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Share of ``|z| <= n_sigma`` and its central 90 % interval (Jeffreys), each of ``n_sigma``'s shape."""
    from scipy.stats import beta

    hits = (np.abs(z)[None, :] <= n_sigma[:, None]).sum(axis=1)
    low = beta.ppf(0.05, hits + 0.5, len(z) - hits + 0.5)
    high = beta.ppf(0.95, hits + 0.5, len(z) - hits + 0.5)
    return hits / len(z), np.asarray(low), np.asarray(high)


@styled
def draw_parity(run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> Figure:
    """Predicted before training against labelled energies, and the error by the order of labels."""
    figure = new_figure(7.2, 3.5)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    residuals = residuals_of(generations, labels)
    if not residuals:
        say(left, "no prediction was tested yet")
        say(right, "")
        return figure
    x = np.array([r.labelled_ev for r in residuals])
    y = np.array([r.predicted_ev for r in residuals])
    error_mev = (y - x) * 1000
    span = float(np.ptp([*x, *y])) or 0.1
    reach = np.minimum([r.sigma_ev for r in residuals], 0.5 * span)
    ends = np.array([min(x.min(), (y - reach).min()), max(x.max(), (y + reach).max())])
    ends = ends + np.array([-0.06, 0.06]) * (np.ptp(ends) or 1.0)
    left.plot(ends, ends, color=GREY, lw=0.9, zorder=0)
    right.axhline(0.0, color=GREY, lw=0.9, zorder=0)
    _by_kind(left, right, residuals)
    left.set(xlim=ends, ylim=ends, xlabel="Reference energy (eV)", ylabel="Predicted before training (eV)")
    left.set_aspect("equal", adjustable="box")
    right.set(xlabel="Test, in order", ylabel="Predicted minus reference (meV)")
    linear = max(1.0, float(np.median(np.abs(error_mev))))
    if np.abs(error_mev).max() > 20 * linear:
        right.set_yscale("symlog", linthresh=linear)
    text = f"$n$ = {len(x)}\nMAE {np.abs(error_mev).mean():.1f} meV\nlast {abs(error_mev[-1]):.1f} meV"
    left.text(0.04, 0.96, text, transform=left.transAxes, va="top", fontsize=9.5)
    right.legend(loc="best")
    whole_numbers(right)
    panel(left, "a")
    panel(right, "b")
    return figure


def _by_kind(left: Axes, right: Axes, residuals: Sequence[Residual]) -> None:
    for kind, (marker, colour, name) in KINDS.items():
        mine = [(number, r) for number, r in enumerate(residuals, start=1) if r.kind == kind]
        if not mine:
            continue
        bars = {"fmt": marker, "color": colour, "mec": "white", "mew": 0.5, "elinewidth": 1.0, "capsize": 2.0, "ms": 6}
        sigma = np.array([r.sigma_ev for _, r in mine])
        left.errorbar([r.labelled_ev for _, r in mine], [r.predicted_ev for _, r in mine], yerr=sigma, **bars)
        right.errorbar(
            [n for n, _ in mine], [r.error_ev * 1000 for _, r in mine], yerr=sigma * 1000, label=name, **bars
        )


@styled
def draw_calibration(run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> Figure:
    """Errors in units of the stated sigma, and how many lie within a multiple of it."""
    from scipy.stats import norm

    figure = new_figure(7.2, 3.4)
    left, right = figure.subplots(1, 2)
    residuals = residuals_of(generations, labels)
    if not residuals:
        say(left, "no stated uncertainty was tested yet")
        say(right, "")
        return figure
    z = np.array([r.error_ev / r.sigma_ev for r in residuals])
    for width, alpha in ((2, 0.10), (1, 0.16)):
        left.axhspan(-width, width, color=BLUE, alpha=alpha, lw=0, label=rf"$\pm{width}\sigma$")
    left.axhline(0.0, color=GREY, lw=0.9)
    for kind, (marker, colour, name) in KINDS.items():
        mine = [
            (number, value) for number, (r, value) in enumerate(zip(residuals, z, strict=True), 1) if r.kind == kind
        ]
        if mine:
            left.plot(*zip(*mine, strict=True), marker, color=colour, mec="white", mew=0.5, ms=6, label=name)
    reach = max(3.0, 1.1 * float(np.abs(z).max()))
    left.set(xlabel="Test, in order", ylabel=r"Error / stated $\sigma$", ylim=(-reach, reach))
    whole_numbers(left)
    left.legend(loc="best", ncols=2, columnspacing=1.0)
    n_sigma = np.linspace(0.0, 3.0, 121)
    nominal = 2 * norm.cdf(n_sigma) - 1
    share, low, high = coverage(z, n_sigma)
    right.plot([0, 1], [0, 1], color=GREY, lw=0.9, label="nominal")
    right.fill_between(nominal, low, high, step="post", color=BLUE, alpha=0.16, lw=0, label="90 % interval")
    right.plot(nominal, share, color=BLUE, drawstyle="steps-post", label=f"observed, $n$ = {len(z)}")
    right.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="Nominal coverage", ylabel="Observed coverage")
    for level in (1, 2):
        right.axvline(float(2 * norm.cdf(level) - 1), color=FAINT, lw=0.8, zorder=0)
        right.text(float(2 * norm.cdf(level) - 1), 0.02, rf"{level}$\sigma$", color=INK, fontsize=8.5, ha="right")
    right.legend(loc="upper left")
    panel(left, "a")
    panel(right, "b")
    return figure
