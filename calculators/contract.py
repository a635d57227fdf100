"""What every reference calculator must do, checked on real calculations through the labeller.

For the author of a calculator: ``al-loop calculators --test NAME``, or in a test of one's own::

    from calculators.contract import run_contract

    def test_my_calculator() -> None:
        assert [check for check in run_contract("my-code", {"cutoff_ev": 400}) if not check.passed] == []
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols, covalent_radii

from alcore.errors import AlLoopError, CalculatorError
from alcore.identity import json_sha256, label_key
from alcore.types import Candidate, FloatArray, Label, LabelRequest, LabelStatus, Structure
from calculators.attempts import NOT_MADE, changed_settings, own_folder, prepare_worker
from calculators.base import ResolvedCalculator, no_inspection
from calculators.executors.local import WorkerPool
from calculators.folders import fresh_folder
from calculators.labeling import LocalLabeler
from calculators.labels import LabelLimits, conclude
from calculators.leftovers import Watch
from calculators.measure import Measurement
from calculators.registry import resolve

STEP_ANG = 0.02
"""Long for a finite difference, against the noise of an SCF; Simpson's rule makes up for it (error of fourth order)."""
N_DIRECTIONS = 2
MIN_FORCE_EV_PER_ANG = 0.05
MOMENT_NOISE_EV = 1e-8
"""The same start of an SCF gives the same energy to more digits than this; another start does not."""
REFUSED = "refused, with a reason, before anything runs"
HOLD_S = (0.3, 5.0)
"""When the time limit strikes in the test of it: after half a calculation, but within these bounds."""


