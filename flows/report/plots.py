"""Figures of a run. Each has a ``draw_*`` that returns the figure and a ``*_figure`` that returns it as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alcore.barrier import path_spline
from alcore.segments import segments
from alcore.types import Band, FloatArray, GenerationRecord, Label, PathRecord, RunRecord
from flows.report.frames import (
    LabelledFrame,
    initial_energy_ev,
    labelled_frames,
    labels_of_band,
    last_probed,
    path_names,
)
from flows.report.plots_statistics import draw_calibration, draw_parity
from flows.report.schema import GenerationRow
from flows.report.style import (
    BLUE,
    CYCLE,
    FAINT,
    GREY,
    INK,
    VERMILLION,
    new_figure,
    panel,
    plain_log,
    render,
    say,
    styled,
    whole_numbers,
)
from flows.report.summary import known_barrier_ev, path_rows, teacher_of, tolerances

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Generations = Sequence[GenerationRecord]
Labels = Mapping[str, Label]
ERROR_FLOOR_MEV = 0.1
"""Smaller errors are drawn at this value: below it they mean nothing."""


def path_figure(run: RunRecord, generations: Generations, labels: Labels, path: str | None = None) -> bytes:
    """Energy along the newest band of one hop, as PNG; the first hop if ``path`` is None."""
    return render(draw_path(run, generations, labels, path))


def barrier_figure(run: RunRecord, generations: Generations, labels: Labels, path: str | None = None) -> bytes:
    """Barrier and its errors over generations and over reference calls, as PNG; all hops if ``path`` is None."""
    return render(draw_barrier(run, generations, labels, path))


def parity_figure(run: RunRecord, generations: Generations, labels: Labels) -> bytes:
    """Energies predicted before training against their labels, as PNG."""
    return render(draw_parity(run, generations, labels))


def calibration_figure(run: RunRecord, generations: Generations, labels: Labels) -> bytes:
    """Errors in units of the stated sigma, and their coverage against what a normal law promises, as PNG."""
    return render(draw_calibration(run, generations, labels))


def energy_curve(band: Band, n_points: int = 400) -> tuple[FloatArray, FloatArray, FloatArray] | None:
    """Coordinate (Å), energy and sigma (eV) on a fine grid, each ``(n_points,)``; None for a folded or broken band.

    Energies are the cubic Hermite spline through the images' energies with minus the tangential force as slope; sigma
    is interpolated without overshoot.
    """
    from scipy.interpolate import PchipInterpolator

    s, energy, sigma = band.coordinate_ang, band.energies_ev, np.nan_to_num(band.sigma_ev, nan=0.0, posinf=0.0)
    finite = all(np.isfinite(values).all() for values in (s, energy, band.forces))
    if not finite or not (np.diff(s) > 0).all():
        return None
    grid = np.unique(np.concatenate([np.linspace(s[0], s[-1], n_points), s]))
    return grid, np.asarray(path_spline(band)(grid)), PchipInterpolator(s, sigma)(grid)


@styled
def draw_path(run: RunRecord, generations: Generations, labels: Labels, path: str | None = None) -> Figure:
    """See ``path_figure``."""
    figure = new_figure(6.2, 4.1)
    axes = figure.subplots()
    names = path_names(generations)
    name = path if path is not None else (names[0] if names else "")
    probed = last_probed(generations, name)
    if probed is None or probed.band is None:
        say(axes, "no band yet: the end states are being settled")
        return figure
    band = probed.band
    axes.axhline(0.0, color=FAINT, lw=0.8, zorder=0)
    curve = energy_curve(band)
    if curve is not None:
        grid, energy, sigma = curve
        axes.fill_between(
            grid, energy - sigma, energy + sigma, color=BLUE, alpha=0.18, lw=0, label=r"$\pm 1\sigma$, calibrated"
        )
        axes.plot(grid, energy, color=BLUE, label="surrogate")
    axes.plot(band.coordinate_ang, band.energies_ev, "o", color=BLUE, mfc="white", mew=1.3, zorder=3, label="images")
    _mark_segments(axes, band)
    top = _reference_points(axes, run, generations, labels, probed)
    low, high = _energy_window(band, curve, top)
    axes.set_ylim(low, high)
    _earlier_frames(figure, axes, [f for f in labelled_frames(generations, labels) if f.path == name], band)
    axes.set_title(_saddle_text(probed), loc="right", fontsize=10.5)
    axes.set_xlabel("Path coordinate (Å)")
    axes.set_ylabel("Energy relative to the initial state (eV)")
    title = f"{run.name}, {name}" if len(names) > 1 else run.name
    axes.set_title(f"{title}: generation {_generation_of(generations, probed)}", loc="left", fontsize=10.5)
    figure.legend(
        loc="outside lower center", ncols=6, columnspacing=1.0, handletextpad=0.4, handlelength=1.3, fontsize=9
    )
    return figure


def _mark_segments(axes: Axes, band: Band) -> None:
    """Intermediate minima, at which the band is divided, and the saddle of the segment that limits the rate forward."""
    if not band.minima:
        return
    wells = list(band.minima)
    for well in wells:
        axes.axvline(float(band.coordinate_ang[well]), color=FAINT, lw=0.8, ls="--", zorder=0)
    axes.plot(
        band.coordinate_ang[wells], band.energies_ev[wells], "v", color=INK, ms=7, zorder=4, label="intermediate minima"
    )
    top = next(segment.saddle for segment in segments(band) if segment.rate_limiting)
    axes.plot(
        band.coordinate_ang[top],
        band.energies_ev[top],
        "^",
        color=INK,
        ms=7,
        zorder=4,
        label="rate-limiting saddle (forward)",
    )


def _generation_of(generations: Generations, probed: PathRecord) -> int:
    return next(g.index for g in generations for record in g.paths if record is probed)


def _reference_points(
    axes: Axes, run: RunRecord, generations: Generations, labels: Labels, probed: PathRecord
) -> list[float]:
    """Reference energies at exactly this band's images; returns them."""
    zero = initial_energy_ev(generations, labels, probed.path)
    if zero is None or probed.band is None:
        return []
    found = labels_of_band(probed.band, labels)
    energies = [float(label.energy_ev or 0.0) - zero for label in found.values()]
    if energies:
        teacher = teacher_of(run, labels)["name"]
        where = [probed.band.coordinate_ang[image] for image in found]
        axes.plot(
            where, energies, "D", color=VERMILLION, ms=6, mec="white", mew=0.6, zorder=5, label=f"reference ({teacher})"
        )
    return energies


