"""Worker processes on this machine: warm, one job at a time each, ended with all they started when a job is late."""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from alcore.errors import AlLoopError
from calculators.executors.memory import MemoryWatch, told_excess
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import MARK, end_family, how_it_ended

STARTUP_LIMIT_S = 300.0
"""Loading torch and a model on a busy machine takes tens of seconds; no more than this."""

_LOOK_S = 0.2
_TAIL_LINES = 15
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from calculators.executors.worker import main; main(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerStartError(AlLoopError):
    """A worker process could not get ready; its text says what it said."""


class PoolClosedError(AlLoopError):
    """The pool was closed while the job waited or ran; the job has no outcome."""


class _Worker:
    """One process as its parent sees it; everything but ``kill`` is called by one thread at a time."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"worker-{self.mark[:8]}.log"
        self.connection, theirs = Pipe()
        environment = os.environ | {name: str(threads) for name in THREAD_VARIABLES} | {MARK: self.mark}
        # Our sys.path goes as an argument, not as PYTHONPATH: programs that a calculator starts must not inherit it.
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        try:
            with theirs, self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _BOOT, path, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                )
        except OSError as error:
            self.connection.close()
            raise WorkerStartError(f"cannot start a worker process: {error}") from error

    def prepare(self, payload: bytes) -> None:
        """Hand over what to do; returns once the worker is warm.

        Raises:
            WorkerStartError: it did not get there.
        """
        with suppress(OSError):
            self.connection.send_bytes(payload)
        kind, value = self._answer(STARTUP_LIMIT_S)
        if kind == "died":
            raise WorkerStartError(f"a worker process died at its start ({self._how()}): {tail(self.log)}")
        if kind != "ready":
            late = f"a worker was not ready within {STARTUP_LIMIT_S:g} s: {tail(self.log)}"
            raise WorkerStartError(str(value) if kind == "failed" else late)

    def run(self, job: Any, folder: Path, timeout_s: float, memory_gb: float | None) -> JobOutcome:
        start = time.monotonic()
        watch = MemoryWatch(self.process.pid, memory_gb)
        with suppress(OSError):  # a worker that died while idle is found below
            self.connection.send((str(folder), job, timeout_s))
        kind, value = self._answer(timeout_s)
        if kind == "begun":
            kind, value = self._answer(timeout_s, watch)
        elif kind == "died":
            return JobOutcome(kind="lost", text=self._how())
        seconds = time.monotonic() - start
        if kind in ("died", "timeout"):
            how = self._how() if kind == "died" else ""
            said = tail(folder / "stderr.txt")
            return JobOutcome(kind="died" if how else "timeout", text=how, last_words=said, seconds=seconds)
        if kind == "memory":
            said = tail(folder / "stderr.txt")
            used = told_excess(value, memory_gb)
            return JobOutcome(kind="memory", text=used, last_words=said, seconds=seconds)
        if kind == "raised":
            return JobOutcome(kind="raised", text=value, seconds=seconds)
        return JobOutcome(kind="done", value=value, seconds=seconds)

    def _answer(self, timeout_s: float, watch: MemoryWatch | None = None) -> tuple[str, Any]:
        deadline = time.monotonic() + timeout_s
        try:
            while (left := deadline - time.monotonic()) > 0:
                if self.connection.poll(min(left, _LOOK_S)):
                    kind, value = self.connection.recv()
                    return str(kind), value
                # A forked grandchild may hold the socket open, so its end alone does not tell.
                if self.process.poll() is not None and not self.connection.poll():
                    return "died", None
                if watch is not None and (excess := watch.excess_gb()) is not None:
                    return "memory", excess
        except (EOFError, OSError):
            return "died", None
        return "timeout", None

    def _how(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(timeout=5)
            return how_it_ended(code)
        return "it closed its connection"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """End the process and all it started; any thread may call this, more than once."""
        end_family(self.process.pid, self.mark)
        self.process.wait()

    def release(self) -> None:
        """``kill``, and give back what the parent held for it."""
        self.kill()
        self.connection.close()
        self.log.unlink(missing_ok=True)


class WorkerPool:
    """Up to ``workers`` processes, started when first needed; any number of threads may run jobs at once.

    Args:
        setup: importable function; ``setup(argument)`` runs once in each worker and returns the function of a job.
        argument: for ``setup``; picklable.
        folder: where workers live; jobs have folders of their own.
        workers: how many jobs run at once.
        threads: OpenMP, BLAS and torch threads of each worker, set before numpy is imported.
        memory_gb: a job whose worker holds more, with all it started, is ended; None: no limit.
    """

    def __init__(
        self,
        setup: Callable[[Any], Callable[[Any], Any]],
        argument: Any,
        *,
        folder: Path,
        workers: int,
        threads: int = 1,
        memory_gb: float | None = None,
    ) -> None:
        self._payload = pickle.dumps((setup, argument))
        self._folder = folder
        self._threads, self._memory_gb = threads, memory_gb
        self._lock = threading.Lock()
        self._closed = False
        self._workers: set[_Worker] = set()
        # Last in, first out: the warm worker is taken before a new one is started.
        self._slots: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        self._n_slots = workers
        for _ in range(workers):
            self._slots.put(None)

    def run(self, job: Any, folder: Path, timeout_s: float) -> JobOutcome:
        """Wait for a free worker and run ``job`` in ``folder``; blocks.

        Raises:
            WorkerStartError: no worker can be started.
            PoolClosedError: the pool was closed before there was an outcome.
        """
        worker = self._slots.get()
        try:
            if worker is not None and not worker.alive:
                self._release(worker)
                worker = None
            if worker is None:
                worker = self._start()
            self._refuse_if_closed()
            busy, worker = worker, None  # goes back only if it answered
            try:
                outcome = busy.run(job, folder, timeout_s, self._memory_gb)
                if outcome.kind == "lost":  # it had died while idle, so the job has not begun
                    self._release(busy)
                    busy = self._start()
                    outcome = busy.run(job, folder, timeout_s, self._memory_gb)
            except BaseException:
                self._release(busy)
                raise
            if outcome.kind in ("lost", "died", "timeout", "memory"):
                self._release(busy)
                self._refuse_if_closed()
            else:
                worker = busy
            return outcome
        finally:
            self._slots.put(worker)

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise PoolClosedError("labelling was stopped: the workers were closed")

    def _start(self) -> _Worker:
        with self._lock:
            self._refuse_if_closed()
            worker = _Worker(self._folder, self._threads)
            self._workers.add(worker)
        try:
            worker.prepare(self._payload)
        except BaseException:
            self._release(worker)
            self._refuse_if_closed()
            raise
        return worker

    def _release(self, worker: _Worker) -> None:
        worker.release()
        with self._lock:
            self._workers.discard(worker)

    def pids(self) -> list[int]:
        """Of the workers that run now."""
        with self._lock:
            return [worker.process.pid for worker in self._workers if worker.alive]

    def close(self) -> None:
        """End every worker and all they started; jobs in flight raise ``PoolClosedError``. May be called twice."""
        with self._lock:
            first, self._closed = not self._closed, True
            workers = list(self._workers)
        for worker in workers:
            worker.kill()
        if not first:
            return
        slots = [self._slots.get() for _ in range(self._n_slots)]  # every job has let go of its worker now
        for worker in filter(None, slots):
            self._release(worker)
        for _ in slots:
            self._slots.put(None)  # whoever still waits is refused


def tail(path: Path, lines: int = _TAIL_LINES) -> str:
    """The last lines of a text file, or ""."""
    try:
        with path.open(errors="replace") as file:
            return "".join(deque(file, maxlen=lines)).strip()
    except OSError:
        return ""
