"""Processes that calculations leave behind: known by a mark they inherit, or by the folder they stand in."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

VARIABLE = "AL_LOOP_WATCH"
GONE_WITHIN_S = 5.0
"""The kernel takes a moment to end a killed process."""


class Watch:
    """While it is open, whatever this process starts carries a mark in its environment.

    A process that drops its environment and leaves its family (``env -i setsid program &``) is still known by its
    working folder, as long as that lies in ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mark = uuid.uuid4().hex
        self._before: str | None = None

    def __enter__(self) -> Self:
        self._before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self._mark
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.environ.pop(VARIABLE)
        if self._before is not None:
            os.environ[VARIABLE] = self._before
        self.end_all(wait_s=0.0)

    def running(self) -> dict[int, str]:
        """Name of every such process by its number; this one is not among them."""
        return {process.pid: name for process, name in self._found()}

    def end_all(self, wait_s: float = GONE_WITHIN_S) -> list[str]:
        """Names and numbers of those that do not end by themselves soon; they are killed."""
        psutil.wait_procs([process for process, _ in self._found()], timeout=wait_s)
        left = self._found()
        for process, _ in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs([process for process, _ in left], timeout=GONE_WITHIN_S)
        return [f"{name} (pid {process.pid})" for process, name in left]

    def _found(self) -> list[tuple[psutil.Process, str]]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and self._is_ours(process):
                    found.append((process, process.name()))
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        """A process of another user, or a dead one, cannot be asked and is not ours."""
        if process.environ().get(VARIABLE) == self._mark:
            return True
        return Path(process.cwd()).is_relative_to(self._folder)
