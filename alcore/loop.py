"""The loop: one generation, and generations until a stop rule holds. Written once, over injected steps.

A generation probes each open hop, labels what is worth it, holds every label against what was predicted before,
decides, and only then learns. What it needs from outside comes in a ``Workshop``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from alcore.barrier import count_calls, total_calls
from alcore.dataset import grow
from alcore.errors import StoreError
from alcore.identity import label_key
from alcore.neb import interpolate
from alcore.plain import from_plain
from alcore.probe import Probe, ProbeSpec, probe_path
from alcore.selection import whose_turn
from alcore.spin import path_jumps
from alcore.state import LoopSpec, LoopState, Workshop, good_label
from alcore.steps import Steps
from alcore.stopping import budget, hop_budget, overall, unmet
from alcore.symmetry import derived_label, first_of_its_kind, symmetric_ends
from alcore.types import (
    Dataset,
    Decision,
    EndpointPair,
    GenerationRecord,
    Label,
    LabelRequest,
    PathRecord,
)
from alcore.uncertainty import calibrate
from alcore.verdict import measure
from alcore.vetting import vet

PUT_ASIDE = "look below spool/ in the data folder for what could not be delivered, or begin under another name"


def begin(pairs: Sequence[EndpointPair], spec: LoopSpec, shop: Workshop, given: Sequence[Label] = ()) -> LoopState:
    """The state to start from: empty, or as the store remembers it after the last completed generation.

    Args:
        pairs: the hops as the run file gives them.
        spec: the loop's settings.
        shop: what to work with.
        given: labels the user brought along; they start the data set and count as no call.

    Raises:
        StoreError: something of the run is missing in the store.
    """
    bands = {pair.name: interpolate(pair, spec.neb) for pair in pairs}
    samples = [pair.initial.moved(place) for pair in pairs for place in bands[pair.name]]
    doubts = vet([label for label in given if label.ok])
    fresh = LoopState(
        pairs={pair.name: pair for pair in pairs},
        asked={label.key: ("data", replace(label, reused=True)) for label in given},
        doubts=doubts,
        dataset=grow(Dataset(), [label for label in given if label.key not in doubts]),
        surrogate=shop.trainer.start(samples, [state for pair in pairs for state in (pair.initial, pair.final)]),
    )
    for label in given:
        shop.store.save_label(label, spec.run)
    records = shop.store.load_generations(spec.run)
    if [record.index for record in records] != list(range(len(records))):
        known = ", ".join(str(record.index) for record in records)
        raise StoreError(f"a generation is missing: there are {known}", where=f"run '{spec.run}'", mend=PUT_ASIDE)
    if not records:
        return replace(fresh, surrogate=shop.trainer.finish(fresh.surrogate, {}, fresh.dataset, ()))
    return _resumed(fresh, tuple(records), shop, spec.run)


def _resumed(fresh: LoopState, records: tuple[GenerationRecord, ...], shop: Workshop, run: str) -> LoopState:
    last = records[-1]
    kinds = {key: kind for record in records for key, kind in record.kinds.items()}
    keys = list(dict.fromkeys([*last.label_keys, *kinds]))
    stored = {key: _owned(label, run) for key, label in shop.store.load_labels(keys).items()}
    if missing := [key for key in last.label_keys if key not in stored]:
        told = f"{len(missing)} labels of generation {last.index} are missing, the first is {missing[0][:12]}"
        raise StoreError(told, where=f"run '{run}'", mend=PUT_ASIDE)
    asked = {key: (kinds.get(key, "data"), stored[key]) for key in keys if key in stored}
    dataset = grow(Dataset(), [stored[key] for key in last.label_keys])
    pairs = {
        p.path: replace(fresh.pairs[p.path], initial=p.initial, final=p.final)
        for p in last.paths
        if p.path in fresh.pairs
    }
    state = replace(
        fresh,
        pairs=pairs,
        records=records,
        asked={**fresh.asked, **asked},
        doubts=dict(last.doubts),
        dataset=dataset,
    )
    surrogate = shop.trainer.restore(fresh.surrogate, last, dataset, state.residuals)
    shop.log(f"goes on after generation {last.index} with {len(dataset)} labels")
    return replace(state, surrogate=surrogate)


def run_loop(state: LoopState, spec: LoopSpec, shop: Workshop) -> LoopState:
    """Generations until every hop is settled or the budget is spent; a state that is already settled comes back as it
    is, unless the budget was raised or the tolerances were tightened since."""
    state = reopened(state, spec)
    while True:
        done = state.decision
        if done.stop and not (done.code in ("label_budget", "generation_budget") and _can_go_on(state, spec)):
            return state
        state = run_generation(state, spec, shop)


def reopened(state: LoopState, spec: LoopSpec) -> LoopState:
    """Hops that converged by looser tolerances than today's, or had spent a smaller budget, are open again; those that
    spent more than today's are not."""
    if not state.records:
        return state
    paths = []
    for settled in state.records[-1].paths:
        decision = settled.decision
        spent = hop_budget([p for r in state.records for p in r.paths if p.path == settled.path], spec.stop)
        if decision.code == "converged":
            missing = unmet(state.last_tested(settled.path) or settled, spec.stop)
            decision = Decision(stop=False, code="continue", reason="; ".join(missing)) if missing else decision
        elif decision.code == "generation_budget" and spent is None:
            decision = Decision(stop=False, code="continue", reason="more generations are allowed now")
        elif decision.code == "continue" and spent is not None:
            decision = spent
        paths.append(settled if decision is settled.decision else replace(settled, decision=decision))
    if all(new is old for new, old in zip(paths, state.records[-1].paths, strict=True)):
        return state
    last = replace(state.records[-1], paths=tuple(paths), decision=overall(paths, None))
    return replace(state, records=(*state.records[:-1], last))


