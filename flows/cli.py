"""The command ``al-loop``. Every verb imports what it needs when it is called, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failure, 2 bad input, 3 budget spent without converging, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from alcore.errors import InputError
from flows import __version__
from flows.command_group import OneLineErrors

if TYPE_CHECKING:
    from alcore.protocols import RecordStore
    from storage.store import MongoStore

PACKAGES = ("alcore", "calculators", "storage", "flows")


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where results go: stdout. Errors go to stderr, by ``OneLineErrors``."""

    console: Console
    quiet: bool

    def line(self, text: str) -> None:
        """One line as it is: no markup, no wrapping."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A message that is no result: silent with ``-q``."""
        if not self.quiet:
            self.line(text)


app = typer.Typer(cls=OneLineErrors, name="al-loop", add_completion=True, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"al-loop {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Say more.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say less.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Migration barriers by active learning: NEB on MACE, labels from a reference calculator, until it agrees.

    Example: al-loop init my-hop && al-loop check my-hop/run.yaml && al-loop run my-hop/run.yaml
    """
    del debug, version  # seen by OneLineErrors.main and _version
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for package in PACKAGES:
        logging.getLogger(package).setLevel("ERROR" if quiet else "INFO" if verbose else "WARNING")
    ctx.obj = Output(console=Console(), quiet=quiet)
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.")]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="The run's name.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. neb.n_images=9; may be repeated."),
]
Mongodb = Annotated[
    str | None,
    typer.Option(metavar="URI", help="Where to look; without it AL_LOOP_MONGODB_URI, or the embedded server."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    calculator: Annotated[str, typer.Option(metavar="NAME", help="The reference calculator to set up.")] = "emt",
) -> None:
    """Write a commented run file and an example pair of end states.

    Example: al-loop init my-hop --calculator tblite
    """
    from flows.init import init_folder

    run_file = init_folder(folder, calculator)
    shown = shlex.quote(str(run_file))
    ctx.obj.say(f"wrote {run_file} and an example pair of end states (a vacancy hop in copper); next:")
    ctx.obj.say(f"  al-loop check {shown}\n  al-loop run {shown}")


@app.command()
def check(ctx: typer.Context, run_file: RunFile, overrides: Overrides = None) -> None:
    """Check all that can be known before computing, and say what the run would do. Exit 2 lists every problem.

    Example: al-loop check my-hop/run.yaml
    """
    from flows.runfile import load_run_file

    settings = load_run_file(run_file, overrides or ())
    from flows.check import check_run  # imports more, and is not needed to refuse a bad run file

    report = check_run(settings)
    for line in report.lines:
        ctx.obj.line(line)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    raise typer.Exit(2 if report.problems else 0)


@app.command()
def run(
    ctx: typer.Context,
    run_file: RunFile,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Another name for the run.")] = None,
    overrides: Overrides = None,
    no_server: Annotated[bool, typer.Option("--no-server", help="Plain Python, without Prefect.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Go through every step with a cheap teacher in the reference's place.")
    ] = False,
) -> None:
    """Run the loop in the foreground. A name that exists goes on where it stopped.

    Exit: 0 converged, 3 budget spent without converging, 2 bad input, 1 failure, 130 stopped with Ctrl-C.

    Example: al-loop run my-hop/run.yaml --set stop.max_labels=20
    """
    from flows.runfile import load_run_file

    settings = load_run_file(run_file, overrides or (), name=name)
    try:
        from flows.session import run_foreground

        code = run_foreground(settings, use_prefect=not no_server, dry_run=dry_run, console=ctx.obj.console)
    except KeyboardInterrupt:
        from storage.uris import redact_tree

        options = [*(["--name", name] if name else []), *(f"--set={override}" for override in overrides or ())]
        options += ["--no-server"] * no_server + ["--dry-run"] * dry_run
        again = shlex.join(["al-loop", "run", str(run_file), *redact_tree(options)])
        cancel_it = shlex.join(["al-loop", "cancel", settings.name + "-dry-run" * dry_run])
        queued = f" jobs in the queue go on (`{cancel_it}` ends them)," if settings.executor.queue else ""
        print(f"stopped; nothing that was labelled is lost,{queued} go on with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


@app.command()
def cancel(ctx: typer.Context, name: RunName, mongodb_uri: Mongodb = None) -> None:
    """End the jobs that a stopped run left in a queue.

    Example: al-loop cancel my-hop
    """
    from flows.cancel import cancel_run

    with _store(mongodb_uri) as store:
        ctx.obj.line(cancel_run(store, name))


@app.command()
def up(ctx: typer.Context) -> None:
    """Start MongoDB, the Prefect server and the worker that serves the deployment.

    Example: al-loop up && prefect deployment run al-loop
    """
    from flows import services

    services.up(ctx.obj.say)


@app.command()
def down(ctx: typer.Context) -> None:
    """Stop what `al-loop up` started.

    Example: al-loop down
    """
    from flows import services

    services.down(ctx.obj.say)


@app.command()
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

    with _store(mongodb_uri) as store:
        rows = run_rows(store, name)
        generations = store.load_generations(name) if name else []
        summary = _summary(store, name) if name and as_json else {}
    if as_json:
        print(json.dumps([row | {"rows": summary["generations"]} for row in rows] if name else rows, indent=1))
        return
    ctx.obj.console.print(runs_table(rows) if rows else "no run yet; `al-loop run RUN.yaml` starts one")
    if generations:
        ctx.obj.console.print(generation_table(generations))


@app.command()
def show(ctx: typer.Context, name: RunName, as_json: AsJson = False, mongodb_uri: Mongodb = None) -> None:
    """The result of a run: what `barrier.json` holds.

    Example: al-loop show my-hop --json
    """
    from flows.report.table import result_lines

    with _store(mongodb_uri) as store:
        summary = _summary(store, name)
    if as_json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return
    for line in result_lines(summary):
        ctx.obj.line(line)


@app.command()
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

    with _store(mongodb_uri) as store:
        record = load_run(store, name)
        generations = store.load_generations(name)
        labels = run_labels(store, generations)
    written = write_report(record, generations, labels, out or Path(f"{name}-report"))
    ctx.obj.line(str(written))


@app.command()
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

    with _store(mongodb_uri) as store:
        written = export_run(store, name, out or Path(f"{name}-export"))
    ctx.obj.line(str(written))


@app.command()
def label(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Structures: any file ASE reads, all its frames.")],
    calculator: Annotated[str | None, typer.Option(metavar="NAME", help="The reference calculator.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the calculator; may be repeated."),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="Take calculator and executor from this run file.")
    ] = None,
    executor: Annotated[str | None, typer.Option(metavar="local|pyiron", help="Where labels are computed.")] = None,
    workers: Annotated[int | None, typer.Option(metavar="N", help="How many at the same time.")] = None,
    timeout_s: Annotated[float | None, typer.Option(metavar="S", help="Seconds one label may take.")] = None,
    executor_overrides: Annotated[
        list[str] | None,
        typer.Option("--set-executor", metavar="KEY=VALUE", help="A setting of the executor; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT.extxyz", help="Default: FILE-labelled.extxyz, here.")
    ] = None,
    mongodb_uri: Mongodb = None,
) -> None:
    """Label structures outside a loop; what the store holds already is taken from there.

    Exit: 0 all is labelled, 1 some failed, 2 bad input, 130 stopped with Ctrl-C.

    Example: al-loop label frames.extxyz --calculator tblite --set method=GFN2-xTB --workers 2 -o labels.extxyz
    """
    from flows.label import read_job, run_job

    where = {"kind": executor, "workers": workers, "timeout_s": timeout_s}
    job = read_job(
        file,
        calculator,
        out=out,
        like=like,
        settings=overrides or (),
        executor=where,
        executor_settings=executor_overrides or (),
    )
    try:
        with _store(mongodb_uri or job.mongodb_uri) as store:
            code = run_job(job, store, ctx.obj.console, quiet=ctx.obj.quiet)
    except KeyboardInterrupt:
        print("stopped; what is labelled is kept: the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


@app.command()
def calculators(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Describe this one.")] = None,
    test: Annotated[str | None, typer.Option(metavar="NAME", help="Run the contract test on this calculator.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting for the test, e.g. model=a.model; repeatable."),
    ] = None,
    structure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A small structure for the test; default: eight atoms or so.")
    ] = None,
    energy_tolerance: Annotated[
        float | None, typer.Option(metavar="EV", help="Of the test, in eV: order and place (default 0.001).")
    ] = None,
    force_tolerance: Annotated[
        float | None, typer.Option(metavar="EV_PER_ANG", help="Of the test, in eV/Å (default 0.01).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The reference calculators and whether each can run here; one with its settings; or the contract test on one.

    The test computes a dozen small structures and prints a line a promise; exit 1 if one is broken.

    Example: al-loop calculators --test tblite --set method=GFN2-xTB
    """
    from flows import catalogue

    tolerances = (energy_tolerance, force_tolerance)
    catalogue.refuse_mixture(name, test, (overrides, structure, *tolerances))
    if test is not None:
        kept = catalogue.check_calculator(ctx.obj.console, test, overrides or (), structure, tolerances, as_json)
        raise typer.Exit(0 if kept else 1)
    if name is not None:
        catalogue.show_calculator(ctx.obj.console, name, as_json)
    else:
        catalogue.list_calculators(ctx.obj.console, as_json)


def _summary(store: RecordStore, name: str) -> dict[str, Any]:
    from flows.report.summary import barrier_summary
    from flows.status import load_run, run_labels

    generations = store.load_generations(name)
    return barrier_summary(load_run(store, name), generations, run_labels(store, generations))


@contextmanager
def _store(mongodb_uri: str | None) -> Iterator[MongoStore]:
    from flows.settings import StoreSettings

    if mongodb_uri is not None and not mongodb_uri.startswith(("mongodb://", "mongodb+srv://")):
        raise InputError("not an address", where="--mongodb-uri", mend="mongodb://host:port")
    from flows.session import open_record_store

    store = open_record_store(StoreSettings(mongodb_uri=mongodb_uri) if mongodb_uri else None)
    try:
        yield store
    finally:
        store.close()


def main() -> None:
    """Entry point of the console script."""
    if not sys.warnoptions:  # our own warnings, a line each; libraries warn their programmers
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=rf"({'|'.join(PACKAGES)})\.")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    app()


if __name__ == "__main__":
    main()
