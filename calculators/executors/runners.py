"""What starts a job's command, and tells when it is gone: this machine, or a queueing system."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from alcore.errors import AlLoopError, CalculatorError
from calculators.executors.local import STARTUP_LIMIT_S, tail
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import MARK, end_family, family, how_it_ended
from calculators.executors.queues import QUEUE_LOG, Queue, QueueFullError, QueueSilentError, Resources

_LOG = logging.getLogger(__name__)

BACKSTOP_S = 60.0
"""A job ends itself when it is late. One that does not, because it has not even begun, is ended so much later."""
N_SUBMISSIONS = 5
"""So often without an answer; a queue that is full is asked for as long as it takes."""
FULL_PAUSE_S = 60.0
"""At most so long between two submissions to a queue that is full."""
N_QUESTIONS = 10

_OUT_OF_TIME = re.compile(r"DUE TO TIME LIMIT|TERM_RUNLIMIT|walltime.{0,40}exceeded|exceeded.{0,40}walltime", re.I)


@dataclass(kw_only=True, eq=False)
class Running:
    """A job that has been handed over.

    Attributes:
        name, folder: pyiron's.
        token: every process of the job on this machine carries it (``processes.MARK``).
        begun: whether its command has started.
        since: when this process began to look after it (``time.monotonic()``).
        number: in the queue; None where there is none, or it is not known.
        missing_since: when the queue first did not list it.
        process: the child of this process that runs it; None if an earlier process started it.
        foreign: it is another run's. We may wait for it, but never end it or write its number down.
    """

    name: str
    folder: Path
    token: str
    begun: Callable[[], bool]
    since: float = field(default_factory=time.monotonic)
    number: int | None = None
    missing_since: float | None = None
    process: subprocess.Popen[bytes] | None = None
    foreign: bool = False


class Runner(Protocol):
    """How jobs run. ``start`` and ``attach`` are called once for each; any thread may call any method."""

    def pause_s(self, job: Running) -> float:
        """How long to wait before looking again; a job that has taken long is looked at less often."""

    def start(self, job: Running, command: str) -> None:
        """Hand it over."""

    def attach(self, job: Running) -> bool:
        """Take over a job that an earlier process started; False if nothing was ever started."""

    def runs(self, job: Running) -> bool:
        """Whether another run's job waits or runs now, as far as can be seen from here."""

    def gone(self, job: Running) -> JobOutcome | None:
        """How it ended, if it has without an outcome of its own; None while it may still bring one."""

    def end(self, job: Running) -> None:
        """End it with all it started, if it is ours."""

    def release(self, job: Running) -> None:
        """It has brought its outcome."""


class LocalRunner:
    """Processes of this machine, which outlive this process and are found again by their mark.

    Args:
        take: modules and prologue.
        timeout_s: of the job itself.
    """

    def __init__(self, take: Resources, timeout_s: float) -> None:
        self._take = take
        self._limit_s = STARTUP_LIMIT_S + timeout_s + BACKSTOP_S

    def pause_s(self, job: Running) -> float:
        return _pause_s(job, 0.5)

    def start(self, job: Running, command: str) -> None:
        script = "\n".join([*self._take.preamble(), f"exec {command}"])
        with (job.folder / QUEUE_LOG).open("ab") as log:
            try:
                job.process = subprocess.Popen(
                    [*self._take.shell, "-c", script],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=job.folder,
                    env=os.environ | {MARK: job.token},
                    start_new_session=True,
                )
            except OSError as error:
                raise CalculatorError(f"cannot start a job: {error}", where="executor") from error

    def attach(self, job: Running) -> bool:
        return job.begun() or bool(family(job.token))

    def runs(self, job: Running) -> bool:
        return bool(family(job.token))

    def gone(self, job: Running) -> JobOutcome | None:
        if time.monotonic() - job.since > self._limit_s:
            self.end(job)
            return JobOutcome(kind="timeout", last_words=_last_words(job), seconds=self._limit_s)
        code = job.process.poll() if job.process is not None else None
        if code is None and (job.process is not None or family(job.token)):
            return None
        how = "it is gone" if code is None else how_it_ended(code)
        self.end(job)
        return JobOutcome(kind="died", text=how, last_words=_last_words(job), seconds=time.monotonic() - job.since)

    def end(self, job: Running) -> None:
        if job.foreign:
            return
        end_family(job.process.pid if job.process is not None else -1, job.token)
        if job.process is not None:
            job.process.wait()

    def release(self, job: Running) -> None:
        if job.process is not None:
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(timeout=5)
        self.end(job)


