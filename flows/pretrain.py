"""``al-loop pretrain``: a small generalist MACE from what a teacher says about structures like the user's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from alcore.chemical_space import metals, pairs, salts
from alcore.errors import InputError
from alcore.files import make_folder, read_file
from alcore.sampling import DefectSpec, SampleSpec, around_structures
from alcore.teaching import KeptTeacher, Limits, teach
from alcore.tellurides import tellurides
from alcore.types import Structure
from flows.pretrain_settings import LearningSettings, PretrainSettings, formula_counts
from flows.runfile import RunFileErrors
from flows.signals import terminable
from flows.wiring import threads, vouched

if TYPE_CHECKING:
    from rich.console import Console

    from alcore.mace.pretraining import PretrainReport, PretrainSpec
    from calculators.base import ResolvedCalculator

SPACES = {"metals": metals, "salts": salts, "tellurides": tellurides}
FEWEST = 8
"""Structures; fewer teach nothing."""
LINE_EVERY = 10
"""Where there is no terminal, so many lines tell of the labels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PretrainJob:
    """What is to be learned, checked.

    Attributes:
        settings: of the file.
        structures: the teacher will be asked about, none of a withheld composition.
        resolved: the teacher.
        note: what the structures are and what was withheld, in words; it travels with the model.
        model_file: to be written.
    """

    settings: PretrainSettings
    structures: Sequence[Structure]
    resolved: ResolvedCalculator
    note: str
    model_file: Path

    @property
    def labels_folder(self) -> Path:
        """Where the teacher's answers are kept, beside the model."""
        return self.model_file.with_suffix(".labels")


def read_job(settings: PretrainSettings, where: str) -> PretrainJob:
    """Everything that is asked for, read and checked; asks the teacher nothing.

    Args:
        settings: as ``load_pretrain_file`` gives them.
        where: the file, for messages.

    Raises:
        InputError: what cannot work; ``RunFileErrors`` with every structure the teacher does not take.
    """
    from calculators.registry import resolve

    model_file = _model_file(settings, where)
    resolved = resolve(settings.teacher.name, vouched(settings.teacher.name, settings.teacher.arguments()))
    resolved.check_available()
    around = [s for k, file in enumerate(settings.around) for s in _read(file, f"{where}: around.{k}")]
    withheld = _compositions(settings, where)
    drawn, what = _draw(settings, around, where)
    left = [structure for structure in drawn if _composition(structure) not in withheld]
    if len(left) < FEWEST:
        gone = f", {len(drawn) - len(left)} were withheld" if withheld else ""
        mend = f"raise sampling.count or space.count to {FEWEST} at least, or withhold less"
        raise InputError(f"only {len(left)} structures are left to learn from{gone}", where=where, mend=mend)
    _check_structures(left, resolved, where)
    return PretrainJob(
        settings=settings,
        structures=left,
        resolved=resolved,
        note="; ".join([*what, *_withheld_words(drawn, withheld)]),
        model_file=model_file,
    )


def _model_file(settings: PretrainSettings, where: str) -> Path:
    """Raises:
    InputError: it or its report exists, or cannot be written there.
    """
    given = Path(settings.output)
    file = given if given.suffix == ".model" else given / f"{settings.name}.model"
    where = f"{where}: output"
    if found := [one for one in (file, file.with_suffix(".json")) if one.exists()]:
        there = " and ".join(map(str, found))
        raise InputError(f"there is {there}", where=where, mend="remove that, or give another output (-o)")
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not above.is_dir():
        raise InputError(f"{above} is no folder", where=where, mend="give a folder, or a file that ends in .model")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"nothing can be written to {above}", where=where, mend="mend its rights, or give another")
    return file


