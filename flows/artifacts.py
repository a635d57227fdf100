"""What a run shows in the dashboard, updated every generation: progress, summary, table and pictures.

Each has one key a run, so that what is published are versions of the same artifact.
"""

from __future__ import annotations

import base64
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from alcore.identity import sha256_hex
from alcore.types import GenerationRecord, Label, PathRecord, RunRecord

UNITS_NOTE = "Energies in eV, forces in eV/Å. Errors are of the predicted barrier."


def publish(run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> None:
    """Updates every artifact of ``run``; call it inside its flow."""
    from prefect.artifacts import (
        create_image_artifact,
        create_markdown_artifact,
        create_progress_artifact,
        create_table_artifact,
    )

    from flows.report.plots import barrier_figure, path_figure

    if not generations:
        return
    key, last = artifact_key(run.name), generations[-1]
    create_progress_artifact(progress(run, generations), key=f"{key}-progress", description=_headline(run, last))
    create_markdown_artifact(markdown_summary(run, last), key=f"{key}-summary", description=_headline(run, last))
    create_table_artifact(generation_rows(generations), key=f"{key}-generations", description=UNITS_NOTE)
    create_image_artifact(
        png_uri(barrier_figure(run, generations, labels)),
        key=f"{key}-barrier",
        description="The barrier and its error, generation by generation",
    )
    probed = {path.path for generation in generations for path in generation.paths if path.band is not None}
    for path in last.paths:
        if path.path in probed:
            create_image_artifact(
                png_uri(path_figure(run, generations, labels, path.path)),
                key=f"{key}-path" if len(last.paths) == 1 else f"{key}-path-{slug(path.path)}",
                description=f"{path.path}: its newest band, the uncertainty of it and the reference points",
            )


def artifact_key(run: str) -> str:
    """A key Prefect takes that no other run's name maps to."""
    return f"al-loop-{slug(run)}"


def slug(name: str) -> str:
    """``name`` in lower-case letters, digits and dashes; told apart by a hash where that changes it."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain if plain == name else f"{plain}-{sha256_hex(name.encode())[:6]}".strip("-")


def png_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def progress(run: RunRecord, generations: Sequence[GenerationRecord]) -> float:
    """Used part of the budget (labels, or generations of all hops, whichever is nearer its end) in %; 100 once the run
    stopped. A hop that is settled needs no more generations."""
    last = generations[-1]
    if last.decision.stop or run.status != "running":
        return 100.0
    stop = run.settings.get("stop", {})
    used = [0.0]
    if allowed := stop.get("max_generations", 0) * len(last.paths):
        asked = Counter(path.path for generation in generations for path in generation.paths if path.label_keys)
        spent = (allowed / len(last.paths) if p.decision.stop else asked[p.path] - 1 for p in last.paths)
        used.append(sum(spent) / allowed)
    used.append(last.n_reference_calls / stop["max_labels"] if stop.get("max_labels") else 0.0)
    return round(100 * min(max(used), 0.99), 1)


def generation_rows(generations: Sequence[GenerationRecord]) -> list[dict[str, Any]]:
    """A row for each path of each generation, valid JSON: what is not known, or not finite, is an empty cell."""
    return [_row(generation, path) for generation in generations for path in generation.paths]


def _row(generation: GenerationRecord, path: PathRecord) -> dict[str, Any]:
    barrier = path.barrier
    return {
        "generation": generation.index,
        "path": path.path,
        "barrier": _cell(barrier.forward_ev if barrier else None),
        "± sigma": _cell(path.barrier_std_ev if path.barrier_std_ev is not None or not barrier else barrier.sigma_ev),
        "verified barrier": _cell(path.verified_barrier_ev),
        "error to verified": _cell(path.error_to_verified_ev),
        "error to known": _cell(path.error_to_reference_ev),
        "force on saddle": _cell(path.saddle_fmax_ev_per_ang),
        "reference calls": generation.n_reference_calls,
        "labels reused": generation.n_labels_reused,
        "data set": len(generation.label_keys),
        "seconds": _cell(sum(generation.seconds.values()), digits=1),
        "decision": f"{path.decision.code}: {path.decision.reason}".removesuffix(": "),
    }


def markdown_summary(run: RunRecord, last: GenerationRecord) -> str:
    """The state of a run in a few lines."""
    lines = [f"# {run.name}", "", _headline(run, last), ""]
    for path in last.paths:
        lines += [f"## {path.path}", "", f"- {_sentence(path)}"]
        if path.barrier is not None:
            reverse, reaction = _ev(path.barrier.reverse_ev), _ev(path.barrier.reaction_energy_ev)
            lines.append(f"- reverse barrier {reverse}, reaction energy {reaction}")
        if path.band is not None:
            lines.append(f"- band: {path.band.status}{', ' + path.band.reason if path.band.reason else ''}")
        lines += [f"- {path.decision.code}: {path.decision.reason}".removesuffix(": "), ""]
    calls = ", ".join(f"{kind} {count}" for kind, count in last.calls_by_kind.items())
    lines.append(
        f"Reference calls: {last.n_reference_calls}{f' ({calls})' if calls else ''}; reused: {last.n_labels_reused}."
    )
    lines.append(f"Calibration of the uncertainty: {last.calibration.factor:.2f} ({last.calibration.source}).")
    return "\n".join(lines)


def _sentence(path: PathRecord) -> str:
    if path.barrier is None:
        return "the end states are being settled"
    sigma = path.barrier_std_ev if path.barrier_std_ev is not None else path.barrier.sigma_ev
    verified = (
        f"verified by the reference: **{_ev(path.verified_barrier_ev)}**"
        if path.verified_barrier_ev is not None
        else "not verified yet"
    )
    return f"barrier **{_ev(path.barrier.forward_ev)}** ± {_ev(sigma)}, {verified}"


def _headline(run: RunRecord, last: GenerationRecord) -> str:
    reason = run.reason or last.decision.reason
    status = run.status if run.status != "running" or not last.decision.stop else last.decision.code
    return f"{status.replace('_', ' ')} · generation {last.index} · {last.n_reference_calls} reference calls" + (
        f" · {reason}" if reason else ""
    )


def _ev(value: float | None) -> str:
    return f"{value:.3f} eV" if value is not None and math.isfinite(value) else "unknown"


def _cell(value: float | None, digits: int = 4) -> float | str:
    return round(float(value), digits) if value is not None and math.isfinite(value) else ""
