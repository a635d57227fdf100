"""Reference labels from worker processes on this machine."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import ase.io

from alcore.errors import AlLoopError, CalculatorError, InputError
from alcore.identity import json_sha256
from alcore.types import Label, LabelRequest, LabelStatus, Structure
from calculators.base import ResolvedCalculator
from calculators.checks import reject_reason
from calculators.executors.local import JobOutcome, PoolClosedError, WorkerPool, WorkerStartError
from calculators.measure import Measurement, measure, plain_array


def prepare_worker(resolved: ResolvedCalculator) -> Callable[[Structure], Measurement]:
    """Runs once in each worker: loads what is slow to load; the returned function computes one structure.

    Raises:
        CalculatorError: the program, model file or factory is no longer the one that the fingerprint was made of.
    """
    facts = {"calculator": resolved.name, **resolved.entry.fingerprint_facts(resolved.settings)}
    if json_sha256(facts) != resolved.fingerprint:
        keys = sorted({*facts, *resolved.facts})
        changed = ", ".join(key for key in keys if facts.get(key) != resolved.facts.get(key))
        raise CalculatorError(f"{resolved.name} has changed since the run began: {changed}", mend="start the run again")
    resolved.entry.warm_up(resolved.settings)
    return partial(_compute, resolved)


def _compute(resolved: ResolvedCalculator, structure: Structure) -> Measurement:
    return measure(partial(resolved.entry.make, resolved.settings, structure), structure)


class LocalLabeler:
    """A ``Labeler`` (``alcore.protocols``) over warm workers; several threads may call ``label`` at once.

    Every calculation has a folder of its own. That of an ``ok`` label is removed; that of a failed one is kept with
    the structure (``input.extxyz``), what the calculator wrote, and the reason (``error.txt``).

    Args:
        resolved: the calculator.
        folder: where calculations run.
        workers: how many run at once.
        timeout_s: wall time of one calculation, a worker's start not counted; after it, the whole process tree ends.
        threads: OpenMP, BLAS and torch threads of each worker.
        max_force_ev_per_ang: a larger force on any atom makes a label ``rejected``.
    Raises:
        InputError: a number that makes no sense, or a folder that cannot be made.
    """

    def __init__(
        self,
        resolved: ResolvedCalculator,
        folder: Path,
        workers: int = 1,
        timeout_s: float = 3600.0,
        threads: int = 1,
        max_force_ev_per_ang: float = 50.0,
    ) -> None:
        limits = {"workers": workers, "timeout_s": timeout_s, "threads": threads, "max_force": max_force_ev_per_ang}
        for name, value in limits.items():
            if not value > 0:
                raise InputError(f"{name} is {value}", where="executor", mend="it must be positive")
        self._folder = Path(folder).absolute()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the folder of calculations: {error}", where=str(folder)) from error
        self._resolved, self._workers = resolved, workers
        self._timeout_s, self._max_force = timeout_s, max_force_ev_per_ang
        self._pool = WorkerPool(prepare_worker, resolved, folder=self._folder, workers=workers, threads=threads)

    @property
    def name(self) -> str:
        return self._resolved.name

    @property
    def fingerprint(self) -> str:
        return self._resolved.fingerprint

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
        if not requests:
            return []
        labels: dict[int, Label] = {}
        first_error: Exception | None = None
        with ThreadPoolExecutor(min(self._workers, len(requests)), thread_name_prefix="label") as threads:
            futures = {threads.submit(self._label_one, request): index for index, request in enumerate(requests)}
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
                self.close()
                raise
        if first_error is not None:
            raise first_error
        return [labels[index] for index in range(len(requests))]

    def close(self) -> None:
        """End every worker and all it started; a ``label`` in flight raises. May be called twice."""
        self._pool.close()

    def __enter__(self) -> LocalLabeler:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _label_one(self, request: LabelRequest) -> Label:
        structure = request.candidate.structure
        folder = _fresh_folder(self._folder, request.key[:16])
        ase.io.write(folder / "input.extxyz", structure.to_atoms(), format="extxyz")
        try:
            outcome = self._pool.run(structure, folder, self._timeout_s)
        except BaseException as error:  # there is no answer, so there is no label
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, WorkerStartError):
                raise CalculatorError(str(error), where=f"calculator {self.name}") from error
            raise
        status, reason, text = self._judge(structure, outcome)
        if status == "ok":
            shutil.rmtree(folder, ignore_errors=True)
        else:
            (folder / "error.txt").write_text(f"{status}: {reason}\n{text}", encoding="utf-8")
        return self._to_label(request, status, reason, folder, outcome)

    def _judge(self, structure: Structure, outcome: JobOutcome) -> tuple[LabelStatus, str, str]:
        """Status, reason in one line, and all the text there is about it."""
        if outcome.kind == "timeout":
            return "timeout", f"no answer within {self._timeout_s:g} s; its processes were ended", outcome.last_words
        if outcome.kind in ("died", "lost"):
            told = f": {telling_line(outcome.last_words)}" if outcome.last_words else ""
            return "crashed", f"the worker process died ({outcome.text}){told}", outcome.last_words
        if outcome.kind == "raised":
            return "crashed", outcome.text.strip().splitlines()[-1], outcome.text
        measurement: Measurement = outcome.value
        if measurement.status != "ok":
            return measurement.status, measurement.reason, measurement.error_text
        why = reject_reason(structure, measurement, self._max_force)
        return ("rejected", why, "") if why else ("ok", "", "")

    def _to_label(
        self, request: LabelRequest, status: LabelStatus, reason: str, folder: Path, outcome: JobOutcome
    ) -> Label:
        structure = request.candidate.structure
        values: dict[str, Any] = {}
        if status in ("ok", "rejected"):
            answer: Measurement = outcome.value
            values = {
                "energy_ev": answer.energy_ev if math.isfinite(answer.energy_ev) else None,
                "forces": plain_array(answer.forces, (len(structure), 3)),
                "stress": answer.stress,
                "magnetic_moments": answer.magnetic_moments,
            }
        details: dict[str, Any] = {"calculator": dict(self._resolved.facts)}
        if outcome.kind == "done":
            details["energy_kind"] = outcome.value.energy_kind
        return Label(
            key=request.key,
            structure=structure,
            status=status,
            fingerprint=self.fingerprint,
            calculator=self.name,
            reason=reason,
            folder="" if status == "ok" else str(folder),
            seconds=outcome.seconds,
            details=details,
            **values,
        )


def telling_line(text: str) -> str:
    """The line that says most about a death: Python's fatal error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return next((line for line in lines if line.startswith("Fatal Python error")), lines[-1])[:300]


def _cancel(futures: dict[Future[Label], int]) -> None:
    for future in futures:
        future.cancel()


def _fresh_folder(parent: Path, name: str) -> Path:
    """A new folder ``name``, ``name-2``, ... in ``parent``: an earlier failure of the same key is kept."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise AlLoopError(f"cannot make a folder for a calculation: {error}") from error


__all__ = ["LocalLabeler", "PoolClosedError", "prepare_worker"]
