"""Runs the loop's steps without Prefect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from alcore.protocols import StepName, T


class PlainRunner:
    """Steps in threads of this process, without Prefect.

    Args:
        workers: how many of each step may run at once.
    """

    def __init__(self, workers: Mapping[StepName, int] | None = None) -> None:
        self.workers = dict(workers or {})

    @contextmanager
    def generation(self, index: int) -> Iterator[None]:
        yield

    def map(self, step: StepName, generation: int, names: Sequence[str], work: Callable[[str], T]) -> list[T]:
        with ThreadPoolExecutor(max_workers=max(1, min(len(names), self.workers.get(step, 1)))) as pool:
            return list(pool.map(work, names))
