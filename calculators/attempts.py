"""The inside of a label: the user's settings first, then rung by rung the code's ladder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from alcore.errors import CalculatorError
from alcore.identity import json_sha256
from alcore.types import Structure
from calculators.base import ResolvedCalculator
from calculators.measure import Measurement, measure


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


def climb(resolved: ResolvedCalculator, retries: int, structure: Structure) -> Measurement:
    """The first attempt that is ``ok``, else the last one made; each but the first in a folder ``retry-N`` of its own.

    Args:
        resolved: the calculator.
        retries: how many rungs may be climbed after the first attempt.
        structure: what is asked.
    """
    entry, settings = resolved.entry, resolved.settings
    rungs, tried = list(entry.retries), [_attempt(resolved, settings, structure, "as set")]
    while (last := tried[-1]).status != "ok" and len(tried) <= retries:
        while rungs and last.status not in rungs[0].after:
            rungs.pop(0)
        if not rungs:
            break
        rung = rungs.pop(0)
        changed = rung.change(settings)
        if moved := differing(entry.facts(changed), resolved.facts):
            told = f"{last.reason}; the retry '{rung.name}' would change {', '.join(moved)} and was not made"
            tried[-1] = replace(last, reason=told)
            continue
        with _own_folder(f"retry-{len(tried)}"):
            tried.append(_attempt(resolved, changed, structure, rung.name))
    return replace(tried[-1], attempts=tuple(attempt for one in tried for attempt in one.attempts))


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
def _own_folder(name: str) -> Iterator[None]:
    """Inside, a new folder ``name`` is the current one: an attempt must not find another's files."""
    before = Path.cwd()
    (before / name).mkdir()
    os.chdir(name)
    try:
        yield
    finally:
        os.chdir(before)
