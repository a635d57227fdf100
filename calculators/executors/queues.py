"""Queueing systems, through pysqa: its configuration, written from the user's settings, and a few careful questions."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alcore.errors import AlLoopError, CalculatorError, InputError

QUEUE_NAME = "al_loop"
QUEUE_LOG = "queue.out"
COMMAND_LIMIT_S = 60.0
"""A queueing system that does not answer within this is asked again later."""

_NEEDS = {"sge": "defusedxml", "flux": "flux-python"}
_NOT_NOW = re.compile(r"unable to contact|timed out|temporar|try again|connection (refused|failure)|communicat", re.I)
_FULL = re.compile(r"MaxSubmit|MaxJobs|GrpSubmit|job submit limit|violates accounting/QOS policy", re.I)
_TOO_LARGE = re.compile(r"\b(?:QOS|Assoc)(?!(?:Max|Grp)(?:Submit)?Job)[A-Z]\w+")
"""SLURM ends a job that no wait would make fit with the same general words, but names another limit."""
_WALLTIME = re.compile(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)")


@dataclass(frozen=True, kw_only=True)
class QueueSpec:
    """Where jobs are queued.

    Attributes:
        system: one of ``SYSTEMS``.
        walltime_s: of a job, s.
        partition: partition or queue of the system, or None for its default.
        submit_options: more options of the submission, one directive line each, e.g. ``--account=abc``.
        poll_s: how often the queue is asked, s; one question for all jobs.
        grace_s: so long after a job has left the queue its output may still be on its way through the file system, s.
    Raises:
        InputError: an unknown system, or a number that makes no sense.
    """

    system: str
    walltime_s: float
    partition: str | None = None
    submit_options: tuple[str, ...] = ()
    poll_s: float = 10.0
    grace_s: float = 45.0

    def __post_init__(self) -> None:
        if self.system == "moab":
            why = "pysqa can submit to moab, but not tell a job's number or list its jobs"
            raise InputError(why, where="executor.queue", mend="use the system below it: torque or slurm")
        if self.system not in SYSTEMS:
            raise InputError(
                f"unknown queue {self.system!r}", where="executor.queue", mend=f"known: {', '.join(SYSTEMS)}"
            )
        for name in ("walltime_s", "poll_s", "grace_s"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}", where="executor", mend="it must be positive")


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What one job takes, and what is done before its command.

    Attributes:
        cores: all cores of the job.
        threads: of each of its processes; ``cores // threads`` processes.
        memory_gb: GB of memory of the whole job, or None for the system's default.
        modules: environment modules that are loaded first; one that cannot be loaded ends the job.
        prologue: shell lines after that.
    Raises:
        InputError: a number that makes no sense.
    """

    cores: int = 1
    threads: int = 1
    memory_gb: float | None = None
    modules: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("cores", "threads", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} is {value}", where="executor", mend="it must be positive")

    def preamble(self) -> list[str]:
        """Shell lines that come before the command."""
        loads = [
            f"module load {shlex.quote(name)} || "
            f"{{ echo {shlex.quote(f'al-loop: cannot load module {name}')} >&2; exit 90; }}"
            for name in self.modules
        ]
        return [*loads, *self.prologue]

    @property
    def shell(self) -> list[str]:
        """``module`` is a function of login shells."""
        return ["/bin/bash", "-l"] if self.modules else ["/bin/bash"]


def walltime_s(text: str) -> float:
    """Seconds of ``[days-]hours:minutes:seconds``.

    Raises:
        InputError: it is not of that form, or zero.
    """
    found = _WALLTIME.fullmatch(text.strip())
    seconds = 0.0
    if found:
        days, hours, minutes, rest = (int(part or 0) for part in found.groups())
        seconds = float(((24 * days + hours) * 60 + minutes) * 60 + rest)
    if not seconds:
        mend = "write [days-]hours:minutes:seconds, e.g. 12:00:00"
        raise InputError(f"{text!r} is no wall time", where="executor.walltime", mend=mend)
    return seconds


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{rest:02d}"


def _slurm(spec: QueueSpec, take: Resources) -> list[str]:
    lines = [
        "--job-name={{job_name}}",
        "--chdir={{working_directory}}",
        f"--output={{{{working_directory}}}}/{QUEUE_LOG}",
        f"--ntasks={max(1, take.cores // take.threads)}",
        f"--cpus-per-task={min(take.cores, take.threads)}",
        f"--time={_clock(spec.walltime_s)}",
        "--no-requeue",  # a job that begins twice would find the files of its first beginning
    ]
    lines += [f"--mem={int(1024 * take.memory_gb)}M"] if take.memory_gb else []
    return lines + ([f"--partition={spec.partition}"] if spec.partition else [])


