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
        ``{"pid": ...}`` and its ``identity``, to be remembered and given to ``find``.
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
    return {"pid": child.pid, **identity(psutil.Process(child.pid))}


def identity(process: psutil.Process) -> dict[str, Any]:
    """What tells a process from an earlier or later one with its pid. ``created`` follows the clock, also when that
    jumps; where the kernel says it, ``ticks`` since the boot ``boot`` do not."""
    found: dict[str, Any] = {"created": process.create_time()}
    try:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        found["ticks"] = int(stat.rpartition(")")[2].split()[19])
        found["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError, IndexError):
        found.pop("ticks", None)
    return found


def _same(process: psutil.Process, remembered: Mapping[str, Any]) -> bool:
    now = identity(process)
    if "boot" in now and remembered.get("boot") and "ticks" in remembered:
        return all(now[key] == remembered[key] for key in ("ticks", "boot"))
    return bool(abs(now["created"] - float(remembered["created"])) < START_TIME_TOLERANCE_S)


def find(remembered: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process that was remembered, if it still runs; another one that got the same pid is not it."""
    if not remembered:
        return None
    try:
        process = psutil.Process(int(remembered["pid"]))
        return process if _same(process, remembered) and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, KeyError, TypeError, ValueError):  # gone, somebody else's, or remembered by a damaged file
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
