"""What the store knows about runs, as plain rows: nothing here computes or draws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alcore.errors import InputError
from alcore.protocols import RecordStore
from alcore.types import GenerationRecord, Label, RunRecord
from alcore.vetting import believed

if TYPE_CHECKING:
    from rich.table import Table


def load_run(store: RecordStore, name: str) -> RunRecord:
    """The run called ``name``.

    Raises:
        InputError: there is none; names those there are.
    """
    run = store.load_run(name)
    if run is None:
        known = ", ".join(record.name for record in store.list_runs()[:10])
        raise InputError(f"no run named '{name}'", mend=f"runs: {known}" if known else "there is no run yet")
    return run


def run_labels(store: RecordStore, generations: Sequence[GenerationRecord]) -> dict[str, Label]:
    """Every label a run asked for or started from, by key: failed ones too, and those it did not believe as such."""
    if not generations:
        return {}
    keys = [key for generation in generations for record in generation.paths for key in record.label_keys]
    keys += [*generations[-1].label_keys, *generations[-1].kinds]
    return believed(store.load_labels(list(dict.fromkeys(keys))), generations[-1].doubts)


def run_rows(store: RecordStore, name: str | None = None) -> list[dict[str, Any]]:
    """One row a run, newest first: its state, its generations, its labels by status, its barriers in eV.

    Args:
        store: where to look.
        name: only this run.

    Raises:
        InputError: there is no run of that name.
    """
    runs = store.list_runs() if name is None else [load_run(store, name)]
    return [_row(store, run) for run in runs]


def _row(store: RecordStore, run: RunRecord) -> dict[str, Any]:
    generations = store.load_generations(run.name)
    last = generations[-1] if generations else None
    labels = run_labels(store, generations)
    return {
        "name": run.name,
        "status": run.status,
        "reason": run.reason or (last.decision.reason if last else ""),
        "generations": len(generations),
        "labels": dict(sorted(Counter(label.status for label in labels.values()).items())),
        "n_reference_calls": last.n_reference_calls if last else 0,
        "n_labels_reused": last.n_labels_reused if last else 0,
        "paths": [
            {
                "name": record.path,
                "barrier_forward_ev": record.barrier.forward_ev if record.barrier else None,
                "barrier_std_ev": record.barrier_std_ev,
                "verified_barrier_ev": record.verified_barrier_ev,
                "decision": record.decision.code,
            }
            for record in (last.paths if last else ())
        ],
        "started": run.started,
        "finished": run.finished,
    }


def runs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """``run_rows`` for a terminal."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "status", "generations", "labels", "barriers / eV", "started (UTC)", "why"):
        table.add_column(column, overflow="fold", no_wrap=column == "status")
    for row in rows:
        table.add_row(
            row["name"],
            row["status"],
            str(row["generations"]),
            ", ".join(f"{count} {status}" for status, count in row["labels"].items()) or "none",
            "\n".join(_barrier(path) for path in row["paths"]),
            row["started"][:19].replace("T", " "),
            row["reason"],
        )
    return table


def _barrier(path: dict[str, Any]) -> str:
    if path["verified_barrier_ev"] is not None:
        return f"{path['name']} {path['verified_barrier_ev']:.3f} (reference)"
    if path["barrier_forward_ev"] is not None:
        return f"{path['name']} {path['barrier_forward_ev']:.3f} (surrogate)"
    return f"{path['name']} -"
