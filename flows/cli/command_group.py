"""How ``al-loop`` ends: one line on stderr for every error, and an exit code."""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from typer.core import TyperGroup
from typer.exceptions import TyperException

from alcore.errors import AlLoopError, InputError

GLOBAL_FLAGS = ("--debug", "-v", "--verbose", "-q", "--quiet")
LATER_VERBS = ("benchmark",)
"""Verbs that have a meaning but no code yet: refused by name, not as misspelt."""


class OneLineErrors(TyperGroup):
    """Ends every error as one line on stderr and an exit code; takes the global flags before and after the verb."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        flags = [word for word in given[:end] if word in GLOBAL_FLAGS]
        words = [word for i, word in enumerate(given) if i >= end or word not in GLOBAL_FLAGS]
        extra["standalone_mode"] = False
        try:
            code = super().main(flags + words, prog_name or "al-loop", *rest, **extra)
        except Exception as error:
            if "--debug" in flags:
                traceback.print_exc()
            code = _tell(error)
        sys.exit(code if isinstance(code, int) else 0)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        verb = args[0]
        if verb in LATER_VERBS:
            raise InputError("not available yet", where=f"al-loop {verb}", mend=f"there is: {' '.join(self.commands)}")
        if verb not in self.commands and not verb.startswith("-"):
            near = difflib.get_close_matches(verb, self.commands, n=1)
            mend = f"did you mean `al-loop {near[0]}`?" if near else f"there is: {' '.join(self.commands)}"
            raise InputError("no such verb", where=f"al-loop {verb}", mend=mend)
        return super().resolve_command(ctx, args)


def _tell(error: Exception) -> int:
    """Say what went wrong on stderr; returns the exit code."""
    if isinstance(error, AlLoopError):
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    if isinstance(error, TyperException):  # a missing argument, an unknown option
        command = getattr(getattr(error, "ctx", None), "command_path", "al-loop")
        print(f"{command}: {' '.join(error.format_message().split())} (see `{command} --help`)", file=sys.stderr)
        return error.exit_code
    lines = str(error).strip().splitlines() or ["no message"]
    print(f"failed: {type(error).__name__}: {lines[0]} (--debug shows where)", file=sys.stderr)
    return 1
