"""Processes that outlive the command that started them: found again by pid *and* start time, stopped by pid."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

START_TIME_TOLERANCE_S = 2.0
"""The kernel's start time is read relative to a boot time that clock corrections may move a little."""


def start_detached(command: Sequence[str], *, env: Mapping[str, str], log: Path) -> dict[str, Any]:
    """Starts ``command`` in a session of its own, its output appended to ``log``.

    Returns:
        ``{"pid": ..., "created": ...}``, to be remembered and given to ``find``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        child = subprocess.Popen(
            command,
            env=dict(env),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    return {"pid": child.pid, "created": psutil.Process(child.pid).create_time()}


def find(remembered: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that was remembered, if it still runs; another one that got the same pid is not it."""
    if not remembered:
        return None
    try:
        process = psutil.Process(int(remembered["pid"]))
        same = abs(process.create_time() - float(remembered["created"])) < START_TIME_TOLERANCE_S
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """Every process of this user whose environment says ``name=value``; it is inherited, so a service's offspring
    is found even after its parent died."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # ended meanwhile, or somebody else's
            continue
    return found


def stop(processes: Iterable[psutil.Process], grace_s: float = 10.0) -> None:
    """SIGTERM, then SIGKILL for what is left after ``grace_s``."""
    asked = []
    for process in processes:
        try:
            process.terminate()
            asked.append(process)
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(asked, timeout=grace_s)
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=5)