class ContractCheck(NamedTuple):
    """One promise: its name, whether it was kept, and the numbers."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What counts as equal. The defaults suit a converged plane-wave code; a real-space grid may need more.

    Attributes:
        energy_ev: for the same geometry in another order or at another place.
        force_ev_per_ang: for each force component, likewise, and for a force along a direction by finite differences.
    """

    energy_ev: float = 1e-3
    force_ev_per_ang: float = 1e-2


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all checks need."""

    resolved: ResolvedCalculator
    asked: Structure
    folder: Path
    watch: Watch
    tolerances: Tolerances
    timeout_s: float

    def labeler(self, resolved: ResolvedCalculator | None = None, retries: int = 2, apart: str = ".") -> LocalLabeler:
        """``apart``: a folder within, so that no outcome of the same key is found there."""
        folder = self.folder / apart
        return LocalLabeler(resolved or self.resolved, folder, timeout_s=self.timeout_s, retries=retries)

    def request(self, structure: Structure, resolved: ResolvedCalculator | None = None) -> LabelRequest:
        candidate = Candidate(path="contract", kind="data", image=0, structure=structure)
        key = label_key(structure, (resolved or self.resolved).fingerprint)
        return LabelRequest(key=key, candidate=candidate, generation=0)


def run_contract(
    entry_name: str,
    settings: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
    *,
    tolerances: Tolerances = Tolerances(),
    timeout_s: float = 3600.0,
    on_check: Callable[[ContractCheck], None] | None = None,
) -> list[ContractCheck]:
    """Compute variants of a structure and hold the answers against each other.

    It takes 7 calculations; 2 more where a charge is taken, one (short) for each failure that the entry knows how to
    provoke, and one that is stopped after 5 s at the latest.

    Args:
        entry_name: the calculator's name in the registry.
        settings: its settings, as in a run file.
        structure: a small structure away from symmetric places; None: one of elements the calculator knows.
        tolerances: what counts as equal.
        timeout_s: wall time of one calculation.
        on_check: hears of each check as soon as it is decided.
    Returns:
        Every check. After a broken one that others need they are missing: without ``runs`` there is nothing to compare.
        The files of a calculation that could not be used are kept where its check says.
    Raises:
        CalculatorError: unknown calculator, bad settings, it cannot run here, or not for this structure.
    """
    resolved = resolve(entry_name, settings)
    resolved.check_available()
    asked = structure or example_structure(resolved.entry.elements(resolved.settings))
    resolved.check_structure(asked)
    folder = Path(tempfile.mkdtemp(prefix="al-loop-contract-")).resolve()
    checks: list[ContractCheck] = []
    try:
        with Watch(folder) as watch:
            bench = _Bench(
                resolved=resolved, asked=asked, folder=folder, watch=watch, tolerances=tolerances, timeout_s=timeout_s
            )
            for check in _checks(bench):
                checks.append(check)
                if on_check is not None:
                    on_check(check)
    finally:
        if not any(str(folder) in check.detail for check in checks if not check.passed):
            shutil.rmtree(folder, ignore_errors=True)
    return checks


def example_structure(elements: set[int] | None) -> Structure:
    """Eight rattled atoms of MgO if both elements are known, else four of Cu, else four of the first known element."""
    if elements is None or {8, 12} <= elements:
        atoms = bulk("MgO", "rocksalt", a=4.21, cubic=True)
    elif 29 in elements:
        atoms = bulk("Cu", cubic=True)
    else:
        number = min(elements)
        atoms = bulk(chemical_symbols[number], "fcc", a=2.9 * float(covalent_radii[number]), cubic=True)
    atoms.rattle(0.06, seed=0)
    assert isinstance(atoms, Atoms)
    return Structure.from_atoms(atoms)


def _checks(bench: _Bench) -> Iterator[ContractCheck]:
    yield (key := _check_key(bench))
    if bench.resolved.entry.retries:
        yield _check_ladder(bench.resolved)
    if not key.passed:  # no worker would take it
        return
    left: list[str] = []
    with bench.labeler() as labeler:
        (first,) = labeler.label([bench.request(bench.asked)])
        yield _check_runs(first)
        if first.status == "rejected":
            yield ContractCheck("geometry and numbers", False, _said(first))
        if not first.ok:
            return
        yield ContractCheck("geometry and numbers", True, "atoms, order and cell as given; all finite; forces sane")
        if bench.resolved.entry.inspect is not no_inspection:
            yield _check_steps(first)
        before = bench.watch.running()
        yield from _check_numbers(bench, labeler, first)
        grown = [name for pid, name in bench.watch.running().items() if pid not in before]
        if len(grown) >= 2 + 2 * N_DIRECTIONS:  # one a calculation; a single one may be a helper of some library
            left += [f"{name} (while the worker lives)" for name in grown]
        if bench.resolved.entry.takes_charge:
            yield (charge := _check_charge(bench, labeler, first))
            if charge.detail != REFUSED:
                yield _check_moments(bench, labeler, first)
    left += bench.watch.end_all()
    for status, spoil in bench.resolved.entry.sabotage.items():
        yield _check_failure(bench, status, spoil)
        left += bench.watch.end_all()
    yield _check_timeout(bench, first.seconds)
    nothing = ContractCheck("nothing is left running", True, "no process of any calculation is left")
    yield nothing if not left else nothing._replace(passed=False, detail=f"still there: {', '.join(sorted(left))}")


def _said(label: Label) -> str:
    return f"{label.status}{f': {label.reason}' if label.reason else ''}; its files: {label.folder}"


def _check_runs(first: Label) -> ContractCheck:
    if first.status not in ("ok", "rejected"):
        return ContractCheck("runs", False, _said(first))
    attempts = sum(attempt["status"] != NOT_MADE for attempt in first.details["attempts"])
    again = f" at attempt {attempts}" if attempts > 1 else ""
    return ContractCheck("runs", True, f"{len(first.structure)} atoms in {first.seconds:.2f} s{again}")


def _check_key(bench: _Bench) -> ContractCheck:
    resolved, asked, name = bench.resolved, bench.asked, "same input, same key"
    try:
        json.dumps(resolved.entry.fingerprint_facts(resolved.settings))
    except (TypeError, ValueError) as error:
        return ContractCheck(name, False, f"fingerprint_facts are not plain JSON values: {error}")
    twin = replace(resolved, settings=type(resolved.settings).model_validate(resolved.settings.model_dump()))
    again = json_sha256(twin.entry.facts(twin.settings))
    key = label_key(asked, resolved.fingerprint)
    same = label_key(asked.moved(asked.positions + 1e-10), again)
    other = label_key(asked.moved(asked.positions + 1e-3), resolved.fingerprint)
    return ContractCheck(name, key == same != other, f"{key[:8]}, again {same[:8]}, elsewhere {other[:8]}")


def _check_ladder(resolved: ResolvedCalculator) -> ContractCheck:
    problems = []
    for rung in resolved.entry.retries:
        try:
            changed_settings(resolved, rung)
        except Exception as error:  # an entry's own function
            problems.append(f"'{rung.name}': {' '.join(str(error).split())}")
    rungs = f"{len(resolved.entry.retries)} rungs keep the fingerprint"
    return ContractCheck("retries do not move the energy", not problems, "; ".join(problems) or rungs)


def _check_steps(first: Label) -> ContractCheck:
    steps, version = first.details["electronic_steps"], first.details["code_version"]
    told = f"{steps} steps" + (f", version {version}" if version else "")
    passed = isinstance(steps, int) and steps > 0
    return ContractCheck("electronic steps are counted", passed, told if passed else f"electronic_steps is {steps}")


def _check_numbers(bench: _Bench, labeler: LocalLabeler, first: Label) -> Iterator[ContractCheck]:
    """Forces against energies, then order and place; the same input again only where one of the last two is off."""
    asked, rng = bench.asked, np.random.default_rng(0)
    order, shift = np.arange(len(asked))[::-1], rng.uniform(0.3, 0.7, 3)
    directions = [d / np.linalg.norm(d) for d in rng.normal(size=(N_DIRECTIONS, len(asked), 3))]
    variants = [asked.moved(asked.positions + sign * STEP_ANG * d) for d in directions for sign in (-1, 1)]
    variants += [asked.take(order), asked.moved(asked.positions + shift)]
    *displaced, permuted, shifted = labeler.label([bench.request(variant) for variant in variants])
    yield _check_forces(first, displaced, directions, bench.tolerances)
    same = np.arange(len(asked))
    found = [_check_same("permutation", first, permuted, order, bench.tolerances)]
    found += [_check_same("translation", first, shifted, same, bench.tolerances)]
    if not all(check.passed for check in found):
        (again,) = labeler.label([bench.request(asked)])
        yield _check_same("same input, same answer", first, again, same, bench.tolerances)
    yield from found


def _check_forces(
    first: Label, displaced: Sequence[Label], directions: Sequence[FloatArray], tolerances: Tolerances
) -> ContractCheck:
    """Simpson's rule over the forces at three places of a line gives the energy between its ends, if the energy is the
    one of the forces."""
    name = "forces are -dE/dx"
    if failed := [label for label in displaced if not label.ok]:
        return ContractCheck(name, False, _said(failed[0]))
    largest = float(np.abs(_forces(first)).max())
    if largest < MIN_FORCE_EV_PER_ANG:
        detail = f"the largest force is {largest:.3f} eV/Å, which tells nothing: test a structure away from its minimum"
        return ContractCheck(name, False, detail)
    errors = []
    for direction, low, high in zip(directions, displaced[::2], displaced[1::2], strict=True):
        slopes = [float(np.vdot(_forces(label), direction)) for label in (low, first, high)]
        errors.append(abs((_energy(low) - _energy(high)) / (2 * STEP_ANG) - float(np.dot(slopes, [1, 4, 1])) / 6))
    kind = first.details["energy_kind"]
    detail = f"differ by {max(errors):.1e} eV/Å along {len(directions)} directions ({kind} energy, up to {largest:.2f})"
    return ContractCheck(name, max(errors) < tolerances.force_ev_per_ang, detail)


def _check_same(name: str, first: Label, other: Label, order: Any, tolerances: Tolerances) -> ContractCheck:
    if not other.ok:
        return ContractCheck(name, False, _said(other))
    energy = abs(_energy(other) - _energy(first))
    force = float(np.abs(_forces(other) - _forces(first)[order]).max())
    passed = energy < tolerances.energy_ev and force < tolerances.force_ev_per_ang
    return ContractCheck(name, passed, f"energy differs by {energy:.1e} eV, forces by {force:.1e} eV/Å")


def _energy(label: Label) -> float:
    assert label.energy_ev is not None
    return label.energy_ev


def _forces(label: Label) -> FloatArray:
    assert label.forces is not None
    return label.forces


def _first_accepted(bench: _Bench, labeler: LocalLabeler, variants: Sequence[Structure]) -> tuple[Label | None, str]:
    """The first label that is ``ok``; without one, None and what was said of the last variant; "" if all were refused.

    A calculator may refuse a variant before anything is computed: nothing is ignored then.
    """
    said = ""
    for variant in variants:
        try:
            bench.resolved.check_structure(variant)
        except CalculatorError:
            continue
        (label,) = labeler.label([bench.request(variant)])
        if label.ok:
            return label, ""
        said = _said(label)
    return None, said


def _check_charge(bench: _Bench, labeler: LocalLabeler, first: Label) -> ContractCheck:
    name = "a charge is not ignored"
    variants = [replace(bench.asked, charge=bench.asked.charge + extra) for extra in (1.0, 2.0)]
    label, said = _first_accepted(bench, labeler, variants)
    if label is None:
        return ContractCheck(name, not said, said or REFUSED)
    moved = abs(_energy(label) - _energy(first))
    detail = f"{label.structure.charge:+g} e moves the energy by {moved:.3f} eV"
    return ContractCheck(name, moved > bench.tolerances.energy_ev, detail)


def _check_moments(bench: _Bench, labeler: LocalLabeler, first: Label) -> ContractCheck:
    """Moments may die out in the SCF, but another start of it leaves traces: digits, or final moments."""
    name = "initial moments are not ignored"
    unit = np.eye(1, len(bench.asked))[0]
    given = bench.asked.magnetic_moments
    options = [2 * unit, unit] if given is None else [None]
    variants = [replace(bench.asked, magnetic_moments=moments) for moments in options]
    label, said = _first_accepted(bench, labeler, variants)
    if label is None:
        return ContractCheck(name, not said, said or REFUSED)
    moved = abs(_energy(label) - _energy(first))
    ends = [None if one.magnetic_moments is None else one.magnetic_moments.tolist() for one in (first, label)]
    detail = f"they move the energy by {moved:.3g} eV" + (", and final moments" if ends[0] != ends[1] else "")
    return ContractCheck(name, moved > MOMENT_NOISE_EV or ends[0] != ends[1], detail)


def _check_failure(bench: _Bench, status: LabelStatus, spoil: Callable[[Any], Any]) -> ContractCheck:
    name = f"a failure is {status}"
    try:
        settings = spoil(bench.resolved.settings)
        facts = bench.resolved.entry.facts(settings)
        spoilt = replace(bench.resolved, settings=settings, facts=facts, fingerprint=json_sha256(facts))
        with bench.labeler(spoilt, retries=0, apart=status) as labeler:
            (label,) = labeler.label([bench.request(bench.asked, spoilt)])
    except Exception as error:  # an entry's own function, or a worker that did not start
        return ContractCheck(name, False, " ".join(f"{type(error).__name__}: {error}".split()))
    passed = label.status == status
    return ContractCheck(name, passed, label.reason if passed else f"it is {_said(label)}")


def endless(resolved: ResolvedCalculator) -> Callable[[Structure], Measurement]:
    """Makes, in a worker, a job that computes again and again: any time limit strikes in the middle of it."""
    compute = prepare_worker((resolved, 0))

    def job(structure: Structure) -> Measurement:
        home = Path.cwd()
        for number in count():
            with own_folder(home, f"again-{number}"):
                compute(structure)
        raise AssertionError("not reached")

    return job


def _check_timeout(bench: _Bench, calculation_s: float) -> ContractCheck:
    name = "a timeout ends the whole process tree"
    limits = LabelLimits(timeout_s=float(np.clip(calculation_s / 2, *HOLD_S)), retries=0)
    request = bench.request(bench.asked)
    folder = fresh_folder(bench.folder, "timeout")
    pool = WorkerPool(endless, bench.resolved, folder=bench.folder, workers=1)
    try:
        outcome = pool.run(bench.asked, folder, limits.timeout_s)
        label = conclude(request, bench.resolved, outcome, folder, limits)
        left = bench.watch.end_all()
    except AlLoopError as error:
        return ContractCheck(name, False, str(error))
    finally:
        pool.close()
    if label.status != "timeout":
        return ContractCheck(name, False, f"it is {_said(label)}")
    return ContractCheck(name, not left, f"still there: {', '.join(sorted(left))}" if left else label.reason)


__all__ = ["ContractCheck", "Tolerances", "example_structure", "run_contract"]
