"""Ending a process with everything it started."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import psutil

MARK = "AL_LOOP_WORKER"
"""Environment variable that every descendant of a worker inherits; it finds those that left the process tree."""


def how_it_ended(code: int) -> str:
    """A process' return code, as ``subprocess`` gives it, in words."""
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def family(mark: str) -> set[psutil.Process]:
    """Every process that carries ``mark``, and all their descendants."""
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark:
                found |= {process, *process.children(recursive=True)}
    return found


def end_family(pid: int, mark: str) -> None:
    """Kill the worker ``pid`` and all that came from it; itself last, when called from inside.

    From outside it goes first: it must not take a child's death for the child's answer. A process is known by its mark,
    never by its number alone: a dead worker's number may be somebody else's by now.
    """
    ended: set[psutil.Process] = set()
    alive = False
    while new := family(mark) - ended:
        alive = alive or any(process.pid == pid for process in new)
        for process in sorted(new, key=lambda one: one.pid != pid):
            if process.pid != os.getpid():
                with suppress(psutil.Error):
                    process.kill()
        ended |= new
    if alive:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
