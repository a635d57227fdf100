"""Verbs about reference labels: label, calculators."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import AsJson, Mongodb, opened_store

verbs = typer.Typer()


@verbs.command()
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
        with opened_store(mongodb_uri or job.mongodb_uri) as store:
            code = run_job(job, store, ctx.obj.console, quiet=ctx.obj.quiet)
    except KeyboardInterrupt:
        print("stopped; what is labelled is kept: the same command goes on from there", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(code)


@verbs.command()
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
