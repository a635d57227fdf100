"""The reference calculator of the crash test: EMT that takes its time and says on disk when it starts and ends."""

from __future__ import annotations

import os
import time
from typing import Any

from ase.calculators.emt import EMT

from alcore.identity import label_key
from alcore.types import Structure

LOG, FINGERPRINT = "CRASH_TEST_LOG", "CRASH_TEST_FINGERPRINT"
"""Environment variables: the file to write to; the calculator's fingerprint, which makes a geometry a label's key."""


class SlowEMT(EMT):
    """Writes ``start KEY PID TIME`` and ``end KEY PID TIME``, each on the disk before it goes on."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def calculate(self, atoms: Any = None, *arguments: Any, **more: Any) -> None:
        key = label_key(Structure.from_atoms(atoms), os.environ[FINGERPRINT])
        _note(f"start {key}")
        time.sleep(self._seconds)
        super().calculate(atoms, *arguments, **more)
        _note(f"end {key}")


def calculator(seconds: float = 1.0) -> SlowEMT:
    """What a run file names; ``seconds`` a label."""
    return SlowEMT(seconds)


def _note(event: str) -> None:
    line = f"{event} {os.getpid()} {time.time():.4f}\n"
    file = os.open(os.environ[LOG], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
        os.fsync(file)
    finally:
        os.close(file)
