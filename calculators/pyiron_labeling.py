"""Reference labels as pyiron jobs, on this machine or through a queueing system.

``PyironLabeler(resolved, folder, workers=1, *, queue: QueueSpec | None = None, resources: Resources = Resources(),
timeout_s=3600.0, max_force_ev_per_ang=50.0, retries=2)``, with, from ``calculators.executors.queues``,
``QueueSpec(system, walltime_s, partition=None, submit_options=())``, ``walltime_s("1-12:00:00")`` for its number, and
``Resources(cores=1, threads=1, memory_gb=None, modules=(), prologue=())``.
"""

from __future__ import annotations

import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import ase.io
from filelock import FileLock, Timeout

from alcore.errors import AlLoopError, InputError
from alcore.types import Label, LabelRequest
from calculators import job as inside
from calculators import outcomes
from calculators.base import ResolvedCalculator
from calculators.executors.local import PoolClosedError
from calculators.executors.outcome import JobOutcome
from calculators.executors.pyiron import UNFINISHED, NewJob, PyironProject, Record
from calculators.executors.queues import QUEUE_NAME, Queue, QueueSpec, Resources
from calculators.executors.runners import LocalRunner, QueueRunner, Runner, Running
from calculators.labeling import ExecutorLabeler
from calculators.labels import LabelLimits
from calculators.outcomes import Place, RefusedError

_LOG = logging.getLogger(__name__)
_MARGIN_S = 60.0
"""A job in a queue ends itself so long before its walltime; a tenth of it, if that is less. So it can still say why."""
_WAIT_S = 0.25