def _read(file: str, where: str) -> list[Structure]:
    found = []
    for k, frame in enumerate(read_file(Path(file), where, ":")):
        try:
            charge = float(frame.info.get("charge", 0.0))
        except (TypeError, ValueError):
            text = f"frame {k} of {Path(file).name} has the charge {frame.info['charge']!r}, which is no number"
            raise InputError(text, where=where, mend="give it in e") from None
        found.append(Structure.from_atoms(frame, charge=charge))
    if not found:
        raise InputError(f"there is no structure in {file}", where=where, mend="give another file, or remove it")
    return found


Composition = tuple[tuple[int, int], ...]
"""Atomic numbers in order, and how many atoms there are of each."""


def _composition(structure: Structure) -> Composition:
    return tuple(sorted(Counter(structure.numbers.tolist()).items()))


def _compositions(settings: PretrainSettings, where: str) -> set[Composition]:
    """What must not be learned from: every composition in the files, and the formulas."""
    found: set[Composition] = set()
    for k, entry in enumerate(settings.withhold):
        if Path(entry).is_file():
            found |= {_composition(structure) for structure in _read(entry, f"{where}: withhold.{k}")}
        else:
            counts = formula_counts(entry) or {}
            found.add(tuple(sorted((chemical_symbols.index(symbol), n) for symbol, n in counts.items())))
    return found


def _formula(composition: Composition) -> str:
    return Formula.from_dict({chemical_symbols[z]: n for z, n in composition}).format("hill")


def _withheld_words(drawn: Sequence[Structure], withheld: set[Composition]) -> list[str]:
    """How often each withheld composition was among what was drawn."""
    counts = Counter(_composition(structure) for structure in drawn)
    told = [f"{_formula(composition)} ({counts[composition]} drawn)" for composition in sorted(withheld)]
    return [f"left out: {', '.join(told)}"] if told else []


def _draw(settings: PretrainSettings, around: Sequence[Structure], where: str) -> tuple[list[Structure], list[str]]:
    """All structures, and what they are."""
    sampling, space = settings.sampling, settings.space
    low, high = sampling.rattle_ang
    spec = SampleSpec(rattle_ang=(low, high), strain=sampling.strain, squeezed_fraction=sampling.squeezed_fraction)
    rng = np.random.default_rng(settings.seed)
    drawn: list[Structure] = []
    what = []
    if space is not None:
        try:
            drawn += SPACES[space.kind](space.elements, space.count, rng, spec)
        except InputError as error:
            raise InputError(error.message, where=f"{where}: space.elements", mend=error.mend) from None
        what.append(f"{len(drawn)} {space.kind} of {', '.join(space.elements)}")
    if around:
        defects = DefectSpec(vacancy_fraction=sampling.vacancy_fraction, swap_fraction=sampling.swap_fraction)
        drawn += around_structures(around, sampling.count, rng, spec, defects)
        named = ", ".join(sorted({Path(file).name for file in settings.around}))
        what.append(f"{sampling.count} around {named}")
    elements = [chemical_symbols[z] for z in sorted({int(z) for structure in drawn for z in structure.numbers})]
    if settings.pairs:
        drawn += (couples := pairs(elements, settings.pairs, rng))
        what.append(f"{len(couples)} pairs of {', '.join(elements)}")
    return drawn, what


def _check_structures(structures: Sequence[Structure], resolved: ResolvedCalculator, where: str) -> None:
    known = resolved.entry.elements(resolved.settings)
    elements = {int(z) for structure in structures for z in structure.numbers}
    if known is not None and (missing := sorted(elements - known)):
        told = ", ".join(chemical_symbols[z] for z in missing)
        mend = f"it knows {' '.join(chemical_symbols[z] for z in sorted(known))}"
        raise InputError(f"{resolved.name} does not know {told}", where=f"{where}: teacher", mend=mend)
    problems: dict[str, None] = {}
    for structure in structures:
        try:
            resolved.check_structure(structure, f"{where}: teacher")
        except InputError as error:
            problems[str(error)] = None
    if problems:
        raise RunFileErrors(list(problems))


# --- doing it ---------------------------------------------------------------------------------------------------------


