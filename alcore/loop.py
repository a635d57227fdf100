"""The loop: one generation, and generations until a stop rule holds. Written once, over injected steps.

A generation probes each open hop, labels what is worth it, holds every label against what was predicted before,
decides, and only then learns. What it needs from outside comes in a ``Workshop``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from alcore.barrier import count_calls, held_against, label_fmax, reference_barrier, total_calls
from alcore.dataset import grow
from alcore.identity import label_key
from alcore.neb import NebSpec, interpolate
from alcore.probe import Probe, ProbeSpec, probe_path
from alcore.protocols import Labeler, RecordStore, StepRunner, Trainer
from alcore.selection import SelectSpec
from alcore.stopping import StopSpec, budget, decide, overall, unmet
from alcore.types import (
    Calibration,
    Candidate,
    Dataset,
    Decision,
    EndpointPair,
    GenerationRecord,
    Label,
    LabelRequest,
    PathRecord,
    Residual,
)
from alcore.uncertainty import calibrate, calibrated, of_lead, relative_sigmas


@dataclass(frozen=True, kw_only=True)
class LoopSpec:
    """What the loop is asked to do; sections as in the run file."""

    run: str
    neb: NebSpec = NebSpec()
    select: SelectSpec = SelectSpec()
    stop: StopSpec = StopSpec()


@dataclass(frozen=True, kw_only=True, eq=False)
class Workshop:
    """What the loop works with.

    Attributes:
        labeler: the reference calculator.
        trainer: makes surrogates.
        store: remembers.
        runner: runs the steps (plainly, or as Prefect tasks).
        on_generation: hears of each record once it is stored.
        log: takes lines for a person.
    """

    labeler: Labeler
    trainer: Trainer[Any]
    store: RecordStore
    runner: StepRunner
    on_generation: Callable[[GenerationRecord, Mapping[str, Label]], None] = lambda record, labels: None
    log: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, kw_only=True, eq=False)
class LoopState:
    """Everything a generation starts from.

    Attributes:
        pairs: hops with their end states as they stand, by name.
        records: generations so far.
        asked: kind and label of everything asked for so far, by key.
        dataset: labels learned.
        surrogate: what the trainer made of them.
    """

    pairs: Mapping[str, EndpointPair]
    records: tuple[GenerationRecord, ...] = ()
    asked: Mapping[str, tuple[str, Label]] = field(default_factory=dict)
    dataset: Dataset = Dataset()
    surrogate: Any = None

    @property
    def residuals(self) -> list[Residual]:
        """All residuals so far, in order."""
        return [residual for record in self.records for path in record.paths for residual in path.residuals]

    @property
    def labels(self) -> dict[str, Label]:
        return {key: label for key, (_, label) in self.asked.items()}

    @property
    def decision(self) -> Decision:
        return self.records[-1].decision if self.records else Decision(stop=False, code="continue", reason="")

    def last(self, path: str) -> PathRecord | None:
        """The latest record of a hop."""
        return next((p for p in self.records[-1].paths if p.path == path), None) if self.records else None


def begin(pairs: Sequence[EndpointPair], spec: LoopSpec, shop: Workshop, given: Sequence[Label] = ()) -> LoopState:
    """The state to start from: empty, or as the store remembers it after the last completed generation.

    Args:
        pairs: the hops as the run file gives them.
        spec: the loop's settings.
        shop: what to work with.
        given: labels the user brought along; they start the data set and count as no call.
    """
    bands = {pair.name: interpolate(pair, spec.neb) for pair in pairs}
    samples = [pair.initial.moved(place) for pair in pairs for place in bands[pair.name]]
    fresh = LoopState(
        pairs={pair.name: pair for pair in pairs},
        asked={label.key: ("data", replace(label, reused=True)) for label in given},
        dataset=grow(Dataset(), given),
        surrogate=shop.trainer.start(samples, [state for pair in pairs for state in (pair.initial, pair.final)]),
    )
    for label in given:
        shop.store.save_label(label, spec.run)
    records = shop.store.load_generations(spec.run)
    if not records:
        return replace(fresh, surrogate=shop.trainer.finish(fresh.surrogate, {}, fresh.dataset, ()))
    return _resumed(fresh, tuple(records), shop, spec.run)


def _resumed(fresh: LoopState, records: tuple[GenerationRecord, ...], shop: Workshop, run: str) -> LoopState:
    last = records[-1]
    kinds = {key: kind for record in records for key, kind in record.kinds.items()}
    keys = list(dict.fromkeys([*last.label_keys, *kinds]))
    stored = {key: _owned(label, run) for key, label in shop.store.load_labels(keys).items()}
    asked = {key: (kinds.get(key, "data"), stored[key]) for key in keys if key in stored}
    dataset = grow(Dataset(), [stored[key] for key in last.label_keys])
    pairs = {
        p.path: replace(fresh.pairs[p.path], initial=p.initial, final=p.final)
        for p in last.paths
        if p.path in fresh.pairs
    }
    state = replace(fresh, pairs=pairs, records=records, asked={**fresh.asked, **asked}, dataset=dataset)
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
    """Hops that converged by looser tolerances than today's are open again."""
    if not state.records:
        return state
    paths = []
    for settled in state.records[-1].paths:
        mine = (p for r in reversed(state.records) for p in r.paths if p.path == settled.path and p.residuals)
        missing = unmet(next(mine, settled), spec.stop) if settled.decision.code == "converged" else []
        reopened = Decision(stop=False, code="continue", reason="; ".join(missing))
        paths.append(replace(settled, decision=reopened) if missing else settled)
    if all(new is old for new, old in zip(paths, state.records[-1].paths, strict=True)):
        return state
    last = replace(state.records[-1], paths=tuple(paths), decision=overall(paths, None))
    return replace(state, records=(*state.records[:-1], last))