def _energy_window(
    band: Band, curve: tuple[FloatArray, FloatArray, FloatArray] | None, energies: list[float]
) -> tuple[float, float]:
    """Limits of the energy axis: the band with its uncertainty and the labels on it; wilder labels go to the edge."""
    values = [*band.energies_ev[np.isfinite(band.energies_ev)], *energies, 0.0]
    span = max(values) - min(values) or 0.1
    if curve is not None:
        _, energy, sigma = curve
        wide = np.minimum(sigma, 1.5 * span)
        values += [*(energy - wide), *(energy + wide)]
    low, high = min(values), max(values)
    return low - 0.07 * (high - low), high + 0.2 * (high - low)


def _earlier_frames(figure: Figure, axes: Axes, frames: Sequence[LabelledFrame], band: Band) -> None:
    """Labels of earlier bands at their image's coordinate then, shaded by generation; wild ones at the edge."""
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    here = {tuple(np.round(positions, 6).ravel()) for positions in band.positions}
    drawn = [
        (frame.coordinate_ang, frame.energy_ev, frame.generation)
        for frame in frames
        if frame.coordinate_ang is not None
        and frame.energy_ev is not None
        and tuple(np.round(frame.label.structure.positions, 6).ravel()) not in here
    ]
    if not drawn:
        return
    where, energy, generation = (np.array(column, dtype=float) for column in zip(*drawn, strict=True))
    low, high = axes.get_ylim()
    margin = 0.02 * (high - low)
    inside = (energy >= low) & (energy <= high)
    norm = (float(generation.min()) - 0.5, float(generation.max()) + 0.5)
    colours = colormaps["cividis_r"].resampled(round(norm[1] - norm[0]))
    for mask, marker, name in ((inside, "o", "earlier labels"), (~inside, "^", "off the scale")):
        if mask.any():
            points = axes.scatter(
                where[mask],
                np.clip(energy[mask], low + margin, high - margin),
                c=generation[mask],
                cmap=colours,
                vmin=norm[0],
                vmax=norm[1],
                marker=marker,
                s=26,
                edgecolors=INK,
                linewidths=0.5,
                zorder=4,
            )
            axes.plot([], [], marker, color=INK, mfc="white", mew=0.7, label=name)  # the colour tells the generation
    if generation.max() > generation.min():
        bar = figure.colorbar(points, ax=axes, pad=0.015, aspect=32, ticks=MaxNLocator(integer=True))
        bar.set_label("asked for in generation", fontsize=9.5)
        bar.ax.tick_params(which="both", length=0)
        bar.ax.minorticks_off()
        bar.outline.set_linewidth(0.6)


