"""One run of the loop from its settings: opened or gone on with in the store, run, closed with its outcome."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast

from alcore.errors import AlLoopError, InputError, StoreError
from alcore.identity import geometry_bytes
from alcore.loop import begin, run_loop
from alcore.protocols import RecordStore, StepRunner
from alcore.runner import PlainRunner
from alcore.state import LoopState, Workshop
from alcore.types import EndpointPair, GenerationRecord, Label, RunRecord, StopCode
from flows import environment, wiring
from flows.settings import CalculatorSettings, RunSettings, StoreSettings
from flows.sittings import new_sitting

if TYPE_CHECKING:
    from prefect.states import State
    from rich.console import Console

    from calculators.base import ResolvedCalculator
    from flows.bounded import BoundedLabeler
    from storage.store import MongoStore

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


def open_record_store(settings: StoreSettings | None) -> MongoStore:
    """The database of the run file, of ``AL_LOOP_MONGODB_URI``, or the embedded one (started if need be).

    Raises:
        StoreError: it cannot be reached, or is of a newer schema.
    """
    from storage.store import open_store

    given = settings.mongodb_uri if settings else None
    return open_store(given or environment.mongodb_uri_from_env(), environment.data_dir())


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
    """
    parts = read_parts(settings)
    with closing(open_record_store(settings.store)) as store:
        before = earlier_run(settings, store, parts.pairs, parts.resolved)
        with closing(wiring.make_labeler(settings, parts.resolved, store, environment.data_dir(), log)) as labeler:
            run = _open_run(settings, store, before, log)
            generations = store.load_generations(run.name)

            def heard(record: GenerationRecord, labels: Mapping[str, Label]) -> None:
                generations.append(record)
                log(generation_line(record))
                on_generation(run, generations, labels)

            try:
                shop = Workshop(
                    labeler=labeler,
                    trainer=wiring.make_trainer(settings, parts.prior, store),
                    store=store,
                    runner=runner,
                    on_generation=heard,
                    log=log,
                )
                spec = wiring.loop_spec(settings, sitting=len(run.sittings) - 1)
                with _ctrl_c_ends(labeler), show_slots(labeler), wiring.few_threads(parts.pairs, spec):
                    state = run_loop(begin(parts.pairs, spec, shop, parts.given), spec, shop)
            except BaseException as error:
                with suppress(StoreError):  # if the store is what failed, that is what should be heard of
                    _close_run(run, store, "failed" if isinstance(error, Exception) else "cancelled", _reason(error))
                raise
        return _finished(run, state, store, on_generation)


@contextmanager
def _ctrl_c_ends(labeler: BoundedLabeler) -> Iterator[None]:
    """Threads that wait for a label do not hear of Ctrl-C, and the runner waits for them: end what they wait for, too.
    In another thread, because the handler may interrupt one that holds the labeler's locks."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=labeler.close).start()
        before(number, frame)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _finished(run: RunRecord, state: LoopState, store: RecordStore, on_generation: OnGeneration) -> RunOutcome:
    closed = _close_run(run, store, STATUS[state.decision.code], state.decision.reason)
    outcome = RunOutcome(run=closed, generations=list(state.records), labels=state.labels)
    on_generation(closed, outcome.generations, outcome.labels)
    return outcome


def earlier_run(
    settings: RunSettings, store: RecordStore, pairs: Sequence[EndpointPair], resolved: ResolvedCalculator
) -> RunRecord | None:
    """The run of that name, if there is one and it asked the same question.

    Raises:
        InputError: it was made with other physics: other settings, end states or reference calculator.
    """
    before = store.load_run(settings.name)
    if before is None:
        return None
    then, now = _question(before.settings), _question(_without_password(settings))
    changed = [key for key in now if then.get(key) != now[key]]
    generations = store.load_generations(settings.name)
    if generations:
        asked = [(p.path, geometry_bytes(p.initial), geometry_bytes(p.final)) for p in generations[0].paths]
        if asked != [(pair.name, geometry_bytes(pair.initial), geometry_bytes(pair.final)) for pair in pairs]:
            changed.append("the end states' files")
        labels = store.load_labels(generations[-1].label_keys[:1]).values()
        if any(label.fingerprint != resolved.fingerprint for label in labels) and "calculator" not in changed:
            changed.append("the calculator's version or files")
    if changed:
        raise InputError(
            f"the run '{settings.name}' exists with other settings in: {', '.join(dict.fromkeys(changed))}",
            where="name",
            mend="choose another name (--name), or undo the change",
        )
    return before


def _question(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that must not differ. Of end states the content counts, not where their files lie."""
    paths = [{**path, "initial": None, "final": None} for path in values.get("paths", [])]
    return {key: value for key, value in values.items() if key not in MAY_CHANGE} | {"paths": paths}


def _open_run(
    settings: RunSettings, store: RecordStore, before: RunRecord | None, log: Callable[[str], None]
) -> RunRecord:
    """The record of a run that begins or, if there was one ``before``, goes on."""
    values = _without_password(settings)
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
        for key, (then, now) in sitting.changed.items():
            log(f"  {key} was {then}, is now {now}")
    store.save_run(run)
    return run


def _close_run(run: RunRecord, store: RecordStore, status: RunStatus, reason: str) -> RunRecord:
    closed = replace(run, status=status, reason=reason, finished=environment.now_iso())
    store.save_run(closed)
    return closed


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by the user"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _without_password(settings: RunSettings) -> dict[str, Any]:
    """Plain values; where the database lies is no part of the question, and its password none of the answer."""
    values = settings.model_dump(mode="json")
    values["store"] = {"mongodb_uri": None}
    return values


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
        earlier_run(settings, store, parts.pairs, parts.resolved)


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
