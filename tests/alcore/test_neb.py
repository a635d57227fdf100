"""The band: ASE's forces, ASE's barrier, guards that hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.mep import NEB
from hypothesis import given
from hypothesis import strategies as st

from alcore.endpoints import make_pair
from alcore.neb import (
    Guards,
    NebSpec,
    closest_contact,
    guard_reason,
    interpolate,
    neb_forces,
    path_coordinate,
    relax_band,
    tangents,
)
from alcore.optimisers import LBFGS_PATIENCE, Lbfgs
from alcore.types import EndpointPair, FloatArray, Structure

FORCE_EV_PER_ANG = 1e-9
AU_BARRIER_EV = 0.3745
BARRIER_EV = 0.002
SYMMETRY_EV = 1e-3


@pytest.fixture(scope="module")
def rough_band(au_pair: EndpointPair) -> FloatArray:
    """An asymmetric band far from relaxed: only there do tangents and springs show what they are."""
    band = interpolate(au_pair, NebSpec(n_images=5))
    noise = 0.05 * np.random.default_rng(5).standard_normal(band.shape)
    noise[[0, -1]] = 0.0
    return band + np.where(au_pair.initial.fixed, 0.0, noise)


@pytest.mark.parametrize("climb", [False, True])
@pytest.mark.parametrize("spring", [0.1, 2.0])
def test_forces_equal_those_of_ase(
    au_pair: EndpointPair, emt: Any, rough_band: FloatArray, climb: bool, spring: float
) -> None:
    images = [au_pair.initial.moved(place).to_atoms() for place in rough_band]
    for image in images:
        image.calc = EMT()
    theirs = NEB(images, k=spring, climb=climb, method="improvedtangent").get_forces().reshape(5, -1, 3)
    energies, forces = emt.evaluate(au_pair.initial, rough_band)
    top = int(energies[1:-1].argmax()) + 1
    ours = neb_forces(
        rough_band, energies, np.where(au_pair.initial.fixed, 0.0, forces), spring, top if climb else None
    )
    np.testing.assert_allclose(np.where(au_pair.initial.fixed, 0.0, ours), theirs, atol=FORCE_EV_PER_ANG)


@given(st.lists(st.floats(-2, 2), min_size=5, max_size=5))
def test_tangents_are_unit_vectors_between_the_neighbours(energies: list[float]) -> None:
    positions = np.random.default_rng(0).standard_normal((5, 2, 3))
    found = tangents(positions, np.array(energies))
    if len(set(energies)) == 5:
        np.testing.assert_allclose(np.linalg.norm(found, axis=(1, 2)), 1.0, atol=1e-9)
    for k, tangent in enumerate(found):
        ahead, behind = positions[k + 2] - positions[k + 1], positions[k + 1] - positions[k]
        plane = np.stack([ahead.ravel(), behind.ravel()], axis=1)
        rest = tangent.ravel() - plane @ np.linalg.lstsq(plane, tangent.ravel(), rcond=None)[0]
        np.testing.assert_allclose(rest, 0.0, atol=1e-9)


@pytest.fixture(scope="module")
def relaxed(au_pair: EndpointPair, emt: Any) -> Any:
    return relax_band(emt, au_pair.initial, interpolate(au_pair, NebSpec()), NebSpec(fmax_ev_per_ang=0.01))


def test_climbing_image_finds_the_barrier(relaxed: Any) -> None:
    assert relaxed.status == "converged"
    assert relaxed.climbing_image == 4
    assert relaxed.energies_ev.max() - relaxed.energies_ev[0] == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)


def test_symmetric_hop_has_a_symmetric_band(relaxed: Any, au_pair: EndpointPair) -> None:
    relative = relaxed.energies_ev - relaxed.energies_ev[0]
    np.testing.assert_allclose(relative, relative[::-1], atol=SYMMETRY_EV)
    steps = np.diff(path_coordinate(au_pair.initial, relaxed.positions))
    np.testing.assert_allclose(steps, steps[::-1], atol=0.02)


def test_end_states_and_fixed_atoms_stay(relaxed: Any, au_pair: EndpointPair) -> None:
    np.testing.assert_array_equal(relaxed.positions[0], au_pair.initial.positions)
    np.testing.assert_array_equal(relaxed.positions[-1], au_pair.final.positions)
    start = interpolate(au_pair, NebSpec())
    np.testing.assert_allclose((relaxed.positions - start)[:, au_pair.initial.fixed], 0.0, atol=1e-12)


def test_climbing_force_points_up_along_the_path(relaxed: Any, au_pair: EndpointPair, emt: Any) -> None:
    """At the climbing image of a relaxed band the whole reference force is small: it is a saddle."""
    _, forces = emt.evaluate(au_pair.initial, relaxed.positions[[relaxed.climbing_image]])
    assert au_pair.initial.free_fmax(forces[0]) < 0.02


def test_interpolation_goes_through_the_periodic_boundary() -> None:
    """0.5 Å from one face to 0.5 Å from the other: 1 Å apart, not 5."""

    places = [[0.5, 0.0, 0.0], [3.0, 3.0, 3.0]]
    initial = Atoms("H2", positions=places, cell=[6, 6, 6], pbc=True)
    final = initial.copy()
    final.positions[0, 0] = 5.5
    band = interpolate(make_pair("hop", initial, final), NebSpec(n_images=5))
    assert path_coordinate(Structure.from_atoms(initial), band)[-1] == pytest.approx(1.0, abs=1e-2)
    for place in band:
        contact = closest_contact(Structure.from_atoms(initial).moved(place))
        assert contact is None or contact[2] > 1.0


def test_given_images_are_taken_as_they_are(au_pair: EndpointPair) -> None:
    middle = au_pair.initial.moved(0.5 * (au_pair.initial.positions + au_pair.final.positions) + 0.01)
    band = interpolate(replace(au_pair, images=(middle,)), NebSpec(n_images=9))
    assert band.shape[0] == 3
    np.testing.assert_array_equal(band[1], middle.positions)


class Counting:
    """How often each geometry is evaluated."""

    def __init__(self, potential: Any) -> None:
        self.potential, self.images = potential, [0]

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.images.append(len(positions))
        found: tuple[FloatArray, FloatArray] = self.potential.evaluate(template, positions)
        return found


@pytest.fixture(scope="module")
def vacancy() -> EndpointPair:
    """Cu, 31 atoms and a vacancy, all free: the cell may drift as a whole; end states not relaxed."""

    full = bulk("Cu", "fcc", a=3.61, cubic=True) * (2, 2, 2)
    near = int(np.argsort(full.get_distances(0, list(range(len(full))), mic=True))[1])
    final = full.copy()
    final.positions[near] += full.get_distance(near, 0, mic=True, vector=True)
    return make_pair("vacancy", full[1:], final[1:])


@pytest.mark.parametrize("case", ["adatom", "vacancy"])
def test_the_band_is_that_of_fire_with_far_fewer_evaluations(
    case: str, au_pair: EndpointPair, vacancy: EndpointPair, emt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = au_pair if case == "adatom" else vacancy
    spec = NebSpec(n_images=5, fmax_ev_per_ang=0.01)
    start = interpolate(pair, spec)
    quick, slow = Counting(emt), Counting(emt)
    found = relax_band(quick, pair.initial, start, spec)
    monkeypatch.setattr(Lbfgs, "stalled", lambda self, fmax: True)
    expected = relax_band(slow, pair.initial, start, spec)
    assert found.status == expected.status == "converged"
    assert found.climbing_image == expected.climbing_image
    assert found.energies_ev.max() == pytest.approx(expected.energies_ev.max(), abs=BARRIER_EV)
    assert np.abs(found.positions[found.climbing_image] - expected.positions[expected.climbing_image]).max() < 0.02
    assert 2 * sum(quick.images) < sum(slow.images)
    # the end states once, with the first; in the end the climbing image alone, and then those beside it
    assert {5, 1} <= set(quick.images[2:]) <= {5, 4, 1}


class Stiff:
    """One hump along x in a valley that is stiff across."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, y = positions[:, 0, 0], positions[:, 0, 1]
        forces = np.zeros_like(positions)
        forces[:, 0, 0] = -0.5 * np.pi * 0.3 * np.sin(np.pi * x)
        forces[:, 0, 1] = -60.0 * y
        return 0.15 * (1 - np.cos(np.pi * x)) + 30.0 * y**2, forces


