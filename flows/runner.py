"""The loop's steps as Prefect tasks: named and tagged so that a person can read a run in the dashboard.

A task's only parameter is an id; nothing is cached or persisted by Prefect, because the store is the truth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from alcore.errors import AlLoopError
from alcore.protocols import StepName

T = TypeVar("T")

CONTENT_KEY = re.compile(r"[0-9a-f]{64}")
SHORT_KEY = 6


class PrefectRunner:
    """Implements ``alcore.protocols.StepRunner`` inside a flow.

    Args:
        limits: how many of a step run at once; 1 for a step that is not named.
    """

    def __init__(self, limits: Mapping[StepName, int] | None = None) -> None:
        self._limits = dict(limits or {})

    @contextmanager
    def generation(self, index: int) -> Iterator[None]:
        """Says in the run's log where a generation starts and ends; its tasks carry its tag, ``g03``."""
        log = get_run_logger()
        log.info("generation %d", index)
        yield
        log.info("generation %d done", index)

    def map(self, step: StepName, generation: int, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        """``[work(name) for name in names]``, a task each; what ``work`` raises, this raises."""
        tasks = [_as_task(step, generation, name, work) for name in names]
        limit = self._limits.get(step, 1)
        if limit == 1 or len(names) == 1:
            return [_result(one(name, return_state=True)) for one, name in zip(tasks, names, strict=True)]
        pool: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=limit)
        with pool as threads:
            futures: list[PrefectFuture[Any]] = [
                threads.submit(one, parameters={"name": name}) for one, name in zip(tasks, names, strict=True)
            ]
            for future in futures:
                future.wait()
            return [_result(future.state) for future in futures]


def task_name(step: StepName, generation: int, name: str) -> str:
    """``label g03 1f9a2c``: keys are shortened, names stay."""
    return f"{step} g{generation:02d} {name[:SHORT_KEY] if CONTENT_KEY.fullmatch(name) else name}".rstrip()


def _as_task(step: StepName, generation: int, name: str, work: Callable[[str], T]) -> Task[[str], Any]:
    def run_step(name: str) -> Any:
        try:
            return work(name)
        except AlLoopError as error:  # a line for a person: shown as the task's state, without a traceback
            return Failed(message=str(error), data=error)

    named = task_name(step, generation, name).replace("{", "{{").replace("}", "}}")
    as_task = task(
        name=step,
        task_run_name=named,
        tags=[step, f"g{generation:02d}"],
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    return as_task(run_step)


def _result(state: State[Any]) -> Any:
    return state.result(raise_on_failure=True)
