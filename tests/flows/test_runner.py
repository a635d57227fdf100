from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from alcore.errors import InputError
from flows.runner import PrefectRunner, task_name

KEY = "1f9a2c" + "0" * 58


def _in_flow(work: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``work`` returns inside a flow, and the flow run's id."""
    from prefect import flow
    from prefect.runtime import flow_run

    @flow(name="runner-test", persist_result=False)
    def run() -> Any:
        return work(), flow_run.id

    return run()  # type: ignore[no-any-return]


def _task_runs(flow_run_id: str, expected: int) -> list[Any]:
    """Task runs are recorded by events, a moment later."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    async def read() -> list[Any]:
        async with get_client() as client:
            for _ in range(60):
                runs = await client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
                )  # type: ignore[list-item]
                if len(runs) >= expected and all(run.state and run.state.is_final() for run in runs):
                    break
                await asyncio.sleep(0.25)
            return list(runs)

    return asyncio.run(read())


@pytest.mark.parametrize(
    ("step", "name", "shown"),
    [
        ("probe", "hop", "probe g03 hop"),
        ("label", KEY, "label g03 1f9a2c"),
        ("train", "member-1", "train g03 member-1"),
        ("record", "", "record g03"),
    ],
)
def test_task_names(step: Any, name: str, shown: str) -> None:
    assert task_name(step, 3, name) == shown


def test_map_keeps_order_and_shows_named_tagged_tasks_with_ids_only(prefect_api: str) -> None:
    def work() -> list[str]:
        runner = PrefectRunner({"label": 2})
        with runner.generation(3):
            return [*runner.map("label", 3, [KEY, "b", "c{x}"], str.upper), *runner.map("probe", 3, ["hop"], str.upper)]

    result, flow_run_id = _in_flow(work)
    assert result == [KEY.upper(), "B", "C{X}", "HOP"]
    runs = {run.name: run for run in _task_runs(flow_run_id, 4)}
    assert set(runs) == {"label g03 1f9a2c", "label g03 b", "label g03 c{x}", "probe g03 hop"}
    assert set(runs["label g03 b"].tags) == {"label", "g03"}
    assert set(runs["label g03 b"].task_inputs) == {"name"}
    assert all(run.state.is_completed() for run in runs.values())


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_the_limit_run_at_once(prefect_api: str, limit: int) -> None:
    lock = threading.Lock()
    meet = threading.Barrier(limit)
    running, most = 0, 0

    def one(name: str) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meet.wait(timeout=30)  # passes only if ``limit`` of them do run at the same time
        with lock:
            running -= 1
        return name

    names = [str(i) for i in range(3 * limit)]
    result, _ = _in_flow(lambda: PrefectRunner({"label": limit}).map("label", 0, names, one))
    assert result == names
    assert most == limit


def test_same_id_twice_is_worked_twice(prefect_api: str) -> None:
    seen: list[str] = []
    _in_flow(lambda: [PrefectRunner().map("record", i, ["same"], seen.append) for i in range(2)])
    assert seen == ["same", "same"]


@pytest.mark.parametrize("error", [InputError("no", where="run.yaml: x"), ValueError("boom")])
@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"]])
def test_exceptions_come_through_as_they_are(prefect_api: str, error: Exception, names: list[str]) -> None:
    def fail(name: str) -> str:
        if name == names[-1]:
            raise error
        return name

    def work() -> BaseException | None:
        try:
            PrefectRunner({"label": 2}).map("label", 0, names, fail)
        except Exception as caught:
            return caught
        return None

    caught, _ = _in_flow(lambda: [work()])
    assert caught[0] is error


def test_nothing_to_do_is_no_task(prefect_api: str) -> None:
    result, _ = _in_flow(lambda: PrefectRunner().map("label", 0, [], str.upper))
    assert result == []
