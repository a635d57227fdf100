"""``al-loop check``: everything that can be known before computing, every problem listed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from alcore.errors import InputError
from alcore.types import EndpointPair, Label
from flows import environment, wiring
from flows.earlier import change_lines, earlier_run, plain_settings
from flows.one_process import at_work, refuse_busy
from flows.session import open_record_store
from flows.settings import ExecutorSettings, RunSettings
from flows.sittings import new_sitting

if TYPE_CHECKING:
    from calculators.base import ResolvedCalculator
    from storage.durable import DurableStore

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
            self.problems.append(" ".join(str(error).split()))
            return None


def check_run(settings: RunSettings) -> CheckReport:
    """End states, calculator, data, model and store; computes nothing."""
    report = CheckReport()
    asked = [report.ask(partial(wiring.read_pair, path, f"paths.{k}")) for k, path in enumerate(settings.paths)]
    pairs = [pair for pair in asked if pair is not None]
    resolved = report.ask(lambda: wiring.resolve_calculator(settings, []))
    report.ask(lambda: wiring.check_executor(settings.executor))
    given: list[Label] = []
    if resolved is not None:
        for pair in pairs:
            report.ask(partial(resolved.check_structure, pair.initial, f"path {pair.name}"))
        for k in range(len(settings.data)):
            given += report.ask(partial(wiring.read_data_file, settings, resolved, k)) or []
    numbers = wiring.elements(pairs, given)
    prior = report.ask(lambda: wiring.make_prior(settings.model, numbers, settings.seed)) if numbers else None
    if prior is not None:
        report.ask(partial(wiring.read_replay, settings, prior.model))
    store = report.ask(lambda: open_record_store(settings.store))
    if store is not None:
        with closing(store):
            report.ask(lambda: refuse_busy(store, settings.name))
            if resolved is not None and len(pairs) == len(settings.paths):
                history = report.ask(lambda: _history(settings, store, pairs, resolved, given))
    if report.problems:
        return report
    assert resolved is not None and prior is not None and history is not None
    report.lines += [_pair_line(pair) for pair in pairs]
    report.lines += _plan(settings, resolved, prior, len(given))
    report.lines += history
    return report


def _plan(settings: RunSettings, resolved: ResolvedCalculator, prior: wiring.Prior, n_given: int) -> list[str]:
    stop, model = settings.stop, settings.model
    learns = f"strategy {model.strategy}, correction {model.correction}, on {wiring.pick_device(model.device)}"
    confirms = f"the reference confirms every barrier to {1e3 * stop.barrier_tolerance_ev:g} meV"
    return [
        f"reference   {settings.calculator.name} (fingerprint {resolved.fingerprint[:12]})",
        *executor_lines(settings.executor),
        f"prior       {prior.name}",
        f"model       committee of {model.committee}, {learns}",
        f"data        {n_given} labels brought along",
        f"band        {settings.neb.n_images} images between the end states, {settings.neb.interpolation}",
        f"stops       when {confirms}, or after {stop.max_labels} labels or {stop.max_generations} generations",
    ]


def executor_lines(executor: ExecutorSettings) -> list[str]:
    """Where labels run, how many at once and why, and a warning if they would be in each other's way."""
    _, limit = wiring.label_pool(executor)
    each, cores = wiring.cores_of_a_label(executor), environment.cores()
    where = f"queue {executor.queue}" if executor.queue else "this machine"
    if executor.max_running is not None:
        why = "executor.max_running"
    elif executor.queue:
        why = "unless executor.max_running says otherwise"
    else:
        why = f"{count(cores, 'core')} / {count(each, 'core' if executor.cores > 1 else 'thread')}"
    most = [f"{executor.timeout_s:g} s"] + ([f"{executor.memory_gb:g} GB"] if executor.memory_gb else [])
    running = f"{executor.workers} at a time of this run, {limit} of all runs there ({why})"
    lines = [f"executor    {executor.kind}, {where}: {running}, {' and '.join(most)} each at most"]
    if executor.queue is None and min(executor.workers, limit) * each > cores:
        busy = min(executor.workers, limit) * each
        lines.append(
            f"warning     {count(busy, 'thread')} at once on {count(cores, 'core')} slow each other down "
            f"(executor: fewer workers, threads or max_running)"
        )
    elif executor.workers > limit:
        lines.append(f"warning     {executor.workers} workers, but only {limit} can ever run at once ({why})")
    return lines


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _history(
    settings: RunSettings,
    store: DurableStore,
    pairs: list[EndpointPair],
    resolved: ResolvedCalculator,
    given: list[Label],
) -> list[str]:
    run = earlier_run(settings, store, pairs, resolved, given)
    if run is None:
        return [f"run         {settings.name}: new"]
    done = len(store.load_generations(settings.name))
    who = at_work(store, settings.name)
    state = run.status if run.status != "running" else "abandoned" if who is None else f"running: {who}"
    then = f"goes on after generation {done - 1}" if done else "begins anew"
    changed = change_lines(new_sitting(plain_settings(settings), run))
    return [f"run         {settings.name}: exists ({state}), {then}", *(f"changed     {line}" for line in changed)]


def _pair_line(pair: EndpointPair) -> str:
    moved = np.linalg.norm(pair.final.positions - pair.initial.positions, axis=1)
    most = int(moved.argmax())
    symbol = pair.initial.to_atoms().symbols
    free = int((~pair.initial.fixed.all(axis=1)).sum())
    images = f", {len(pair.images)} images given" if pair.images else ""
    return (
        f"path        {pair.name}: {symbol.get_chemical_formula()}, {len(pair.initial)} atoms ({free} free){images}; "
        f"{symbol[most]} {most} moves {moved[most]:.2f} Å, all together {float(np.linalg.norm(moved)):.2f} Å"
    )