def _can_go_on(state: LoopState, spec: LoopSpec) -> bool:
    """Whether labels are left, and a hop to ask for them."""
    last = state.records[-1]
    return budget(last.n_reference_calls, spec.stop) is None and not all(p.decision.stop for p in last.paths)


def run_generation(state: LoopState, spec: LoopSpec, shop: Workshop) -> LoopState:
    """One turn: probe, select, label, measure, decide, learn, record."""
    index = len(state.records)
    seconds: dict[str, float] = {}
    with shop.runner.generation(index):
        open_paths = [name for name in state.pairs if not ((last := state.last(name)) and last.decision.stop)]
        with _timed(seconds, "probe"):
            probe_spec = ProbeSpec(
                neb=spec.neb,
                select=spec.select,
                end_state_fmax_ev_per_ang=spec.stop.saddle_fmax_ev_per_ang,
                calibration=calibrate(state.residuals, state.surrogate.elsewhere),
            )
            probed = Steps(shop, spec.run, index).remembered(
                "probe",
                open_paths,
                lambda name: _symmetric(_probe(name, state, probe_spec, shop), state.pairs[name], spec, shop),
                inputs={
                    "spec": probe_spec,
                    "learned": state.surrogate.describe(),
                    "hops": [state.pairs[name] for name in open_paths],
                    "calculator": shop.labeler.fingerprint,
                },
                unpack=partial(from_plain, Probe),
            )
        probes = dict(zip(open_paths, probed, strict=True))
        with _timed(seconds, "label"):
            requests = _requests(probes, state, spec, shop, index)
            labels = _obtain(requests, state, spec, shop)
        with _timed(seconds, "measure"):
            state, paths = measure(state, probes, requests, labels, spec, shop)
        labels = state.labels
        answered = [(r.candidate.kind, labels[r.key]) for r in requests]
        calls = count_calls(state.records[-1].calls_by_kind if state.records else {}, answered)
        n_calls = total_calls(calls)
        decision = overall(paths, budget(n_calls, spec.stop))
        with _timed(seconds, "train"):
            state = _learn(state, paths, Steps(shop, spec.run, index)) if not decision.stop else state
        record = GenerationRecord(
            run=spec.run,
            index=index,
            paths=tuple(paths),
            label_keys=tuple(label.key for label in state.dataset.labels),
            kinds={key: kind for key, (kind, _) in state.asked.items()},
            n_reference_calls=n_calls,
            n_labels_reused=sum(label.reused for _, label in state.asked.values()),
            calls_by_kind=calls,
            doubts=dict(state.doubts),
            calibration=calibrate(
                [*state.residuals, *state.independent(r for p in paths for r in p.residuals)], state.surrogate.elsewhere
            ),
            surrogate=state.surrogate.describe(),
            seconds=seconds,
            sitting=spec.sitting,
            decision=decision,
        )
        shop.runner.map("record", index, [spec.run], lambda _: _record(record, shop))
    _warn_of_spin(record, state, shop)
    shop.on_generation(record, state.labels)
    return replace(state, records=(*state.records, record))


