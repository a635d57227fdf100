"""Reference labels: requests to an executor, what comes back to labels."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Self

import ase.io

from alcore.errors import AlLoopError, CalculatorError, InputError
from alcore.types import Label, LabelRequest
from calculators.attempts import prepare_local_worker
from calculators.base import ResolvedCalculator
from calculators.executors.local import PoolClosedError, WorkerPool, WorkerStartError
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import end_orphans, how_it_ended
from calculators.folders import fresh_folder
from calculators.labels import LabelLimits, conclude
from calculators.outcomes import JOBS, OUTCOME, Place, concluded, finished, folder_name, places, read_outcome, went_well

_LOG = logging.getLogger(__name__)

KILLED = tuple(how_it_ended(-number) for number in (signal.SIGKILL, signal.SIGTERM))
"""How a worker dies that did nothing wrong: somebody, or a machine short of memory, ended it."""


class ExecutorLabeler(ABC):
    """A ``Labeler`` (``alcore.protocols``) over some executor; several threads may call ``label`` at once.

    Every calculation has a folder of its own, with the structure (``input.extxyz``), what the calculator wrote and, if
    it failed, the reason (``error.txt``). It stays until the label is believed (``tidy``).

    Args:
        resolved: the calculator.
        folder: where calculations run.
        workers: how many run at once.
        limits: what a label may take.
        beside: the folder in which those of all runs lie, this one too: what another run has computed, and could not
            tell anybody any more, is taken from there. None: nobody else is looked at.
        log: takes lines for a person; None: the module's logger.
    Raises:
        InputError: a number that makes no sense, or a folder that cannot be made.
    """

    def __init__(
        self,
        resolved: ResolvedCalculator,
        folder: Path,
        workers: int,
        limits: LabelLimits,
        *,
        beside: Path | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if workers < 1:
            raise InputError(f"workers is {workers}", where="executor", mend="it must be positive")
        self._resolved, self._workers, self._limits = resolved, workers, limits
        self._folder, self._beside = Path(folder).absolute(), beside
        self._log = log or _LOG.warning
        self._taking = threading.Lock()
        self._taken: set[Path] = set()  # folders whose outcomes this labeler has given away, or is about to
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder of calculations: {error}", where=str(folder)) from error

    @property
    def name(self) -> str:
        return self._resolved.name

    @property
    def fingerprint(self) -> str:
        return self._resolved.fingerprint

    @abstractmethod
    def _run(self, request: LabelRequest) -> tuple[JobOutcome, Path]:
        """Computes one request, blocking; its outcome and the folder it ran in."""

    @abstractmethod
    def close(self) -> None:
        """End all that runs here for this labeler; a ``label`` in flight raises. May be called twice."""

    def label(self, requests: Sequence[LabelRequest], on_done: Callable[[Label], None] | None = None) -> list[Label]:
        """One label for each request, in order. A failed calculation is a status, never an exception.

        Args:
            requests: what to compute.
            on_done: hears of each label as soon as it is there, in the calling thread. If it raises, what already runs
                is still finished and reported, the rest is not begun, and the error is raised then.
        Raises:
            CalculatorError: a structure the calculator cannot take, or it no longer starts here.
            AlLoopError: ``close`` was called meanwhile.
        """
        for request in requests:
            self._resolved.check_structure(request.candidate.structure)
        return label_each(requests, self._label_one, self._workers, on_done=on_done, stop=self.close)

    def tidy(self, label: Label) -> None:
        """This label is believed and stored: the folder of its calculation may go."""
        folder = Path(label.folder)
        if not label.folder:
            return
        if folder.parent == self._folder:  # a label from the store may have been made anywhere
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.parent.parent == self._folder / JOBS:  # pyiron's record of it stays, with its numbers
            shutil.rmtree(folder.parent, ignore_errors=True)

    def _finished(self, request: LabelRequest) -> tuple[JobOutcome, Path] | None:
        """An outcome that waits for somebody to ask, and where it lies; nobody else gets it from this labeler."""
        with self._taking:
            for place in places(request.key, self._folder, self._beside):
                if place.folder in self._taken or self._knows_better(place):
                    continue
                outcome = finished(place, request.key, self.fingerprint, self._folder)
                if outcome is None:
                    self._end_what_runs(place)
                else:
                    self._taken.add(place.folder)
                    whose = "this run" if place.home == self._folder else f"run {place.home.name}"
                    self._log(f"label {request.key[:6]} was already computed for {whose}: taken from its folder")
                    return outcome, place.folder
        return None

    @staticmethod
    def _end_what_runs(place: Place) -> None:
        """Somebody was killed here. What the worker had started may run on, and nobody waits for it."""
        if not place.is_job and not concluded(place.folder):
            end_orphans({log.stem.removeprefix("worker-") for log in place.home.glob("worker-*.log")})

    def _knows_better(self, place: Place) -> bool:
        """Whether something else than the file there says how this calculation ended."""
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _label_one(self, request: LabelRequest) -> Label:
        outcome, folder = self._run(request)
        return conclude(request, self._resolved, outcome, folder, self._limits)


class LocalLabeler(ExecutorLabeler):
    """Warm worker processes on this machine.

    Args:
        resolved, folder, workers: see ``ExecutorLabeler``.
        timeout_s: wall time of one label, a worker's start not counted; after it, the whole process tree ends.
        threads: OpenMP, BLAS and torch threads of each worker.
        memory_gb: a label whose worker, with all it started, holds more is ended and ``crashed``; None: no limit.
        max_force_ev_per_ang: a larger force on any atom makes a label ``rejected``.
        retries: how many rungs of the code's ladder a failed calculation may climb.
        beside, log: see ``ExecutorLabeler``.
    """

    def __init__(
        self,
        resolved: ResolvedCalculator,
        folder: Path,
        workers: int = 1,
        *,
        timeout_s: float = 3600.0,
        threads: int = 1,
        memory_gb: float | None = None,
        max_force_ev_per_ang: float = 50.0,
        retries: int = 2,
        beside: Path | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        limits = LabelLimits(timeout_s=timeout_s, retries=retries, max_force_ev_per_ang=max_force_ev_per_ang)
        super().__init__(resolved, folder, workers, limits, beside=beside, log=log)
        if threads < 1:
            raise InputError(f"threads is {threads}", where="executor", mend="it must be positive")
        self._pool = WorkerPool(
            prepare_local_worker,
            (resolved, retries),
            folder=self._folder,
            workers=workers,
            threads=threads,
            memory_gb=memory_gb,
        )

    def close(self) -> None:
        self._pool.close()

    def _run(self, request: LabelRequest) -> tuple[JobOutcome, Path]:
        if (found := self._finished(request)) is not None:
            return found
        outcome, folder = self._compute(request)
        if outcome.kind == "died" and outcome.text in KILLED:
            self._log(f"label {request.key[:6]}: its worker was {outcome.text} from outside; once more")
            shutil.rmtree(folder, ignore_errors=True)
            return self._compute(request)
        return outcome, folder

    def _compute(self, request: LabelRequest) -> tuple[JobOutcome, Path]:
        with self._taking:
            folder = fresh_folder(self._folder, folder_name(request.key))
            self._taken.add(folder)
        try:
            ase.io.write(folder / "input.extxyz", request.candidate.structure.to_atoms(), format="extxyz")
            outcome = self._pool.run(request, folder, self._limits.timeout_s)
        except BaseException as error:  # there is no answer, so there is no label
            if self._kept(request, folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, WorkerStartError):
                raise CalculatorError(str(error), where=f"calculator {self.name}") from error
            if isinstance(error, OSError):
                raise AlLoopError(f"cannot write into {folder}: {error}") from error
            raise
        if outcome.kind != "done":  # it may have ended after it had its answer
            outcome = self._kept(request, folder) or outcome
        elif went_well(outcome) and not (folder / OUTCOME).exists():
            self._log(f"label {request.key[:6]} is computed, but cannot be kept in {folder} (is the disk full?)")
        return outcome, folder

    def _kept(self, request: LabelRequest, folder: Path) -> JobOutcome | None:
        """What the worker had on disk before it, or we, came to an end."""
        return read_outcome(folder, key=request.key, fingerprint=self.fingerprint)


def label_each(
    requests: Sequence[LabelRequest],
    one: Callable[[LabelRequest], Label],
    workers: int,
    *,
    on_done: Callable[[Label], None] | None,
    stop: Callable[[], None],
) -> list[Label]:
    """``[one(request) for request in requests]``, ``workers`` at a time.

    Args:
        on_done: see ``ExecutorLabeler.label``.
        stop: ends what ``one`` waits for; called at Ctrl-C.
    Raises:
        Exception: the first one that ``one`` or ``on_done`` raised; the rest is not begun then.
    """
    if not requests:
        return []
    labels: dict[int, Label] = {}
    first_error: Exception | None = None
    with ThreadPoolExecutor(min(workers, len(requests)), thread_name_prefix="label") as threads:
        futures = {threads.submit(one, request): index for index, request in enumerate(requests)}
        try:
            for future in as_completed(futures):
                if future.cancelled():
                    continue
                try:
                    labels[futures[future]] = label = future.result()
                    if on_done is not None:
                        on_done(label)
                except Exception as error:
                    first_error = first_error or error
                    _cancel(futures)
        except BaseException:  # Ctrl-C: nobody will read what is still being computed
            _cancel(futures)
            stop()
            raise
    if first_error is not None:
        raise first_error
    return [labels[index] for index in range(len(requests))]


def _cancel(futures: dict[Future[Label], int]) -> None:
    for future in futures:
        future.cancel()


__all__ = ["ExecutorLabeler", "LocalLabeler", "PoolClosedError"]