class QueueRunner:
    """Jobs in a queue; they outlive this process and are found again by their number, or else by their name.

    Args:
        queue: which.
        note_number: called with the name of a job of ours and its number as soon as there is one.
        closed: while submissions are tried again, this ends it.
    """

    def __init__(self, queue: Queue, note_number: Callable[[str, int], None], closed: threading.Event) -> None:
        self._queue, self._note_number, self._closed = queue, note_number, closed
        self._told = threading.Lock()  # taken for good by the first who says that the queue is full

    def pause_s(self, job: Running) -> float:
        return _pause_s(job, self._queue.spec.poll_s)

    def start(self, job: Running, command: str) -> None:
        """Raises:
        CalculatorError: the queue refuses it, or is silent for long.
        """
        wait_s, n_silent, said = self._queue.spec.poll_s, 0, ""
        while n_silent < N_SUBMISSIONS:
            try:
                job.number = self._queue.submit(queue_name(job), job.folder, command)
                self._note_number(job.name, job.number)
                job.since = time.monotonic()
                return
            except QueueFullError as error:
                if self._told.acquire(blocking=False):
                    _LOG.warning("the queue takes no more jobs for now, so we wait: %s", error)
                wait_s = min(wait_s, FULL_PAUSE_S)
            except QueueSilentError as error:
                n_silent, said = n_silent + 1, str(error)
            # it may have been taken without a word
            if self._closed.wait(wait_s) or (n_silent and self.attach(job)):
                return
            wait_s *= 2
        raise self._silent(said)

    def attach(self, job: Running) -> bool:
        """Raises:
        CalculatorError: the number was never recorded, and the queue is silent for long.
        """
        said = ""
        for _ in range(N_QUESTIONS):
            try:
                self._find(job)
                return job.number is not None or job.begun()
            except QueueSilentError as error:
                said = str(error)
            if self._closed.wait(self._queue.spec.poll_s):
                return True
        raise self._silent(said)

    def runs(self, job: Running) -> bool:
        """Raises:
        CalculatorError: the queue is silent for long.
        """
        self.attach(job)
        return job.number is not None

    def _find(self, job: Running) -> None:
        """The number of a job that was submitted, but killed us before we could record it."""
        if job.number is None:
            listed = self._queue.ask()
            job.number = next((number for number, name in listed.items() if name == queue_name(job)), None)
            if job.number is not None and not job.foreign:
                self._note_number(job.name, job.number)

    def _silent(self, said: str) -> CalculatorError:
        mend = "see whether its commands work in this shell, then start again"
        return CalculatorError(said, where=f"queue {self._queue.spec.system}", mend=mend)

    def gone(self, job: Running) -> JobOutcome | None:
        listed = self._queue.listed(job.missing_since or job.since)
        if listed is None:
            return None
        if self._is_listed(job, listed):
            job.missing_since = None
            return None
        now = time.monotonic()
        if job.missing_since is None:
            job.missing_since = now
        if now - job.missing_since < self._queue.spec.grace_s:
            return None
        said, spec = _last_words(job), self._queue.spec
        which = f"{spec.system} job {job.number or queue_name(job)}"
        if _OUT_OF_TIME.search(said):
            return JobOutcome(
                kind="timeout", text=f"{which} reached its walltime of {spec.walltime_s:g} s", last_words=said
            )
        return JobOutcome(kind="died", text=f"{which} left the queue without an outcome", last_words=said)

    def _is_listed(self, job: Running, listed: Mapping[int, str]) -> bool:
        return job.number in listed if job.number is not None else queue_name(job) in listed.values()

    def end(self, job: Running) -> None:
        if job.foreign:
            return
        with suppress(AlLoopError):
            self._find(job)
        if job.number is not None:
            self._queue.cancel(job.number)

    def release(self, job: Running) -> None:
        """The job is at its end anyway."""


def _pause_s(job: Running, most_s: float) -> float:
    return min(most_s, 0.05 + 0.05 * (time.monotonic() - job.since)) * random.uniform(0.8, 1.2)


def queue_name(job: Running) -> str:
    """Fifteen characters, which every queueing system shows in full; no other job has them, not even one of another
    run that computes the same label."""
    return f"al_{job.token[:12]}"


def _last_words(job: Running) -> str:
    parts = [tail(job.folder / name) for name in ("stderr.txt", QUEUE_LOG)]
    return "\n".join(part for part in parts if part)