def _warn_of_spin(record: GenerationRecord, state: LoopState, shop: Workshop) -> None:
    """Spin states that jump along a band, said as soon as a new label shows them."""
    labels = state.labels
    for path in record.paths:
        keys = [*state.keys_of(path.path), *path.label_keys]
        for jump in path_jumps(path.band, keys, labels):
            if {jump.before, jump.after} & set(path.label_keys):
                shop.log(f"{path.path}: {jump}")


def _probe(name: str, state: LoopState, spec: ProbeSpec, shop: Workshop) -> Probe:
    last, labels = state.last(name), state.labels
    initial, final = (good_label(labels, key) for key in ((last.initial_label, last.final_label) if last else ("", "")))
    tries = sum(state.asked[key][0] == "endpoint" for key in state.keys_of(name))
    return probe_path(
        state.pairs[name],
        state.surrogate,
        spec,
        initial=initial,
        final=final,
        previous=state.last_tested(name),
        end_state_tries=tries,
        key_of=lambda structure: label_key(structure, shop.labeler.fingerprint),
        asked=state.asked.keys(),
        failed={key for key, label in labels.items() if not label.ok},
    )


def _requests(
    probes: Mapping[str, Probe], state: LoopState, spec: LoopSpec, shop: Workshop, index: int
) -> list[LabelRequest]:
    """Candidates of the end states, and of the hops whose turn it is, as requests: the same geometry once, cut to what
    the budget allows."""
    left = spec.stop.max_labels - (state.records[-1].n_reference_calls if state.records else 0)
    waiting = {name: probe.barrier.sigma_ev for name, probe in probes.items() if probe.barrier and probe.candidates}
    turn = whose_turn(waiting, spec.select)
    if len(turn) < len(waiting):
        least = ", ".join(f"{name} (± {1e3 * waiting[name]:.0f} meV)" for name in turn)
        shop.log(f"labels {least}, the least certain of {len(waiting)} hops")
    requests: dict[str, LabelRequest] = {}
    for name, probe in probes.items():
        for candidate in probe.candidates if name in turn or name not in waiting else ():
            key = label_key(candidate.structure, shop.labeler.fingerprint)
            requests.setdefault(key, LabelRequest(key=key, candidate=candidate, generation=index))
    return list(requests.values())[: max(left, 0)]


def _record(record: GenerationRecord, shop: Workshop) -> None:
    """Once it is stored, its steps are needed no more."""
    shop.store.save_generation(record)
    shop.store.forget_steps(record.run, record.index)


def _symmetric(probe: Probe, pair: EndpointPair, spec: LoopSpec, shop: Workshop) -> Probe:
    """End states that are nearly images of each other made exact ones, so that one label serves both."""
    if not spec.neb.symmetry:
        return probe
    candidates, said = symmetric_ends(probe.candidates, pair)
    if said:
        shop.log(f"{pair.name}: {said}")
    return replace(probe, candidates=candidates)