def test_where_the_fast_steps_lead_nowhere_fire_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps the wrong way: forces never get smaller, until FIRE takes over."""
    atom = Structure.from_atoms(Atoms("H", positions=[[0.0, 0, 0]]))
    start = np.zeros((7, 1, 3))
    start[:, 0, 0] = np.linspace(0, 2, 7)
    start[1:-1, 0, 1] = 0.05
    monkeypatch.setattr(Lbfgs, "step", lambda self, force: -0.001 * np.sign(force))
    found = relax_band(Stiff(), atom, start, NebSpec())
    assert found.status == "converged"
    assert found.n_steps > LBFGS_PATIENCE
    assert found.energies_ev.max() == pytest.approx(0.3, abs=1e-3)


def test_fast_steps_out_of_bounds_are_taken_back_and_gone_on_from_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    atom = Structure.from_atoms(Atoms("H", positions=[[0.0, 0, 0]]))
    start = np.zeros((7, 1, 3))
    start[:, 0, 0] = np.linspace(0, 2, 7)
    start[1:-1, 0, 1] = 0.05
    monkeypatch.setattr(Lbfgs, "step", lambda self, force: np.full_like(force, 3.0))
    found = relax_band(Stiff(), atom, start, NebSpec())
    assert found.status == "converged"
    assert np.abs(found.positions[:, 0, 1]).max() < 0.01


class Exploding:
    """EMT until an image has been evaluated ``after`` times, then energies fall without end."""

    def __init__(self, potential: Any, after: int, energy: float, force: float = 1.0) -> None:
        self.potential, self.after, self.energy, self.force, self.calls = potential, after, energy, force, 0
        self.last_sound: FloatArray | None = None

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.calls += 1
        energies, forces = self.potential.evaluate(template, positions)
        if self.calls > self.after:
            energies, forces = energies.copy(), forces * self.force
            energies[2] += self.energy
        else:
            self.last_sound = positions.copy()
        return energies, forces


@pytest.mark.parametrize(
    ("energy", "reason"),
    [(-50.0, "below the lower end state"), (50.0, "above the lower end state"), (float("nan"), "not finite")],
)
def test_an_explosion_is_stopped_at_the_last_sound_band(
    au_pair: EndpointPair, emt: Any, energy: float, reason: str
) -> None:
    potential = Exploding(emt, 4, energy)
    found = relax_band(potential, au_pair.initial, interpolate(au_pair, NebSpec(n_images=3)), NebSpec())
    assert found.status == "guarded"
    assert reason in found.reason
    assert potential.last_sound is not None
    np.testing.assert_array_equal(found.positions[1:-1], potential.last_sound)
    assert np.isfinite(found.energies_ev).all()


class Collapse:
    """Every image is pulled apart or together without end, at no change of energy."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        centre = positions.mean(axis=1, keepdims=True)
        return np.zeros(len(positions)), self.factor * (positions - centre)


