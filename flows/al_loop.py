"""The flow ``al-loop``: parameters in, one run of the loop, what it found out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed

from alcore.errors import AlLoopError, InputError
from alcore.types import GenerationRecord, Label, RunRecord
from flows.artifacts import publish
from flows.runner import PrefectRunner, show_slots
from flows.settings import RunSettings


def _readable_name() -> str:
    given = flow_run.parameters or {}
    settings = given.get("settings")
    of_settings = settings.get("name") if isinstance(settings, Mapping) else getattr(settings, "name", None)
    config = given.get("config")
    return str(given.get("name") or of_settings or (Path(config).stem if config else "quickstart"))


@flow(name="al-loop", flow_run_name=_readable_name, validate_parameters=False, persist_result=False)
def al_loop(config: str | None = None, settings: RunSettings | None = None, name: str | None = None) -> Any:
    """Find migration barriers by active learning.

    Give a run file or settings, or neither for the quickstart.

    Args:
        config: a run file (absolute path).
        settings: the same content as an object.
        name: the run's name instead of the one in there; a name that exists goes on where it stopped.

    Returns:
        What ``barrier.json`` holds; or a failed state whose message is the one line of an ``AlLoopError``.
    """
    try:
        return _run(config, settings, name)
    except AlLoopError as error:
        get_run_logger().error("%s", error)
        return Failed(message=str(error), data=error)


def _run(config: str | None, settings: RunSettings | None, name: str | None) -> dict[str, Any]:
    from flows.report.summary import barrier_summary
    from flows.runfile import resolve_settings

    log = get_run_logger()
    if config is not None and not Path(config).expanduser().is_absolute() and not Path(config).exists():
        raise InputError(
            "a deployed run starts in another folder", where=config, mend="give the run file's absolute path"
        )
    resolved = resolve_settings(config, settings, name)
    from flows.session import run_session
    from flows.wiring import at_once

    def on_generation(run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label]) -> None:
        try:
            publish(run, generations, labels)
        except Exception:  # pictures of a run must never end it; the store has everything
            log.warning("the dashboard's artifacts could not be updated", exc_info=True)

    outcome = run_session(
        resolved,
        runner=PrefectRunner(at_once(resolved)),
        on_generation=on_generation,
        log=log.info,
        show_slots=show_slots,
    )
    return dict(barrier_summary(outcome.run, outcome.generations, outcome.labels))