def _sge(spec: QueueSpec, take: Resources) -> list[str]:
    lines = ["-N {{job_name}}", "-wd {{working_directory}}", "-S /bin/bash", "-j y", "-r n"]
    lines += [f"-o {{{{working_directory}}}}/{QUEUE_LOG}", f"-l h_rt={int(spec.walltime_s)}", "-V"]
    # the name of a parallel environment is the site's own: submit_options: ["-pe mpi 16"]
    lines += [f"-l h_vmem={int(1024 * take.memory_gb / take.cores)}M"] if take.memory_gb else []
    return lines + ([f"-q {spec.partition}"] if spec.partition else [])


def _torque(spec: QueueSpec, take: Resources) -> list[str]:
    lines = ["-N {{job_name}}", "-S /bin/bash", "-j oe", "-r n", "-V", f"-o {{{{working_directory}}}}/{QUEUE_LOG}"]
    lines += [f"-l nodes=1:ppn={take.cores}", f"-l walltime={_clock(spec.walltime_s)}"]
    lines += [f"-l mem={int(1024 * take.memory_gb)}mb"] if take.memory_gb else []
    return lines + ([f"-q {spec.partition}"] if spec.partition else [])


def _lsf(spec: QueueSpec, take: Resources) -> list[str]:
    lines = ["-J {{job_name}}", "-cwd {{working_directory}}", f"-oo {{{{working_directory}}}}/{QUEUE_LOG}", "-rn"]
    lines += [f"-n {take.cores}", f"-W {max(1, int(spec.walltime_s // 60))}"]  # minutes
    lines += [f"-M {int(1024 * take.memory_gb)}MB"] if take.memory_gb else []
    return lines + ([f"-q {spec.partition}"] if spec.partition else [])


def _flux(spec: QueueSpec, take: Resources) -> list[str]:
    lines = [
        "--job-name={{job_name}}",
        "--cwd={{working_directory}}",
        f"--output={{{{working_directory}}}}/{QUEUE_LOG}",
    ]
    lines += [f"--nslots={max(1, take.cores // take.threads)}", f"--cores-per-slot={min(take.cores, take.threads)}"]
    lines += [f"--time-limit={int(spec.walltime_s)}s"]
    return lines + ([f"--queue={spec.partition}"] if spec.partition else [])


SYSTEMS: dict[str, tuple[str, Any]] = {
    "slurm": ("#SBATCH", _slurm),
    "sge": ("#$", _sge),
    "torque": ("#PBS", _torque),
    "lsf": ("#BSUB", _lsf),
    "flux": ("# flux:", _flux),
}
"""How a directive begins in each system's scripts, and the directives of a job."""


def script_template(spec: QueueSpec, take: Resources) -> str:
    """The Jinja template of a job's script; pysqa fills in ``job_name``, ``working_directory`` and ``command``."""
    prefix, directives = SYSTEMS[spec.system]
    lines = [f"{prefix} {line}" for line in directives(spec, take)]
    # the user's own lines are no templates
    lines += [f"{prefix} {{% raw %}}{option}{{% endraw %}}" for option in spec.submit_options]
    lines += ["{% raw %}" + line + "{% endraw %}" for line in take.preamble()]
    return "\n".join([f"#!{' '.join(take.shell)}", *lines, "{{command}}", ""])


