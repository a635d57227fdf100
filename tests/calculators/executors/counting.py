"""A calculator that counts how often it was begun, for tests that name it as ``counting:counted``."""

from __future__ import annotations

import time
from pathlib import Path

from ase.calculators.emt import EMT


def counted(file: str, seconds: float = 0.0, hold: str = "") -> EMT:
    """EMT, after a line in ``file``, ``seconds``, and until there is no file ``hold`` any more."""
    with Path(file).open("a") as log:
        log.write("begun\n")
    time.sleep(seconds)
    while hold and Path(hold).exists():
        time.sleep(0.05)
    return EMT()