def _obtain(requests: Sequence[LabelRequest], state: LoopState, spec: LoopSpec, shop: Workshop) -> dict[str, Label]:
    """A label for every request: from the store where it is good, else by symmetry from one that is known, else from
    the reference; and then stored at once.

    One that failed is asked for again, but not where this very generation had asked for it before it was interrupted.
    """
    by_key = {request.key: request for request in requests}
    index, run, symmetry = len(state.records), spec.run, spec.neb.symmetry
    mine = {"computed_by": run, "generation": index}
    known = {
        key: _owned(label, run)
        for key, label in shop.store.load_labels(list(by_key)).items()
        if (label.ok and (symmetry or not label.derived_from)) or mine.items() <= label.details.items()
    }
    for label in known.values():
        shop.store.save_label(label, run)

    def derived(keys: Sequence[str], sources: Sequence[Label]) -> dict[str, Label]:
        found = {key: derived_label(by_key[key].candidate.structure, sources) for key in keys}
        images = {k: replace(v, details={**v.details, **mine}) for k, v in found.items() if v is not None}
        for key, label in images.items():
            shop.store.save_label(label, run)
            shop.log(f"label {key[:6]} follows by symmetry from {label.derived_from[:6]}: no reference call")
        return images

    def work(key: str) -> Label:
        with shop.claims.claim(key, computed=not symmetry) as others:
            if others is not None:
                shop.store.save_label(others, run)
                return _owned(others, run)
            (label,) = shop.labeler.label([by_key[key]])
            label = replace(label, details={**label.details, **mine})
            shop.store.save_label(label, run)
        if not label.ok:
            place = f", files in {label.folder}" if label.folder else ""
            shop.log(
                f"label of {by_key[key].candidate.path} ({by_key[key].candidate.kind}) is {label.status}: "
                f"{label.reason}{place}"
            )
        return label

    before = [*state.labels.values(), *known.values()]
    sources = [label for label in before if label.fingerprint == shop.labeler.fingerprint]
    while missing := [key for key in by_key if key not in known]:
        if symmetry:
            known |= derived(missing, sources)
            missing = [key for key in missing if key not in known]
            leaders = first_of_its_kind([by_key[key].candidate.structure for key in missing])
            missing = [missing[k] for k in dict.fromkeys(leaders)]
        # once these are there, their images follow; those of one that failed are computed after all
        fresh = shop.runner.map("label", index, missing, work) if missing else []
        known |= dict(zip(missing, fresh, strict=True))
        sources = fresh
    return {key: known[key] for key in by_key}


def _owned(label: Label, run: str) -> Label:
    """A stored label counts as reused unless this very run had computed it before it was interrupted, or it is one that
    nobody computed."""
    return replace(label, reused=not label.derived_from and label.details.get("computed_by") != run)


def _learn(state: LoopState, paths: Sequence[PathRecord], steps: Steps) -> LoopState:
    """Fine-tunes the members that are due, and lets the better surface lead."""
    trainer = steps.shop.trainer
    due = trainer.due(state.surrogate, state.dataset)
    if not due:
        return state
    trained = steps.remembered(
        "train",
        due,
        lambda name: trainer.train_member(name, state.surrogate, state.dataset, steps.index),
        inputs={"labels": [label.key for label in state.dataset.labels], "before": state.surrogate.describe()},
        pack=trainer.pack_member,
        unpack=trainer.unpack_member,
    )
    residuals = [*state.residuals, *state.independent(r for p in paths for r in p.residuals)]
    surrogate = trainer.finish(state.surrogate, dict(zip(due, trained, strict=True)), state.dataset, residuals)
    if told := surrogate.describe().get("trained"):
        steps.shop.log(str(told))
    return replace(state, surrogate=surrogate)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - began, 3)
