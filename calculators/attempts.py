"""The inside of a label: the user's settings first, then rung by rung the code's ladder."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from alcore.types import LabelRequest, Structure
from calculators.base import ResolvedCalculator, Retry
from calculators.executors.outcome import JobOutcome
from calculators.executors.worker import ENDING
from calculators.folders import fresh_folder
from calculators.measure import Measurement, measure
from calculators.outcomes import went_well, write_outcome

ATTEMPTS_FILE = "attempts.json"
"""In a label's folder, once its ladder is climbed: the attempts so far, and the one that began last."""

NOT_MADE = "not made"
"""The status of a rung that would have moved the energy."""


def prepare_worker(argument: tuple[ResolvedCalculator, int]) -> Callable[[Structure], Measurement]:
    """Runs once in each worker: loads what is slow to load; the returned function computes one structure.

    Args:
        argument: the calculator, and how many rungs of its ladder may be climbed.
    Raises:
        CalculatorError: the program, model file or factory is no longer the one that the fingerprint was made of.
    """
    resolved, retries = argument
    facts = resolved.entry.facts(resolved.settings)
    if json_sha256(facts) != resolved.fingerprint:
        changed = ", ".join(differing(facts, resolved.facts))
        raise CalculatorError(f"{resolved.name} has changed since the run began: {changed}", mend="start the run again")
    resolved.entry.warm_up(resolved.settings)
    return partial(climb, resolved, retries)


def prepare_local_worker(argument: tuple[ResolvedCalculator, int]) -> Callable[[LabelRequest], Measurement]:
    """As ``prepare_worker``, for a worker of this machine: what was computed is on disk before it is told.

    A crash is not kept: one that nobody hears of is rather the end of the machine than of the calculation.
    """
    compute, (resolved, _), parent = prepare_worker(argument), argument, os.getppid()

    def work(request: LabelRequest) -> Measurement:
        began = time.perf_counter()
        measurement = compute(request.candidate.structure)
        outcome = JobOutcome(kind="done", value=measurement, seconds=time.perf_counter() - began)
        good = went_well(outcome) or (measurement.status == "unconverged" and os.getppid() == parent)
        if good and not ENDING.is_set():
            with suppress(OSError):  # who hears of it looks, and says so
                write_outcome(Path.cwd(), outcome, key=request.key, fingerprint=resolved.fingerprint)
        return measurement

    return work


def climb(resolved: ResolvedCalculator, retries: int, structure: Structure) -> Measurement:
    """The first attempt that is ``ok``, else the last one made; each but the first in a folder ``retry-N`` of its own.

    After a failure the next rung is the first one not yet looked at that answers to how it failed. One that would move
    the energy, or cannot be made from these settings, is not tried; the reason then names it.

    Args:
        resolved: the calculator.
        retries: how many rungs may be climbed after the first attempt.
        structure: what is asked.
    """
    home, rungs = Path.cwd(), list(resolved.entry.retries)
    last = _attempt(resolved, resolved.settings, structure, "as set")
    stories, made = [*last.attempts], 0
    while last.status != "ok" and made < retries:
        rung = next((rung for rung in rungs if last.status in rung.after), None)
        if rung is None:
            break
        rungs.remove(rung)
        try:
            changed = changed_settings(resolved, rung)
        except Exception as error:
            stories.append({"name": rung.name, "status": NOT_MADE, "reason": " ".join(str(error).split())})
            last = replace(last, reason=f"{last.reason}; the retry '{rung.name}' was not made: {error}")
            continue
        # Whoever ends this label from outside still learns how far it had come.
        begun = [*stories, {"name": rung.name, "status": "begun"}]
        with suppress(OSError):
            (home / ATTEMPTS_FILE).write_text(json.dumps(begun), encoding="utf-8")
        made += 1
        with own_folder(home, f"retry-{made}"):
            last = _attempt(resolved, changed, structure, rung.name)
        stories += last.attempts
    return replace(last, attempts=tuple(stories))


def changed_settings(resolved: ResolvedCalculator, rung: Retry) -> Any:
    """The settings of a rung.

    Raises:
        CalculatorError: it would move the energy. Whatever the entry raises comes through too.
    """
    changed = rung.change(resolved.settings)
    if moved := differing(resolved.entry.facts(changed), resolved.facts):
        raise CalculatorError(f"it would change {', '.join(moved)}")
    return changed


def _attempt(resolved: ResolvedCalculator, settings: Any, structure: Structure, name: str) -> Measurement:
    began = time.perf_counter()
    measurement = measure(
        partial(resolved.entry.make, settings, structure), structure, partial(resolved.entry.inspect, settings)
    )
    story = {
        "name": name,
        "status": measurement.status,
        "reason": measurement.reason,
        "electronic_steps": measurement.inspection.electronic_steps,
        "seconds": round(time.perf_counter() - began, 3),
    }
    return replace(measurement, attempts=(story,), settings=settings.model_dump(mode="json"))


def differing(facts: Any, others: Any) -> list[str]:
    """Names of the facts that are not the same."""
    return [key for key in sorted({*facts, *others}) if facts.get(key) != others.get(key)]


@contextmanager
def own_folder(home: Path, name: str) -> Iterator[None]:
    """Inside, a new folder in ``home`` is the current one: an attempt must not find another's files."""
    os.chdir(fresh_folder(home, name))  # there may be one already, if a queue began this job again
    try:
        yield
    finally:
        os.chdir(home)
