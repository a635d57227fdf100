"""Barriers and extrema of bands whose answer is known, and labels held against predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st

from alcore.barrier import (
    doubtful_rival,
    estimate_barrier,
    find_extrema,
    held_against,
    label_fmax,
    path_spline,
    reference_barrier,
    tangential_slopes,
)
from alcore.types import Band, Candidate, Label, Structure

LENGTH_ANG = 3.0
EXTREMUM_EV = 2e-3


def _band(
    energy: Callable[[Any], Any],
    slope: Callable[[Any], Any],
    n: int = 13,
    direction: tuple[float, ...] = (1, 0, 0),
    cell: float | None = None,
) -> Band:
    """An atom on a straight line of 3 Å whose energy is a known function of s in [0, 3]."""
    s = np.linspace(0, LENGTH_ANG, n)
    unit = np.array(direction) / np.linalg.norm(direction)
    atoms = Atoms(
        "H2", positions=[[0, 0, 0], [0, 5, 5]], cell=None if cell is None else [cell] * 3, pbc=cell is not None
    )
    template = Structure.from_atoms(atoms)
    positions = np.repeat(template.positions[None], n, axis=0)
    positions[:, 0] += s[:, None] * unit
    forces = np.zeros_like(positions)
    forces[:, 0] = -slope(s)[:, None] * unit
    zeros = np.zeros(n)
    return Band(
        path="hop",
        template=template,
        positions=positions,
        energies_ev=energy(s) - energy(s[0]),
        forces=forces,
        sigma_committee_ev=zeros,
        sigma_posterior_ev=zeros,
        sigma_ev=0.01 * s,
        coordinate_ang=s,
        status="converged",
    )


def _double_hump(tilt: float) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """Two humps with a dip between them, tilted by ``tilt`` eV over the whole path."""
    k = 4 * np.pi / LENGTH_ANG
    return (lambda s: 0.2 * (1 - np.cos(k * s)) + tilt * s / LENGTH_ANG), (
        lambda s: 0.2 * k * np.sin(k * s) + tilt / LENGTH_ANG
    )


@given(st.floats(-0.15, 0.15))
def test_every_extremum_of_a_double_hump_is_found(tilt: float) -> None:
    energy, slope = _double_hump(tilt)
    found = [e for e in find_extrema(_band(energy, slope)) if 0.1 < e.coordinate_ang < 2.9]
    assert [e.kind for e in found] == ["maximum", "minimum", "maximum"]
    fine = np.linspace(0.1, 2.9, 20001)
    values = energy(fine) - energy(0.0)
    turning = np.flatnonzero(np.diff(np.sign(np.diff(values)))) + 1
    assert len(turning) == 3
    for extremum, k in zip(found, turning, strict=True):
        assert extremum.energy_ev == pytest.approx(values[k], abs=EXTREMUM_EV)
        assert extremum.coordinate_ang == pytest.approx(fine[k], abs=0.03)
        assert abs(extremum.image - extremum.coordinate_ang / LENGTH_ANG * 12) <= 0.6


def test_ripples_below_a_millielectronvolt_are_not_extrema() -> None:
    band = _band(
        lambda s: 0.4 * np.sin(np.pi * s / 3) ** 2 + 2e-4 * np.sin(12 * np.pi * s / 3),
        lambda s: 0.4 * np.pi / 3 * np.sin(2 * np.pi * s / 3) + 2e-4 * 4 * np.pi * np.cos(12 * np.pi * s / 3),
        n=49,
    )
    assert [e.kind for e in find_extrema(band) if 0.2 < e.coordinate_ang < 2.8] == ["maximum"]


def test_barrier_counts_from_both_ends() -> None:
    energy, slope = _double_hump(-0.1)
    band = _band(energy, slope)
    found = estimate_barrier(band)
    assert found.saddle_image == 3
    assert found.forward_ev == pytest.approx(0.4 - 0.025)
    assert found.reverse_ev == pytest.approx(0.4 + 0.075)
    assert found.reaction_energy_ev == pytest.approx(-0.1)
    assert found.spline_forward_ev == pytest.approx(found.forward_ev, abs=EXTREMUM_EV)
    assert found.sigma_ev == band.sigma_ev[3]


def test_spline_finds_a_saddle_between_images() -> None:
    """With an even number of images the top lies between two: the highest image alone is 22 meV low here."""
    band = _band(lambda s: 0.4 * np.sin(np.pi * s / 3) ** 2, lambda s: 0.4 * np.pi / 3 * np.sin(2 * np.pi * s / 3), n=8)
    found = estimate_barrier(band)
    assert found.forward_ev < 0.385
    assert found.spline_forward_ev == pytest.approx(0.4, abs=EXTREMUM_EV)


@pytest.mark.parametrize("direction", [(1, 0, 0), (1, 1, 0), (-1, 2, 0.5)])
def test_slopes_are_those_of_the_energy_along_the_path(direction: tuple[float, ...]) -> None:
    energy, slope = _double_hump(0.1)
    band = _band(energy, slope, direction=direction)
    np.testing.assert_allclose(tangential_slopes(band), slope(band.coordinate_ang), atol=1e-9)
    spline = path_spline(band)
    np.testing.assert_allclose(spline(band.coordinate_ang), band.energies_ev, atol=1e-9)


def test_a_path_through_the_boundary_has_the_same_slopes() -> None:
    energy, slope = _double_hump(0.1)
    band = _band(energy, slope, cell=20.0)
    wrapped = band.positions.copy()
    wrapped[5:, 0] -= [20.0, 0, 0]
    np.testing.assert_allclose(
        tangential_slopes(replace(band, positions=wrapped)), slope(band.coordinate_ang), atol=1e-9
    )


def _label(energy: float | None, status: Any = "ok", force: float = 0.1) -> Label:
    structure = Structure.from_atoms(Atoms("H", positions=[[0, 0, 0]]))
    return Label(
        key=f"key {energy}",
        structure=structure,
        status=status,
        fingerprint="f",
        calculator="emt",
        energy_ev=energy,
        forces=None if energy is None else np.array([[force, 0.0, 0.0]]),
    )


def test_a_label_is_held_against_what_was_predicted() -> None:
    structure = _label(0.0).structure
    candidate = Candidate(
        path="hop",
        kind="saddle",
        image=3,
        structure=structure,
        energy_ev=0.5,
        sigma_committee_ev=0.1,
        sigma_posterior_ev=0.2,
        sigma_ev=0.4,
        by_lead_ev={"prior": 0.5},
    )
    found = held_against(candidate, _label(-99.6), _label(-100.0), 4)
    assert found is not None
    assert found.error_ev == pytest.approx(0.1)
    assert found.fmax_ev_per_ang == pytest.approx(0.1)
    assert (found.sigma_committee_ev, found.sigma_posterior_ev, found.sigma_ev, found.generation) == (0.1, 0.2, 0.4, 4)
    assert held_against(candidate, _label(None, "crashed"), _label(-100.0), 4) is None
    assert held_against(candidate, _label(-99.6), _label(-100.0, "rejected"), 4) is None
    assert held_against(candidate, _label(-99.6), None, 4) is None
    assert held_against(replace(candidate, energy_ev=None), _label(-99.6), _label(-100.0), 4) is None


def test_reference_barrier_needs_both_labels() -> None:
    assert reference_barrier(_label(-99.5), _label(-100.0)) == pytest.approx(0.5)
    assert reference_barrier(None, _label(-100.0)) is None
    assert reference_barrier(_label(-99.5, "rejected"), _label(-100.0)) is None


def test_force_of_a_failed_label_is_unknown() -> None:
    assert label_fmax(_label(1.0, force=0.3)) == pytest.approx(0.3)
    assert label_fmax(_label(1.0, "rejected")) is None
    assert label_fmax(None) is None


@pytest.mark.parametrize("minima", [(), (6,)])
def test_a_rival_is_another_hump_that_may_be_the_highest(minima: tuple[int, ...]) -> None:
    """Whether the band is divided between the two or not."""
    energy, slope = _double_hump(0.05)  # the second hump is 25 meV higher
    band = replace(_band(energy, slope), minima=minima)
    first, second = (int(k) for k in (band.energies_ev[:6].argmax(), 6 + band.energies_ev[6:].argmax()))
    assert band.energies_ev[second] - band.energies_ev[first] == pytest.approx(0.025, abs=1e-3)

    def rival(**sigmas: float) -> int | None:
        sigma = np.full(len(band.energies_ev), sigmas.pop("rest", 0.005))
        sigma[first] = sigmas.pop("first", 0.005)
        return doubtful_rival(replace(band, sigma_ev=sigma), 0.01)

    assert rival() is None  # known to the tolerance
    assert rival(first=0.02) == first
    assert rival(first=0.012) is None  # two sigmas do not reach
    known = np.full(len(band.energies_ev), 0.018)
    assert doubtful_rival(replace(band, sigma_ev=known), 0.02) is None  # they do, but within the tolerance
    assert doubtful_rival(replace(band, sigma_ev=known), 0.01) == first
    assert rival(rest=0.1) is None  # the highest one's own uncertainty makes no rival


def test_images_of_one_hump_are_no_rivals() -> None:
    """Nor is a wiggle beside its top, or a path without any hump."""
    energies = np.array([0.0, 0.3, 0.4, 0.3995, 0.4002, 0.3, 0.1])
    band = _band(lambda s: 0 * s, lambda s: 0 * s, n=7)
    unsure = np.full(7, 0.1)
    for values in (energies, np.sort(energies), np.sort(energies)[::-1]):
        assert doubtful_rival(replace(band, energies_ev=values, sigma_ev=unsure), 0.01) is None
    dip = np.array([0.0, 0.3, 0.4, 0.39, 0.399, 0.3, 0.1])
    assert doubtful_rival(replace(band, energies_ev=dip, sigma_ev=unsure), 0.01) == 4


def test_a_residual_remembers_its_image() -> None:
    """Where along the band a label lies tells whether an end state is a minimum."""
    band = _band(*_double_hump(0.0))
    structure = band.structure(4)
    label = Label(
        key="k",
        structure=structure,
        status="ok",
        fingerprint="f",
        calculator="c",
        energy_ev=1.0,
        forces=np.zeros((2, 3)),
    )
    asked = Candidate(path="hop", kind="saddle", image=4, structure=structure, energy_ev=0.4)
    residual = held_against(asked, label, replace(label, energy_ev=0.7), 1)
    assert residual is not None
    assert residual.image == 4
