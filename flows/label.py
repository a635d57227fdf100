"""``al-loop label``: structures of a file labelled outside a loop, through the same store, executors and checks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ase.io import write
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from alcore.errors import InputError
from alcore.files import read_file
from alcore.identity import label_key
from alcore.protocols import RecordStore
from alcore.types import Candidate, Label, LabelRequest, Structure
from alcore.vetting import believed, vet
from calculators.labeling import label_each
from flows import environment, wiring
from flows.bounded import BoundedLabeler, stop_labelling
from flows.claims import LabelClaims
from flows.export import labelled_atoms
from flows.leases import LeaseKeeper
from flows.runfile import RunFileErrors, apply_override, load_run_file, read_section
from flows.settings import PYIRON_KEYS, ExecutorSettings
from flows.signals import signals_call, terminable

if TYPE_CHECKING:
    from ase import Atoms
    from rich.console import Console

    from calculators.base import ResolvedCalculator
    from storage.durable import DurableStore


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelJob:
    """What is to be labelled, checked.

    Attributes:
        source: name of the file, for messages.
        structures: one a frame.
        config_types: what the frames say of themselves, one a frame.
        resolved: the calculator.
        executor: where it runs.
        mongodb_uri: of the run file it is to be like, or None.
        out: where the labels go.
    """

    source: str
    structures: Sequence[Structure]
    config_types: Sequence[str]
    resolved: ResolvedCalculator
    executor: ExecutorSettings
    mongodb_uri: str | None
    out: Path

    @property
    def keys(self) -> list[str]:
        """Content keys, one a frame; frames that are the same structure share one."""
        return [label_key(structure, self.resolved.fingerprint) for structure in self.structures]

    def where(self, key: str) -> str:
        """The frames of that key, for a person."""
        frames = [str(k) for k, other in enumerate(self.keys) if other == key]
        return f"frame{'s' * (len(frames) > 1)} {', '.join(frames)}"


def read_job(
    file: Path,
    calculator: str | None,
    *,
    out: Path | None = None,
    like: Path | None = None,
    settings: Sequence[str] = (),
    executor: Mapping[str, Any] | None = None,
    executor_settings: Sequence[str] = (),
) -> LabelJob:
    """Everything that is asked for, read and checked; computes nothing.

    Args:
        file: frames that ASE reads.
        calculator: name of the calculator; None: that of ``like``.
        out: where the labels go; None: ``<file>-labelled.extxyz`` in the current folder.
        like: a run file that names calculator and executor.
        settings: ``key=value`` each, the calculator's.
        executor: keys of the executor; None as a value means: not given.
        executor_settings: ``key=value`` each, more of the executor's.

    Raises:
        InputError: the first thing that cannot work, or (``RunFileErrors``) everything wrong with the structures.
    """
    from calculators.registry import resolve

    run = load_run_file(like) if like is not None else None
    if calculator is None and run is None:
        raise InputError("no calculator is named", where="al-loop label", mend="--calculator NAME, or --like RUN.yaml")
    same = run is not None and calculator in (None, run.calculator.name)
    arguments = run.calculator.arguments() if run is not None and same else {}
    for override in settings:
        apply_override(arguments, override)
    name = calculator or (run.calculator.name if run is not None else "")
    resolved = resolve(name, wiring.vouched(name, arguments), base=Path.cwd())
    resolved.check_available()
    where = _executor({} if run is None else run.executor.model_dump(), executor or {}, executor_settings)
    target = out or Path(f"{file.stem}-labelled.extxyz")
    if not target.absolute().parent.is_dir():
        raise InputError("no such folder", where=str(target.parent), mend="make it, or give another -o")
    frames = _read_frames(file)
    return LabelJob(
        source=file.name,
        structures=_structures(frames, file.name, resolved),
        config_types=[str(frame.info.get("config_type", "label")) for frame in frames],
        resolved=resolved,
        executor=where,
        mongodb_uri=run.store.mongodb_uri if run is not None else None,
        out=target,
    )


def _executor(base: dict[str, Any], given: Mapping[str, Any], overrides: Sequence[str]) -> ExecutorSettings:
    asked = {key: value for key, value in given.items() if value is not None}
    if asked.get("kind") == "local":
        base = {key: value for key, value in base.items() if key not in PYIRON_KEYS}
    values = base | asked
    for override in overrides:
        apply_override(values, override)
    settings = read_section(ExecutorSettings, values, "executor")
    wiring.check_executor(settings)
    return settings


def _read_frames(file: Path) -> list[Atoms]:
    if not file.is_file():
        raise InputError("no such file", where=str(file), mend="give a file of structures that ASE reads")
    frames: list[Atoms] = read_file(file, str(file), ":")
    if not frames:
        raise InputError("there is no structure in it", where=str(file))
    return frames


def _structures(frames: Sequence[Atoms], source: str, resolved: ResolvedCalculator) -> list[Structure]:
    structures, problems = [], []
    for k, frame in enumerate(frames):
        where = f"{source}: frame {k}"
        try:
            structure = Structure.from_atoms(frame, charge=_charge(frame, where))
            resolved.check_structure(structure, where)
            structures.append(structure)
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise RunFileErrors(problems)
    return structures


def _charge(frame: Atoms, where: str) -> float:
    given = frame.info.get("charge", 0.0)
    try:
        return float(given)
    except (TypeError, ValueError):
        raise InputError(f"the charge {given!r} is no number", where=where, mend="give it in e") from None


def run_job(job: LabelJob, store: DurableStore, console: Console, *, quiet: bool = False) -> int:
    """Label what the store does not hold yet, write the file, say what came of it; the exit code.

    Raises:
        KeyboardInterrupt: Ctrl-C; every label that was there is stored.
    """
    keys = job.keys
    labels = {key: label for key, label in store.load_labels(keys).items() if label.ok}
    computed: set[str] = set()
    wanted = [request for request in _requests(job) if request.key not in labels]
    if wanted:
        folder = environment.data_dir() / "calculations" / f"label-{job.resolved.name}-{job.resolved.fingerprint[:12]}"
        with _progress(job, len(wanted), console, quiet) as (tell, say):
            what = f"al-loop label {job.source}"
            labeler = wiring.open_labeler(job.executor, job.resolved, store, folder, run=what, log=say)
            end = partial(stop_labelling, labeler, store)
            with closing(LeaseKeeper(store, run=what)) as keeper, closing(labeler), terminable(), signals_call(end):
                claims = LabelClaims(keeper, store, stop=labeler.closed, log=say)
                work = _Work(wanted, labeler, claims, store)
                labels |= work.done(labels, tell, workers=job.executor.workers)
                computed = work.computed
    labels = vetted(labels)
    write_labels(job, labels)
    for line in _failures(job, labels):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not quiet:
        console.print(_summary(job, labels, len(computed)))
    return 0 if all(label.ok for label in labels.values()) else 1


def _requests(job: LabelJob) -> list[LabelRequest]:
    """One for each different structure."""
    asked = dict(zip(job.keys, job.structures, strict=True))
    return [
        LabelRequest(
            key=key, candidate=Candidate(path=job.source, kind="data", image=k, structure=structure), generation=0
        )
        for k, (key, structure) in enumerate(asked.items())
    ]


class _Work:
    """What is still to be labelled, by several threads; ``computed`` are the keys of what was computed here."""

    def __init__(
        self, requests: Sequence[LabelRequest], labeler: BoundedLabeler, claims: LabelClaims, store: RecordStore
    ) -> None:
        self._left, self._labeler, self._claims, self._store = list(requests), labeler, claims, store
        self._turn = threading.Lock()
        self.computed: set[str] = set()

    def done(self, known: Mapping[str, Label], tell: Callable[[Label], None], *, workers: int) -> dict[str, Label]:
        """All of it; ``tell`` hears of each. Folders of what is believed go in the end, or at Ctrl-C."""
        labels: dict[str, Label] = {}

        def heard(label: Label) -> None:
            labels[label.key] = label
            tell(label)

        try:
            label_each(list(self._left), self._one, workers, on_done=heard, stop=self._labeler.close)
        finally:
            together = vetted({**known, **labels})
            for key in self.computed & labels.keys():
                if together[key].ok:
                    self._labeler.tidy(labels[key])
        return labels

    def _one(self, _: LabelRequest) -> Label:
        """Any one of them; stored before anybody else may ask for it."""
        request = self._next()
        with self._claims.claim(request.key) as others:
            if others is not None:
                return others
            (label,) = self._labeler.label([request])
            self._store.save_label(label)
            self.computed.add(request.key)
        return label

    def _next(self) -> LabelRequest:
        """What somebody else computes now comes last: by then it may be there."""
        with self._turn:
            held = self._claims.held()
            return self._left.pop(next((k for k, request in enumerate(self._left) if request.key not in held), 0))


def vetted(labels: Mapping[str, Label]) -> dict[str, Label]:
    """The same, those that the others speak against ``rejected``, as in a loop."""
    return believed(labels, vet([label for label in labels.values() if label.ok]))


def write_labels(job: LabelJob, labels: Mapping[str, Label]) -> None:
    """The sound ones, in the order of their frames, with the keys MACE reads."""
    frames = []
    for key, config_type in zip(job.keys, job.config_types, strict=True):
        if labels[key].ok:
            frames.append(labelled_atoms(labels[key], config_type))
            frames[-1].info["status"] = labels[key].status
    if frames:
        write(job.out, frames, format="extxyz")


def _failures(job: LabelJob, labels: Mapping[str, Label]) -> Iterator[str]:
    for key, label in labels.items():
        if not label.ok:
            yield f"{job.where(key)}: {label.status}: {label.reason}, files in {label.folder}"


def _summary(job: LabelJob, labels: Mapping[str, Label], n_computed: int) -> Table:
    found = [labels[key] for key in job.keys]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("status")
    table.add_column("frames", justify="right")
    for status, count in sorted(Counter(label.status for label in found).items()):
        table.add_row(status, str(count))
    table.add_row("computed now", str(n_computed))
    table.add_row("known already", str(len(labels) - n_computed))
    n_ok = sum(label.ok for label in found)
    table.add_row("written", Text(f"{n_ok} to {job.out}" if n_ok else "nothing"))
    return table


@contextmanager
def _progress(
    job: LabelJob, total: int, console: Console, quiet: bool
) -> Iterator[tuple[Callable[[Label], None], Callable[[str], None]]]:
    """What hears of each label, and what takes lines: a bar on a terminal, plain lines elsewhere."""
    counts: Counter[str] = Counter()

    def say(line: str) -> None:
        if not quiet:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def counted(label: Label) -> str:
        counts[label.status] += 1
        return ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))

    def tell(label: Label) -> None:
        so_far = counted(label)
        say(f"{counts.total()}/{total} {job.where(label.key)}: {label.status} ({so_far})")

    if quiet or not console.is_terminal:
        yield tell, say
        return
    columns = (TextColumn("labels"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda label: bar.update(task, advance=1, description=counted(label)), say