def _can_go_on(state: LoopState, spec: LoopSpec) -> bool:
    last = state.records[-1]
    return budget(last.n_reference_calls, last.index, spec.stop) is None


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
                calibration=calibrate(state.residuals),
            )
            probed = shop.runner.map("probe", index, open_paths, lambda name: _probe(name, state, probe_spec, shop))
        probes = dict(zip(open_paths, probed, strict=True))
        with _timed(seconds, "label"):
            requests = _requests(probes, state, spec, shop, index)
            labels = _obtain(requests, index, spec.run, shop)
        state, paths = _measure(state, probes, requests, labels, spec, shop)
        answered = [(r.candidate.kind, labels[r.key]) for r in requests]
        calls = count_calls(state.records[-1].calls_by_kind if state.records else {}, answered)
        n_calls = total_calls(calls)
        decision = overall(paths, budget(n_calls, index, spec.stop))
        with _timed(seconds, "train"):
            state = _learn(state, paths, index, shop) if not decision.stop else state
        record = GenerationRecord(
            run=spec.run,
            index=index,
            paths=tuple(paths),
            label_keys=tuple(label.key for label in state.dataset.labels),
            kinds={key: kind for key, (kind, _) in state.asked.items()},
            n_reference_calls=n_calls,
            n_labels_reused=sum(label.reused for _, label in state.asked.values()),
            calls_by_kind=calls,
            calibration=calibrate([*state.residuals, *(r for p in paths for r in p.residuals)]),
            surrogate=state.surrogate.describe(),
            seconds=seconds,
            decision=decision,
        )
        shop.runner.map("record", index, [spec.run], lambda _: shop.store.save_generation(record))
    shop.on_generation(record, state.labels)
    return replace(state, records=(*state.records, record))


def _probe(name: str, state: LoopState, spec: ProbeSpec, shop: Workshop) -> Probe:
    last = state.last(name)
    initial, final = (
        state.labels.get(key) if key else None for key in ((last.initial_label, last.final_label) if last else ("", ""))
    )
    tries = sum(state.asked[key][0] == "endpoint" for key in _path_keys(state, name))
    return probe_path(
        state.pairs[name],
        state.surrogate,
        spec,
        initial=initial,
        final=final,
        previous=last,
        end_state_tries=tries,
        key_of=lambda structure: label_key(structure, shop.labeler.fingerprint),
        asked=state.asked.keys(),
    )


def _path_keys(state: LoopState, name: str) -> list[str]:
    return [
        key
        for record in state.records
        for p in record.paths
        if p.path == name
        for key in p.label_keys
        if key in state.asked
    ]


