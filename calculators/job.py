"""The inside of one job, anywhere: ``python -m calculators.job FOLDER`` computes what ``FOLDER/job.json`` asks.

Two processes: one that watches (time, memory, signals), and one that computes as a worker would, with its output in
``stdout.txt`` and ``stderr.txt``. ``begun.json`` is there from the first moment, and a folder never begins twice.
``outcome.npz`` appears in one step, complete, and carries the job's token; without it there is no outcome.
Nothing depends on the current folder, the home folder or an installed al-loop.
"""

from __future__ import annotations

import io
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
from dataclasses import fields
from pathlib import Path
from select import select
from typing import TYPE_CHECKING, Any

from alcore.errors import CalculatorError
from calculators.executors.local import STARTUP_LIMIT_S, THREAD_VARIABLES, tail
from calculators.executors.memory import LOOK_S, MemoryWatch, told_excess
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import MARK, end_family, how_it_ended

if TYPE_CHECKING:
    from alcore.types import Structure
    from calculators.base import ResolvedCalculator
    from calculators.measure import Measurement

JOB, BEGUN, OUTCOME = "job.json", "begun.json", "outcome.npz"
BEGUN_BEFORE = 75
"""Exit code of a job whose folder has begun before (a queue that starts a job twice, or two submissions)."""

# Our sys.path travels in job.json: al-loop need not be installed there, and programs must not inherit a PYTHONPATH.
_BOOT = (
    'import json,sys; sys.path[:]=json.load(open(sys.argv[1]+"/job.json"))["path"]; '
    "from calculators.job import {0}; sys.exit({0}(sys.argv[1]))"
)


class RefusedError(CalculatorError):
    """The calculator could not even be set up where the job ran; more jobs would end the same way."""


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
    _write_whole(Path(working_directory) / JOB, str(input_dict["job"]).encode())


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
    import numpy as np

    job = read_job(folder)
    try:
        with np.load(folder / OUTCOME, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        answer = json.loads(arrays.pop("json").tobytes())
    except FileNotFoundError:
        return None
    except Exception:  # never written by us, or not all of it has arrived
        return None
    if job is None or answer["token"] != job["token"]:
        return None
    if answer["kind"] == "refused":
        raise RefusedError(answer["text"], where=f"calculator {job['calculator']}")
    value = answer.pop("value")
    told = {field.name: answer[field.name] for field in fields(JobOutcome) if field.name in answer}
    return JobOutcome(**told, value=None if value is None else _to_measurement(_decoded(value, arrays)))


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


def write_outcome(folder: Path, token: str, outcome: JobOutcome, refused: str = "") -> None:
    """In one step: a reader sees all of it or nothing.

    Args:
        folder: the job's.
        token: the job's.
        outcome: how it ended.
        refused: why the calculator could not even be set up; the outcome then does not count.
    """
    import numpy as np

    arrays: dict[str, Any] = {}
    answer = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
    if outcome.value is not None:
        values = {field.name: getattr(outcome.value, field.name) for field in fields(outcome.value)}
        inspection = values["inspection"]
        values["inspection"] = {field.name: getattr(inspection, field.name) for field in fields(inspection)}
        answer["value"] = _encoded(values, arrays)
    answer |= {"token": token} | ({"kind": "refused", "text": refused} if refused else {})
    arrays["json"] = np.frombuffer(json.dumps(answer, default=repr).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    _write_whole(folder / OUTCOME, buffer.getvalue())


def _write_whole(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some shared file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _encoded(value: Any, arrays: dict[str, Any]) -> Any:
    """Plain values, with each array moved to ``arrays``."""
    import numpy as np

    if isinstance(value, np.ndarray) and value.dtype != object:
        arrays[name := f"array{len(arrays)}"] = value
        return {"__array__": name}
    if isinstance(value, np.ndarray | np.generic):
        return _encoded(value.tolist(), arrays)
    if isinstance(value, Mapping):
        return {str(key): _encoded(part, arrays) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_encoded(part, arrays) for part in value]
    return value


def _decoded(value: Any, arrays: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__array__"}:
            return arrays[value["__array__"]]
        return {key: _decoded(part, arrays) for key, part in value.items()}
    return [_decoded(part, arrays) for part in value] if isinstance(value, list) else value


def _to_measurement(values: dict[str, Any]) -> Measurement:
    from calculators.base import Inspection
    from calculators.measure import Measurement

    values["inspection"] = Inspection(**values["inspection"])
    values["geometries"] = tuple(tuple(geometry) for geometry in values["geometries"])
    values["attempts"] = tuple(values["attempts"])
    return Measurement(**values)


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
    if outcome is not None and not (folder / OUTCOME).exists():
        told = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
        write_outcome(folder, job["token"], JobOutcome(**told | {"last_words": tail(folder / "stderr.txt")}))
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

    from calculators.executors.worker import watch_parent

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
        write_outcome(folder, job["token"], JobOutcome(kind="died"), refused=said)
        return
    os.write(ready, b"r")
    begun = time.monotonic()
    try:
        outcome = JobOutcome(kind="done", value=work(structure), seconds=time.monotonic() - begun)
    except BaseException:
        outcome = JobOutcome(kind="raised", text=traceback.format_exc(), seconds=time.monotonic() - begun)
    if os.getppid() == parent:  # else all is being ended, and what a child's death made of this is no answer
        write_outcome(folder, job["token"], outcome)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever a library wants to do at its end may hang; all that counts is on the disk


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
