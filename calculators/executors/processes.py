"""Ending a process with everything it started."""

from __future__ import annotations

import os
import signal
from collections.abc import Collection
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


def end_orphans(marks: Collection[str]) -> None:
    """Kill what dead workers of this machine left: a worker that is killed in the same moment as its parent ends
    nothing any more. A family whose worker lives is left alone.

    Args:
        marks: how the workers' marks begin, 8 characters each.
    """
    families: dict[str, bool] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            mark = process.environ().get(MARK, "")
            if mark[:8] in marks:
                families[mark] = families.get(mark, False) or _is_worker(process)
    for mark, lives in families.items():
        if not lives:
            end_family(-1, mark)


def _is_worker(process: psutil.Process) -> bool:
    """It leads its session, which tells it from what it forked."""
    leads = os.getsid(process.pid) == process.pid
    return leads and any("calculators.executors.worker" in part for part in process.cmdline())


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
