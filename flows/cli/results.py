"""Verbs that read what runs left: status, show, report, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.cli.common import AsJson, Mongodb, RunName, opened_store

if TYPE_CHECKING:
    from alcore.protocols import RecordStore

verbs = typer.Typer()


@verbs.command()
def status(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this run.")] = None,
    as_json: AsJson = False,
    mongodb_uri: Mongodb = None,
) -> None:
    """Runs, generations, labels by status.

    Example: al-loop status my-hop
    """
    from flows.report.table import generation_table
    from flows.status import run_rows, runs_table

    with opened_store(mongodb_uri) as store:
        rows = run_rows(store, name)
        generations = store.load_generations(name) if name else []
        summary = _summary(store, name) if name and as_json else {}
    if as_json:
        print(json.dumps([row | {"rows": summary["generations"]} for row in rows] if name else rows, indent=1))
        return
    ctx.obj.console.print(runs_table(rows) if rows else "no run yet; `al-loop run RUN.yaml` starts one")
    if generations:
        ctx.obj.console.print(generation_table(generations))


@verbs.command()
def show(ctx: typer.Context, name: RunName, as_json: AsJson = False, mongodb_uri: Mongodb = None) -> None:
    """The result of a run: what `barrier.json` holds.

    Example: al-loop show my-hop --json
    """
    from flows.report.table import result_lines

    with opened_store(mongodb_uri) as store:
        summary = _summary(store, name)
    if as_json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    for line in result_lines(summary):
        ctx.obj.line(line)


@verbs.command()
def report(
    ctx: typer.Context,
    name: RunName,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where to; default NAME-report.")
    ] = None,
    mongodb_uri: Mongodb = None,
) -> None:
    """Write the report folder: `barrier.json`, the path, plots, and one `report.html` that shows it all offline.

    Example: al-loop report my-hop -o report
    """
    from flows.report.build import write_report
    from flows.status import load_run, run_labels

    with opened_store(mongodb_uri) as store:
        record = load_run(store, name)
        generations = store.load_generations(name)
        labels = run_labels(store, generations)
    written = write_report(record, generations, labels, out or Path(f"{name}-report"))
    ctx.obj.line(str(written))


@verbs.command()
def export(
    ctx: typer.Context,
    name: RunName,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Where to; default NAME-export.")
    ] = None,
    mongodb_uri: Mongodb = None,
) -> None:
    """Write the labels (`dataset.extxyz`), the committee's models and the run file as resolved.

    Example: al-loop export my-hop -o my-hop-data
    """
    from flows.export import export_run

    with opened_store(mongodb_uri) as store:
        written = export_run(store, name, out or Path(f"{name}-export"))
    ctx.obj.line(str(written))


def _summary(store: RecordStore, name: str) -> dict[str, Any]:
    from flows.report.summary import barrier_summary
    from flows.status import load_run, run_labels

    generations = store.load_generations(name)
    return barrier_summary(load_run(store, name), generations, run_labels(store, generations))
