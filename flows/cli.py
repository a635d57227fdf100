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
    from alcore.types import Structure

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
        print(f"stopped; nothing that was labelled is lost, go on with: {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


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
def calculators(
    ctx: typer.Context,
    test: Annotated[str | None, typer.Option(metavar="NAME", help="Run the contract test on this calculator.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting for the test, e.g. model=my.model; may be repeated."
        ),
    ] = None,
    structure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A small structure for the test; default: eight atoms or so.")
    ] = None,
) -> None:
    """The reference calculators, and whether each can run here; or the contract test on one (exit 1 if it fails).

    Example: al-loop calculators --test tblite --set method=GFN2-xTB
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    if test is None:
        from calculators.registry import describe_all

        for column in ("calculator", "here", "what it is"):
            table.add_column(column)
        for entry in describe_all():
            table.add_row(entry.name, Text(entry.unavailable or "yes"), Text(entry.description))
        ctx.obj.console.print(table)
        return
    from calculators.contract import run_contract
    from flows.runfile import apply_override

    settings: dict[str, Any] = {}
    for override in overrides or ():
        apply_override(settings, override)
    checks = run_contract(test, settings, _structure(structure) if structure else None)
    for check in checks:
        table.add_row("kept  " if check.passed else "BROKEN", Text(check.check), Text(check.detail))
    ctx.obj.console.print(table)
    raise typer.Exit(0 if all(check.passed for check in checks) else 1)


def _structure(file: Path) -> Structure:
    from alcore.endpoints import read_atoms
    from alcore.types import Structure

    atoms = read_atoms(file, "--structure")
    return Structure.from_atoms(atoms, charge=float(atoms.info.get("charge", 0.0)))


def _summary(store: RecordStore, name: str) -> dict[str, Any]:
    from flows.report.summary import barrier_summary
    from flows.status import load_run, run_labels

    generations = store.load_generations(name)
    return barrier_summary(load_run(store, name), generations, run_labels(store, generations))


@contextmanager
def _store(mongodb_uri: str | None) -> Iterator[RecordStore]:
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
