"""The command ``al-loop``. Every verb imports what it needs when it is called, so that ``--help`` answers at once.

Exit codes: 0 done, 1 failure, 2 bad input, 3 budget spent without converging, 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import typer
from rich.console import Console

from flows import __version__
from flows.cli import labels, models, results, runs
from flows.cli.command_group import OneLineErrors
from flows.cli.common import Output

PACKAGES = ("alcore", "calculators", "storage", "flows")

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


for group in (runs, results, labels, models):
    app.add_typer(group.verbs)


def main() -> None:
    """Entry point of the console script."""
    if not sys.warnoptions:  # our own warnings, a line each; libraries warn their programmers
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module=rf"({'|'.join(PACKAGES)})\.")
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    app()
