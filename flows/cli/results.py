"""Verbs that read what runs left: status, show, report, export, import."""

from __future__ import annotations

import json
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alcore.errors import InputError
from flows.cli.common import AsJson, Mongodb, RunName, checked_name, opened_store, waiting_lines

if TYPE_CHECKING:
    from alcore.protocols import RecordStore
    from flows.export_format import Watch

verbs = typer.Typer()


@verbs.command()
def status(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this run.", callback=checked_name)] = None,
    as_json: AsJson = False,
    mongodb_uri: Mongodb = None,
) -> None:
    """Runs, generations, labels by status; writes that wait on disk for the database.

    Example: al-loop status my-hop
    """
    from flows.report.table import generation_table
    from flows.status import run_rows, runs_table

    try:
        with opened_store(mongodb_uri) as store:
            rows = run_rows(store, name)
            generations = store.load_generations(name) if name else []
            summary = _summary(store, name) if name and as_json else {}
    finally:  # above all if nobody answers there
        for line in waiting_lines(mongodb_uri):
            print(line, file=sys.stderr)
    if as_json:
        print(json.dumps([row | {"rows": summary["generations"]} for row in rows] if name else rows, indent=1))
        return
    ctx.obj.console.print(runs_table(rows) if rows else "no run yet; `al-loop run RUN.yaml` starts one")
    if generations:
        ctx.obj.console.print(generation_table(generations))


@verbs.command()
def show(
    ctx: typer.Context,
    name: RunName,
    provenance: Annotated[
        bool,
        typer.Option("--provenance", help="Where the barrier came from: labels, models, settings, code, machines."),
    ] = False,
    generation: Annotated[
        int | None, typer.Option(metavar="K", help="With --provenance: the barrier of that generation.")
    ] = None,
    as_json: AsJson = False,
    mongodb_uri: Mongodb = None,
) -> None:
    """The result of a run: what `barrier.json` holds; or where it came from.

    Example: al-loop show my-hop --json
    """
    if provenance:
        from flows.provenance import barrier_provenance, provenance_view

        with opened_store(mongodb_uri) as store:
            found = barrier_provenance(database_of(store), name, generation)
        if as_json:
            print(json.dumps(found, indent=1, ensure_ascii=False))
            return
        for part in provenance_view(found):
            ctx.obj.console.print(part)
        return
    if generation is not None:
        raise InputError("is for --provenance only", where="--generation", mend="add --provenance")
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
    """Write all of a run into a folder: records that `al-loop import` brings into another database without loss, the
    labels (`dataset.extxyz`), the committee's models and the run file as resolved.

    Example: al-loop export my-hop -o my-hop-data
    """
    from flows.export import export_run

    watch = on_stderr(quiet=ctx.obj.quiet)
    with opened_store(mongodb_uri) as store:
        written = export_run(
            database_of(store),
            name,
            out or Path(f"{name}-export"),
            watch=watch,
            log=lambda line: print(line, file=sys.stderr),
        )
    ctx.obj.line(str(written))


@verbs.command("import")
def import_(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `al-loop export` wrote.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Call the run so.")] = None,
    mongodb_uri: Mongodb = None,
) -> None:
    """Bring an exported run into the database: all of it or, if anything is wrong, nothing. Labels that are there
    already stay as they are.

    Example: al-loop import my-hop-export --name my-hop-2
    """
    from flows.import_run import import_run, read_export

    watch = on_stderr(quiet=ctx.obj.quiet)
    export = read_export(folder, name=name, watch=watch)  # before a database is even started
    with opened_store(mongodb_uri) as store:
        done = import_run(database_of(store), export, watch=watch, log=ctx.obj.say)
    if done.was_there:
        ctx.obj.line(f"run '{done.name}' is there already, the very same: nothing changed")
        return
    known = f" ({done.n_known} were there already)" if done.n_known else ""
    ctx.obj.line(
        f"run '{done.name}': {done.n_generations} generations, {done.n_labels} labels{known}, {done.n_models} models"
    )
    again = ["al-loop", "run", str(folder / "run.yaml"), *(["--name", done.name] if name else [])]
    ctx.obj.say(f"go on with: {shlex.join(again)}")


@verbs.command()
def gc(
    ctx: typer.Context,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it.")] = False,
    labels: Annotated[bool, typer.Option("--labels", help="Also labels that no run refers to.")] = False,
    run: Annotated[str | None, typer.Option(metavar="NAME", help="This whole run instead.")] = None,
    as_json: AsJson = False,
    mongodb_uri: Mongodb = None,
) -> None:
    """Show what no run needs: models, arrays, steps, folders, uploads that were cut off; remove it with `--yes`.

    Example: al-loop gc --yes
    """
    from flows.environment import data_dir
    from flows.gc import collect, gc_table, refuse_if_writes_wait

    with opened_store(mongodb_uri) as store:
        refuse_if_writes_wait(store)
        say = partial(print, file=sys.stderr)
        rows, kept = collect(database_of(store), data_dir(), run=run, labels=labels, yes=yes, log=say)
    if as_json:
        print(json.dumps([{"kind": kind, "count": count, "size_mb": mb} for kind, count, mb in rows], indent=1))
        return
    ctx.obj.console.print(gc_table(rows, removed=yes))
    if kept:
        ctx.obj.say(kept)
    if not yes and any(count for _, count, _ in rows):
        ctx.obj.say("nothing was removed; --yes does it")


def database_of(store: Any) -> Any:
    """What a run consists of is asked of the database itself, and files go straight into it: nothing of them may wait
    on disk."""
    return getattr(store, "mongo", store)


def on_stderr(*, quiet: bool) -> Watch:
    """A progress bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    return lambda items, what: track(items, what, console=console, transient=True, disable=hidden)


def _summary(store: RecordStore, name: str) -> dict[str, Any]:
    from flows.report.summary import barrier_summary
    from flows.status import load_run, run_labels

    generations = store.load_generations(name)
    return barrier_summary(load_run(store, name), generations, run_labels(store, generations))
