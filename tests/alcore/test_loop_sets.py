"""The loop on hops that share things: end states, a surrogate, turns, and labels that follow by symmetry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loop_bench import AU_BARRIER_EV, BARRIER_EV, EVERY_CALL, SPEC, Bench, assert_counted_honestly, barrier_of

from alcore.endpoints import relax_end_state
from alcore.errors import InputError
from alcore.identity import label_key
from alcore.loop import begin
from alcore.probe import Probe, probe_path
from alcore.selection import SelectSpec
from alcore.state import LoopState
from alcore.stopping import StopSpec
from alcore.types import Decision, EndpointPair, Label, PathRecord


@pytest.mark.slow
def test_two_hops_share_one_model_and_their_common_end_state(
    bench: Callable[..., Bench], two_hops: tuple[EndpointPair, EndpointPair]
) -> None:
    place = bench()
    state = place.run(*two_hops)
    assert state.decision.code == "converged", state.decision.reason
    for name in ("hop", "across"):
        assert barrier_of(state, name) == pytest.approx(AU_BARRIER_EV, abs=BARRIER_EV)
    assert [p.path for p in state.records[-1].paths] == ["hop", "across"]
    assert state.records[0].n_reference_calls == 1, "all three end states are images of one"
    asked = [[p.path for p in record.paths if p.label_keys] for record in state.records[1:]]
    assert all(len(names) == 1 for names in asked), "one hop at a time"
    assert {name for names in asked for name in names} == {"hop", "across"}
    assert_counted_honestly(state, place)


def test_the_image_of_a_labelled_end_state_costs_no_call(
    finished: tuple[LoopState, Bench], bench: Callable[..., Bench], au_pair: EndpointPair, label_of: Any
) -> None:
    """The final state follows from the initial one, two layers of the slab fixed, and is what the reference says."""
    state, _ = finished
    record = state.last("hop")
    assert record is not None
    (derived,) = [label for label in state.labels.values() if label.derived_from]
    assert (derived.key, derived.derived_from) == (record.final_label, record.initial_label)
    real = label_of(derived.structure)
    assert derived.energy_ev == pytest.approx(real.energy_ev, abs=1e-6)
    np.testing.assert_allclose(derived.forces, real.forces, atol=1e-5)
    assert state.records[-1].n_labels_reused == 0
    assert "final" not in state.records[-1].calls_by_kind


def test_an_image_is_no_witness_for_a_label_that_lies(bench: Callable[..., Bench], au_pair: EndpointPair) -> None:
    """Initial and derived final state are one answer, not two: the saddle's label alone can put it in doubt."""
    liar = label_key(au_pair.initial, "emt-in-process")

    def spoil(call: int, label: Label) -> Label:
        return replace(label, energy_ev=(label.energy_ev or 0.0) + 1000.0) if label.key == liar else label

    place = bench(spoil=spoil)
    state = place.run(au_pair)
    derived = {label.key for _, label in state.asked.values() if label.derived_from == liar}
    assert derived
    assert {liar, *derived} <= set(state.doubts)
    assert not {liar, *derived} & {label.key for label in state.dataset.labels}
    assert state.decision.code == "converged", state.decision.reason
    assert_counted_honestly(state, place)


ENDS_ONLY = StopSpec(max_generations=0)