class PyironLabeler(ExecutorLabeler):
    """Every label is a pyiron job, whose name is made of the label's key.

    Jobs outlive this process. Asked for the same label again, a later one finds the job that waits, runs or has ended
    meanwhile, and computes nothing twice; a job that died without a word is a ``crashed`` label, and the next request
    makes a fresh one. Until ``close`` the folder is this labeler's alone.

    A job that another run left is waited for as long as it is seen to wait or run, and its answer taken. It is only
    looked at, never ended, and that run's records are not touched: its owner may be alive. What it leaves is computed
    here if it does not bring a good answer.

    Args:
        resolved: the calculator.
        folder: of this run; pyiron's database and files, the queue's configuration and the jobs lie in it.
        workers: how many jobs wait or run at once.
        queue: the queueing system; None: processes of this machine.
        resources: of each job.
        timeout_s: wall time of one label, its start not counted; in a queue no more than what the walltime leaves.
        max_force_ev_per_ang: a larger force on any atom makes a label ``rejected``.
        retries: how many rungs of the code's ladder a failed calculation may climb.
        beside, log: see ``ExecutorLabeler``.
    Raises:
        InputError: a number that makes no sense, or a folder that cannot be used, or that another labeler uses.
        CalculatorError: pyiron or pysqa is not installed.
    """

    def __init__(
        self,
        resolved: ResolvedCalculator,
        folder: Path,
        workers: int = 1,
        *,
        queue: QueueSpec | None = None,
        resources: Resources | None = None,
        timeout_s: float = 3600.0,
        max_force_ev_per_ang: float = 50.0,
        retries: int = 2,
        beside: Path | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if queue is not None:
            timeout_s = min(timeout_s, queue.walltime_s - min(_MARGIN_S, 0.1 * queue.walltime_s))
        limits = LabelLimits(timeout_s=timeout_s, retries=retries, max_force_ev_per_ang=max_force_ev_per_ang)
        super().__init__(resolved, folder, workers, limits, beside=beside, log=log)
        self._folder = self._folder.resolve()  # pyiron does so, too
        if re.search(r"\s", str(self._folder)):
            raise InputError("pysqa and pyiron take no folder with a space in its name", where=str(self._folder))
        self._take = resources or Resources()
        self._closed = threading.Event()
        self._slots = threading.Semaphore(workers)
        self._lock = threading.Lock()
        self._keys: dict[str, threading.Lock] = {}
        self._running: set[Running] = set()
        self._queue_name = None if queue is None else QUEUE_NAME
        self._runner: Runner
        self._folder_lock = _lock(self._folder)
        try:
            self._project = PyironProject(self._folder)
            if queue is None:
                self._runner = LocalRunner(self._take, timeout_s)
            else:
                asked = Queue(queue, self._take, self._project.queues_folder)
                self._runner = QueueRunner(asked, self._project.note_number, self._closed)
        except BaseException:
            self._folder_lock.release()
            raise

    def close(self) -> None:
        """Jobs of this machine end; those in a queue go on, and a later labeler finds them. A ``label`` in flight
        raises ``PoolClosedError``."""
        self._closed.set()
        try:
            if self._queue_name is None:
                with self._lock:
                    running = list(self._running)
                for job in running:
                    self._abandon(job)
            self._project.close()
        finally:
            self._folder_lock.release()

    def cancel(self) -> int:
        """End every unfinished job of this folder, those of earlier processes and those in a queue too, then ``close``.

        Returns:
            how many there were.
        """
        self._closed.set()
        try:
            records = self._project.unfinished()
            for record in records:
                if (job := self._as_running(record)) is not None:
                    self._abandon(job)
                else:
                    self._project.note_status(record.name, "aborted")
        finally:
            self.close()
        return len(records)

    def _label_one(self, request: LabelRequest) -> Label:
        label = super()._label_one(request)
        if not label.ok and self._is_job_of_ours(folder := Path(label.folder)):  # the next request makes a fresh job
            self._record(partial(self._project.note_status, folder.name, "aborted"))
        return label

    def _is_job_of_ours(self, folder: Path) -> bool:
        return folder.parent.parent == self._folder / outcomes.JOBS

    def _knows_better(self, place: Place) -> bool:
        return place.is_job and place.home == self._folder  # pyiron does

    def _run(self, request: LabelRequest) -> tuple[JobOutcome, Path]:
        with self._turn(request.key):
            job, outcome, free = self._job_of(request)
            if job is None:
                if (found := self._finished(request) or self._awaited(request)) is not None:
                    return found
                job = self._create(request, free)
            try:
                while outcome is None:
                    outcome = inside.read_outcome(job.folder) or self._look(job)
            except PoolClosedError:
                if self._queue_name is None:
                    self._abandon(job)
                raise
            except RefusedError:
                self._abandon(job)
                raise
            finally:
                with self._lock:
                    self._running.discard(job)
            self._runner.release(job)
            self._record(partial(self._project.collect, job.name))
            self._taken.add(job.folder)
            return outcome, job.folder

    def _awaited(self, request: LabelRequest) -> tuple[JobOutcome, Path] | None:
        """What a job brings that another run left, if it is seen to wait or run; waits for it.

        Raises:
            CalculatorError: the queue is silent for long.
        """
        for place in outcomes.places(request.key, self._folder, self._beside):
            job = None if self._knows_better(place) else self._left(place, request)
            if job is None or not self._runner.runs(job):
                continue
            named = f"label {request.key[:6]}"
            self._log(f"{named} is being computed by a job of run {place.home.name}: waits for it")
            while self._runner.gone(job) is None and not (job.folder / outcomes.OUTCOME).exists():
                if self._closed.wait(self._runner.pause_s(job)):
                    raise _stopped()
            outcome = outcomes.finished(place, request.key, self.fingerprint, self._folder)
            if outcome is not None:
                self._taken.add(place.folder)
                return outcome, place.folder
            self._log(f"{named}: the job of run {place.home.name} brought no good answer, so it is computed here")
        return None

    def _left(self, place: Place, request: LabelRequest) -> Running | None:
        """The job of another run for this very label, if it has no outcome yet."""
        job = inside.read_job(place.folder) or {}
        asked = (request.key, self.fingerprint)
        if (job.get("key"), job.get("fingerprint")) != asked or (place.folder / outcomes.OUTCOME).exists():
            return None
        begun = partial(inside.has_begun, place.folder)
        return Running(name=place.folder.name, folder=place.folder, token=job["token"], begun=begun, foreign=True)

    @staticmethod
    def _record(note: Callable[[], None]) -> None:
        """pyiron's record of a job that has ended; the label does not depend on it."""
        try:
            note()
        except AlLoopError as error:
            _LOG.warning("%s", error)

    def _look(self, job: Running) -> JobOutcome | None:
        """How the job ended without an outcome of its own, if it did; waits, the longer the longer it takes."""
        gone = self._runner.gone(job)
        if gone is not None:
            outcome = inside.read_outcome(job.folder)
            if outcome is None and self._queue_name is None:
                self._refuse_if_closed()  # ``close`` is what ended it
            return outcome or gone
        if self._closed.wait(self._runner.pause_s(job)):
            raise _stopped()
        return None

    @contextmanager
    def _turn(self, key: str) -> Iterator[None]:
        """One job of a key at a time, and no more of them than workers."""
        with self._lock:
            own = self._keys.setdefault(key, threading.Lock())
        with own:
            while not self._slots.acquire(timeout=_WAIT_S):
                self._refuse_if_closed()
            try:
                self._refuse_if_closed()
                yield
            finally:
                self._slots.release()

    def _refuse_if_closed(self) -> None:
        if self._closed.is_set():
            raise _stopped()

    def _job_of(self, request: LabelRequest) -> tuple[Running | None, JobOutcome | None, str]:
        """This run's job of the request, if it is to be waited for or has ended; its outcome, if it has ended by
        itself; and a free name for another."""
        record, free = self._project.newest(outcomes.job_stem(request.key))
        job = None if record is None else self._as_running(record)
        if record is not None and job is not None and record.status != "aborted" and not outcomes.concluded(job.folder):
            try:
                outcome = inside.read_outcome(job.folder)
            except RefusedError:  # of an earlier process; it may have been mended since
                self._abandon(job)
                return None, None, free
            if record.status == "finished" and outcome is not None and job.folder not in self._taken:
                return job, outcome, free
            # one that an earlier process sent to a queue cannot be watched from here
            if record.status in UNFINISHED and (outcome or not (record.number and self._queue_name is None)):
                self._begin(job, attach=outcome is None)
                return job, outcome, free
        if record is not None and record.status in UNFINISHED:
            self._project.note_status(record.name, "aborted")
        return None, None, free

    def _create(self, request: LabelRequest, name: str) -> Running:
        structure = request.candidate.structure
        text = inside.describe_job(
            self._resolved,
            structure,
            key=request.key,
            retries=self._limits.retries,
            timeout_s=self._limits.timeout_s,
            threads=self._take.threads,
            memory_gb=self._take.memory_gb,
        )
        new = NewJob(
            name=name,
            command=inside.command(self._project.folder_of(name)),
            inputs={"job": text},
            write_input=inside.write_input,
            collect_output=inside.collect_output,
            cores=self._take.cores,
            queue=self._queue_name,
        )
        folder = self._project.create(new)
        ase.io.write(folder / "input.extxyz", structure.to_atoms(), format="extxyz")
        job = self._as_running(Record(name=name, status="submitted", folder=folder))
        assert job is not None
        self._begin(job, attach=False, fresh=True)
        return job

    def _as_running(self, record: Record) -> Running | None:
        """None if its input is not all there."""
        described = inside.read_job(record.folder)
        if described is None:
            return None
        return Running(
            name=record.name,
            folder=record.folder,
            token=described["token"],
            begun=partial(inside.has_begun, record.folder),
            number=record.number,
        )

    def _begin(self, job: Running, *, attach: bool, fresh: bool = False) -> None:
        """Hand the job over, unless it is there already."""
        with self._lock:
            self._refuse_if_closed()
            self._running.add(job)
        try:
            if fresh or (attach and not self._runner.attach(job)):
                self._runner.start(job, inside.command(job.folder))
        except BaseException:
            with self._lock:
                self._running.discard(job)
            if fresh:  # one that is there already is left to the next who asks
                self._abandon(job)
            raise

    def _abandon(self, job: Running) -> None:
        """There will be no label of this job; the next request makes a fresh one."""
        with suppress(AlLoopError):
            self._project.note_status(job.name, "aborted")  # first: if we are killed here, nobody waits for it
        self._runner.end(job)
        shutil.rmtree(job.folder.parent, ignore_errors=True)


def _lock(folder: Path) -> FileLock:
    """One labeler a folder: pyiron's files bear no second writer, and two would start the same job twice. The system
    frees it when this process ends, however that comes.

    Raises:
        InputError: another labeler holds it, of this process or of another; or it cannot be made.
    """
    lock = FileLock(folder / ".lock", thread_local=False)  # whoever closes may be another thread
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        mend = "wait for it, or stop it (Ctrl-C) first"
        raise InputError("another process labels there", where=str(folder), mend=mend) from error
    except OSError as error:
        raise InputError(f"cannot lock the folder of calculations: {error}", where=str(folder)) from error
    return lock


def _stopped() -> PoolClosedError:
    return PoolClosedError("labelling was stopped: the labeler was closed")
