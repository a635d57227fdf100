"""The loop's steps as Prefect tasks: named and tagged so that a person can read a run in the dashboard.

A task's only parameter is an id; nothing is cached or persisted by Prefect, because the store is the truth.
"""

from __future__ import annotations

import contextvars
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Failed, State
from prefect.task_runners import ThreadPoolTaskRunner

from alcore.errors import AlLoopError
from alcore.protocols import StepName

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from flows.bounded import BoundedLabeler

T = TypeVar("T")

LIMIT_PREFIX = "al-loop-labels-"
SLOT_LEASE_S, SLOT_RENEWAL_S, SLOT_LOOK_S = 60.0, 20.0, 1.0
"""Prefect takes no shorter lease; after it, the slots of a flow that was killed are free in the dashboard, too."""

logger = logging.getLogger(__name__)

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


@contextmanager
def show_slots(labeler: BoundedLabeler) -> Iterator[None]:
    """Inside, a global concurrency limit in the dashboard (``al-loop-labels-<pool>``) shows how many labels run.

    It only shows: the leases in the store are what counts. It follows them in a thread of its own, a second late, so
    that whatever goes wrong here neither holds a label up nor ends it.
    """
    done = threading.Event()
    context = contextvars.copy_context()  # Prefect's settings, the server's address among them, live there
    mirror = SlotMirror(labeler)
    thread = threading.Thread(target=context.run, args=(mirror.follow, done), name="label-slots", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)


class SlotMirror:
    """Occupies as many slots of Prefect's limit as ``labeler`` has labels running."""

    def __init__(self, labeler: BoundedLabeler) -> None:
        self._labeler, self._name = labeler, f"{LIMIT_PREFIX}{labeler.pool}"
        self._leases: list[UUID] = []

    def follow(self, done: threading.Event) -> None:
        """Until ``done``; what fails is tried again when the slots are next renewed."""
        looks = 0
        every = round(SLOT_RENEWAL_S / SLOT_LOOK_S)
        try:
            with _client() as client:
                while not done.wait(SLOT_LOOK_S if looks else 0):
                    try:
                        if looks % every == 0:
                            client.upsert_global_concurrency_limit_by_name(self._name, self._labeler.limit)
                            self._renew(client)
                        self._match(client, self._labeler.running)
                    except Exception as error:
                        logger.debug("the dashboard's limit %s: %s", self._name, error)
                    looks += 1
                self._match(client, 0)
        except Exception as error:
            logger.debug("the dashboard shows no limit %s: %s", self._name, error)

    def _match(self, client: SyncPrefectClient, wanted: int) -> None:
        while len(self._leases) < wanted:
            answer = client.increment_concurrency_slots_with_lease(
                names=[self._name], slots=1, mode="concurrency", lease_duration=SLOT_LEASE_S
            )
            self._leases.append(UUID(answer.json()["lease_id"]))
        while len(self._leases) > wanted:
            client.release_concurrency_slots_with_lease(self._leases.pop())

    def _renew(self, client: SyncPrefectClient) -> None:
        held, self._leases = self._leases, []
        for lease in held:  # one that the server has forgotten is dropped, and occupied anew
            try:
                client.renew_concurrency_lease(lease, SLOT_LEASE_S)
                self._leases.append(lease)
            except Exception as error:
                logger.debug("the dashboard's slot %s: %s", lease, error)


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    """A client of our own (the flow's is the flow's), which gives up at the first error instead of waiting."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_API_URL, temporary_settings

    with temporary_settings({"client.max_retries": 0}):
        api = PREFECT_API_URL.value()
        if not api:
            raise AlLoopError("there is no Prefect server")
        key, auth = PREFECT_API_KEY.value(), PREFECT_API_AUTH_STRING.value()
        with SyncPrefectClient(api, api_key=key, auth_string=auth) as client:
            yield client
