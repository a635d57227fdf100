"""What a terminal shows: the generation table, and the honest end of a run in a few lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alcore.types import GenerationRecord
from flows.report.frames import path_names
from flows.report.schema import GenerationRow
from flows.report.summary import path_rows

if TYPE_CHECKING:
    from rich.table import Table

_STOPS = {
    "converged": "green",
    "barrierless": "yellow",
    "label_budget": "yellow",
    "generation_budget": "yellow",
    "end_state_not_minimum": "red",
    "labels_failing": "red",
}


def number(value: float | None, digits: int = 3, scale: float = 1.0) -> str:
    """A value for a table; an en dash where it is not known."""
    if value is None:
        return "–"
    return f"{round(value * scale, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before a zero


def signed_mev(value_ev: float) -> str:
    """``+1.5 meV``."""
    return f"{round(value_ev * 1000, 1) + 0.0:+.1f} meV"


def barrier_text(value: float | None, std: float | None) -> str:
    """``0.375 ± 0.004``."""
    return number(value) if value is None or std is None else f"{value:.3f} ± {std:.3f}"


def estimate_text(path: Mapping[str, Any]) -> str:
    """A hop's barrier with the uncertainty that goes with it: a confirmed one knows its last label, any other value is
    what was predicted before it."""
    return barrier_text(path["barrier_forward_ev"], path["barrier_std_ev" if path["converged"] else "predicted_std_ev"])


def _error_ev(row: GenerationRow) -> float | None:
    return row.error_to_verified_ev if row.error_to_verified_ev is not None else row.error_to_reference_ev


def generation_table(generations: Sequence[GenerationRecord]) -> Table:
    """One row a generation and hop: what was predicted before its labels were known; the error is that barrier minus
    the reference's at the same saddle."""
    from rich.table import Table
    from rich.text import Text

    names = path_names(generations)
    table = Table(title=generations[-1].run if generations else None, title_justify="left")
    columns = [
        "gen",
        *(["path"] if len(names) > 1 else []),
        "barrier eV",
        "error meV",
        "fmax eV/Å",
        "labels",
        "s",
        "decision",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column in ("path", "decision") else "right", no_wrap=True)
    rows = [(row.index, name, row) for name in names for row in path_rows(generations, name)]
    for index, name, row in sorted(rows, key=lambda item: (item[0], names.index(item[1]))):
        seconds = sum(value for value in row.seconds.values() if value is not None)
        table.add_row(
            str(index),
            *([name] if len(names) > 1 else []),
            barrier_text(row.barrier_forward_ev, row.predicted_std_ev),
            number(_error_ev(row), 1, 1000),
            number(row.saddle_reference_fmax_ev_per_ang),
            str(row.n_labels),
            f"{seconds:.0f}",
            Text(row.decision.code, style=_STOPS.get(row.decision.code, "")),
        )
    return table


def _kinds(by_kind: Mapping[str, int]) -> str:
    named = [f"{count} {kind}" for kind, count in by_kind.items() if count and kind != "failed"]
    return f" ({', '.join(named)})" if named else ""


def _path_lines(path: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    teacher, name = summary["teacher"]["name"], path["name"]
    barrier = f"{estimate_text(path)} eV"
    if path["barrier_forward_ev"] is None:
        return [f"{name}: NOT converged, no barrier: {path['stop_reason']}"]
    verified, fmax = path["verified_barrier_ev"], path["saddle_reference_fmax_ev_per_ang"]
    if path["converged"]:
        lines = [f"{name}: converged, barrier {barrier}"]
    elif path["stop_code"] == "barrierless":
        lines = [f"{name}: barrierless: {path['stop_reason']}"]
    else:
        lines = [f"{name}: NOT converged, the surrogate says {barrier}: {path['stop_reason'] or 'still running'}"]
    if verified is not None:
        force = "" if fmax is None else f", largest force there {fmax:.3f} eV/Å"
        lines.append(f"  {teacher} at this saddle: {verified:.4f} eV{force}")
    elif path["last_verified_barrier_ev"] is not None:
        last = f"(generation {path['last_verified_generation']}) gave {path['last_verified_barrier_ev']:.4f} eV"
        lines.append(f"  this saddle has no {teacher} label; the last that had one {last}")
    else:
        lines.append(f"  no {teacher} label at any saddle: the barrier is the surrogate's word alone")
    if path["reference_barrier_ev"] is not None and path["error_to_reference_ev"] is not None:
        lines.append(
            f"  known barrier {path['reference_barrier_ev']:.4f} eV: off by {signed_mev(path['error_to_reference_ev'])}"
        )
    inner = path["extrema"]
    if sum(extremum["kind"] == "maximum" for extremum in inner) > 1:
        named = ", ".join(
            f"{e['kind'][:3]} {number(e['energy_ev'])} eV at {number(e['coordinate_ang'], 2)} Å" for e in inner
        )
        lines.append(f"  the path has several humps: {named}")
    if len(path["segments"]) > 1:
        parts = ", ".join(
            f"{k + 1}: {number(s['barrier_forward_ev'])} eV forward, {number(s['barrier_reverse_ev'])} eV reverse"
            for k, s in enumerate(path["segments"])
        )
        limiting, highest = path["rate_limiting_segment"] + 1, path["verified_segment"] + 1
        lines.append(f"  its segments, of which number {limiting} is rate-limiting forward: {parts}")
        if limiting != highest:
            lines.append(
                f"  the barrier is that of number {highest}, the highest saddle above the initial state; but number "
                f"{limiting} climbs {number(path['rate_limiting_ev'])} eV from a well before it, and limits the rate"
            )
    lines += [f"  {jump}" for jump in path["spin_jumps"]]
    if not path["neb_converged"]:
        lines.append(f"  the band is not relaxed on the surrogate ({path['neb_reason'] or path['neb_status']})")
    return lines


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """The end of a run for a person: the barrier and who says so, or how far it came and why it stopped.

    Args:
        summary: what ``barrier_summary`` returned.
    """
    if not summary["paths"]:
        return [f"{summary['run']}: no generation yet ({summary['status']})"]
    lines = [line for path in summary["paths"] for line in _path_lines(path, summary)]
    calls = summary["n_reference_calls"]
    n_reused = summary["n_labels_reused"]
    reused = f", {n_reused} label{'s' if n_reused > 1 else ''} reused" if n_reused else ""
    lines.append(f"{calls} reference calculations{_kinds(summary['n_reference_calls_by_kind'])}{reused}")
    if summary["failures"]:
        first = summary["failures"][0]
        where = f", see {first['folder']}" if first["folder"] else ""
        lines.append(
            f"{len(summary['failures'])} of them failed; the first: {first['status']}: {first['reason']}{where}"
        )
    lines.append(f"teacher: {summary['teacher']['description']}; prior: {summary['prior']['description']}")
    return lines
