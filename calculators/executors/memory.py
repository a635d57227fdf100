"""How much memory a worker and its children hold, looked at seldom enough to cost nothing."""

from __future__ import annotations

import time
from contextlib import suppress

import psutil

BYTES_PER_GB = 1e9
LOOK_S = 1.0
LOOK_SHARE = 0.02
"""Looking takes at most this share of the time, however many processes there are."""


def resident_gb(pid: int) -> float:
    """Resident memory of the process and all its descendants in GB; 0 if it is gone. Shared pages count each time."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0.0
    total = 0
    for member in family:
        with suppress(psutil.Error):  # ended meanwhile
            total += member.memory_info().rss
    return total / BYTES_PER_GB


def told_excess(held_gb: float, limit_gb: float | None) -> str:
    """What a person hears of a process that held more than it may."""
    return f"used {held_gb:.3g} GB, more than executor.memory_gb {limit_gb:g}"


class MemoryWatch:
    """Tells when a process holds more than it may.

    Args:
        pid: the process; its descendants count, too.
        limit_gb: what they may hold together; None: as much as they like.
    """

    def __init__(self, pid: int, limit_gb: float | None) -> None:
        self._pid, self._limit_gb = pid, limit_gb
        self._next = time.monotonic() + LOOK_S

    def excess_gb(self) -> float | None:
        """What is held, if that is too much; looks about once a second, however often it is asked."""
        if self._limit_gb is None or (began := time.monotonic()) < self._next:
            return None
        held = resident_gb(self._pid)
        now = time.monotonic()
        self._next = now + max(LOOK_S, (now - began) / LOOK_SHARE)
        return held if held > self._limit_gb else None
