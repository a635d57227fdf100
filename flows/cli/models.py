"""Verbs that make models: pretrain."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

verbs = typer.Typer()


@verbs.command()
def pretrain(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="PRETRAIN.yaml", help="The pre-training file.")],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="OUT", help="A .model file or a folder, instead of the file's `output`."),
    ] = None,
) -> None:
    """Make a small generalist MACE from a teacher: any calculator that is not the reference. A run file then names it
    as `model.foundation`. Interrupted and called again, it asks the teacher for nothing twice.

    Exit: 0 made, 1 failure, 2 bad input, 130 stopped with Ctrl-C, 143 by SIGTERM.

    Example: al-loop pretrain config/pretrain_cr_sb_te.yaml -o priors
    """
    from flows.pretrain_settings import load_pretrain_file

    settings = load_pretrain_file(file, out)
    try:
        from flows.pretrain import read_job, run_job

        run_job(read_job(settings, str(file)), ctx.obj.console, quiet=ctx.obj.quiet)
    except KeyboardInterrupt as error:
        from flows.signals import TERMINATED, Terminated

        again = shlex.join(["al-loop", "pretrain", str(file), *(["-o", str(out)] if out else [])])
        print(f"stopped; what is labelled is kept beside the output, go on with: {again}", file=sys.stderr)
        raise typer.Exit(TERMINATED if isinstance(error, Terminated) else 130) from None
