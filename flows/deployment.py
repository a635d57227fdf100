"""What stands on the Prefect server: the work pool, the deployments, and the rules that keep run states honest."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

POOL = "al-loop"
ENTRYPOINTS: Mapping[str, str] = {"al-loop": "flows.al_loop:al_loop"}
"""Deployment (and flow) name -> ``module:flow``. Imported by name: the same installed, editable or from a checkout."""

HEARTBEAT_S = 30
ZOMBIE_AFTER_S = 240
"""Silence after which a run counts as dead; above Prefect's default heartbeat of 180 s, so that a run started by other
means than our worker is never called dead while it lives."""

ZOMBIE_RULE = "al-loop: runs without a heartbeat have crashed"
LIVE_STATES = ("RUNNING", "PENDING", "CANCELLING")


async def deploy(env: Mapping[str, str], entrypoints: Mapping[str, str] = ENTRYPOINTS) -> None:
    """Creates or updates the work pool, the deployments and the zombie rule on the server Prefect's settings name.

    Args:
        env: extra environment variables of the flow run's process.
        entrypoints: deployment name -> ``module:flow``.
    """
    from prefect import Flow
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.flows import EntrypointType

    async with get_client() as client:
        try:
            await client.read_work_pool(POOL)
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # the worker, which makes it too, was faster
                await client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        await _put_zombie_rule(client, entrypoints)
    for name, entrypoint in entrypoints.items():
        module, _, attribute = entrypoint.partition(":")
        flow: Flow[..., Any] = getattr(importlib.import_module(module), attribute)
        deployment = await flow.ato_deployment(
            name,
            work_pool_name=POOL,
            entrypoint_type=EntrypointType.MODULE_PATH,
            job_variables={"stream_output": False, "env": dict(env)},
        )
        await deployment.aapply()


async def _put_zombie_rule(client: Any, flow_names: Iterable[str]) -> None:
    """A run whose process and worker were both killed has nobody to report it: its missing heartbeat does."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    rule = AutomationCore(
        name=ZOMBIE_RULE,
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat"},
            expect={
                "prefect.flow-run.heartbeat",
                *(f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")),
            },
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": list(flow_names)}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=ZOMBIE_AFTER_S),
        ),
        actions=[
            ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message="No heartbeat: its process is gone.")
        ],
    )
    known = await client.read_automations_by_name(ZOMBIE_RULE)
    if known:
        await client.update_automation(known[0].id, rule)
    else:
        await client.create_automation(rule)


async def crash_orphans(alive: Collection[UUID]) -> int:
    """Marks our deployments' runs as Crashed that claim to run although their process is gone.

    Args:
        alive: ids of the flow runs that do have a process.

    Returns:
        How many were marked.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterName,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed, State

    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType(state) for state in LIVE_STATES]))
    async with get_client() as client:
        runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(state=states),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL])),
        )
        orphans = [run for run in runs if run.id not in alive]
        for run in orphans:
            gone: State[None] = Crashed(message="Its process is gone. Start it again under the same name to go on.")
            await client.set_flow_run_state(run.id, gone, force=True)
    return len(orphans)
