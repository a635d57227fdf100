"""The reference calculators of al-loop's registry, evaluated in this process and counted."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alcore.types import Label, LabelRequest, Structure
from calculators.attempts import prepare_worker
from calculators.base import ResolvedCalculator
from calculators.executors.outcome import JobOutcome
from calculators.labels import LabelLimits, conclude
from calculators.registry import resolve


class InProcessLabeler:
    """``alcore.protocols.Labeler`` that computes in the calling process: no worker, no queue, the same ladder of
    retries and the same judgement of what comes back.

    Attributes:
        n_calls: evaluations so far, failed ones included.
        seconds: that they took.
    """

    def __init__(self, resolved: ResolvedCalculator) -> None:
        self._resolved, self._compute = resolved, prepare_worker((resolved, LabelLimits().retries))
        self._folder = tempfile.TemporaryDirectory(prefix="al-loop-benchmark-")
        self.n_calls, self.seconds = 0, 0.0

    @property
    def name(self) -> str:
        return self._resolved.name

    @property
    def fingerprint(self) -> str:
        return self._resolved.fingerprint

    def label(self, requests: Sequence[LabelRequest], on_done: Callable[[Label], None] | None = None) -> list[Label]:
        """One after the other."""
        labels = []
        for request in requests:
            labels.append(self._label_one(request))
            if on_done is not None:
                on_done(labels[-1])
        return labels

    def tidy(self, label: Label) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        self._folder.cleanup()

    def _label_one(self, request: LabelRequest) -> Label:
        self._resolved.check_structure(request.candidate.structure)
        self.n_calls += 1
        began, home = time.perf_counter(), Path.cwd()
        os.chdir(self._folder.name)  # tblite writes its log where it runs
        try:
            value = self._compute(request.candidate.structure)
        finally:
            os.chdir(home)
        took = time.perf_counter() - began
        self.seconds += took
        outcome = JobOutcome(kind="done", value=value, seconds=took)
        return conclude(request, self._resolved, outcome, Path(self._folder.name), LabelLimits())


class Tally:
    """ASE calculators of one reference, every evaluation of each counted in ``calls``."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self._resolved, self.calls = resolve(name, settings), 0

    def calculator(self, structure: Structure) -> Any:
        """A calculator of its own for one image."""
        made: Any = self._resolved.entry.make(self._resolved.settings, structure)
        evaluate = made.calculate

        def calculate(*args: Any, **keywords: Any) -> None:
            self.calls += 1
            with tempfile.TemporaryDirectory(prefix="al-loop-benchmark-") as folder:
                home = Path.cwd()
                os.chdir(folder)
                try:
                    evaluate(*args, **keywords)
                finally:
                    os.chdir(home)

        setattr(made, "calculate", calculate)  # noqa: B010
        return made
