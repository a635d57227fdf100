"""A calculator that counts how often it was begun (``counting:counted``), and some that count and fail."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import suppress
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


def unconverged(file: str, hold: str = "") -> EMT:
    """Never gets there, after a line in ``file`` and when there is no file ``hold`` any more."""
    counted(file, hold=hold)
    raise RuntimeError("SCF did not converge")


def fills(file: str) -> EMT:
    """EMT, after a line in ``file``, on a disk that has no room left, even for what is printed."""
    counted(file)
    with suppress(OSError), open("filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(1024))
    with suppress(OSError):  # at once, or when its buffer is written out
        print("said with nowhere to go")
    return EMT()


def depends(file: str, pid_file: str) -> EMT:
    """EMT, after a line in ``file``, once a program that it starts has ended, however that came."""
    program = subprocess.Popen(["sleep", "300"])
    Path(pid_file).write_text(f"{os.getpid()} {program.pid}")
    program.wait()
    return counted(file)
