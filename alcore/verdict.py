"""What a generation's labels say, held against each other and against predictions, and what follows for each hop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from alcore.barrier import held_against, label_fmax, reference_barrier
from alcore.dataset import grow
from alcore.identity import label_key
from alcore.probe import Probe
from alcore.state import LoopSpec, LoopState, Workshop, good_label
from alcore.stopping import decide, hop_budget
from alcore.types import Calibration, Candidate, Dataset, Decision, EndpointPair, Label, LabelRequest, PathRecord
from alcore.uncertainty import calibrate, calibrated, of_lead, relative_sigmas
from alcore.vetting import vet


def measure(
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
    state = _vetted(replace(state, asked=asked), labels, shop)
    labels = state.labels
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
    residuals = [*state.residuals, *state.independent(new)]
    surrogate = shop.trainer.finish(state.surrogate, {}, state.dataset, residuals)
    state = replace(state, pairs=pairs, surrogate=surrogate)
    calibration = calibrate(residuals, surrogate.elsewhere)
    paths = []
    for name in state.pairs:
        if name not in drafts:
            settled = state.last(name)
            assert settled is not None
            paths.append(replace(settled, label_keys=(), residuals=()))
            continue
        record = _with_std(drafts[name], surrogate, calibration, spec.stop.barrier_tolerance_ev)
        given_up = _given_up(state, record, probes[name])
        earlier = [p for r in state.records for p in r.paths if p.path == name]
        decision = given_up or decide(record, spec.stop, earlier)
        if not decision.stop:
            spent = hop_budget([*earlier, record], spec.stop)
            decision = replace(spent, reason=f"{spent.reason}: {decision.reason}") if spent else decision
        paths.append(replace(record, decision=decision))
    return state, paths


def _vetted(state: LoopState, new: Mapping[str, Label], shop: Workshop) -> LoopState:
    """All labels held against each other: which are believed may change with every one that comes in."""
    good = [label for _, label in state.asked.values() if label.ok]
    # A derived label stands or falls with the one it was derived from, and is no witness for it. Where this run never
    # asked for that one, the first of its images speaks for it.
    computed = {label.key for label in good if not label.derived_from}
    witnesses: dict[str, Label] = {}
    for label in good:
        if label.derived_from not in computed:
            witnesses.setdefault(label.derived_from or label.key, label)
    told = vet(list(witnesses.values()))
    doubts = {
        label.key: told[witness.key]
        for label in good
        if (witness := witnesses[label.derived_from or label.key]).key in told
    }
    for key in doubts.keys() - state.doubts.keys():
        shop.log(f"label {key[:6]} is not believed: {doubts[key]}")
    settled = {*new, *state.doubts}
    state = replace(state, doubts=doubts)
    believed = state.labels
    for key in settled & believed.keys():
        if believed[key].ok:
            shop.labeler.tidy(believed[key])
    known = [believed[label.key] for label in state.dataset.labels]
    return replace(state, dataset=grow(Dataset(), [*known, *believed.values()]))


def _draft(
    pair: EndpointPair, probe: Probe, answered: Sequence[tuple[Candidate, Label]], state: LoopState, index: int
) -> tuple[PathRecord, EndpointPair]:
    """The hop's record before anything is decided, and its end states (moved where a relaxed one was labelled)."""
    last = state.last(pair.name)
    known = dict(state.labels)
    before_keys = (last.initial_label, last.final_label) if last else ("", "")
    ends = {
        side: key if good_label(known, key) else "" for side, key in zip(("initial", "final"), before_keys, strict=True)
    }
    structures = {"initial": pair.initial, "final": pair.final}
    for candidate, label in answered:
        known[label.key] = label
        if candidate.kind in ("initial", "final", "endpoint") and label.ok:
            side = "initial" if candidate.image == 0 else "final"
            if _calmer(label, known.get(ends[side])):
                ends[side], structures[side] = label.key, label.structure
    initial, final = known.get(ends["initial"]), known.get(ends["final"])
    before = good_label(known, before_keys[0]) or initial
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
    asking = [p for p in (*earlier, record) if p.label_keys]  # a hop may have to wait for its turn
    labels = state.labels
    fruitless = [p for p in asking[-MAX_FRUITLESS:] if not any(labels[key].ok for key in p.label_keys)]
    if record.label_keys and len(fruitless) >= MAX_FRUITLESS:
        worst = labels[record.label_keys[0]]
        return Decision(
            stop=True,
            code="labels_failing",
            reason=f"{MAX_FRUITLESS} generations without a good label; last: {worst.status}, {worst.reason}",
        )
    if not record.label_keys and not probe.candidates:
        return Decision(stop=True, code="labels_failing", reason="no image is left that is sound and not labelled")
    return None


MAX_FRUITLESS = 5
"""Generations in which a hop asked, in a row without a single good label, after which it is given up."""
