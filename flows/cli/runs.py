"""Verbs that set up and run: init, check, run, cancel, up, down."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.cli.common import Mongodb, Overrides, RunFile, RunName, opened_store

verbs = typer.Typer()


@verbs.command()
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


@verbs.command()
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


@verbs.command()
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

    Exit: 0 converged, 3 budget spent without converging, 2 bad input, 1 failure, 130 stopped with Ctrl-C,
    143 by SIGTERM.

    Example: al-loop run my-hop/run.yaml --set stop.max_labels=20
    """
    from flows.runfile import load_run_file

    settings = load_run_file(run_file, overrides or (), name=name)
    try:
        from flows.session import run_foreground

        code = run_foreground(settings, use_prefect=not no_server, dry_run=dry_run, console=ctx.obj.console)
    except KeyboardInterrupt as error:
        from flows.signals import TERMINATED, Terminated
        from storage.uris import redact_tree

        options = [*(["--name", name] if name else []), *(f"--set={override}" for override in overrides or ())]
        options += ["--no-server"] * no_server + ["--dry-run"] * dry_run
        again = shlex.join(["al-loop", "run", str(run_file), *redact_tree(options)])
        cancel_it = shlex.join(["al-loop", "cancel", settings.name + "-dry-run" * dry_run])
        queued = f" jobs in the queue go on (`{cancel_it}` ends them)," if settings.executor.queue else ""
        print(f"stopped; nothing that was labelled is lost,{queued} go on with: {again}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else 130) from None
    raise typer.Exit(code)


@verbs.command()
def cancel(ctx: typer.Context, name: RunName, mongodb_uri: Mongodb = None) -> None:
    """End the jobs that a stopped run left in a queue.

    Example: al-loop cancel my-hop
    """
    from flows.cancel import cancel_run

    with opened_store(mongodb_uri) as store:
        ctx.obj.line(cancel_run(store, name))


@verbs.command()
def up(ctx: typer.Context) -> None:
    """Start MongoDB, the Prefect server and the worker that serves the deployment.

    Example: al-loop up && prefect deployment run al-loop
    """
    from flows import services

    services.up(ctx.obj.say)


@verbs.command()
def down(ctx: typer.Context) -> None:
    """Stop what `al-loop up` started.

    Example: al-loop down
    """
    from flows import services

    services.down(ctx.obj.say)
