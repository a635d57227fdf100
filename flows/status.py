"""What the store knows about runs, as plain rows: nothing here computes or draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from alcore.errors import InputError
from alcore.protocols import RecordStore
from alcore.types import GenerationRecord, Label, RunRecord
from alcore.vetting import believed

if TYPE_CHECKING:
    from rich.table import Table

    from storage.durable import DurableStore
    from storage.memory import MemoryStore
    from storage.store import MongoStore


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


def run_rows(store: MongoStore | MemoryStore | DurableStore, name: str | None = None) -> list[dict[str, Any]]:
    """One row a run, newest first: its state, its generations, its labels by status, its barriers in eV.

    A run that should be ``running`` but that no living process works on is ``abandoned``; calling it again goes on.

    Args:
        store: where to look.
        name: only this run.

    Raises:
        InputError: there is no run of that name.
    """
    from flows.leases import live_runs

    if name is not None:
        load_run(store, name)
    alive = live_runs(store)
    rows = store.run_rows(name)
    for row in rows:
        if row["status"] == "running" and row["name"] not in alive:
            row["status"] = "abandoned"
    return rows


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
