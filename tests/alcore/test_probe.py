"""Probing one hop with EMT itself as the surrogate: what is asked for, and when it is given up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms

from alcore.identity import label_key
from alcore.neb import NebSpec, interpolate
from alcore.probe import MAX_END_STATE_TRIES, Probe, ProbeSpec, beside, probe_path, relaxed_band
from alcore.selection import SelectSpec
from alcore.types import (
    Calibration,
    CommitteePrediction,
    EndpointPair,
    FloatArray,
    Label,
    PathRecord,
    Residual,
    Structure,
)

AU_BARRIER_EV = 0.3745
BARRIER_EV = 0.002
SPEC = ProbeSpec(neb=NebSpec(n_images=5))


class SureEmt:
    """EMT, which knows that it is right."""

    def __init__(self, potential: Any) -> None:
        self.potential = potential
        self.evaluations = 0

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        self.evaluations += 1
        found: tuple[FloatArray, FloatArray] = self.potential.evaluate(template, positions)
        return found

    def predict(self, template: Structure, positions: FloatArray) -> CommitteePrediction:
        energies, forces = self.potential.evaluate(template, positions)
        n = len(positions)
        return CommitteePrediction(
            energies_ev=energies,
            forces=forces,
            members_ev=np.zeros((0, n)),
            by_lead_ev={"prior": energies},
            covariance_ev2=1e-4 * (np.eye(n) - np.eye(n)[:, [0]] * np.eye(n)[[0]]),
        )

    def posterior_sigma(self, template: Structure, positions: FloatArray) -> FloatArray:
        return np.zeros(len(positions))

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def surrogate(emt: Any) -> SureEmt:
    return SureEmt(emt)


@pytest.fixture(scope="module")
def ends(au_pair: EndpointPair, label_of: Callable[..., Label]) -> tuple[Label, Label]:
    return label_of(au_pair.initial), label_of(au_pair.final)


def key_of(structure: Structure) -> str:
    return label_key(structure, "emt-in-process")


def _probe(pair: EndpointPair, surrogate: Any, initial: Label | None, final: Label | None, **kwargs: Any) -> Probe:
    values: dict[str, Any] = {"previous": None, "end_state_tries": 0, "asked": frozenset(), "spec": SPEC}
    values.update(kwargs)
    spec = values.pop("spec")
    return probe_path(pair, surrogate, spec, initial=initial, final=final, key_of=key_of, **values)


def _record(pair: EndpointPair, probe: Probe, error: float, saddle_key: str = "") -> PathRecord:
    residual = Residual(
        key=saddle_key,
        path="hop",
        kind="saddle",
        generation=1,
        predicted_ev=0.4 + error,
        labelled_ev=0.4,
        sigma_committee_ev=0.0,
        sigma_posterior_ev=0.01,
        sigma_ev=0.01,
        fmax_ev_per_ang=0.01,
    )
    return PathRecord(
        path="hop",
        initial=pair.initial,
        final=pair.final,
        band=probe.band,
        barrier=probe.barrier,
        residuals=(residual,),
        saddle_key=saddle_key,
    )


def test_end_states_are_labelled_first(au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label]) -> None:
    both = _probe(au_pair, surrogate, None, None)
    assert [(c.kind, c.image) for c in both.candidates] == [("initial", 0), ("final", -1)]
    assert both.band is None
    (one,) = _probe(au_pair, surrogate, ends[0], None).candidates
    assert one.kind == "final"
    assert one.structure is au_pair.final


def test_settled_end_states_give_a_band_and_its_saddle(
    au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label]
) -> None:
    found = _probe(au_pair, surrogate, *ends)
    assert found.band is not None
    assert found.barrier is not None
    assert found.band.converged
    assert found.band.energies_ev[0] == 0.0
    assert found.band.sigma_ev[0] == 0.0
    assert found.barrier.forward_ev == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    (saddle,) = found.candidates
    assert (saddle.kind, saddle.image) == ("saddle", found.barrier.saddle_image)
    assert saddle.energy_ev == pytest.approx(found.barrier.forward_ev)


def _restless(
    pair: EndpointPair, side: str, label_of: Callable[..., Label], **kwargs: Any
) -> tuple[EndpointPair, Label]:
    structure = getattr(pair, side)
    up = structure.positions.copy()
    up[-1, 2] += 0.15
    moved = structure.moved(up)
    return replace(pair, **{side: moved}, **kwargs), label_of(moved)


def test_an_end_state_with_a_force_is_relaxed(
    au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label], label_of: Callable[..., Label]
) -> None:
    pair, label = _restless(au_pair, "final", label_of)
    found = _probe(pair, surrogate, ends[0], label)
    (candidate,) = found.candidates
    assert (candidate.kind, candidate.image) == ("endpoint", -1)
    assert found.band is None
    relaxed = label_of(candidate.structure)
    assert relaxed.forces is not None
    assert candidate.structure.free_fmax(relaxed.forces) < SPEC.end_state_fmax_ev_per_ang
    np.testing.assert_allclose(candidate.forces, relaxed.forces, atol=1e-9)


def test_an_end_state_is_not_relaxed_beyond_what_the_labels_know(
    au_pair: EndpointPair, emt: Any, ends: tuple[Label, Label], label_of: Callable[..., Label]
) -> None:
    """Sigma grows with the way: the label is due where it exceeds the gain, not at a minimum that is but a guess."""

    class Unsure(SureEmt):
        def posterior_sigma(self, template: Structure, positions: FloatArray) -> FloatArray:
            return np.asarray(20.0 * np.linalg.norm(positions - positions[:1], axis=(1, 2)) ** 2)

    pair, label = _restless(au_pair, "final", label_of)
    way = {
        kind: float(np.linalg.norm(_probe(pair, kind(emt), ends[0], label).candidates[0].structure.positions - place))
        for place in [pair.final.positions]
        for kind in (SureEmt, Unsure)
    }
    assert 0.01 < way[Unsure] < 0.7 * way[SureEmt]


def test_an_end_state_is_given_up_with_a_reason(
    au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label], label_of: Callable[..., Label]
) -> None:
    pair, label = _restless(au_pair, "initial", label_of)
    stiff = _probe(replace(pair, relax=False), surrogate, label, ends[1])
    assert "initial state above 0.05 eV/Å and relax_endpoints is false" in stiff.hopeless
    tired = _probe(pair, surrogate, label, ends[1], end_state_tries=MAX_END_STATE_TRIES)
    assert f"after {MAX_END_STATE_TRIES} relaxations" in tired.hopeless
    (candidate,) = _probe(pair, surrogate, label, ends[1]).candidates
    done = _probe(pair, surrogate, label, ends[1], asked=frozenset([key_of(candidate.structure)]))
    assert "cannot be relaxed further" in done.hopeless


def test_an_end_state_that_falls_into_the_other_is_no_minimum(
    au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label], label_of: Callable[..., Label]
) -> None:
    """Just beyond the saddle it slides down to where the hop began."""
    slope = au_pair.initial.positions + 0.25 * (au_pair.final.positions - au_pair.initial.positions)
    slope[-1, 2] += 0.3
    pair = replace(au_pair, final=au_pair.initial.moved(slope))
    found = _probe(pair, surrogate, ends[0], label_of(pair.final))
    assert found.hopeless == "the final state relaxes into the other one: it is no minimum; give one beyond it"


def test_a_trusted_band_is_gone_on_from(au_pair: EndpointPair, surrogate: SureEmt, ends: tuple[Label, Label]) -> None:
    first = _probe(au_pair, surrogate, *ends)
    assert first.band is not None
    trusted, doubted = (
        _probe(au_pair, surrogate, *ends, previous=_record(au_pair, first, error)).band for error in (0.005, 0.5)
    )
    assert trusted is not None
    assert doubted is not None
    assert trusted.n_steps == 0
    np.testing.assert_array_equal(trusted.positions, first.band.positions)
    assert doubted.n_steps == first.band.n_steps


def test_a_saddle_that_fell_short_can_be_tested_again(
    au_pair: EndpointPair, emt: Any, ends: tuple[Label, Label]
) -> None:
    """Its label was as predicted but, say, its force was not, and the band stays where it is. It must still get a new
    saddle to label: without one the hop could only end with its budget."""

    class Later(SureEmt):
        """After one more label: a little stiffer, the old band still below its force limit."""

        def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
            energies, forces = super().evaluate(template, positions)
            return 1.02 * energies, 1.02 * forces

    first = _probe(au_pair, SureEmt(emt), *ends)
    (saddle,) = first.candidates
    key = key_of(saddle.structure)
    again = _probe(au_pair, Later(emt), *ends, previous=_record(au_pair, first, 0.005, key), asked=frozenset([key]))
    (candidate,) = again.candidates
    assert candidate.kind == "saddle"
    assert key_of(candidate.structure) != key


def test_an_exploding_surrogate_yields_a_guarded_band_and_a_sound_candidate(
    au_pair: EndpointPair, emt: Any, ends: tuple[Label, Label]
) -> None:
    class Hole(SureEmt):
        """EMT with a hole that swallows whatever comes near the middle of the path."""

        def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
            energies, forces = super().evaluate(template, positions)
            return (energies - 100.0 * (np.arange(len(energies)) == 3) * (self.evaluations > 3)), forces

    found = _probe(au_pair, Hole(emt), *ends)
    assert found.band is not None
    assert found.band.status == "guarded"
    assert "below the lower end state" in found.band.reason
    (candidate,) = found.candidates
    assert candidate.kind == "uncertain"


def test_sigmas_of_a_band_are_calibrated(au_pair: EndpointPair, surrogate: SureEmt) -> None:
    start = interpolate(au_pair, SPEC.neb)
    once, thrice = (
        relaxed_band(au_pair, surrogate, replace(SPEC, calibration=Calibration(factor=f)), start)[0] for f in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice.sigma_ev[1:] / once.sigma_ev[1:], 3.0, rtol=0.02)
    np.testing.assert_array_equal(thrice.sigma_posterior_ev, once.sigma_posterior_ev)


class Sinking(SureEmt):
    """Pulls the hopping atom down into the surface, where no label is good."""

    def evaluate(self, template: Structure, positions: FloatArray) -> tuple[FloatArray, FloatArray]:
        energies, forces = super().evaluate(template, positions)
        depth = positions[:, -1, 2] - template.positions[-1, 2]
        forces = forces.copy()
        forces[:, -1, 2] -= 20.0
        return energies + 20.0 * depth, forces


@pytest.mark.parametrize(
    ("strategy", "kind", "factor"), [("saddle+uncertainty", "saddle", 2.0), ("uncertainty", "uncertain", 5.0)]
)
def test_what_is_asked_as_uncertain_has_a_factor_of_its_own(
    au_pair: EndpointPair,
    surrogate: SureEmt,
    ends: tuple[Label, Label],
    strategy: Any,
    kind: str,
    factor: float,
) -> None:
    spec = replace(SPEC, select=SelectSpec(strategy=strategy), calibration=Calibration(factor=2.0, astray=5.0))
    (candidate,) = _probe(au_pair, surrogate, *ends, spec=spec).candidates
    assert candidate.kind == kind
    assert candidate.sigma_ev == pytest.approx(np.hypot(factor * candidate.sigma_posterior_ev, 1e-3), rel=1e-6)


def test_a_place_that_brings_no_label_is_left_for_one_nearer_the_start(
    au_pair: EndpointPair, emt: Any, ends: tuple[Label, Label]
) -> None:
    """The surrogate learns nothing from failures, so its band comes out the same each time; what is asked must not."""
    failed: set[str] = set()
    heights = []
    for _ in range(6):
        found = _probe(au_pair, Sinking(emt), *ends, asked=frozenset(failed), failed=frozenset(failed))
        (candidate,) = found.candidates
        assert key_of(candidate.structure) not in failed
        failed.add(key_of(candidate.structure))
        heights.append(float(candidate.structure.positions[-1, 2]))
    start = float(au_pair.initial.positions[-1, 2])
    assert heights[0] < start - 0.05
    assert abs(heights[1] - heights[0]) < 0.02  # first beside it: perhaps it was bad luck
    assert all(np.diff(heights[1:]) > 0.01) or heights[-1] > start - 0.02
    assert heights[-1] > heights[0] + 0.8 * (start - heights[0])


def test_the_way_back_ends_where_it_began() -> None:
    structure = Structure.from_atoms(Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 1.0]]))
    home = np.array([[0, 0, 0], [0, 0, 2.5]])
    places: list[FloatArray] = []

    def spoiled(place: Structure) -> bool:
        places.append(place.positions)
        return len(places) < 9

    beside(structure, spoiled, home)
    gaps = [place[1, 2] - place[0, 2] for place in places]
    np.testing.assert_allclose(gaps[:5], [1.0, 1.0, 1.75, 2.5, 2.5], atol=0.02)
    assert len({place.tobytes() for place in places}) == len(places)
