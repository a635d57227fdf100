"""Paths over a well: divided where the well is real, whole where it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.optimize import BFGS
from hypothesis import given
from hypothesis import strategies as st

from alcore.barrier import find_extrema
from alcore.endpoints import make_pair
from alcore.neb import NebSpec, Relaxed, interpolate, path_coordinate, relax_band
from alcore.segments import ONE_WELL_ANG, relax_path, resampled, segments
from alcore.types import Band, EndpointPair, FloatArray, Structure

SADDLE_EV = 1.5e-3
SADDLE_ANG = 0.05
WELL_EV = 1e-3
SPEC = NebSpec(fmax_ev_per_ang=0.01)


class Humps:
    """One atom; along x ``height`` (1 - cos) / 2 with a well every 2 Å, plus ``tilt`` eV/Å, on a curved valley in y."""

    def __init__(self, height: float = 0.3, tilt: float = 0.0, second: float = 1.0, bend: float = 0.3) -> None:
        self.height, self.tilt, self.second, self.bend = height, tilt, second, bend

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, y, z = positions[:, 0].T
        k = np.pi
        height = self.height * np.where(x > 2.0, self.second, 1.0)
        valley = self.bend * np.sin(k * x / 4)
        energy = 0.5 * height * (1 - np.cos(k * x)) + self.tilt * x + 2.0 * (y - valley) ** 2 + 2.0 * z**2
        forces = np.zeros_like(positions)
        forces[:, 0, 0] = -0.5 * height * k * np.sin(k * x) - self.tilt
        forces[:, 0, 0] += 4.0 * (y - valley) * self.bend * k / 4 * np.cos(k * x / 4)
        forces[:, 0, 1] = -4.0 * (y - valley)
        forces[:, 0, 2] = -4.0 * z
        return energy, forces


def _atom(length: float, n_images: int = 7) -> tuple[Structure, FloatArray]:
    template = Structure.from_atoms(Atoms("H", positions=[[0.0, 0, 0]]))
    start = np.zeros((n_images + 2, 1, 3))
    start[:, 0, 0] = np.linspace(0, length, n_images + 2)
    return template, start


def _band(template: Structure, found: Relaxed) -> Band:
    n = len(found.positions)
    return Band(
        path="hop",
        template=template,
        positions=found.positions,
        energies_ev=found.energies_ev - found.energies_ev[0],
        forces=found.forces,
        sigma_committee_ev=np.zeros(n),
        sigma_posterior_ev=np.zeros(n),
        sigma_ev=0.001 * np.arange(n, dtype=np.float64),
        coordinate_ang=path_coordinate(template, found.positions),
        status=found.status,
        minima=found.minima,
    )


def test_a_path_over_a_well_is_divided_there() -> None:
    template, start = _atom(4.0)
    found = relax_path(Humps(second=1.5), template, start, SPEC)
    assert found.status == "converged"
    (well,) = found.minima
    np.testing.assert_allclose(found.positions[well, 0, 0], 2.0, atol=0.01)
    first, second = segments(_band(template, found))
    assert (first.forward_ev, second.forward_ev) == pytest.approx((0.3, 0.45), abs=SADDLE_EV)
    assert [first.rate_limiting, second.rate_limiting] == [False, True]
    assert (first.end, second.start) == (well, well)
    assert found.climbing_image == second.saddle
    assert second.sigma_ev == 0.001 * second.saddle
    np.testing.assert_allclose(found.positions[[first.saddle, second.saddle], 0, 0], [1.0, 3.0], atol=0.02)


def test_of_three_humps_that_climb_alike_on_the_way_down_the_highest_is_called_rate_limiting() -> None:
    template, start = _atom(6.0, 11)
    band = _band(template, relax_path(Humps(tilt=-0.05, bend=0.0), template, start, SPEC))
    assert len(band.minima) == 2
    parts = segments(band)
    assert [part.rate_limiting for part in parts] == [True, False, False]
    assert sum(p.forward_ev - p.reverse_ev for p in parts) == pytest.approx(band.energies_ev[-1], abs=1e-12)
    inner = [e.kind for e in find_extrema(band)]
    assert inner == ["maximum", "minimum"] * 2 + ["maximum"]


def test_one_hump_is_one_segment(au_pair: EndpointPair, emt: Any) -> None:
    template, start = _atom(2.0)
    assert relax_path(Humps(), template, start, SPEC).minima == ()
    start = interpolate(au_pair, SPEC)
    found, plain = relax_path(emt, au_pair.initial, start, SPEC), relax_band(emt, au_pair.initial, start, SPEC)
    assert found.minima == ()
    np.testing.assert_array_equal(found.positions, plain.positions)
    (whole,) = segments(_band(au_pair.initial, found))
    assert (whole.start, whole.saddle, whole.end, whole.rate_limiting) == (0, 4, 8, True)


@pytest.mark.parametrize(("height", "sigma"), [(0.02, 0.0), (0.3, 0.2)])
def test_a_shallow_well_and_one_that_is_not_sure_divide_nothing(height: float, sigma: float) -> None:
    template, start = _atom(4.0)
    found = relax_path(Humps(height), template, start, SPEC, unsure=lambda pair: sigma)
    assert found.status == "converged"
    assert found.minima == ()


def test_a_divided_band_is_gone_on_from() -> None:
    template, start = _atom(4.0)
    first = relax_path(Humps(), template, start, SPEC)
    again = relax_path(Humps(), template, first.positions, SPEC, minima=first.minima)
    assert (again.n_steps, again.minima) == (0, first.minima)
    np.testing.assert_array_equal(again.positions, first.positions)


class Ramp(Humps):
    """One hump from 0 to 4 Å: the next surrogate has no well between."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, y, z = positions[:, 0].T
        k = np.pi / 2
        forces = -4.0 * positions.copy()
        forces[:, 0, 0] = -0.5 * self.height * k * np.sin(k * x)
        return 0.5 * self.height * (1 - np.cos(k * x)) + self.tilt * x + 2.0 * (y**2 + z**2), forces