def _saddle_text(probed: PathRecord) -> str:
    if probed.barrier is None:
        return ""
    text = f"predicted ${probed.barrier.forward_ev:.3f} \\pm {probed.barrier.sigma_ev:.3f}$ eV"
    if probed.verified_barrier_ev is None:
        return f"{text}, saddle not labelled"
    return f"{text}, reference ${probed.verified_barrier_ev:.3f}$ eV"


@styled
def draw_barrier(run: RunRecord, generations: Generations, labels: Labels, path: str | None = None) -> Figure:
    """See ``barrier_figure``."""
    figure = new_figure(7.2, 5.2)
    grid = figure.subplots(2, 2, sharex="col", sharey="row", height_ratios=(1.15, 1))
    names = [path] if path is not None else path_names(generations)
    rows = {name: [row for row in path_rows(generations, name) if row.barrier_forward_ev is not None] for name in names}
    if not any(rows.values()):
        for axes in grid.flat:
            say(axes, "no barrier yet")
        return figure
    for number, name in enumerate(names):
        known = known_barrier_ev(run, name)
        for column, x in enumerate(("index", "n_reference_calls")):
            look = (CYCLE[number % len(CYCLE)], name if len(names) > 1 else "")
            _barrier_column(grid[0, column], rows[name], x, look, known)
            _error_column(grid[1, column], rows[name], x, look)
    _barrier_window(grid[0, 0], [row for name in names for row in rows[name]])
    tolerance_mev = tolerances(run)[0] * 1000
    for axes in grid[1]:
        axes.axhline(tolerance_mev, color=INK, lw=0.9, ls="--", label=f"tolerance {tolerance_mev:g} meV")
        plain_log(axes)
        whole_numbers(axes)
    grid[0, 0].set_ylabel("Barrier (eV)")
    grid[1, 0].set_ylabel("Error, uncertainty (meV)")
    grid[1, 0].set_xlabel("Generation")
    grid[1, 1].set_xlabel("Reference calculations")
    for letter, axes in zip("abcd", grid.flat, strict=True):
        panel(axes, letter)
    entries: dict[str, Any] = {}
    for axes in grid[:, 1]:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, columnspacing=1.4)
    return figure


def _barrier_window(axes: Axes, rows: Sequence[GenerationRow]) -> None:
    """No early uncertainty of several eV may flatten what is to be seen."""
    values = np.concatenate([_column(rows, "barrier_forward_ev"), _column(rows, "verified_barrier_ev")])
    span = float(np.nanmax(values) - np.nanmin(values)) or 0.1
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, float(np.nanmin(values)) - 1.5 * span), min(high, float(np.nanmax(values)) + 1.5 * span))


def _column(rows: Sequence[GenerationRow], name: str) -> FloatArray:
    """One value of every row; NaN where it is not known."""
    return np.array([np.nan if getattr(row, name) is None else getattr(row, name) for row in rows], dtype=float)


def _barrier_column(
    axes: Axes, rows: Sequence[GenerationRow], x: str, look: tuple[str, str], known: float | None
) -> None:
    """Upper panels; ``look`` is the hop's colour and, if there are several, its name."""
    colour, hop = look
    where, barrier, std = _column(rows, x), _column(rows, "barrier_forward_ev"), _column(rows, "predicted_std_ev")
    axes.fill_between(where, barrier - std, barrier + std, color=colour, alpha=0.18, lw=0)
    label = hop or r"surrogate $\pm 1\sigma$"
    axes.plot(where, barrier, "-o", color=colour, mfc="white", mew=1.3, label=label)
    verified, shade = _column(rows, "verified_barrier_ev"), colour if hop else VERMILLION
    axes.plot(where, verified, "D", color=shade, ms=6, mec="white", mew=0.6, zorder=4, label="reference at its saddle")
    if known is not None:
        axes.axhline(known, color=GREY, lw=1.0, ls=":", label="known barrier")


def _error_column(axes: Axes, rows: Sequence[GenerationRow], x: str, look: tuple[str, str]) -> None:
    """Lower panels: sizes of the errors, in meV."""
    colour, hop = look
    where = _column(rows, x)

    def mev(name: str) -> FloatArray:
        values = np.abs(_column(rows, name)) * 1000
        return np.where(np.isnan(values), np.nan, np.maximum(values, ERROR_FLOOR_MEV))

    axes.plot(where, mev("predicted_std_ev"), color=colour, lw=1.3, alpha=0.6, label=r"stated $\sigma$")
    error = mev("error_to_verified_ev")
    axes.plot(where, error, "o", color=colour, mec="white", mew=0.6, ms=6.5, zorder=3, label="surrogate − reference")
    to_known = mev("error_to_reference_ev")
    if np.isfinite(to_known).any():
        shade = colour if hop else GREY
        axes.plot(where, to_known, "s", color=shade, mfc="white", mew=1.2, label="reference − known")
