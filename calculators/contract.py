"""What every reference calculator must do, checked on real calculations through the labeller."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from ase import Atoms
from ase.build import bulk
from ase.data import chemical_symbols, covalent_radii

from alcore.identity import label_key
from alcore.types import Candidate, FloatArray, Label, LabelRequest, Structure
from calculators.base import ResolvedCalculator
from calculators.checks import geometry_change
from calculators.labeling import LocalLabeler
from calculators.registry import resolve

STEP_ANG = 0.005
STEPS = (-2, -1, 1, 2)
N_DIRECTIONS = 2


class ContractCheck(NamedTuple):
    """One promise: its name, whether it was kept, and the numbers."""

    check: str
    passed: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """What counts as equal. The defaults suit single precision; a real-space grid may need more for translation.

    Attributes:
        energy_ev: for the same geometry in another order or at another place.
        force_ev_per_ang: for each force component, likewise, and for a force along a direction by finite differences.
    """

    energy_ev: float = 1e-3
    force_ev_per_ang: float = 1e-2


def run_contract(
    entry_name: str,
    settings: Mapping[str, Any] | None = None,
    structure: Structure | None = None,
    *,
    tolerances: Tolerances = Tolerances(),
    timeout_s: float = 3600.0,
) -> list[ContractCheck]:
    """Compute a dozen variants of a structure and hold the answers against each other.

    Args:
        entry_name: the calculator's name in the registry.
        settings: its settings, as in a run file.
        structure: a small structure away from symmetric places; None: one of elements the calculator knows.
        tolerances: what counts as equal.
        timeout_s: wall time of one calculation.
    Returns:
        Every check; the first is ``runs``, and stands alone if some calculation failed.
    Raises:
        CalculatorError: unknown calculator, bad settings, or it cannot run here.
    """
    resolved = resolve(entry_name, settings)
    resolved.check_available()
    asked = structure or example_structure(resolved.entry.elements(resolved.settings))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(asked))
    shift = rng.uniform(0.3, 0.7, 3)
    directions = [d / np.linalg.norm(d) for d in rng.normal(size=(N_DIRECTIONS, len(asked), 3))]
    variants = [asked, asked, _permuted(asked, order), asked.moved(asked.positions + shift)]
    variants += [asked.moved(asked.positions + step * STEP_ANG * d) for d in directions for step in STEPS]
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with (
        tempfile.TemporaryDirectory(prefix="al-loop-contract-") as folder,
        LocalLabeler(resolved, Path(folder), workers=1, timeout_s=timeout_s) as labeler,
    ):
        labels = labeler.label([_request(variant, resolved) for variant in variants])
    left = {process.pid for process in psutil.Process().children(recursive=True)} - before
    failed = [label for label in labels if not label.ok]
    if failed:
        return [ContractCheck("runs", False, f"{failed[0].status}: {failed[0].reason}")]
    first, again, permuted, shifted = labels[:4]
    lines = [labels[4 + i * len(STEPS) : 4 + (i + 1) * len(STEPS)] for i in range(N_DIRECTIONS)]
    return [
        ContractCheck("runs", True, f"{len(labels)} calculations, {sum(label.seconds for label in labels):.2f} s"),
        _check_same("same input, same answer", first, again, np.arange(len(asked)), tolerances),
        _check_key(entry_name, settings, asked, resolved),
        _check_geometry(asked, first),
        _check_finite_differences(first, lines, directions, tolerances),
        _check_work(first, lines, directions, tolerances),
        _check_same("permutation", first, permuted, order, tolerances),
        _check_same("translation", first, shifted, np.arange(len(asked)), tolerances),
        ContractCheck("nothing left running", not left, f"processes {sorted(left)}" if left else "no process is left"),
    ]


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


def _request(structure: Structure, resolved: ResolvedCalculator) -> LabelRequest:
    candidate = Candidate(path="contract", kind="data", image=0, structure=structure)
    return LabelRequest(key=label_key(structure, resolved.fingerprint), candidate=candidate, generation=0)


def _permuted(structure: Structure, order: Any) -> Structure:
    moments = structure.magnetic_moments
    return Structure(
        numbers=structure.numbers[order],
        positions=structure.positions[order],
        cell=structure.cell,
        pbc=structure.pbc,
        fixed=structure.fixed[order],
        charge=structure.charge,
        magnetic_moments=None if moments is None else moments[order],
    )


def _energy(label: Label) -> float:
    assert label.energy_ev is not None
    return label.energy_ev


def _forces(label: Label) -> FloatArray:
    assert label.forces is not None
    return label.forces


def _check_same(name: str, first: Label, other: Label, order: Any, tolerances: Tolerances) -> ContractCheck:
    energy = abs(_energy(other) - _energy(first))
    force = float(np.abs(_forces(other) - _forces(first)[order]).max())
    passed = energy < tolerances.energy_ev and force < tolerances.force_ev_per_ang
    return ContractCheck(name, passed, f"energy differs by {energy:.1e} eV, forces by {force:.1e} eV/Å")


def _check_key(
    name: str, settings: Mapping[str, Any] | None, structure: Structure, resolved: ResolvedCalculator
) -> ContractCheck:
    key = label_key(structure, resolved.fingerprint)
    again = label_key(structure.moved(structure.positions + 1e-10), resolve(name, settings).fingerprint)
    other = label_key(structure.moved(structure.positions + 1e-3), resolved.fingerprint)
    passed = key == again and key != other
    return ContractCheck("same input, same key", passed, f"{key[:8]}, again {again[:8]}, elsewhere {other[:8]}")


def _check_geometry(asked: Structure, label: Label) -> ContractCheck:
    """The worker's copy was compared by the label's own check; this is the one that is stored."""
    answered = label.structure
    changed = geometry_change(asked, answered.numbers, answered.positions, answered.cell)
    return ContractCheck("geometry unchanged", changed is None, changed or "positions, cell and order as given")


def _check_finite_differences(
    first: Label, lines: Sequence[Sequence[Label]], directions: Sequence[FloatArray], tolerances: Tolerances
) -> ContractCheck:
    """Central differences of fourth order: those of second order are 0.02 eV/Å off where a potential is stiff."""
    energies = np.array([[_energy(label) for label in line] for line in lines])
    numeric = -(energies @ [1, -8, 8, -1]) / (12 * STEP_ANG)
    stated = np.array([np.vdot(_forces(first), direction) for direction in directions])
    worst, largest = float(np.abs(numeric - stated).max()), float(np.abs(stated).max())
    detail = f"differ by {worst:.1e} eV/Å along {len(directions)} directions (up to {largest:.2f} eV/Å)"
    return ContractCheck("forces are -dE/dx", worst < tolerances.force_ev_per_ang, detail)


def _check_work(
    first: Label, lines: Sequence[Sequence[Label]], directions: Sequence[FloatArray], tolerances: Tolerances
) -> ContractCheck:
    """Boole's rule over five forces gives the energy between the ends, if the energy is the one of the forces."""
    length, errors = (STEPS[-1] - STEPS[0]) * STEP_ANG, []
    for line, direction in zip(lines, directions, strict=True):
        slopes = [-float(np.vdot(_forces(label), direction)) for label in (*line[:2], first, *line[2:])]
        work = length * float(np.dot(slopes, [7, 32, 12, 32, 7])) / 90
        errors.append(abs(_energy(line[-1]) - _energy(line[0]) - work))
    kind = first.details["energy_kind"]
    passed = max(errors) < tolerances.force_ev_per_ang * length
    return ContractCheck("energy is force-consistent", passed, f"work differs by {max(errors):.1e} eV ({kind} energy)")


__all__ = ["ContractCheck", "Tolerances", "example_structure", "run_contract"]