def run_job(job: PretrainJob, console: Console, *, quiet: bool = False) -> PretrainReport:
    """Ask the teacher what is not on disk yet, train, write the model and its report, and say what was made.

    Raises:
        KeyboardInterrupt: Ctrl-C; every answer of the teacher is on disk.
        InputError: the disk does not take them, or fewer than four labels are sound.
        TrainingError: the loss is not finite.
    """

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False, highlight=False, soft_wrap=True)

    settings = job.settings
    say(f"{settings.name}: {len(job.structures)} structures for {job.resolved.name}: {job.note}")
    with terminable(), threads(settings.training.threads):
        from alcore.mace.pretraining import learn
        from calculators.teacher import make_teacher

        try:
            make_folder(job.labels_folder)
            with _labels_bar(console, say, quiet) as tell:
                teacher = KeptTeacher(make_teacher(job.resolved), job.labels_folder, tell)
                lessons = replace(teach(job.structures, teacher), seconds=teacher.seconds)
            if teacher.n_known:
                say(f"{teacher.n_known} labels were in {job.labels_folder}")
            with _training_bar(settings.training, console, say, quiet):
                rng = np.random.default_rng(settings.seed + 1)
                made = learn(lessons, learning_spec(settings.training), rng, job.note)
            made.save(job.model_file)
        except OSError as error:
            mend = "mend that and give the same command again: what is labelled is kept"
            text = f"cannot be written: {error.strerror or error}"
            raise InputError(text, where=str(job.model_file), mend=mend) from error
    console.print(made_line(job, made.report), markup=False, highlight=False, soft_wrap=True)
    say(f"the labels stay in {job.labels_folder}: another training there asks for none of them again")
    return made.report


def learning_spec(settings: LearningSettings) -> PretrainSpec:
    """The same for ``alcore``."""
    from alcore.mace.models import Architecture
    from alcore.mace.pretraining import PretrainSpec

    own = ("channels", "max_ell", "correlation", "r_max_ang", "n_layers")
    given = settings.model_dump(exclude={*own, "threads", "max_force_ev_per_ang"})
    return PretrainSpec(
        architecture=Architecture(**{key: getattr(settings, key) for key in own}),
        limits=Limits(max_force_ev_per_ang=settings.max_force_ev_per_ang),
        **given,
    )


def made_line(job: PretrainJob, report: PretrainReport) -> str:
    """What was made, what it cost, how good it is, and where it is."""
    removed = ", ".join(f"{count} {why}" for why, count in report.removed.items())
    return (
        f"{job.settings.name}: {report.n_train + report.n_held_out} structures"
        f"{f' ({removed}: removed)' if removed else ''} labelled by {report.teacher} in {report.label_seconds:.0f} s, "
        f"trained in {report.train_seconds:.0f} s; "
        f"held-out errors {1000 * report.energy_rmse_ev_per_atom:.1f} meV/atom, "
        f"{1000 * report.force_rmse_ev_per_ang:.0f} meV/Å (forces there {1000 * report.force_rms_ev_per_ang:.0f}); "
        f"{job.model_file}"
    )


@contextmanager
def _labels_bar(console: Console, say: Callable[[str], None], quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """What hears how many labels there are, of how many: a bar on a terminal, some lines elsewhere."""
    if quiet or not console.is_terminal:
        told = [0]

        def tell(done: int, total: int) -> None:
            if done == total or done - told[0] >= total / LINE_EVERY:
                told[0] = done
                say(f"{done}/{total} labels")

        yield tell
        return
    columns = (TextColumn("labels"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _training_bar(
    settings: LearningSettings, console: Console, say: Callable[[str], None], quiet: bool
) -> Iterator[None]:
    what = f"training, {settings.epochs} epochs"
    if quiet or not console.is_terminal:
        say(what)
        yield
        return
    with Progress(SpinnerColumn(), TextColumn(what), TimeElapsedColumn(), console=console, transient=True) as bar:
        bar.add_task("", total=None)
        yield