@pytest.mark.parametrize(("factor", "reason"), [(-5.0, "covalent radii"), (5.0, "moved")])
def test_atoms_that_collapse_or_fly_away_are_stopped(factor: float, reason: str) -> None:
    atoms = Structure.from_atoms(Atoms("Cu4", positions=[[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0], [0, 0, 2.6]]))
    shift = np.zeros((4, 3))
    shift[3, 0] = 0.5
    start = atoms.positions + np.linspace(0, 1, 4)[:, None, None] * shift
    found = relax_band(Collapse(factor), atoms, start, NebSpec())
    assert found.status == "guarded"
    assert reason in found.reason
    assert guard_reason(atoms, found.positions, found.energies_ev, start, Guards()) == ""


def test_steps_run_out_with_a_reason(au_pair: EndpointPair, emt: Any) -> None:
    start = interpolate(au_pair, NebSpec(n_images=3))
    for steps in range(6):
        found = relax_band(
            emt, au_pair.initial, start, NebSpec(max_steps=steps, climb_below_ev_per_ang=100.0, fmax_ev_per_ang=1e-6)
        )
        assert found.status == "max_steps"
        assert "eV/Å" in found.reason, steps


def test_contact_is_found_across_boundaries_and_without_a_cell() -> None:
    across = Atoms("Cu2", positions=[[0.2, 1, 1], [9.8, 1, 1]], cell=[10, 10, 10], pbc=True)
    contact = closest_contact(Structure.from_atoms(across))
    assert contact is not None
    assert contact[:2] in ((0, 1), (1, 0))
    assert contact[2] == pytest.approx(0.4 / (2 * 1.32))
    across.pbc = False
    assert closest_contact(Structure.from_atoms(across)) is None
    assert closest_contact(Structure.from_atoms(Atoms("Cu"))) is None
    far = closest_contact(Structure.from_atoms(Atoms("Cu2", positions=[[-100, 0, 0], [-99, 0, 0]])))
    assert far is not None
    assert far[2] == pytest.approx(1 / 2.64)


