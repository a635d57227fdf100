"""The inside of one job, anywhere: ``python -m calculators.job FOLDER`` computes what ``FOLDER/job.json`` asks.

Two processes: one that watches (time, memory, signals), and one that computes as a worker would, with its output in
``stdout.txt`` and ``stderr.txt``. ``begun.json`` is there from the first moment, and a folder never begins twice.
``outcome.npz`` appears in one step, complete, and carries the job's token; without it there is no outcome.
Nothing depends on the current folder, the home folder or an installed al-loop.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any

from alcore.errors import CalculatorError
from alcore.files import write_whole
from calculators import outcomes
from calculators.executors.local import STARTUP_LIMIT_S, THREAD_VARIABLES, tail
from calculators.executors.memory import LOOK_S, MemoryWatch, told_excess
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import MARK, end_family, how_it_ended

if TYPE_CHECKING:
    from alcore.types import Structure
    from calculators.base import ResolvedCalculator
    from calculators.measure import Measurement

JOB, BEGUN = "job.json", "begun.json"
BEGUN_BEFORE = 75
"""Exit code of a job whose folder has begun before (a queue that starts a job twice, or two submissions)."""
FULL_DISK_S = 5.0
"""So often a job tries to write its outcome to a disk that is full, until its time is over."""

# Our sys.path travels in job.json: al-loop need not be installed there, and programs must not inherit a PYTHONPATH.
_BOOT = (
    'import json,sys; sys.path[:]=json.load(open(sys.argv[1]+"/job.json"))["path"]; '
    "from calculators.job import {0}; sys.exit({0}(sys.argv[1]))"
)


def describe_job(
    resolved: ResolvedCalculator,
    structure: Structure,
    *,
    key: str,
    retries: int,
    timeout_s: float,
    threads: int = 1,
    memory_gb: float | None = None,
) -> str:
    """The text of a new ``job.json``. Numbers are written so that they are read back exactly.

    Args:
        resolved: the calculator, its settings completed.
        structure: what is asked.
        key: of the label.
        retries: rungs of the ladder that may be climbed.
        timeout_s: wall time of all attempts together, s; the start of Python is not counted.
        threads: of each process.
        memory_gb: GB that all its processes together may hold, or None.
    """
    moments = structure.magnetic_moments
    arrays = {name: getattr(structure, name).tolist() for name in ("numbers", "positions", "cell", "pbc", "fixed")}
    moments_list = None if moments is None else moments.tolist()
    job = {
        "token": uuid.uuid4().hex,
        "key": key,
        "host": socket.gethostname(),
        "calculator": resolved.name,
        "settings": resolved.settings.model_dump(mode="json"),
        "fingerprint": resolved.fingerprint,
        "facts": dict(resolved.facts),
        "retries": retries,
        "timeout_s": timeout_s,
        "threads": threads,
        "memory_gb": memory_gb,
        "path": [entry or os.getcwd() for entry in sys.path],
        "structure": {**arrays, "charge": float(structure.charge), "magnetic_moments": moments_list},
    }
    return json.dumps(job, default=str)


def write_input(input_dict: Mapping[str, Any], working_directory: str) -> None:
    """``input_dict["job"]`` is the text that ``describe_job`` made."""
    write_whole(Path(working_directory) / JOB, str(input_dict["job"]).encode(), n_folders=3)


def command(folder: Path) -> str:
    """The shell command of the job in ``folder``."""
    return shlex.join([sys.executable, "-P", "-c", _BOOT.format("main"), str(folder)])


def read_job(folder: Path) -> dict[str, Any] | None:
    """What ``describe_job`` wrote there, or None."""
    try:
        job: dict[str, Any] = json.loads((folder / JOB).read_bytes())
        return job
    except (OSError, ValueError):
        return None


def has_begun(folder: Path) -> bool:
    """Whether a process has started to work on the job there."""
    return (folder / BEGUN).exists()


def read_outcome(folder: Path) -> JobOutcome | None:
    """How the job in ``folder`` ended; None if it has not, or if what lies there belongs to another job.

    Raises:
        RefusedError: the calculator where the job ran is not what the fingerprint says.
    """
    job = read_job(folder)
    if job is None:
        return None
    try:
        return outcomes.read_outcome(folder, token=job["token"])
    except outcomes.RefusedError as error:
        raise outcomes.RefusedError(error.message, where=f"calculator {job['calculator']}") from None


def collect_output(working_directory: str) -> dict[str, Any]:
    """What pyiron keeps of a job: the outcome in plain values."""
    outcome = read_outcome(Path(working_directory))
    if outcome is None:
        return {"kind": "none"}
    kept: dict[str, Any] = {"kind": outcome.kind, "text": outcome.text, "seconds": outcome.seconds}
    if outcome.kind == "done":
        answer: Measurement = outcome.value
        kept |= {"status": answer.status, "reason": answer.reason, "energy_ev": answer.energy_ev}
        for name in ("forces", "stress", "magnetic_moments"):
            if getattr(answer, name) is not None:
                kept[name] = getattr(answer, name)
    return kept


def main(place: str) -> int:
    """Start the process that computes, watch it, and see to it that there is an outcome; the exit code.

    A job that is ended from outside (a signal) leaves no outcome, but no process either.
    """
    folder = Path(place).absolute()
    job = read_job(folder)
    if job is None:
        print(f"al-loop: there is no job in {folder}", file=sys.stderr)
        return 2
    try:
        with (folder / BEGUN).open("x") as file:
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}, file)
    except FileExistsError:
        print(f"al-loop: the job in {folder} has begun before", file=sys.stderr)
        return BEGUN_BEFORE
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    ready, theirs = os.pipe()
    environment = os.environ | {name: str(job["threads"]) for name in THREAD_VARIABLES} | {MARK: job["token"]}
    arguments = [sys.executable, "-P", "-c", _BOOT.format("compute"), str(folder), str(theirs)]
    with (folder / "stdout.txt").open("ab") as out, (folder / "stderr.txt").open("ab") as err:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            cwd=folder,
            env=environment,
            start_new_session=True,
            pass_fds=(theirs,),
        )
    os.close(theirs)
    try:
        outcome = _watch(process, ready, job["timeout_s"], job["memory_gb"])
    finally:
        end_family(process.pid, job["token"])
        process.wait()
    if outcome is not None and not (folder / outcomes.OUTCOME).exists():
        _keep(folder, job, replace(outcome, last_words=tail(folder / "stderr.txt")))
    return 0


def _watch(process: subprocess.Popen[bytes], ready: int, timeout_s: float, memory_gb: float | None) -> JobOutcome:
    """How ``process`` ended, if it leaves no outcome itself; its start is not counted."""
    begun = time.monotonic()
    select([ready], [], [], STARTUP_LIMIT_S)  # readable once it is ready, or dead
    started = bool(os.read(ready, 1)) if select([ready], [], [], 0)[0] else False
    if not started and process.poll() is None:
        return JobOutcome(kind="died", text=f"not ready within {STARTUP_LIMIT_S:g} s")
    begun, memory = time.monotonic(), MemoryWatch(process.pid, memory_gb)
    while (left := begun + timeout_s - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=min(left, LOOK_S) if memory_gb else left)
            return JobOutcome(kind="died", text=how_it_ended(code), seconds=time.monotonic() - begun)
        if (held := memory.excess_gb()) is not None:
            return JobOutcome(kind="memory", text=told_excess(held, memory_gb), seconds=time.monotonic() - begun)
    return JobOutcome(kind="timeout", seconds=time.monotonic() - begun)


def compute(place: str) -> None:
    """The process that computes; ``sys.argv[2]`` is the descriptor of the pipe that hears when it is ready."""
    import faulthandler

    from calculators.executors.worker import ENDING, watch_parent

    folder, ready = Path(place), int(sys.argv[2])
    os.set_inheritable(ready, False)
    faulthandler.enable(all_threads=False)
    parent = os.getppid()
    threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    job = read_job(folder)
    assert job is not None
    try:
        work, structure = _prepared(job)
    except BaseException as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, CalculatorError) else f"{type(error).__name__}: {error}"
        _keep(folder, job, JobOutcome(kind="died"), refused=said)
        return
    os.write(ready, b"r")
    begun = time.monotonic()
    try:
        outcome = JobOutcome(kind="done", value=work(structure), seconds=time.monotonic() - begun)
    except BaseException:
        outcome = JobOutcome(kind="raised", text=traceback.format_exc(), seconds=time.monotonic() - begun)
    if not ENDING.is_set() and (os.getppid() == parent or outcomes.went_well(outcome)):
        _keep(folder, job, outcome)  # else what a child's death made of this is no answer
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever a library wants to do at its end may hang; all that counts is on the disk


def _keep(folder: Path, job: Mapping[str, Any], outcome: JobOutcome, refused: str = "") -> None:
    """While the disk is full we wait: what has been computed is worth more than the rest of the job's time."""
    of = {name: job[name] for name in ("token", "key", "fingerprint")}
    while True:
        try:
            outcomes.write_outcome(folder, outcome, **of, refused=refused)
            return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        time.sleep(FULL_DISK_S)


def _prepared(job: Mapping[str, Any]) -> tuple[Callable[[Structure], Measurement], Structure]:
    """What a worker does at its start; and the structure.

    Raises:
        CalculatorError: the calculator is not what the fingerprint says.
    """
    from alcore.types import Structure
    from calculators.attempts import prepare_worker
    from calculators.base import ResolvedCalculator
    from calculators.registry import get_calculator

    entry = get_calculator(job["calculator"])
    settings = entry.settings_model.model_validate(job["settings"])
    resolved = ResolvedCalculator(entry=entry, settings=settings, facts=job["facts"], fingerprint=job["fingerprint"])
    return prepare_worker((resolved, job["retries"])), Structure(**job["structure"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
