"""The loop end to end: EMT as the reference, real MACE, the in-memory store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loop_bench import AU_BARRIER_EV, BARRIER_EV, EVERY_CALL, SPEC, Bench, assert_counted_honestly, barrier_of

from alcore.identity import label_key
from alcore.loop import begin, reopened
from alcore.state import LoopState
from alcore.stopping import StopSpec
from alcore.types import EndpointPair, GenerationRecord, Label

CALLS = 15
SAME_EV = 1e-6


def test_au_on_aluminium_converges_from_no_prior(finished: tuple[LoopState, Bench]) -> None:
    state, place = finished
    assert state.decision.code == "converged", state.decision.reason
    assert barrier_of(state) == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    assert_counted_honestly(state, place)
    assert state.records[-1].n_reference_calls <= CALLS


def test_converged_means_what_it_says(finished: tuple[LoopState, Bench], emt: Any) -> None:
    """Everything the interface promises, from the reference itself."""
    record = finished[0].last("hop")
    assert record is not None
    assert record.band is not None
    assert record.barrier is not None
    saddle = record.band.structure(record.barrier.saddle_image)
    energies, forces = emt.evaluate(
        saddle, np.array([record.initial.positions, saddle.positions, record.final.positions])
    )
    assert record.verified_barrier_ev == pytest.approx(energies[1] - energies[0], abs=1e-9)
    assert max(saddle.free_fmax(f) for f in forces) < SPEC.stop.saddle_fmax_ev_per_ang
    (residual,) = [r for r in record.residuals if r.key == record.saddle_key]
    assert abs(residual.error_ev) <= SPEC.stop.barrier_tolerance_ev
    assert record.barrier.forward_ev - record.verified_barrier_ev == pytest.approx(residual.error_ev, abs=1e-9)
    assert record.barrier_std_ev is not None
    assert record.barrier_std_ev <= SPEC.stop.barrier_tolerance_ev
    assert record.error_to_reference_ev == pytest.approx(record.verified_barrier_ev - AU_BARRIER_EV)


def test_predictions_are_made_before_their_label_is_learned(finished: tuple[LoopState, Bench]) -> None:
    state, _ = finished
    for before, record in zip(state.records, state.records[1:], strict=False):
        for path in record.paths:
            assert not {r.key for r in path.residuals} & set(before.label_keys)
            assert {r.key for r in path.residuals} <= set(record.label_keys)
    assert len(state.residuals) >= 2


def test_nothing_is_asked_twice(finished: tuple[LoopState, Bench]) -> None:
    calls = finished[1].labeler.calls
    assert len(set(calls)) == len(calls)


def test_the_store_holds_every_generation(finished: tuple[LoopState, Bench]) -> None:
    state, place = finished
    stored = place.store.load_generations("au")
    assert [r.index for r in stored] == [r.index for r in state.records] == list(range(len(stored)))
    assert stored[-1].label_keys == state.records[-1].label_keys
    assert stored[-1].decision == state.records[-1].decision
    assert all(store_label.ok for store_label in place.store.load_labels(stored[-1].label_keys).values())


def test_a_finished_run_comes_back_without_work(finished: tuple[LoopState, Bench], au_pair: EndpointPair) -> None:
    state, place = finished
    calls = len(place.labeler.calls)
    again = place.run(au_pair)
    assert again.decision.code == "converged"
    assert len(again.records) == len(state.records)
    assert len(place.labeler.calls) == calls


class Interrupt(Exception):
    """A process that dies."""


def test_an_interrupted_run_goes_on_as_if_nothing_happened(
    finished: tuple[LoopState, Bench], bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    whole, _ = finished
    place = bench()
    stop_at = len(whole.records) // 2 + 1

    def die(record: GenerationRecord, labels: Mapping[str, Label]) -> None:
        if record.index == stop_at:
            raise Interrupt

    with pytest.raises(Interrupt):
        place.run(au_pair, on_generation=die)
    resumed = place.run(au_pair)
    assert [r.label_keys for r in resumed.records] == [r.label_keys for r in whole.records]
    assert barrier_of(resumed) == pytest.approx(barrier_of(whole), abs=SAME_EV)
    assert resumed.records[-1].n_reference_calls == whole.records[-1].n_reference_calls
    assert resumed.records[-1].calls_by_kind == whole.records[-1].calls_by_kind
    assert len(place.labeler.calls) == whole.records[-1].n_reference_calls


def test_a_second_run_reuses_labels_instead_of_computing_them(
    finished: tuple[LoopState, Bench], au_pair: EndpointPair
) -> None:
    state, place = finished
    calls = len(place.labeler.calls)
    other = place.run(au_pair, spec=replace(SPEC, run="again", stop=StopSpec(max_labels=30, max_generations=2)))
    assert len(place.labeler.calls) == calls
    assert other.records[-1].n_reference_calls == 0
    assert len(other.labels) == 4
    assert other.records[-1].n_labels_reused == 3, "the final state's was not computed"
    assert other.records[-1].label_keys == state.records[2].label_keys


def test_failed_labels_are_counted_and_never_learned(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    """One end state crashes at first and is asked again, one saddle comes back as not a number."""

    def spoil(call: int, label: Label) -> Label:
        if call == 2:
            return replace(label, status="crashed", energy_ev=None, forces=None, reason="exit code 1")
        if call == 5:
            return replace(label, status="rejected", energy_ev=None, forces=None, reason="energy is not finite")
        return label

    place = bench(spoil=spoil)
    state = place.run(au_pair)
    assert state.decision.code == "converged", state.decision.reason
    assert barrier_of(state) == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    assert all(label.ok for label in state.dataset.labels)
    bad = place.labeler.calls[4]
    assert bad not in state.records[-1].label_keys
    assert not state.labels[bad].ok
    assert_counted_honestly(state, place)
    assert state.records[-1].calls_by_kind["failed"] == 2


def _faulty(fault: Callable[[Label], Label]) -> Callable[[int, Label], Label]:
    """``fault`` for a quarter of all structures, chosen by their keys, every time they are asked."""
    return lambda call, label: fault(label) if int(label.key[0], 16) < 4 else label


def test_lies_of_a_kev_are_found_out_and_not_learned(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    def lie(label: Label) -> Label:
        assert label.energy_ev is not None
        return replace(label, energy_ev=label.energy_ev + 1000.0)

    place = bench(spoil=_faulty(lie))
    state = place.run(au_pair)
    lied = {key for key, (_, label) in state.asked.items() if int(key[0], 16) < 4 and not label.derived_from}
    assert lied, "the seed gives at least one lie"
    assert state.decision.code == "converged", state.decision.reason
    assert state.records[-1].paths[0].verified_barrier_ev == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    assert lied == set(state.doubts)
    assert lied.isdisjoint(label.key for label in state.dataset.labels)
    assert {state.labels[key].status for key in lied} == {"rejected"}
    assert all("no force there explains" in state.labels[key].reason for key in lied)
    assert place.store.load_generations("au")[-1].doubts == state.doubts


def test_an_end_state_that_lies_is_asked_beside_and_then_believed(
    bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    """With two labels nobody knows which one lies; two more beside them tell."""
    liar = label_key(au_pair.final, "emt-in-process")

    def spoil(call: int, label: Label) -> Label:
        return replace(label, energy_ev=(label.energy_ev or 0.0) + 1000.0) if label.key == liar else label

    state = bench(spoil=spoil).run(au_pair, spec=EVERY_CALL)
    assert len(state.records[0].doubts) == 2, "neither is believed while there are only two"
    assert len(state.records[0].label_keys) == 0
    assert set(state.doubts) == {liar}
    assert state.decision.code == "converged", state.decision.reason
    final = state.pairs["hop"].final
    assert 0 < np.abs(final.positions - au_pair.final.positions).max() < 0.1


def test_an_end_state_that_always_fails_is_asked_beside(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    cursed = label_key(au_pair.initial, "emt-in-process")

    def spoil(call: int, label: Label) -> Label:
        if label.key != cursed:
            return label
        return replace(label, status="crashed", energy_ev=None, forces=None, reason="cursed")

    place = bench(spoil=spoil)
    state = place.run(au_pair)
    assert state.decision.code == "converged", state.decision.reason
    assert place.labeler.calls.count(cursed) == 1


def test_a_calculator_that_always_fails_ends_the_run(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    place = bench(
        spoil=lambda call, label: replace(label, status="unconverged", energy_ev=None, forces=None, reason="no SCF")
    )
    state = place.run(au_pair)
    assert state.decision.code == "labels_failing"
    assert "no SCF" in state.decision.reason
    assert not len(state.dataset)
    assert_counted_honestly(state, place)


def test_budgets_are_kept_and_can_be_raised(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    place = bench()
    few = replace(SPEC, stop=StopSpec(max_labels=3))
    state = place.run(au_pair, spec=few)
    assert state.decision.code == "label_budget"
    assert len(place.labeler.calls) == 3
    again = place.run(au_pair, spec=few)
    assert len(place.labeler.calls) == 3
    assert len(again.records) == len(state.records)
    short = replace(SPEC, stop=StopSpec(max_labels=30, max_generations=3))
    state = place.run(au_pair, spec=short)
    assert state.decision.code == "generation_budget"
    assert state.records[-1].index == 3
    assert_counted_honestly(state, place)


def test_tighter_tolerances_open_a_converged_run_again(
    finished: tuple[LoopState, Bench],
) -> None:
    """What was confirmed to 10 meV must not be called converged to a thousandth of it."""
    state, _ = finished
    tight = replace(SPEC, stop=replace(SPEC.stop, barrier_tolerance_ev=1e-5, max_labels=1))
    assert not reopened(state, tight).decision.stop
    assert reopened(state, SPEC).decision.code == "converged"


def test_given_labels_start_the_data_set_and_cost_nothing(
    finished: tuple[LoopState, Bench], bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    whole, _ = finished
    place = bench()
    given = tuple(replace(label, details={}) for label in whole.dataset.labels[:-1])
    state = place.run(au_pair, given=given)
    assert state.decision.code == "converged", state.decision.reason
    assert_counted_honestly(state, place)
    assert state.records[-1].n_reference_calls < 5
    assert not {label.key for label in given} & set(place.labeler.calls)
    assert barrier_of(state) == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)


def test_given_labels_that_lie_are_not_learned(
    finished: tuple[LoopState, Bench], bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    liar, *honest = finished[0].dataset.labels
    lying = replace(liar, energy_ev=(liar.energy_ev or 0.0) + 1000.0)
    state = begin([au_pair], SPEC, bench().shop(), [lying, *honest])
    assert set(state.doubts) == {liar.key}
    assert {label.key for label in state.dataset.labels} == {label.key for label in honest}


def test_end_states_off_their_minimum_are_relaxed_and_confirmed(
    bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    rng = np.random.default_rng(1)
    off = {}
    for side in ("initial", "final"):
        structure = getattr(au_pair, side)
        shift = np.where(structure.fixed, 0.0, 0.03 * rng.standard_normal(structure.positions.shape))
        off[side] = structure.moved(structure.positions + shift)
    place = bench()
    state = place.run(replace(au_pair, **off))
    assert state.decision.code == "converged", state.decision.reason
    assert barrier_of(state) == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    record = state.last("hop")
    assert record is not None
    for fmax in (record.initial_fmax_ev_per_ang, record.final_fmax_ev_per_ang):
        assert fmax is not None
        assert fmax <= SPEC.stop.saddle_fmax_ev_per_ang
    assert state.records[-1].calls_by_kind["endpoint"] >= 1
    assert_counted_honestly(state, place)


def test_end_states_that_must_not_be_relaxed_are_refused(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    up = au_pair.final.positions.copy()
    up[-1, 2] += 0.3
    place = bench()
    state = place.run(replace(au_pair, final=au_pair.final.moved(up), relax=False))
    assert state.decision.code == "end_state_not_minimum"
    assert "final" in state.decision.reason
    assert len(place.labeler.calls) == 2