@pytest.mark.parametrize("tilt", [0.0, 0.02])
def test_a_well_that_was_spurious_makes_the_band_whole_again(tilt: float) -> None:
    template, start = _atom(4.0)
    divided = relax_path(Humps(), template, start, SPEC)
    assert divided.minima
    whole = relax_path(Ramp(tilt=tilt), template, divided.positions, SPEC, minima=divided.minima)
    assert whole.status == "converged"
    assert whole.minima == ()
    assert len(whole.positions) == SPEC.n_images + 2
    fresh = relax_path(Ramp(tilt=tilt), template, start, SPEC)
    assert whole.energies_ev.max() == pytest.approx(fresh.energies_ev.max(), abs=SADDLE_EV)


def test_doubts_are_asked_about_the_whole_path_and_stop_it() -> None:
    template, start = _atom(4.0)
    divided = relax_path(Humps(), template, start, SPEC)
    asked = []

    def doubt(positions: FloatArray) -> str:
        asked.append(positions)
        return "too far" if len(asked) > 1 else ""

    found = relax_path(
        Humps(second=2.0, bend=0.5), template, divided.positions, SPEC, doubt=doubt, minima=divided.minima
    )
    assert {len(positions) for positions in asked} == {len(divided.positions)}
    assert found.status == "guarded"
    assert found.reason.startswith("segment ")
    assert found.reason.endswith("too far")


class Restless(Humps):
    """Humps that pull to and fro wherever images lie closer than 0.4 Å: the halves of a divided band never rest."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = 1.0

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        energies, forces = super().evaluate(template, positions)
        if len(positions) > 1 and np.abs(np.diff(positions[:, 0, 0])).min() < 0.4:
            self.sign = -self.sign
            forces[1:-1, 0, 2] += 0.5 * self.sign
        return energies, forces


def test_a_division_that_does_not_converge_leaves_the_band_whole() -> None:
    """No label need ever change that: the whole band is what there is to confirm, and it says what it passes over."""
    template, start = _atom(4.0)
    found = relax_path(Restless(), template, start, replace(SPEC, max_steps=150))
    assert (found.status, found.minima, len(found.positions)) == ("converged", (), 9)
    assert found.reason.startswith("not divided at the well by image 4: segment 1: force ")
    assert relax_path(Humps(), template, start, replace(SPEC, max_steps=150)).reason == ""


def test_a_division_that_is_doubted_is_where_a_label_is_due() -> None:
    template, start = _atom(4.0)
    found = relax_path(Humps(), template, start, SPEC, doubt=lambda p: "too far" if len(p) > 9 else "")
    assert (found.status, found.reason) == ("guarded", "segment 1: too far")
    assert len(found.minima) == 1


class Hollow(Humps):
    """A well at 0, and a lower one at 2 Å with nothing between; then a hump to 4 Å."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        energies, forces = super().evaluate(template, positions)
        x, k = positions[:, 0, 0], np.pi
        before = x < 2.0
        fall = -0.1 * (1 - np.cos(0.5 * k * np.clip(x, 0.0, 2.0)))
        forces[:, 0, 0] += np.where(before, 0.5 * self.height * k * np.sin(k * x), 0.0)
        forces[:, 0, 0] += np.where(before, 0.05 * k * np.sin(0.5 * k * np.clip(x, 0.0, 2.0)), 0.0)
        return energies - np.where(before, 0.5 * self.height * (1 - np.cos(k * x)), 0.0) + fall, forces


