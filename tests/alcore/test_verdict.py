"""What follows from a generation's labels: which are believed, which are a test, and when a hop is given up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from loop_bench import SPEC, Bench

from alcore.identity import label_key
from alcore.loop import begin
from alcore.probe import Probe
from alcore.state import LoopState, Workshop
from alcore.types import Candidate, EndpointPair, GenerationRecord, Label, LabelRequest, PathRecord, Residual
from alcore.verdict import MAX_FRUITLESS, measure

LabelOf = Callable[..., Label]


@pytest.fixture
def shop(bench: Callable[..., Bench]) -> Workshop:
    return bench().shop()


@pytest.fixture
def fresh(shop: Workshop, au_pair: EndpointPair) -> LoopState:
    return begin([au_pair], SPEC, shop)


def _shaken(pair: EndpointPair, label_of: LabelOf, n: int) -> list[Label]:
    rng = np.random.default_rng(0)
    shakes = rng.normal(scale=0.02, size=(n, *pair.initial.positions.shape))
    return [label_of(pair.initial.moved(pair.initial.positions + shake)) for shake in shakes]


def _derived(label: Label, source: str, by_ev: float = 0.0) -> Label:
    return replace(label, energy_ev=(label.energy_ev or 0.0) + by_ev, details={"equivalent_to": source})


@pytest.mark.parametrize("n_liars", [1, 4])
def test_images_of_a_label_this_run_never_asked_for_are_vetted_and_are_one_witness(
    fresh: LoopState, shop: Workshop, au_pair: EndpointPair, label_of: LabelOf, n_liars: int
) -> None:
    """However many they are: all follow from one calculation."""
    labels = _shaken(au_pair, label_of, 2 + n_liars)
    good, bad = labels[:2], [_derived(label, "f" * 64, 1000.0) for label in labels[2:]]
    asked = {label.key: ("uncertain", label) for label in (*bad, *good)}
    state, _ = measure(replace(fresh, pairs={}, asked=asked), {}, [], {}, SPEC, shop)
    assert set(state.doubts) == {label.key for label in bad}
    assert {label.key for label in state.dataset.labels} == {label.key for label in good}


def test_an_image_is_a_test_unless_what_it_follows_from_is_known(
    fresh: LoopState, au_pair: EndpointPair, label_of: LabelOf
) -> None:
    first, second = _shaken(au_pair, label_of, 2)
    residual = Residual(
        key=second.key,
        path="hop",
        kind="saddle",
        generation=1,
        predicted_ev=0.4,
        labelled_ev=0.4,
        sigma_committee_ev=0.0,
        sigma_posterior_ev=0.01,
        sigma_ev=0.01,
        fmax_ev_per_ang=0.01,
    )
    for label, kept in ((second, True), (_derived(second, "f" * 64), True), (_derived(second, first.key), False)):
        state = replace(fresh, asked={one.key: ("saddle", one) for one in (first, label)})
        assert bool(state.independent([residual])) is kept


def _after(
    fresh: LoopState, shop: Workshop, pair: EndpointPair, labels: Sequence[Label | None]
) -> tuple[LoopState, PathRecord]:
    """The state and the hop's record after generations that brought these labels, None where the hop had to wait."""
    state = fresh
    for label in labels:
        wanted = pair.final if label is None else label.structure
        asked = Candidate(path="hop", kind="uncertain", image=1, structure=wanted)
        answers = {} if label is None else {label.key: label}
        requests = [LabelRequest(key=key, candidate=asked, generation=len(state.records)) for key in answers]
        state, (record,) = measure(state, {"hop": Probe(candidates=(asked,))}, requests, answers, SPEC, shop)
        known = GenerationRecord(run="au", index=len(state.records), paths=(record,))
        state = replace(state, records=(*state.records, known))
    return state, record


@pytest.mark.parametrize("waits", [False, True])
def test_labels_that_keep_failing_end_a_hop_that_has_to_wait_for_its_turns_too(
    fresh: LoopState, shop: Workshop, au_pair: EndpointPair, label_of: LabelOf, waits: bool
) -> None:
    failed = [
        replace(label, status="crashed", energy_ev=None, forces=None, reason="exit 1")
        for label in _shaken(au_pair, label_of, MAX_FRUITLESS)
    ]
    turns: list[Any] = [entry for label in failed for entry in ((None, label) if waits else (label,))]
    state, record = _after(fresh, shop, au_pair, turns[:-1])
    assert record.decision.code == "continue"
    _, record = _after(state, shop, au_pair, turns[-1:])
    assert record.decision.code == "labels_failing"
    assert record.decision.reason == "5 generations without a good label; last: crashed, exit 1"
    good = label_of(au_pair.initial)
    assert good.key == label_key(au_pair.initial, "emt-in-process")
    _, record = _after(state, shop, au_pair, [good, turns[-1]])
    assert record.decision.code == "continue"
