"""``barrier.json``: what a run found, how sure it is, what it cost and where it came from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alcore.identity import sha256_hex
from alcore.segments import Segment, segments
from alcore.spin import path_jumps
from alcore.types import Decision, GenerationRecord, Label, PathRecord, RunRecord
from flows.report.frames import LabelledFrame, labelled_frames, last_probed, path_names, path_records
from flows.report.schema import (
    BarrierReport,
    DecisionRow,
    ExtremumRow,
    FailureRow,
    GenerationRow,
    PathResult,
    SegmentRow,
    finite_or_none,
)

_TOP = (
    "barrier_forward_ev",
    "barrier_reverse_ev",
    "reaction_energy_ev",
    "barrier_std_ev",
    "verified_barrier_ev",
    "saddle_reference_fmax_ev_per_ang",
    "neb_fmax_ev_per_ang",
)
"""What a path says that is said of the run too, if it is the only one."""

PRETRAINED_TEACHERS = ("chgnet", "mace")
DEFAULT_TOLERANCE_EV = 0.01
DEFAULT_SADDLE_FMAX_EV_PER_ANG = 0.05


def jsonable(value: Any) -> Any:
    """Plain JSON values: arrays to lists, NaN and infinities to None, anything unknown to its text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    value = finite_or_none(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def section(run: RunRecord, name: str) -> Mapping[str, Any]:
    """A section of the run file, empty if it is missing."""
    values = run.settings.get(name)
    return values if isinstance(values, Mapping) else {}


def tolerances(run: RunRecord) -> tuple[float, float]:
    """Tolerance of the barrier in eV and limit of the reference force on the saddle in eV/Å."""
    stop = section(run, "stop")
    return (
        float(stop.get("barrier_tolerance_ev") or DEFAULT_TOLERANCE_EV),
        float(stop.get("saddle_fmax_ev_per_ang") or DEFAULT_SADDLE_FMAX_EV_PER_ANG),
    )


def known_barrier_ev(run: RunRecord, path: str) -> float | None:
    """The barrier the run file knows from elsewhere."""
    for entry in run.settings.get("paths") or ():
        if isinstance(entry, Mapping) and entry.get("name") == path:
            value = entry.get("reference_barrier_ev")
            return None if value is None else float(value)
    return None


def teacher_of(run: RunRecord, labels: Mapping[str, Label]) -> dict[str, Any]:
    """Where the labels come from, and what a reader must know about it."""
    calculator = section(run, "calculator")
    name = str(calculator.get("name") or next((label.calculator for label in labels.values()), "unknown"))
    label = next((label for label in labels.values() if label.ok), None)
    rehearsal = name in PRETRAINED_TEACHERS
    return {
        "name": name,
        "description": f"{name}, itself a pretrained potential: a rehearsal, not first principles"
        if rehearsal
        else name,
        "settings": jsonable(calculator.get("settings") or {}),
        "fingerprints": sorted({label.fingerprint for label in labels.values()}),
        "details": jsonable(label.details) if label is not None else {},
    }


def prior_of(run: RunRecord, surrogate: Mapping[str, Any]) -> dict[str, Any]:
    """What the surrogate knew before its first label, in words that do not flatter it."""
    model, teacher = section(run, "model"), section(run, "calculator")
    foundation = model.get("foundation")
    if not foundation:
        text = f"untrained MACE, seed {run.settings.get('seed', 0)}: has seen no reference"
    else:
        text = f"foundation model {foundation}, trained elsewhere on other data"
    text = str(surrogate.get("prior_name") or text)
    taught = (teacher.get("settings") or {}).get("model") if teacher.get("name") == "mace" else None
    if foundation and taught is not None and str(taught) == str(foundation):
        text += ", which is also the teacher: this run proves nothing"
    return {
        "description": text,
        "foundation": foundation,
        "sha256": surrogate.get("prior"),
        "strategy": surrogate.get("strategy") or model.get("strategy"),
    }


def _decision(decision: Decision) -> DecisionRow:
    return DecisionRow(stop=decision.stop, code=decision.code, reason=decision.reason)


def _row(generation: GenerationRecord, record: PathRecord | None, n_labels: int, decision: Decision) -> GenerationRow:
    row = GenerationRow(
        index=generation.index,
        n_labels=n_labels,
        n_reference_calls=generation.n_reference_calls,
        dataset_size=len(generation.label_keys),
        seconds=dict(generation.seconds),
        decision=_decision(decision),
    )
    if record is None:
        return row
    barrier, std = record.barrier, record.barrier_std_ev
    values = {
        "barrier_forward_ev": barrier.forward_ev if barrier else None,
        "predicted_std_ev": barrier.sigma_ev if barrier else None,
        "barrier_std_ev": std if std is not None else (barrier.sigma_ev if barrier else None),
        "verified_barrier_ev": record.verified_barrier_ev,
        "saddle_reference_fmax_ev_per_ang": record.saddle_fmax_ev_per_ang,
        "error_to_verified_ev": record.error_to_verified_ev,
        "error_to_reference_ev": record.error_to_reference_ev,
    }
    return row.model_copy(update={key: finite_or_none(value) for key, value in values.items()})


def path_rows(generations: Sequence[GenerationRecord], path: str) -> list[GenerationRow]:
    """One row a generation of one hop."""
    keys: set[str] = set()
    rows = []
    for generation, record in path_records(generations, path):
        keys.update(record.label_keys)
        rows.append(_row(generation, record, len(keys), record.decision))
    return rows


def _run_rows(generations: Sequence[GenerationRecord]) -> list[GenerationRow]:
    single = len(path_names(generations)) == 1
    keys: set[str] = set()
    rows = []
    for generation in generations:
        keys.update(key for record in generation.paths for key in record.label_keys)
        only = generation.paths[0] if single and generation.paths else None
        rows.append(_row(generation, only, len(keys), generation.decision))
    return rows


def _saddle_verified(record: PathRecord, run: RunRecord, labels: Mapping[str, Label]) -> bool:
    tolerance, limit = tolerances(run)
    label = labels.get(record.saddle_key)
    error, fmax = record.error_to_verified_ev, record.saddle_fmax_ev_per_ang
    return bool(
        label is not None
        and label.ok
        and error is not None
        and abs(error) <= tolerance
        and fmax is not None
        and fmax <= limit
    )


def _segment_row(segment: Segment) -> SegmentRow:
    return SegmentRow(
        start_image=segment.start,
        saddle_image=segment.saddle,
        end_image=segment.end,
        barrier_forward_ev=segment.forward_ev,
        barrier_reverse_ev=segment.reverse_ev,
        saddle_ev=segment.saddle_ev,
        saddle_std_ev=segment.sigma_ev,
    )


def _band_values(probed: PathRecord) -> dict[str, Any]:
    band, barrier = probed.band, probed.barrier
    values: dict[str, Any] = {}
    if band is not None:
        parts = segments(band)
        values |= {
            "neb_converged": band.converged,
            "neb_status": band.status,
            "neb_reason": band.reason,
            "neb_fmax_ev_per_ang": band.fmax_ev_per_ang,
            "neb_n_images": len(band.positions),
            "path_length_ang": float(band.coordinate_ang[-1]),
            "segments": [_segment_row(segment) for segment in parts],
            "rate_limiting_segment": next(k for k, segment in enumerate(parts) if segment.rate_limiting),
            "rate_limiting_ev": next(segment.span_ev for segment in parts if segment.rate_limiting),
            "verified_segment": next(k for k, segment in enumerate(parts) if segment.highest),
        }
    if barrier is not None:
        std = probed.barrier_std_ev
        values |= {
            "barrier_forward_ev": barrier.forward_ev,
            "barrier_reverse_ev": barrier.reverse_ev,
            "reaction_energy_ev": barrier.reaction_energy_ev,
            "barrier_std_ev": barrier.sigma_ev if std is None else std,
            "predicted_std_ev": barrier.sigma_ev,
            "barrier_std_committee_ev": barrier.sigma_committee_ev,
            "barrier_std_posterior_ev": barrier.sigma_posterior_ev,
            "barrier_spline_ev": barrier.spline_forward_ev,
            "saddle_image": barrier.saddle_image,
            "extrema": [
                ExtremumRow(kind=e.kind, coordinate_ang=e.coordinate_ang, energy_ev=e.energy_ev, image=e.image)
                for e in barrier.extrema
            ],
        }
    return values


def _path_result(
    run: RunRecord,
    generations: Sequence[GenerationRecord],
    labels: Mapping[str, Label],
    frames: Sequence[LabelledFrame],
    path: str,
) -> PathResult:
    """One hop: its last decision, and its last band."""
    records = path_records(generations, path)
    last, probed = records[-1][1], last_probed(generations, path)
    verified = [(g.index, r.verified_barrier_ev) for g, r in records if r.verified_barrier_ev is not None]
    mine = {frame.label.key: frame for frame in frames if frame.path == path}
    new = [frame for frame in mine.values() if not (frame.label.reused or frame.label.derived_from)]
    calls = Counter(frame.kind for frame in new) + Counter("failed" for frame in new if not frame.label.ok)
    values: dict[str, Any] = {"neb_converged": False, "saddle_verified": False}
    if probed is not None:
        values |= _band_values(probed) | {
            "saddle_verified": _saddle_verified(probed, run, labels),
            "verified_barrier_ev": probed.verified_barrier_ev,
            "saddle_reference_fmax_ev_per_ang": probed.saddle_fmax_ev_per_ang,
            "error_to_verified_ev": probed.error_to_verified_ev,
            "error_to_reference_ev": probed.error_to_reference_ev,
            "spin_jumps": [str(jump) for jump in path_jumps(probed.band, list(mine), labels)],
        }
    return PathResult(
        name=path,
        converged=last.decision.code == "converged",
        stop_code=last.decision.code,
        stop_reason=last.decision.reason,
        initial_reference_fmax_ev_per_ang=last.initial_fmax_ev_per_ang,
        final_reference_fmax_ev_per_ang=last.final_fmax_ev_per_ang,
        last_verified_generation=verified[-1][0] if verified else None,
        last_verified_barrier_ev=verified[-1][1] if verified else None,
        reference_barrier_ev=known_barrier_ev(run, path),
        n_reference_calls=len(new),
        n_reference_calls_by_kind=dict(calls),
        n_labels_reused=sum(frame.label.reused for frame in mine.values()),
        generations=path_rows(generations, path),
        **values,
    )


def _failures(frames: Sequence[LabelledFrame]) -> list[FailureRow]:
    """Each failed calculation once, under the hop that asked for it first."""
    once = {frame.label.key: frame for frame in reversed(frames) if not frame.label.ok}
    return [
        FailureRow(
            key=frame.label.key,
            path=frame.path,
            generation=frame.generation,
            kind=frame.kind,
            status=frame.label.status,
            reason=frame.label.reason,
            folder=frame.label.folder,
        )
        for frame in sorted(once.values(), key=lambda frame: frame.number)
    ]


def _model_sha256(surrogate: Mapping[str, Any]) -> str | None:
    """What made the reported band: the committee, or the prior where it leads; None before there is either."""
    members = [str(member) for member in surrogate.get("members") or ()]
    if members and surrogate.get("lead", "committee") == "committee":
        return members[0] if len(members) == 1 else sha256_hex("".join(members).encode())
    return surrogate.get("prior")


def _seconds(generations: Sequence[GenerationRecord]) -> dict[str, float]:
    total: Counter[str] = Counter()
    for generation in generations:
        for step, seconds in generation.seconds.items():
            total[step] += seconds  # type: ignore[assignment]
    return dict(total)


def barrier_summary(
    run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]
) -> dict[str, Any]:
    """``barrier.json`` as plain JSON values; ``schema.BarrierReport`` says what each of them means.

    Args:
        run: the run.
        generations: its generations in order; may be empty, or cut short where the run still goes on.
        labels: every label asked for, by key, reused and failed ones included.
    """
    frames = list(labelled_frames(generations, labels))
    paths = [_path_result(run, generations, labels, frames, path) for path in path_names(generations)]
    last = generations[-1] if generations else GenerationRecord(run=run.name, index=-1, paths=())
    tolerance, limit = tolerances(run)
    top = {key: getattr(paths[0], key) for key in _TOP} if len(paths) == 1 else {}
    report = BarrierReport(
        run=run.name,
        status=run.status,
        converged=bool(paths) and all(path.converged for path in paths),
        stop_code=last.decision.code,
        stop_reason=last.decision.reason or run.reason,
        saddle_verified=bool(paths) and all(path.saddle_verified for path in paths),
        neb_converged=bool(paths) and all(path.neb_converged for path in paths),
        n_reference_calls=last.n_reference_calls,
        n_reference_calls_by_kind=dict(last.calls_by_kind),
        n_labels_reused=last.n_labels_reused,
        dataset_size=len(last.label_keys),
        barrier_tolerance_ev=tolerance,
        saddle_fmax_limit_ev_per_ang=limit,
        model_sha256=_model_sha256(last.surrogate),
        model_members_sha256=[str(member) for member in last.surrogate.get("members") or ()],
        settings_sha256=run.settings_sha256,
        teacher=teacher_of(run, labels),
        prior=jsonable(prior_of(run, last.surrogate)),
        surrogate=jsonable(last.surrogate),
        calibration={
            "factor": finite_or_none(last.calibration.factor),
            "n_residuals": last.calibration.n_residuals,
            "source": last.calibration.source,
        },
        failures=_failures(frames),
        generations=_run_rows(generations),
        paths=paths,
        seconds=_seconds(generations),
        versions=dict(run.sittings[-1].versions) if run.sittings else {},
        started=run.started,
        finished=run.finished,
        **top,
    )
    result: dict[str, Any] = jsonable(report.model_dump(mode="python"))
    return result
