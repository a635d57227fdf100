"""One run of the loop from its settings: opened or gone on with in the store, run, closed with its outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from alcore.errors import AlLoopError, InputError, StoreError
from alcore.loop import begin, run_loop
from alcore.protocols import RecordStore, StepRunner
from alcore.runner import PlainRunner
from alcore.state import LoopState, Workshop
from alcore.types import EndpointPair, GenerationRecord, Label, RunRecord, StopCode
from flows import environment, wiring
from flows.bounded import BoundedLabeler, stop_labelling
from flows.claims import LabelClaims
from flows.earlier import change_lines, earlier_run, plain_settings
from flows.leases import LeaseKeeper
from flows.one_process import OneProcess, refuse_busy, take_run
from flows.settings import CalculatorSettings, RunSettings, StoreSettings
from flows.signals import Terminated, signals_call, terminable
from flows.sittings import new_sitting

if TYPE_CHECKING:
    from prefect.states import State
    from rich.console import Console

    from calculators.base import ResolvedCalculator
    from storage.durable import DurableStore

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
ShowSlots = Callable[["BoundedLabeler"], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """What a run file names, read and checked."""

    pairs: list[EndpointPair]
    resolved: ResolvedCalculator
    given: list[Label]
    prior: wiring.Prior


@dataclass(frozen=True, kw_only=True, eq=False)
class RunOutcome:
    """A run that has ended: its record, its generations, and every label it asked for by key."""

    run: RunRecord
    generations: list[GenerationRecord]
    labels: dict[str, Label]


def open_record_store(settings: StoreSettings | None, log: Callable[[str], None] | None = None) -> DurableStore:
    """The database of the run file, of ``AL_LOOP_MONGODB_URI``, or the embedded one (started if need be).

    Args:
        settings: of the run file, if there is one.
        log: hears when the database is away and when it is back; None: the module's logger, which is stderr.

    Raises:
        InputError: the data folder cannot be written.
        StoreError: it cannot be reached, or is of a newer schema.
    """
    from storage.durable import open_durable_store

    given = settings.mongodb_uri if settings else None
    return open_durable_store(given or environment.mongodb_uri_from_env(), environment.data_dir(), log=log)


def read_parts(settings: RunSettings) -> Parts:
    """Everything but the store; computes nothing.

    Raises:
        InputError: the first thing that cannot work.
    """
    wiring.check_executor(settings.executor)
    pairs = wiring.read_pairs(settings)
    resolved = wiring.resolve_calculator(settings, pairs)
    given = wiring.read_data(settings, resolved)
    prior = wiring.make_prior(settings.model, wiring.elements(pairs, given), settings.seed)
    return Parts(pairs=pairs, resolved=resolved, given=given, prior=prior)


def run_session(
    settings: RunSettings,
    *,
    runner: StepRunner,
    on_generation: OnGeneration = lambda run, generations, labels: None,
    log: Callable[[str], None] = lambda line: None,
    show_slots: ShowSlots = nullcontext,
) -> RunOutcome:
    """Runs the loop to its end; a name that exists goes on after its last completed generation.

    Args:
        settings: the run file, resolved.
        runner: where the steps run.
        on_generation: hears of every generation with all that came before.
        log: takes lines for a person.
        show_slots: shows, inside, how many labels run at once (``flows.runner.show_slots`` in a flow).

    Raises:
        InputError: something in the settings cannot work, found before anything is computed.
        RunBusyError: another process works on the run, or has taken it over while the database was away.
    """
    parts = read_parts(settings)
    opened = open_record_store(settings.store, log)
    with closing(opened) as store, closing(LeaseKeeper(store, run=settings.name)) as keeper:
        lease = take_run(keeper, settings.name, log)
        before = earlier_run(settings, store, parts.pairs, parts.resolved, parts.given)
        with closing(wiring.make_labeler(settings, parts.resolved, store, environment.data_dir(), log)) as labeler:
            run = _open_run(settings, store, before, log)
            generations: list[GenerationRecord] = []

            def heard(record: GenerationRecord, labels: Mapping[str, Label]) -> None:
                generations.append(record)
                log(generation_line(record))
                on_generation(run, generations, labels)

            try:
                shop = Workshop(
                    labeler=labeler,
                    trainer=wiring.make_trainer(settings, parts.prior, store),
                    store=store,
                    runner=OneProcess(runner, lease),
                    claims=LabelClaims(keeper, store, stop=labeler.closed, log=log),
                    on_generation=heard,
                    log=log,
                )
                spec = wiring.loop_spec(settings, sitting=len(run.sittings) - 1)
                end = partial(stop_labelling, labeler, store)
                with signals_call(end), show_slots(labeler), wiring.few_threads(parts.pairs, spec):
                    state = begin(parts.pairs, spec, shop, parts.given)
                    generations += state.records
                    state = run_loop(state, spec, shop)
                lease.check(ask=True)
            except BaseException as error:
                with suppress(StoreError):  # if the store is what failed, that is what should be heard of
                    if lease.is_ours(ask=True):
                        status: RunStatus = "failed" if isinstance(error, Exception) else "cancelled"
                        _close_run(run, store, status, _reason(error))
                raise
        return _finished(run, state, store, on_generation)


def _finished(run: RunRecord, state: LoopState, store: RecordStore, on_generation: OnGeneration) -> RunOutcome:
    closed = _close_run(run, store, STATUS[state.decision.code], state.decision.reason)
    outcome = RunOutcome(run=closed, generations=list(state.records), labels=state.labels)
    on_generation(closed, outcome.generations, outcome.labels)
    return outcome


def _open_run(
    settings: RunSettings, store: RecordStore, before: RunRecord | None, log: Callable[[str], None]
) -> RunRecord:
    """The record of a run that begins or, if there was one ``before``, goes on."""
    values = plain_settings(settings)
    sitting = new_sitting(values, before)
    run = RunRecord(
        name=settings.name,
        settings=values,
        settings_sha256=sitting.settings_sha256,
        sittings=(*(before.sittings if before else ()), sitting),
        started=before.started if before else sitting.started,
    )
    if before is not None:
        log(f"run '{settings.name}' exists since {before.started}: going on where it stopped")
        for line in change_lines(sitting):
            log(f"  {line}")
    store.save_run(run)
    return run


def _close_run(run: RunRecord, store: RecordStore, status: RunStatus, reason: str) -> RunRecord:
    closed = replace(run, status=status, reason=reason, finished=environment.now_iso())
    store.save_run(closed)
    return closed


def _reason(error: BaseException) -> str:
    if not isinstance(error, Exception):  # Prefect raises one of its own at SIGTERM
        by_hand = isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated)
        return "stopped by the user" if by_hand else "stopped from outside (SIGTERM)"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with terminable():
        if use_prefect:
            refuse_bad_input(settings)  # before a server is started
            outcome = _through_prefect(settings, say)
        else:
            outcome = run_session(settings, runner=PlainRunner(wiring.at_once(settings)), log=say)
    console.print(generation_table(outcome.generations))
    for line in result_lines(barrier_summary(outcome.run, outcome.generations, outcome.labels)):
        say(line)
    return EXIT.get(outcome.run.status, 1)


def refuse_bad_input(settings: RunSettings) -> None:
    """Raises:
    InputError: something that would end the run before its first generation.
    """
    parts = read_parts(settings)
    with closing(open_record_store(settings.store)) as store:
        refuse_busy(store, settings.name)
        earlier_run(settings, store, parts.pairs, parts.resolved, parts.given)


def _through_prefect(settings: RunSettings, say: Callable[[str], None]) -> RunOutcome:
    """The flow itself in this process, reporting to the server of ``al-loop up`` (started if need be)."""
    from flows.al_loop import al_loop
    from flows.services import connected
    from flows.status import run_labels

    # Prefect stores a run's parameters and shows them, and an address may hold a password: it goes another way.
    shown = settings.model_copy(update={"store": StoreSettings()})
    with connected(say), environment.mongodb_uri(settings.store.mongodb_uri):
        state = cast("State[Any]", al_loop(settings=shown, return_state=True))
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
        if get_calculator(name).unavailable(None):
            continue
        change = {"name": f"{settings.name}-dry-run", "calculator": CalculatorSettings(name=name), "data": []}
        teacher = settings.model_copy(update=change)  # without data: they are not the teacher's
        try:
            wiring.resolve_calculator(teacher, pairs)
        except InputError:
            continue
        return teacher
    mend = "pip install 'al-loop[teachers]'"
    raise InputError("no teacher for a dry run knows all elements here", where="--dry-run", mend=mend)
