"""``al-loop cancel``: the jobs that a run left in a queue, or on this machine, end."""

from __future__ import annotations

from alcore.protocols import RecordStore
from calculators.registry import resolve
from flows import environment, wiring
from flows.settings import RunSettings
from flows.status import load_run


def cancel_run(store: RecordStore, name: str) -> str:
    """End every unfinished job of a run; what came of it, for a person.

    Raises:
        InputError: there is no such run, it is active, or its queue is not on this machine.
        CalculatorError: its calculator, or pyiron, is not here any more.
    """
    settings = RunSettings.model_validate(load_run(store, name).settings)
    if settings.executor.kind != "pyiron":
        return f"nothing to cancel: the labels of '{name}' are computed by the run itself, and end with it"
    folder = wiring.run_folder(environment.data_dir(), name)
    if not folder.is_dir():
        return f"nothing to cancel: '{name}' has started no job from this machine"
    wiring.check_executor(settings.executor)
    resolved = resolve(settings.calculator.name, settings.calculator.arguments())
    with wiring.pyiron_labeler(settings.executor, resolved, folder) as labeler:
        n_ended = labeler.cancel()
    return f"ended {n_ended} job{'s' * (n_ended != 1)} of '{name}'"
