"""Programs that a calculator starts: where they are, and which version."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

LAUNCHERS = {"mpirun", "mpiexec", "mpiexec.hydra", "srun", "env", "nice", "time", "ibrun", "aprun", "jsrun", "numactl"}
ASK_LIMIT_S = 30.0


def find_program(command: str) -> Path | None:
    """The program that ``command`` (``"mpirun -np 4 pw.x"``) runs in the end, or None if it is not on this machine."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed
        return None
    for word in reversed(words):
        found = shutil.which(word)
        if found and Path(found).name not in LAUNCHERS:
            return Path(found)
    return None


def ask_version(program: Path, pattern: str, *arguments: str, text: str = "") -> str:
    """What the first group of ``pattern`` finds in the program's output, or "".

    Args:
        program: its path; asked once as long as the file stays the same.
        pattern: regular expression.
        arguments: of the command line.
        text: what it reads from its standard input.
    """
    status = program.stat()
    return _ask(str(program), (status.st_mtime_ns, status.st_size), pattern, arguments, text)


@cache
def _ask(program: str, _stamp: tuple[int, int], pattern: str, arguments: tuple[str, ...], text: str) -> str:
    with tempfile.TemporaryDirectory(prefix="al-loop-version-") as folder:
        try:
            answer = subprocess.run(
                [program, *arguments],
                input=text.encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                timeout=ASK_LIMIT_S,
                check=False,  # a program that is asked for nothing else may well call that an error
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
    match = re.search(pattern, answer.stdout.decode(errors="replace"))
    return match[1] if match else ""