def _requests(
    probes: Mapping[str, Probe], state: LoopState, spec: LoopSpec, shop: Workshop, index: int
) -> list[LabelRequest]:
    """All candidates as requests, the same geometry once, cut to what the budget allows."""
    left = spec.stop.max_labels - (state.records[-1].n_reference_calls if state.records else 0)
    requests: dict[str, LabelRequest] = {}
    for probe in probes.values():
        for candidate in probe.candidates:
            key = label_key(candidate.structure, shop.labeler.fingerprint)
            requests.setdefault(key, LabelRequest(key=key, candidate=candidate, generation=index))
    return list(requests.values())[: max(left, 0)]


def _obtain(requests: Sequence[LabelRequest], index: int, run: str, shop: Workshop) -> dict[str, Label]:
    """A label for every request: from the store where it is good, else from the reference, and then stored at once."""
    by_key = {request.key: request for request in requests}
    known = {key: _owned(label, run) for key, label in shop.store.load_labels(list(by_key)).items() if label.ok}
    for label in known.values():
        shop.store.save_label(label, run)

    def work(key: str) -> Label:
        (label,) = shop.labeler.label([by_key[key]])
        label = replace(label, details={**label.details, "computed_by": run})
        shop.store.save_label(label, run)
        if not label.ok:
            place = f", files in {label.folder}" if label.folder else ""
            shop.log(
                f"label of {by_key[key].candidate.path} ({by_key[key].candidate.kind}) is {label.status}: "
                f"{label.reason}{place}"
            )
        return label

    missing = [key for key in by_key if key not in known]
    fresh = shop.runner.map("label", index, missing, work) if missing else []
    return {**known, **dict(zip(missing, fresh, strict=True))}


def _owned(label: Label, run: str) -> Label:
    """A stored label counts as reused unless this very run had computed it before it was interrupted."""
    return replace(label, reused=label.details.get("computed_by") != run)


def _measure(
    state: LoopState,
    probes: Mapping[str, Probe],
    requests: Sequence[LabelRequest],
    labels: Mapping[str, Label],
    spec: LoopSpec,
    shop: Workshop,
) -> tuple[LoopState, list[PathRecord]]:
    """Labels against predictions, end states as they now stand, the correction refitted, and each hop's decision."""
    index = len(state.records)
    asked = {**state.asked, **{r.key: (r.candidate.kind, labels[r.key]) for r in requests}}
    dataset = grow(state.dataset, labels.values())
    pairs = dict(state.pairs)
    drafts: dict[str, PathRecord] = {}
    for name, probe in probes.items():
        answered = [
            (c, labels[key])
            for c in probe.candidates
            if (key := label_key(c.structure, shop.labeler.fingerprint)) in labels
        ]
        drafts[name], pairs[name] = _draft(pairs[name], probe, answered, state, index)
    new = [residual for draft in drafts.values() for residual in draft.residuals]
    residuals = [*state.residuals, *new]
    surrogate = shop.trainer.finish(state.surrogate, {}, dataset, residuals)
    state = replace(state, pairs=pairs, asked=asked, dataset=dataset, surrogate=surrogate)
    calibration = calibrate(residuals)
    paths = []
    for name in state.pairs:
        if name not in drafts:
            settled = state.last(name)
            assert settled is not None
            paths.append(replace(settled, label_keys=(), residuals=()))
            continue
        record = _with_std(drafts[name], surrogate, calibration, spec.stop.barrier_tolerance_ev)
        given_up = _given_up(state, record, probes[name])
        paths.append(replace(record, decision=given_up or decide(record, spec.stop)))
    return state, paths


def _draft(
    pair: EndpointPair, probe: Probe, answered: Sequence[tuple[Candidate, Label]], state: LoopState, index: int
) -> tuple[PathRecord, EndpointPair]:
    """The hop's record before anything is decided, and its end states (moved where a relaxed one was labelled)."""
    last = state.last(pair.name)
    known = dict(state.labels)
    ends = {"initial": last.initial_label if last else "", "final": last.final_label if last else ""}
    structures = {"initial": pair.initial, "final": pair.final}
    for candidate, label in answered:
        known[label.key] = label
        if candidate.kind in ("initial", "final", "endpoint") and label.ok:
            side = "initial" if candidate.image == 0 else "final"
            if _calmer(label, known.get(ends[side])):
                ends[side], structures[side] = label.key, label.structure
    initial, final = known.get(ends["initial"]), known.get(ends["final"])
    before = known.get(last.initial_label) if last and last.initial_label else initial
    residuals = [r for c, label in answered if (r := held_against(c, label, before, index)) is not None]
    saddle = next(
        (label for c, label in answered if probe.barrier and c.image == probe.barrier.saddle_image and label.ok), None
    )
    verified = reference_barrier(saddle, initial)
    forward = probe.barrier.forward_ev if probe.barrier else None
    best = verified if verified is not None else forward
    reference = pair.reference_barrier_ev
    moved = replace(pair, initial=structures["initial"], final=structures["final"])
    record = PathRecord(
        path=pair.name,
        initial=moved.initial,
        final=moved.final,
        band=probe.band,
        barrier=probe.barrier,
        label_keys=tuple(label.key for _, label in answered),
        residuals=tuple(residuals),
        initial_label=ends["initial"],
        final_label=ends["final"],
        initial_fmax_ev_per_ang=label_fmax(initial),
        final_fmax_ev_per_ang=label_fmax(final),
        saddle_key=saddle.key if saddle else "",
        verified_barrier_ev=verified,
        saddle_fmax_ev_per_ang=label_fmax(saddle),
        error_to_verified_ev=None if verified is None or forward is None else forward - verified,
        error_to_reference_ev=None if best is None or reference is None else best - reference,
    )
    return record, moved


