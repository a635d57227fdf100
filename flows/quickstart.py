"""``make run``: start the services, start the quickstart as a user would, watch it, show what came out.

Exit: 0 converged, 3 the budget is spent without converging, 1 it failed, 2 bad input, 130 the watching was interrupted.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from alcore.errors import AlLoopError, InputError
from alcore.protocols import RecordStore
from alcore.types import GenerationRecord

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from rich.console import Console

RUN = "quickstart"
COMMAND = ("deployment", "run", "al-loop")
EXIT_CODES: Mapping[str, int] = {"converged": 0, "budget_spent": 3}
POLL_S = 2.0
UUID_PATTERN = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


def trigger() -> UUID:
    """Starts a run exactly as a user does, ``prefect deployment run al-loop``; returns the flow run's id.

    Raises:
        AlLoopError: the command was refused; with what it said.
    """
    prefect = Path(sys.executable).with_name("prefect")
    said = subprocess.run([prefect, *COMMAND], check=False, capture_output=True, text=True)
    found = UUID_PATTERN.search(said.stdout)
    if said.returncode or not found:
        reason = (said.stderr.strip() or said.stdout.strip()).splitlines()[-1:]
        raise AlLoopError(f"`prefect {' '.join(COMMAND)}` was refused: {''.join(reason)}")
    return UUID(found.group())


def running(client: SyncPrefectClient) -> UUID | None:
    """The flow run that an earlier, interrupted call started and that has not ended; quickstarts have no parameters."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterName,
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    states = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]
    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[COMMAND[-1]])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states))),
    )
    return next((run.id for run in runs if not any(run.parameters.values())), None)


def progress_line(generation: GenerationRecord) -> str:
    """One generation in one line."""
    parts = [f"generation {generation.index}", f"{generation.n_reference_calls} reference calls"]
    for path in generation.paths:
        if path.barrier is not None:
            sigma = path.barrier.sigma_ev if path.barrier_std_ev is None else path.barrier_std_ev
            parts.append(f"barrier {path.barrier.forward_ev:.3f} ± {sigma:.3f} eV")
    return " · ".join(parts)


def watch(console: Console, store: RecordStore, client: SyncPrefectClient, flow_run_id: UUID) -> str:
    """Prints every generation as it is stored, until the flow run ends; returns why it failed, or ""."""
    printed = -1
    with console.status("waiting for the worker") as status:
        while True:
            state = client.read_flow_run(flow_run_id).state
            for generation in store.load_generations(RUN):
                if generation.index > printed:
                    printed = generation.index
                    console.print(progress_line(generation))
            if state is not None and state.is_final():
                return "" if state.is_completed() else f"{state.name}: {state.message}"
            doing = "waiting for the worker" if state is None or not state.is_running() else f"generation {printed + 1}"
            status.update(doing)
            time.sleep(POLL_S)


def follow(console: Console, store: RecordStore) -> str:
    """Starts the quickstart, or finds it under way, and watches it to its end; returns why it failed, or ""."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        flow_run_id = running(client)
        if flow_run_id is None:
            console.print(f"$ prefect {' '.join(COMMAND)}")
            flow_run_id = trigger()
        else:
            console.print(f"The run {RUN} is under way; watching it.")
        return watch(console, store, client, flow_run_id)


def show(console: Console, store: RecordStore, folder: Path) -> int:
    """Prints the generation table, writes the report into ``folder``; returns the exit code."""
    from flows.report import barrier_summary, generation_table, result_lines, write_report
    from flows.status import load_run, run_labels

    run, generations = load_run(store, RUN), store.load_generations(RUN)
    labels = run_labels(store, generations)
    if generations:
        console.print(generation_table(generations))
        for line in result_lines(barrier_summary(run, generations, labels)):
            console.print(line)
        page = write_report(run, generations, labels, folder)
        console.print(f"report     {page.as_uri()}", soft_wrap=True)
    if run.status not in EXIT_CODES:
        console.print(f"The run {RUN} is {run.status}: {run.reason or 'see its page in the dashboard'}")
    return EXIT_CODES.get(run.status, 1)


def main() -> int:
    """Runs the quickstart to its end, or shows the end it came to before."""
    from rich.console import Console

    from flows.services import connected
    from flows.session import open_record_store

    console = Console(markup=False, highlight=False)
    try:
        with connected() as where, closing(open_record_store(None)) as store:
            run = store.load_run(RUN)
            if run is not None and run.status in EXIT_CODES:
                console.print(f"The run {RUN} has finished already; this is its result.")
            elif problem := follow(console, store):
                console.print(problem, style="red")
                if store.load_run(RUN) is None:  # it failed before there was anything to show
                    return 1
            code = show(console, store, where.data_dir / "reports" / RUN)
            console.print(f"dashboard  {where.dashboard_url}\nmake stop ends what was started")
            return code
    except InputError as error:
        print(f"al-loop: {error}", file=sys.stderr)
        return 2
    except AlLoopError as error:
        print(f"al-loop: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        console.print("\nWhat was started goes on in the background: `make run` watches it again, `make stop` ends it.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
