"""pyiron's side of a job: a record in SQLite and HDF5 under the run's folder, and nothing anywhere else.

pyiron's settings and its database connection are global to a process, and it prints, sets signal handlers, opens a log
in the current folder and a database in the home folder unless the environment says otherwise when it is imported. So it
has a process of its own for each run, with that environment; here is the desk that stands in it, and who asks the desk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alcore.errors import AlLoopError, CalculatorError, InputError
from calculators.executors.local import WorkerPool, WorkerStartError

UNFINISHED = ("created", "submitted", "running", "collect")
ANSWER_LIMIT_S = 300.0
"""pyiron answers in milliseconds, unless a file system hangs."""

WriteInput = Callable[..., None]
CollectOutput = Callable[..., dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One job as pyiron knows it.

    Attributes:
        name: unique in its project.
        status: pyiron's: one of ``UNFINISHED``, ``finished`` or ``aborted``.
        folder: where it runs.
        number: that of the queue, if there is one.
    """

    name: str
    status: str
    folder: Path
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """What pyiron records of a new job.

    Attributes:
        name: letters, digits and underscores.
        command: what computes it.
        inputs: what ``write_input`` takes as its ``input_dict``.
        write_input, collect_output: importable functions; see ``Project.wrap_executable``.
        cores: of the job.
        queue: name of the queue in pysqa's configuration, or None.
    """

    name: str
    command: str
    inputs: Mapping[str, Any]
    write_input: WriteInput
    collect_output: CollectOutput
    cores: int = 1
    queue: str | None = None


class PyironProject:
    """Jobs in one folder: ``pyiron.db``, ``resources/`` (the queue) and ``jobs/``. Threads may share it.

    Every method raises ``AlLoopError`` with what pyiron said, and ``CalculatorError`` where it cannot be started.

    Args:
        folder: absolute, free of symbolic links.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._own = folder, folder / "pyiron"
        self.queues_folder = folder / "resources" / "queues"
        try:
            for needed in (self._own, self.queues_folder):
                needed.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make pyiron's folders: {error}", where=str(folder)) from error
        self._pool = WorkerPool(_Desk, str(folder), folder=self._own, workers=1)

    def close(self) -> None:
        """End pyiron's process. May be called twice."""
        self._pool.close()

    def folder_of(self, name: str) -> Path:
        """Where the job of that name runs."""
        return _folder_of(self._folder, name)

    def newest(self, stem: str) -> tuple[Record | None, str]:
        """The latest job called ``stem``, ``stem_2``, ..., and the first such name that is free."""
        found: tuple[Record | None, str] = self._ask("newest", stem)
        return found

    def unfinished(self) -> list[Record]:
        """Every job that pyiron believes to wait or run."""
        records: list[Record] = self._ask("unfinished")
        return records

    def create(self, new: NewJob) -> Path:
        """Record a new job and write its input; the folder it is to run in. It is ``submitted`` from then on."""
        folder: Path = self._ask("create", new)
        return folder

    def note_number(self, name: str, number: int) -> None:
        """Record the number that the queue gave the job, where pyiron itself would."""
        self._ask("note_number", name, number)

    def note_status(self, name: str, status: str) -> None:
        """Record that the job is, say, ``running`` or ``aborted``."""
        self._ask("note_status", name, status)

    def collect(self, name: str) -> None:
        """The job has ended: pyiron reads its output into HDF5 and calls it ``finished``."""
        self._ask("collect", name)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            outcome = self._pool.run((method, arguments), self._own, ANSWER_LIMIT_S)
        except WorkerStartError as error:
            mend = "pip install pyiron_base"
            raise CalculatorError(f"pyiron does not start: {error}", where="executor.kind", mend=mend) from error
        if outcome.kind != "done":
            said = (outcome.text or outcome.last_words or outcome.kind).strip().splitlines()[-1]
            raise AlLoopError(f"pyiron in {self._folder} failed at {method}: {said}")
        return outcome.value


def _folder_of(folder: Path, name: str) -> Path:
    return folder / "jobs" / f"{name}_hdf5" / name


class _Desk:
    """In pyiron's own process: points pyiron at ``folder``, then answers."""

    def __init__(self, folder: str) -> None:
        for name in [name for name in os.environ if name.startswith("PYIRON")]:
            del os.environ[name]
        os.environ.update(
            PYIRONPROJECTPATHS=folder,
            PYIRONRESOURCEPATHS=f"{folder}/resources",
            PYIRONSQLTYPE="SQLite",
            PYIRONSQLFILE=f"{folder}/pyiron.db",
            PYIRONPROJECTCHECKENABLED="False",
            PYIRONDISABLE="False",
            PYIRONWRITEWORKDIRWARNINGS="False",
            HDF5_USE_FILE_LOCKING="FALSE",  # only this process writes; some shared file systems cannot lock
        )
        from pyiron_base import Project

        self._folder = Path(folder)
        self._project = Project(str(self._folder / "jobs"))

    def __call__(self, question: tuple[str, tuple[Any, ...]]) -> Any:
        method, arguments = question
        return getattr(self, method)(*arguments)

    def newest(self, stem: str) -> tuple[Record | None, str]:
        record, number, name = None, 1, stem
        while self._project.get_job_id(name) is not None:
            record = self._record(name)
            number += 1
            name = f"{stem}_{number}"
        return record, name

    def unfinished(self) -> list[Record]:
        table = self._project.job_table()
        if len(table) == 0:
            return []
        return [self._record(str(name)) for name in table.job[table.status.isin(UNFINISHED)]]

    def create(self, new: NewJob) -> Path:
        job = self._project.wrap_executable(
            executable_str=new.command,
            job_name=new.name,
            write_input_funct=new.write_input,
            collect_output_funct=new.collect_output,
            input_dict=dict(new.inputs),
        )
        if new.queue is not None:
            job.server.cores = new.cores
            job.server.queue = new.queue
        job.save()
        job.project_hdf5.create_working_directory()
        new.write_input(input_dict=dict(new.inputs), working_directory=job.working_directory)
        job.status.submitted = True
        return Path(job.working_directory)

    def note_number(self, name: str, number: int) -> None:
        job = self._project.load(name)
        with job.server.unlocked():
            job.server.queue_id = number
        job.project_hdf5.write_dict(data_dict={"server": job.server.to_dict()})

    def note_status(self, name: str, status: str) -> None:
        self._project.db.set_job_status(status=status, job_id=self._project.get_job_id(name))

    def collect(self, name: str) -> None:
        job = self._project.load(name)
        job.status.collect = True
        job.run()

    def _record(self, name: str) -> Record:
        status = str(self._project.get_job_status(name))
        queued = status in UNFINISHED and self._project.load(name).server.queue_id
        folder = _folder_of(self._folder, name)
        return Record(name=name, status=status, folder=folder, number=int(queued) if queued else None)