def _calmer(new: Label, old: Label | None) -> bool:
    """Whether a relaxed end state is better than the one before: lower in energy or in force."""
    if old is None or not old.ok or new.energy_ev is None or old.energy_ev is None:
        return True
    return new.energy_ev < old.energy_ev or (label_fmax(new) or 0.0) < (label_fmax(old) or 0.0)


def _with_std(record: PathRecord, surrogate: Any, calibration: Calibration, tolerance_ev: float) -> PathRecord:
    """The barrier's calibrated uncertainty now that this generation's labels are known to the correction.

    Where the saddle's label refuted the prediction (or there is none), the prediction stays as uncertain as it was, and
    at least as uncertain as it was wrong.
    """
    if record.band is None or record.barrier is None:
        return record
    saddle = next((r for r in record.residuals if r.key == record.saddle_key), None)
    if saddle is None or abs(saddle.error_ev) > tolerance_ev:
        miss = abs(saddle.error_ev) if saddle else 0.0
        return replace(record, barrier_std_ev=max(record.barrier.sigma_ev, miss))
    ends = np.stack([record.band.positions[0], record.band.positions[record.barrier.saddle_image]])
    prediction = surrogate.predict(record.band.template, ends)
    committee, posterior = relative_sigmas(prediction)
    std = calibrated(of_lead(committee, prediction.lead), posterior, calibration)[1]
    return replace(record, barrier_std_ev=float(std))


def _given_up(state: LoopState, record: PathRecord, probe: Probe) -> Decision | None:
    """A hop that cannot go on: an end state that is no minimum, or labels that keep failing."""
    if probe.hopeless:
        return Decision(stop=True, code="end_state_not_minimum", reason=probe.hopeless)
    earlier = [p for r in state.records for p in r.paths if p.path == record.path]
    recent = [*earlier[-(MAX_FRUITLESS - 1) :], record]
    fruitless = [p for p in recent if p.label_keys and not any(state.asked[key][1].ok for key in p.label_keys)]
    if len(fruitless) >= MAX_FRUITLESS:
        worst = state.asked[record.label_keys[0]][1]
        return Decision(
            stop=True,
            code="labels_failing",
            reason=f"{MAX_FRUITLESS} generations without a good label; last: {worst.status}, {worst.reason}",
        )
    if not record.label_keys and not probe.candidates:
        return Decision(stop=True, code="labels_failing", reason="no image is left that is sound and not labelled")
    return None


MAX_FRUITLESS = 3
"""Generations in a row without a single good label after which a hop is given up."""


def _learn(state: LoopState, paths: Sequence[PathRecord], index: int, shop: Workshop) -> LoopState:
    """Fine-tunes the members that are due, and lets the better surface lead."""
    due = shop.trainer.due(state.surrogate, state.dataset)
    if not due:
        return state
    trained = shop.runner.map(
        "train", index, due, lambda name: shop.trainer.train_member(name, state.surrogate, state.dataset, index)
    )
    residuals = [*state.residuals, *(r for p in paths for r in p.residuals)]
    surrogate = shop.trainer.finish(state.surrogate, dict(zip(due, trained, strict=True)), state.dataset, residuals)
    return replace(state, surrogate=surrogate)


@contextmanager
def _timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[step] = round(time.perf_counter() - began, 3)