def test_another_run_takes_derived_labels_from_the_store_unless_told_not_to(
    bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    """What it then computes replaces what was derived: no later process of either run takes the image for the truth,
    and none pays for it again."""
    first, final = bench(), label_key(au_pair.final, "emt-in-process")
    first.run(au_pair, spec=replace(SPEC, stop=ENDS_ONLY))
    assert first.store.load_labels([final])[final].derived_from
    for spec, calls in ((SPEC, []), (EVERY_CALL, [final])):
        told = replace(spec, run=f"ends {len(calls)}", stop=ENDS_ONLY)
        place = replace(bench(), store=first.store)
        state = place.run(au_pair, spec=told)
        assert place.labeler.calls == calls
        assert state.records[-1].n_labels_reused == 1
        assert bool(state.labels[final].derived_from) is not bool(calls)
        resumed = begin([au_pair], told, place.shop())
        assert resumed.labels[final].details == state.labels[final].details
    assert first.store.load_labels([final])[final].details["computed_by"] == "ends 1"
    first.store.save_label(replace(state.labels[final], details={"equivalent_to": "another"}))
    assert not first.store.load_labels([final])[final].derived_from


def test_labels_of_another_level_of_theory_give_no_images(
    bench: Callable[..., Bench], au_pair: EndpointPair, label_of: Callable[..., Label]
) -> None:
    """The end states are images of the label that was brought along, and yet are computed; then the levels meet."""
    place = bench()
    with pytest.raises(InputError, match="two levels of theory"):
        place.run(au_pair, given=(label_of(au_pair.final, "of another code"),))
    assert place.labeler.calls == [label_key(au_pair.initial, "emt-in-process")]


@pytest.fixture(scope="module")
def two_hops(au_pair: EndpointPair, emt: Any) -> tuple[EndpointPair, EndpointPair]:
    """The second goes along the other side of the square cell: the same barrier by symmetry."""
    moved = au_pair.initial.positions.copy()
    moved[-1, 1] += 0.5 * au_pair.initial.cell[1, 1]
    target = relax_end_state(emt, au_pair.initial.moved(moved), 0.01)
    assert target.status == "converged"
    return au_pair, replace(au_pair, name="across", final=au_pair.initial.moved(target.positions[0]))


def _asked(state: LoopState) -> list[list[str]]:
    return [[p.path for p in record.paths if p.label_keys] for record in state.records]


def test_generations_are_counted_by_hop(
    bench: Callable[..., Bench], two_hops: tuple[EndpointPair, EndpointPair]
) -> None:
    """Each hop has one turn of its own, whoever waits; and may have another when the limit is raised."""
    place, one = bench(), StopSpec(max_labels=30, max_generations=1)
    state = place.run(*two_hops, spec=replace(SPEC, stop=one))
    first, *turns = _asked(state)
    assert first == ["hop", "across"]
    assert sorted(turns) == [["across"], ["hop"]]
    assert state.decision.code == "generation_budget"
    for path in state.records[-1].paths:
        assert path.decision.code == "generation_budget"
        assert path.decision.reason.startswith("1 generations after the end states (limit 1): ")
    assert len(place.run(*two_hops, spec=replace(SPEC, stop=one)).records) == 3
    more = place.run(*two_hops, spec=replace(SPEC, stop=replace(one, max_generations=2)))
    assert len(more.records) > 3
    assert_counted_honestly(more, place)


def test_hops_of_an_older_run_that_spent_their_generations_are_not_asked_again(
    bench: Callable[..., Bench], au_pair: EndpointPair
) -> None:
    """Its hops were open and the run as a whole was stopped."""
    place, spec = bench(), replace(SPEC, stop=ENDS_ONLY)
    state = place.run(au_pair, spec=spec)
    (path,) = state.records[-1].paths
    older = replace(
        state.records[-1],
        paths=(replace(path, decision=Decision(stop=False, code="continue", reason="not yet")),),
        decision=Decision(stop=True, code="generation_budget", reason="0 generations after the end states (limit 0)"),
    )
    place.store.save_generation(older)
    again = place.run(au_pair, spec=spec)
    assert (len(again.records), again.decision.code) == (1, "generation_budget")
    assert len(place.run(au_pair, spec=replace(spec, stop=StopSpec(max_generations=1))).records) == 2


def test_as_many_hops_ask_at_once_as_may(
    bench: Callable[..., Bench], two_hops: tuple[EndpointPair, EndpointPair]
) -> None:
    both = replace(SPEC, select=SelectSpec(hops_per_generation=2), stop=StopSpec(max_labels=30, max_generations=1))
    place = bench()
    state = place.run(*two_hops, spec=both)
    assert _asked(state) == [["hop", "across"], ["hop", "across"]]
    assert state.decision.code == "generation_budget"
    assert_counted_honestly(state, place)


def test_a_hop_that_waited_goes_on_from_its_own_last_test(
    bench: Callable[..., Bench], two_hops: tuple[EndpointPair, EndpointPair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the band it was probed with while it waited, which no label ever met."""
    place, one = bench(), StopSpec(max_labels=30, max_generations=1)
    state = place.run(*two_hops, spec=replace(SPEC, stop=one))
    before: dict[str, PathRecord | None] = {}

    def spy(pair: EndpointPair, *args: Any, previous: PathRecord | None, **kwargs: Any) -> Probe:
        before.setdefault(pair.name, previous)
        return probe_path(pair, *args, previous=previous, **kwargs)

    monkeypatch.setattr("alcore.loop.probe_path", spy)
    place.run(*two_hops, spec=replace(SPEC, stop=replace(one, max_generations=2)))
    for index, (asking,) in enumerate(_asked(state)[1:], start=1):
        tested = next(p for p in state.records[index].paths if p.path == asking)
        assert tested.residuals
        assert (found := before[asking]) is not None
        assert (found.saddle_key, found.label_keys) == (tested.saddle_key, tested.label_keys)
