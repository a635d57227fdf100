"""``al-loop check``: everything that can be known before computing, every problem listed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from alcore.errors import InputError
from alcore.types import EndpointPair
from flows import wiring
from flows.session import open_record_store
from flows.settings import RunSettings

T = TypeVar("T")


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        problems: one line each; empty if the run can start.
        lines: what the run would do.
    """

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def ask(self, question: Callable[[], T]) -> T | None:
        """The answer, or None with the problem noted."""
        try:
            return question()
        except InputError as error:
            self.problems.append(str(error))
            return None


def check_run(settings: RunSettings) -> CheckReport:
    """End states, calculator, data, model and store; computes nothing."""
    report = CheckReport()
    pairs = [pair for k, path in enumerate(settings.paths) if (pair := report.ask(lambda k=k, path=path: wiring.read_pair(path, f"paths.{k}")))]  # type: ignore[misc]
    resolved = report.ask(lambda: wiring.resolve_calculator(settings, pairs))
    given = report.ask(lambda: wiring.read_data(settings, resolved)) if resolved else []
    numbers = sorted({int(z) for pair in pairs for z in pair.initial.numbers})
    prior = report.ask(lambda: wiring.make_prior(settings.model, numbers, settings.seed)) if numbers else None
    before = report.ask(lambda: _earlier_run(settings))
    if report.problems:
        return report
    report.lines += [_pair_line(pair) for pair in pairs]
    assert resolved is not None and prior is not None
    executor, stop = settings.executor, settings.stop
    report.lines += [
        f"reference   {settings.calculator.name} (fingerprint {resolved.fingerprint[:12]}), {executor.workers} at a time, {executor.timeout_s:g} s each at most",
        f"prior       {prior.name}",
        f"model       committee of {settings.model.committee}, strategy {settings.model.strategy}, correction {settings.model.correction}, on {wiring.pick_device(settings.model.device)}",
        f"data        {len(given or [])} labels brought along",
        f"band        {settings.neb.n_images} images between the end states, {settings.neb.interpolation}",
        f"stops       when the reference confirms every barrier to {1e3 * stop.barrier_tolerance_ev:g} meV, or after "
        f"{stop.max_labels} labels or {stop.max_generations} generations",
        f"run         {settings.name}: {before}",
    ]
    return report


def _earlier_run(settings: RunSettings) -> str:
    with closing(open_record_store(settings.store)) as store:
        run = store.load_run(settings.name)
        if run is None:
            return "new"
        return f"exists ({run.status}), goes on after generation {len(store.load_generations(settings.name)) - 1}"


def _pair_line(pair: EndpointPair) -> str:
    moved = np.linalg.norm(pair.final.positions - pair.initial.positions, axis=1)
    most = int(moved.argmax())
    symbol = pair.initial.to_atoms().symbols
    free = int((~pair.initial.fixed.all(axis=1)).sum())
    return (
        f"path        {pair.name}: {symbol.get_chemical_formula()}, {len(pair.initial)} atoms ({free} free); "
        f"{symbol[most]} {most} moves {moved[most]:.2f} Å, all together {float(np.linalg.norm(moved)):.2f} Å"
    )