class Soft:
    """One hump along x; the valley, of stiffness ``c``, bends by ``bend`` Å at the top, in y."""

    def __init__(self, c: float, bend: float) -> None:
        self.c, self.bend = c, bend

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        x, y, z = positions[:, 0].T
        k = np.pi
        off = y - self.bend * np.sin(k * x / 2) ** 2
        forces = np.zeros_like(positions)
        forces[:, 0, 0] = -0.15 * k * np.sin(k * x)
        forces[:, 0, 0] += self.c * off * self.bend * k * np.sin(k * x / 2) * np.cos(k * x / 2)
        forces[:, 0, 1], forces[:, 0, 2] = -self.c * off, -4.0 * z
        return 0.15 * (1 - np.cos(k * x)) + 0.5 * self.c * off**2 + 2.0 * z**2, forces


@pytest.mark.parametrize("stiffness", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("bend", [0.3, 0.5])
def test_the_stated_force_is_that_of_the_band_with_its_refined_saddle(stiffness: float, bend: float) -> None:
    """The saddle moves on, and its neighbours with it until they too are below the limit."""
    atom = Structure.from_atoms(Atoms("H", positions=[[0.0, 0, 0]]))
    start = np.zeros((9, 1, 3))
    start[:, 0, 0] = np.linspace(0, 2, 9)
    spec = NebSpec()
    found = relax_band(Soft(stiffness, bend), atom, start, spec)
    assert found.status == "converged"
    assert found.climbing_image is not None
    left = neb_forces(found.positions, found.energies_ev, found.forces, spec.spring_ev_per_ang2, found.climbing_image)
    largest = np.linalg.norm(left, axis=2).max(axis=1)
    assert found.fmax_ev_per_ang == pytest.approx(largest.max())
    assert largest.max() < spec.fmax_ev_per_ang
    assert largest[found.climbing_image - 1] < 0.2 * spec.fmax_ev_per_ang
    energies, forces = Soft(stiffness, bend).evaluate(atom, found.positions)
    np.testing.assert_allclose(found.energies_ev, energies, atol=1e-12)
    np.testing.assert_allclose(found.forces, forces, atol=1e-12)


def test_a_band_climbs_before_it_may_be_called_converged(au_pair: EndpointPair, emt: Any) -> None:
    """Four images: without climbing none of them is the saddle."""
    spec = NebSpec(n_images=4, fmax_ev_per_ang=0.5)
    assert spec.fmax_ev_per_ang > spec.climb_below_ev_per_ang
    found = relax_band(emt, au_pair.initial, interpolate(au_pair, spec), spec)
    assert found.status == "converged"
    assert found.climbing_image is not None


def test_forces_before_and_after_an_image_climbs_are_not_compared(
    au_pair: EndpointPair, emt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They differ by more than the step between them: taken for curvature, that would spoil the memory."""
    fresh: list[bool] = []
    step = Lbfgs.step

    def watched(self: Lbfgs, force: FloatArray) -> FloatArray:
        if len(force) == 5:  # of the whole band
            fresh.append(self.last is None)
        return step(self, force)

    monkeypatch.setattr(Lbfgs, "step", watched)
    spec = NebSpec(n_images=5)
    assert relax_band(emt, au_pair.initial, interpolate(au_pair, spec), spec).climbing_image is not None
    assert fresh[0]
    assert sum(fresh) == 2


class Flat:
    """Nothing pulls anywhere."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        return np.zeros(len(positions)), np.zeros(positions.shape)


def test_a_band_that_turns_back_on_itself_is_unfolded() -> None:
    atom = Structure.from_atoms(Atoms("H", positions=[[0.0, 0, 0]]))
    start = np.zeros((7, 1, 3))
    start[:, 0, 0] = [0.0, 0.9, 0.3, 1.0, 0.6, 1.2, 1.5]
    start[:, 0, 1] = [0.0, 0.1, 0.0, 0.2, 0.0, 0.1, 0.0]
    found = relax_band(Flat(), atom, start, NebSpec(fmax_ev_per_ang=0.002))
    assert found.status == "converged"
    ahead, behind = found.positions[2:] - found.positions[1:-1], found.positions[1:-1] - found.positions[:-2]
    assert ((start[2:] - start[1:-1]) * (start[1:-1] - start[:-2])).sum(axis=(1, 2)).min() < 0
    assert (ahead * behind).sum(axis=(1, 2)).min() > -1e-3


def test_bends_of_the_path_are_left_alone(au_pair: EndpointPair, emt: Any) -> None:
    start = interpolate(au_pair, NebSpec())
    energies, forces = emt.evaluate(au_pair.initial, start)
    tangent = tangents(start, energies)
    found = neb_forces(start, energies, np.zeros_like(forces), 1.0, None)
    across = found - (found * tangent).sum(axis=(1, 2), keepdims=True) * tangent
    np.testing.assert_allclose(across, 0.0, atol=1e-12)
