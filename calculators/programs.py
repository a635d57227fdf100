"""Programs that a calculator starts: where they are, and which version."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from alcore.errors import CalculatorError

LAUNCHERS = {
    "mpirun",
    "mpiexec",
    "orterun",
    "prun",
    "srun",
    "ibrun",
    "aprun",
    "jsrun",
    "env",
    "nice",
    "time",
    "timeout",
}
LAUNCHERS |= {"numactl", "taskset", "stdbuf", "singularity", "apptainer"}
LAUNCHERS |= {f"{name}.{kind}" for name in ("mpirun", "mpiexec") for kind in ("hydra", "openmpi", "mpich")}
SUBCOMMANDS = {"exec", "run"}
"""Of containers, and the shell's own ``exec``."""
VALUES = {"--map-by": 1, "-map-by": 1, "--bind-to": 1, "-bind-to": 1, "--rank-by": 1, "--mca": 2, "-mca": 2, "-genv": 2}
"""Options of launchers with so many values: those whose value may have a program's name (``node``), or with two."""
PREPARATIONS = {"cd", "module", "ml", "source", ".", "export", "unset", "ulimit", "set"}
"""First words of commands that only make ready for the one that counts."""
IMAGE = ".sif"
NO_PROGRAM = re.compile(r"\w+=.*|\d[\d.:,-]*[smhd]?", re.DOTALL)
"""An assignment, or a number, list of numbers or time."""
ASK_LIMIT_S = 30.0


def find_program(command: str) -> Path | None:
    """The program that ``command`` (``"mpirun -np 4 pw.x | tee log"``) is about, or None if it is not on this machine.

    Of a container it is the image, because nobody can look inside from here.
    """
    try:
        lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words = list(lexer)
    except ValueError:  # a quote that is not closed
        return None
    simple: list[list[str]] = [[]]
    for word in words:
        if word and set(word) <= set("|&;<>()"):
            simple.append([])
        else:
            simple[-1].append(word)
    first = next((part for part in simple if part and part[0] not in PREPARATIONS), [])
    return _program_of(first)


def _program_of(words: list[str]) -> Path | None:
    """Of a command without shell operators: the first word that is no launcher, nor an option of one or its value."""
    skip, after_option = 0, False
    for word in words:
        if skip:
            skip -= 1
        elif word.startswith("-"):
            skip, after_option = VALUES.get(word, 0), word not in VALUES
        elif word in SUBCOMMANDS or Path(word).name in LAUNCHERS or NO_PROGRAM.fullmatch(word):
            after_option = False
        elif found := _located(word):
            return found
        elif not after_option:  # else it may be the option's value
            return None
        else:
            after_option = False
    return None


def _located(word: str) -> Path | None:
    if word.endswith(IMAGE) and Path(word).is_file():
        return Path(word)
    found = shutil.which(word)
    return Path(found) if found else None


def version_of(command: str, pattern: str, *arguments: str, where: str, package: str) -> str:
    """The version of the program that ``command`` runs, as ``ask_version`` finds it.

    Raises:
        CalculatorError: the program is not here, or does not say; the mend is to install ``package``.
    """
    program = find_program(command)
    mend = f"install {package}, or set calculator.settings.command, or version if it runs elsewhere"
    if program is None:
        raise CalculatorError(f"{command} is not on this machine", where=where, mend=mend)
    if version := ask_version(program, pattern, *arguments):
        return version
    text = f"{program} does not say its version"
    raise CalculatorError(text, where=where, mend="set calculator.settings.version, or mend command")


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