def test_a_part_without_a_saddle_of_its_own_is_joined_to_its_neighbour() -> None:
    """The last surrogate had two humps, this one has the second alone; its end states are no saddles of the first."""
    template, start = _atom(4.0)
    divided = relax_path(Humps(bend=0.0), template, start, SPEC)
    assert len(divided.minima) == 1
    found = relax_path(Hollow(bend=0.0), template, divided.positions, SPEC, minima=divided.minima)
    assert found.status == "converged"
    assert found.minima == ()


@given(st.integers(1, 12), st.integers(2, 9), st.integers(0, 1000))
def test_resampled_images_lie_evenly_on_the_same_line(n_images: int, n_given: int, seed: int) -> None:
    line = np.cumsum(np.random.default_rng(seed).uniform(0.1, 1.0, size=n_given))[:, None, None] * np.ones((1, 2, 3))
    found = resampled(line, n_images)
    assert found.shape == (n_images + 2, 2, 3)
    np.testing.assert_array_equal(found[[0, -1]], line[[0, -1]])
    steps = np.diff(found[:, 0, 0])
    np.testing.assert_allclose(steps, steps[0], rtol=1e-9)


@pytest.fixture(scope="module")
def adatom() -> EndpointPair:
    """Cu on Cu(111) from one fcc hollow to the next: over an hcp hollow, EMT."""
    slab = fcc111("Cu", size=(2, 2, 3))
    add_adsorbate(slab, "Cu", 1.9, "fcc")
    slab.center(axis=2, vacuum=6.0)
    slab.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in slab]))
    ends = [slab.copy(), slab.copy()]
    ends[1][-1].position += slab.cell[0] / 2
    for atoms in ends:
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.005)
    return make_pair("adatom", *ends)


def test_a_two_hump_hop_has_the_extrema_of_finely_relaxed_bands(adatom: EndpointPair, emt: Any) -> None:
    """The reference: the well relaxed by ASE, and each half a band of its own, finer in images and in force."""
    found = relax_path(emt, adatom.initial, interpolate(adatom, SPEC), SPEC)
    assert found.status == "converged"
    (well,) = found.minima
    ends = [adatom.initial.to_atoms(), adatom.final.to_atoms()]
    hollow = ends[0].copy()
    hollow[-1].position = 0.5 * (ends[0][-1].position + ends[1][-1].position) + np.array([0.0, 0.6, 0.0])
    hollow.calc = EMT()
    BFGS(hollow, logfile=None).run(fmax=0.005)
    assert np.linalg.norm(hollow.positions - found.positions[well], axis=1).max() < ONE_WELL_ANG
    zero = found.energies_ev[0]
    assert found.energies_ev[well] == pytest.approx(hollow.get_potential_energy(), abs=WELL_EV)
    fine = replace(SPEC, n_images=13, fmax_ev_per_ang=0.005)
    parts = segments(_band(adatom.initial, found))
    for (start, end), part in zip(((ends[0], hollow), (hollow, ends[1])), parts, strict=True):
        half = make_pair("half", start, end)
        true = relax_band(emt, half.initial, interpolate(half, fine), fine)
        assert true.status == "converged"
        assert part.saddle_ev == pytest.approx(float(true.energies_ev.max()) - zero, abs=SADDLE_EV)
        assert true.climbing_image is not None
        apart = found.positions[part.saddle] - true.positions[true.climbing_image]
        assert np.linalg.norm(apart, axis=1).max() < SADDLE_ANG
    extrema = find_extrema(_band(adatom.initial, found))
    assert [e.kind for e in extrema] == ["maximum", "minimum", "maximum"]
    assert [e.image for e in extrema] == [parts[0].saddle, well, parts[1].saddle]


def test_a_deep_well_makes_the_lower_saddle_behind_it_rate_limiting() -> None:
    """0.5 eV from the initial state are verified; but 0.8 eV out of the well have to be climbed after it."""
    template, start = _atom(4.0, 3)
    band = replace(
        _band(template, relax_path(Humps(), template, start, replace(SPEC, n_images=3))),
        energies_ev=np.array([0.0, 0.5, -0.4, 0.4, 0.0]),
        sigma_ev=np.zeros(5),
        minima=(2,),
    )
    first, second = segments(band)
    assert (first.span_ev, second.span_ev) == pytest.approx((0.5, 0.8))
    assert (first.rate_limiting, second.rate_limiting) == (False, True)
    assert (first.highest, second.highest) == (True, False)
    third = replace(band, energies_ev=np.array([0.0, 0.5, 0.2, 0.6, 0.0]))
    assert [part.span_ev for part in segments(third)] == pytest.approx([0.5, 0.6]), "out of the initial state"
