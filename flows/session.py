"""One run of the loop from its settings: opened or gone on with in the store, run, closed with its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

from alcore.errors import AlLoopError, InputError
from alcore.identity import json_sha256
from alcore.loop import LoopState, PlainRunner, Workshop, begin, run_loop
from alcore.protocols import RecordStore, StepRunner
from alcore.types import GenerationRecord, Label, RunRecord, StopCode
from flows import environment, wiring
from flows.settings import RunSettings, StoreSettings

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("al-loop", "torch", "mace-torch", "ase", "numpy", "scipy", "prefect", "mongoengine")

MAY_CHANGE = ("name", "stop", "executor", "store")
"""Sections of a run file that may differ when a run goes on; all else would mix two different questions."""

RunStatus = Literal["running", "converged", "budget_spent", "failed", "cancelled"]
STATUS: Mapping[StopCode, RunStatus] = {
    "converged": "converged",
    "barrierless": "budget_spent",
    "label_budget": "budget_spent",
    "generation_budget": "budget_spent",
    "end_state_not_minimum": "budget_spent",
    "labels_failing": "failed",
    "continue": "running",
}
EXIT: Mapping[RunStatus, int] = {"converged": 0, "budget_spent": 3}

OnGeneration = Callable[[RunRecord, Sequence[GenerationRecord], Mapping[str, Label]], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunOutcome:
    """A run that has ended: its record, its generations, and every label it asked for by key."""

    run: RunRecord
    generations: list[GenerationRecord]
    labels: dict[str, Label]


def open_record_store(settings: StoreSettings | None) -> RecordStore:
    """The database of the run file, of ``AL_LOOP_MONGODB_URI``, or the embedded one (started if need be).

    Raises:
        StoreError: it cannot be reached, or is of a newer schema.
    """
    from storage.store import open_store

    given = settings.mongodb_uri if settings else None
    return open_store(given or environment.mongodb_uri_from_env(), environment.data_dir())


def run_session(
    settings: RunSettings,
    *,
    runner: StepRunner,
    on_generation: OnGeneration = lambda run, generations, labels: None,
    log: Callable[[str], None] = lambda line: None,
) -> RunOutcome:
    """Runs the loop to its end; a name that exists goes on after its last completed generation.

    Args:
        settings: the run file, resolved.
        runner: where the steps run.
        on_generation: hears of every generation with all that came before.
        log: takes lines for a person.

    Raises:
        InputError: something in the settings cannot work, found before anything is computed.
    """
    pairs = wiring.read_pairs(settings)
    resolved = wiring.resolve_calculator(settings, pairs)
    given = wiring.read_data(settings, resolved)
    numbers = sorted({int(z) for pair in pairs for z in pair.initial.numbers} | {int(z) for label in given for z in label.structure.numbers})
    prior = wiring.make_prior(settings.model, numbers, settings.seed)
    with closing(open_record_store(settings.store)) as store:
        run = _open_run(settings, store, log)
        with closing(wiring.make_labeler(settings, resolved, environment.data_dir())) as labeler:
            generations = store.load_generations(run.name)

            def heard(record: GenerationRecord, labels: Mapping[str, Label]) -> None:
                generations.append(record)
                log(generation_line(record))
                on_generation(run, generations, labels)

            shop = Workshop(
                labeler=labeler,
                trainer=wiring.make_trainer(settings, prior, store),
                store=store,
                runner=runner,
                on_generation=heard,
                log=log,
            )
            spec = wiring.loop_spec(settings)
            try:
                state = run_loop(begin(pairs, spec, shop, given), spec, shop)
            except BaseException as error:
                _close_run(run, store, "failed" if isinstance(error, Exception) else "cancelled", _reason(error))
                raise
        return _finished(run, state, store, on_generation)


def _finished(run: RunRecord, state: LoopState, store: RecordStore, on_generation: OnGeneration) -> RunOutcome:
    closed = _close_run(run, store, STATUS[state.decision.code], state.decision.reason)
    outcome = RunOutcome(run=closed, generations=list(state.records), labels=state.labels)
    on_generation(closed, outcome.generations, outcome.labels)
    return outcome


def _open_run(settings: RunSettings, store: RecordStore, log: Callable[[str], None]) -> RunRecord:
    """A new run, or the one of that name if it asked the same question.

    Raises:
        InputError: a run of that name was made with other physics.
    """
    values = _without_password(settings)
    run = RunRecord(
        name=settings.name,
        settings=values,
        settings_sha256=json_sha256(values),
        versions=_versions(),
        started=environment.now_iso(),
    )
    before = store.load_run(settings.name)
    if before is not None:
        changed = [key for key in values if key not in MAY_CHANGE and before.settings.get(key) != values[key]]
        if changed:
            raise InputError(
                f"the run '{settings.name}' exists with other settings in: {', '.join(changed)}",
                where="name",
                mend="choose another name (--name), or undo the change",
            )
        log(f"run '{settings.name}' exists since {before.started}: going on where it stopped")
        run = replace(run, started=before.started)
    store.save_run(run)
    return run


def _close_run(run: RunRecord, store: RecordStore, status: RunStatus, reason: str) -> RunRecord:
    closed = replace(run, status=status, reason=reason, finished=environment.now_iso())
    store.save_run(closed)
    return closed


def _reason(error: BaseException) -> str:
    return "stopped by the user" if isinstance(error, KeyboardInterrupt) else f"{error or type(error).__name__}".splitlines()[0]


def _without_password(settings: RunSettings) -> dict[str, Any]:
    """Plain values; where the database lies is no part of the question, and its password none of the answer."""
    values = settings.model_dump(mode="json")
    values["store"] = {"mongodb_uri": None}
    return values


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            from flows import __version__

            found[package] = __version__ if package == "al-loop" else "not installed"
    return found


def generation_line(record: GenerationRecord) -> str:
    """One generation for a person, one line."""
    parts = [f"generation {record.index}", f"{record.n_reference_calls} calls"]
    for path in record.paths:
        if path.barrier is not None:
            std = path.barrier.sigma_ev if path.barrier_std_ev is None else path.barrier_std_ev
            confirmed = f", reference {path.verified_barrier_ev:.3f}" if path.verified_barrier_ev is not None else ""
            parts.append(f"{path.path}: {path.barrier.forward_ev:.3f} ± {std:.3f} eV{confirmed}")
    return " · ".join([*parts, record.decision.reason])


def run_foreground(settings: RunSettings, *, use_prefect: bool, dry_run: bool, console: Console) -> int:
    """Runs in this process and prints what comes of it; returns the exit code."""
    from flows.report.summary import barrier_summary
    from flows.report.table import generation_table, result_lines

    if dry_run:
        settings = rehearsal(settings)
    wiring.resolve_calculator(settings, wiring.read_pairs(settings))  # bad input is told before a server is started

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    if use_prefect:
        outcome = _through_prefect(settings, say)
    else:
        outcome = run_session(settings, runner=PlainRunner({"label": settings.executor.workers}), log=say)
    console.print(generation_table(outcome.generations))
    for line in result_lines(barrier_summary(outcome.run, outcome.generations, outcome.labels)):
        say(line)
    return EXIT.get(outcome.run.status, 1)


def _through_prefect(settings: RunSettings, say: Callable[[str], None]) -> RunOutcome:
    """The flow itself in this process, reporting to the server of ``al-loop up`` (started if need be)."""
    from flows.al_loop import al_loop
    from flows.services import connected
    from flows.status import run_labels

    with connected(say):
        state = al_loop(settings=settings, return_state=True)
        if not state.is_completed():
            state.result(raise_on_failure=True)
            raise AlLoopError(state.message or "the flow did not complete")
    with closing(open_record_store(settings.store)) as store:
        run = store.load_run(settings.name)
        generations = store.load_generations(settings.name)
        assert run is not None
        return RunOutcome(run=run, generations=generations, labels=run_labels(store, generations))


def rehearsal(settings: RunSettings) -> RunSettings:
    """The same run with a cheap teacher in the reference's place, under a name of its own.

    Raises:
        InputError: no teacher here knows all elements.
    """
    from calculators.registry import get_calculator

    pairs = wiring.read_pairs(settings)
    for name in ("emt", "chgnet", "tblite"):
        entry = get_calculator(name)
        teacher = settings.model_copy(
            update={
                "name": f"{settings.name}-dry-run",
                "calculator": settings.calculator.model_copy(update={"name": name, "settings": {}, "factory": None, "path": None, "packages": []}),
            }
        )
        if entry.unavailable(None):
            continue
        try:
            wiring.resolve_calculator(teacher, pairs)
        except InputError:
            continue
        return teacher
    raise InputError("no teacher for a dry run knows all elements here", where="--dry-run", mend="pip install 'al-loop[teachers]'")