def write_configuration(folder: Path, spec: QueueSpec, take: Resources) -> None:
    """pysqa's ``queue.yaml`` and template, which pyiron finds in ``folder``, too."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    script = f"{spec.system}.sh"
    (folder / script).write_text(script_template(spec, take), encoding="utf-8")
    queue = {"script": script, "cores_min": take.cores, "cores_max": take.cores, "run_time_max": int(spec.walltime_s)}
    content = {"queue_type": spec.system.upper(), "queue_primary": QUEUE_NAME, "queues": {QUEUE_NAME: queue}}
    (folder / "queue.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


class QueueSilentError(AlLoopError):
    """The queueing system gave no usable answer this time; that says nothing about any job."""


class QueueFullError(QueueSilentError):
    """A limit on how many jobs a user may have there: the job was not taken, and will be when others have ended."""


class Queue:
    """One queueing system; any thread may ask.

    Args:
        spec: which.
        take: what each job takes.
        folder: where pysqa's configuration is written.
    Raises:
        CalculatorError: pysqa cannot drive it here.
    """

    def __init__(self, spec: QueueSpec, take: Resources, folder: Path) -> None:
        self.spec, self._lock = spec, threading.Lock()
        self._listed: dict[int, str] | None = None
        self._listed_at, self._next_question = 0.0, 0.0
        try:
            write_configuration(folder, spec, take)
        except OSError as error:
            raise InputError(f"cannot write the queue's configuration: {error}", where=str(folder)) from error
        try:
            from pysqa import QueueAdapter

            self._adapter = QueueAdapter(directory=str(folder), execute_command=_execute)
        except ImportError as error:
            mend = f"pip install {_NEEDS.get(spec.system, 'pyiron_base pysqa')}"
            raise CalculatorError(f"pysqa cannot drive {spec.system}: {error}", where="executor", mend=mend) from error

    def submit(self, name: str, folder: Path, command: str) -> int:
        """The number of the job.

        Raises:
            CalculatorError: the system refuses it; in its own words.
            QueueFullError: not as long as so many jobs are there.
            QueueSilentError: it does not answer; the job may have been taken.
        """
        try:
            number = self._adapter.submit_job(
                queue=QUEUE_NAME, job_name=name, working_directory=str(folder), command=f"exec {command}"
            )
        except _CommandError as error:
            if _FULL.search(str(error)) and not _TOO_LARGE.search(str(error)):
                raise QueueFullError(str(error)) from error
            if error.silent:
                raise QueueSilentError(str(error)) from error
            raise CalculatorError(str(error), where=f"queue {self.spec.system}", mend=error.mend) from error
        except (ValueError, IndexError) as error:
            raise QueueSilentError(f"{self.spec.system} did not say a job's number: {error}") from error
        with self._lock:
            self._next_question = 0.0  # the list is older than the job
        return int(number)

    def listed(self, since: float) -> Mapping[int, str] | None:
        """Names of jobs that wait or run, by number, as asked after ``since`` (``time.monotonic()``); None if the last
        question is older or was not answered. All threads share one question every ``poll_s``, give or take a fifth.

        Raises:
            CalculatorError: the system's command is not there.
        """
        with self._lock:
            now = time.monotonic()
            if now >= self._next_question:
                try:
                    self._listed, self._listed_at = self.ask(), now
                except QueueSilentError:
                    self._listed = None
                self._next_question = time.monotonic() + self.spec.poll_s * random.uniform(0.8, 1.2)
            return self._listed if self._listed_at > since else None

    def ask(self) -> dict[int, str]:
        """Names of jobs that wait or run, by number, as the system says now.

        Raises:
            QueueSilentError: no usable answer.
            CalculatorError: the system's command is not there.
        """
        try:
            table = self._adapter.get_queue_status()
        except _CommandError as error:
            if error.mend:
                raise CalculatorError(str(error), where=f"queue {self.spec.system}", mend=error.mend) from error
            raise QueueSilentError(str(error)) from error
        except Exception as error:  # pysqa reads tables of five systems; a line it does not expect may raise anything
            raise QueueSilentError(f"the list of {self.spec.system} cannot be read: {error}") from error
        return {
            int(number): str(name).strip()
            for number, name, status in zip(table.jobid, table.jobname, table.status, strict=True)
            if status not in ("finished", "error")
        }

    def cancel(self, number: int) -> None:
        """Best effort: a job that is not there any more is no error."""
        try:
            self._adapter.delete_job(process_id=number)
        except _CommandError:
            return


class _CommandError(Exception):
    """A command of the queueing system failed."""

    def __init__(self, text: str, *, mend: str = "", silent: bool = False) -> None:
        super().__init__(text)
        self.mend, self.silent = mend, silent


def _execute(
    commands: Sequence[str],
    working_directory: str | None = None,
    split_output: bool = True,
    shell: bool = False,
    error_filename: str = "",
) -> str | list[str]:
    """pysqa's way to a command, with a time limit, and with what the command says about a failure."""
    program, *arguments = [str(part) for part in commands]
    script = ""
    if program == "squeue":
        arguments += ["--user", str(os.getuid())]
    if program == "bsub":  # reads its directives from stdin only
        script = Path(arguments.pop()).read_text(encoding="utf-8")
    # inside another job its limits would be taken for ours
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            [program, *arguments],
            cwd=working_directory,
            env=environment,
            input=script,
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=COMMAND_LIMIT_S,
        )
    except FileNotFoundError as error:
        mend = "run this on a login node of the cluster, or remove executor.queue"
        raise _CommandError(f"{program} is not on this machine", mend=mend) from error
    except subprocess.TimeoutExpired as error:
        raise _CommandError(f"{program} did not answer within {COMMAND_LIMIT_S:g} s", silent=True) from error
    if done.returncode:
        said = " | ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        silent = bool(_NOT_NOW.search(said))
        raise _CommandError(f"{program} says: {said or f'exit code {done.returncode}'}", silent=silent)
    return done.stdout.split("\n") if split_output else done.stdout
