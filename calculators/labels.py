"""From how a job ended to a label: every executor's labels are judged here, and only here."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alcore.errors import InputError
from alcore.types import Label, LabelRequest, LabelStatus, Structure
from calculators.attempts import ATTEMPTS_FILE, NOT_MADE
from calculators.base import ResolvedCalculator
from calculators.checks import reject_reason
from calculators.executors.outcome import JobOutcome
from calculators.measure import Measurement, plain_array
from calculators.outcomes import ERROR

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LabelLimits:
    """What one label may take, and what is still believed.

    Attributes:
        timeout_s: wall time of all its attempts together.
        retries: rungs of the code's ladder after the first attempt.
        max_force_ev_per_ang: a larger force on any atom makes a label ``rejected``.
    Raises:
        InputError: a number that makes no sense.
    """

    timeout_s: float = 3600.0
    retries: int = 2
    max_force_ev_per_ang: float = 50.0

    def __post_init__(self) -> None:
        for name, value in (("timeout_s", self.timeout_s), ("max_force", self.max_force_ev_per_ang)):
            if not value > 0:
                raise InputError(f"{name} is {value}", where="executor", mend="it must be positive")
        if self.retries < 0:
            raise InputError(f"retries is {self.retries}", where="executor", mend="it must not be negative")


def conclude(
    request: LabelRequest, resolved: ResolvedCalculator, outcome: JobOutcome, folder: Path, limits: LabelLimits
) -> Label:
    """The label of a job that has ended; in its folder, ``error.txt`` says why it is not ``ok``.

    Args:
        request: what was asked.
        resolved: the calculator that was asked.
        outcome: how its job ended; the value of one that is ``done`` is a ``Measurement``.
        folder: where it ran.
        limits: what was allowed.
    """
    attempts = outcome.value.attempts if outcome.kind == "done" else _attempts_begun(folder)
    status, reason, text = _judge(request.candidate.structure, resolved, outcome, limits, attempts)
    reason = " ".join(reason.split())
    if status != "ok":
        try:
            (folder / ERROR).write_text(f"{status}: {reason}\n{text}", encoding="utf-8")
        except OSError as error:  # a full disk, or another run's folder that is gone: the label is what counts
            _LOG.warning("no %s in %s: %s", ERROR, folder, error)
    return _to_label(request, resolved, outcome, (status, reason), attempts, folder)


def _judge(
    structure: Structure,
    resolved: ResolvedCalculator,
    outcome: JobOutcome,
    limits: LabelLimits,
    attempts: Sequence[Mapping[str, Any]],
) -> tuple[LabelStatus, str, str]:
    """Status, reason in one line, and all the text there is about it."""
    if outcome.kind == "timeout":
        late = outcome.text or f"no answer within {limits.timeout_s:g} s"
        late = f"{late}{_how_far(attempts)}; its processes were ended"
        return "timeout", late, outcome.last_words
    if outcome.kind in ("died", "lost"):
        told = f": {telling_line(outcome.last_words)}" if outcome.last_words else ""
        return "crashed", f"the worker process died ({outcome.text}){_how_far(attempts)}{told}", outcome.last_words
    if outcome.kind == "memory":
        return "crashed", f"{outcome.text}{_how_far(attempts)}; its processes were ended", outcome.last_words
    if outcome.kind == "raised":
        return "crashed", telling_line(outcome.text), outcome.text
    measurement: Measurement = outcome.value
    if measurement.status != "ok":
        return measurement.status, measurement.reason, measurement.error_text
    why = _other_version(resolved, measurement) or reject_reason(structure, measurement, limits.max_force_ev_per_ang)
    return ("rejected", why, "") if why else ("ok", "", "")


def _other_version(resolved: ResolvedCalculator, measurement: Measurement) -> str | None:
    """The fingerprint names a version; a label of another one is not what it says it is."""
    stated, found = str(resolved.facts.get("version") or ""), measurement.inspection.code_version
    if not stated or not found or found == stated or found.startswith((f"{stated}.", f"{stated} ")):
        return None
    return f"the output is from version {found}, the fingerprint says {stated} (mend calculator.settings.version)"


def _attempts_begun(folder: Path) -> list[Mapping[str, Any]]:
    """How far a job had come that was ended from outside; nothing if it was at its first attempt."""
    try:
        stories = json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return stories if isinstance(stories, list) else []


def _how_far(attempts: Sequence[Mapping[str, Any]]) -> str:
    made = [attempt for attempt in attempts if attempt["status"] != NOT_MADE]
    return f", in its retry '{made[-1]['name']}' after {made[-2]['status']}" if len(made) > 1 else ""


def _to_label(
    request: LabelRequest,
    resolved: ResolvedCalculator,
    outcome: JobOutcome,
    judged: tuple[LabelStatus, str],
    attempts: Sequence[Mapping[str, Any]],
    folder: Path,
) -> Label:
    structure, (status, reason) = request.candidate.structure, judged
    values: dict[str, Any] = {}
    details: dict[str, Any] = {"calculator": dict(resolved.facts), "attempts": list(attempts)}
    if outcome.kind == "done":
        answer: Measurement = outcome.value
        found = answer.inspection
        own: dict[str, Any] = {"energy_kind": answer.energy_kind, "settings": answer.settings}
        own |= {"electronic_steps": found.electronic_steps, "code_version": found.code_version}
        if answer.total_magnetic_moment is not None:
            own["total_magnetic_moment"] = answer.total_magnetic_moment
        details = {**found.notes, **details, **own}  # a note never hides what stands here for every code
        if status in ("ok", "rejected"):
            values = {
                "energy_ev": answer.energy_ev if math.isfinite(answer.energy_ev) else None,
                "forces": plain_array(answer.forces, (len(structure), 3)),
                "stress": answer.stress,
                "magnetic_moments": answer.magnetic_moments,
            }
    return Label(
        key=request.key,
        structure=structure,
        status=status,
        fingerprint=resolved.fingerprint,
        calculator=resolved.name,
        reason=reason,
        folder=str(folder),
        seconds=outcome.seconds,
        details=details,
        **values,
    )


def telling_line(text: str) -> str:
    """The line that says most about a death: Python's fatal error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return next((line for line in lines if line.startswith("Fatal Python error")), lines[-1])[:300]
