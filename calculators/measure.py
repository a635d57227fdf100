"""One calculation: what the calculator says about a structure, and what it did to it meanwhile."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from ase import Atoms

from alcore.types import Structure, frozen_array
from calculators.base import Inspection

_UNCONVERGED_NAME = re.compile(r"SCFError|Convergence|NotConverged", re.IGNORECASE)
_UNCONVERGED_TEXT = re.compile(
    r"(\bnot|n't|\bfailed to|\bno|\bwithout)\b[^.\n]{0,40}\bconverge|unconverged"
    r"|convergence\b[^.\n]{0,40}\b(not|failed|failure)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """What came back, as it came back: unchecked.

    Attributes:
        status: ``ok`` only means that there are numbers.
        reason: one line; why it is not ``ok``.
        error_text: the traceback, or "".
        energy_ev: the force-consistent energy where the calculator offers it.
        forces: eV/Å, constraints not applied.
        stress: eV/Å^3, Voigt order, or None.
        magnetic_moments: μ_B, or None.
        total_magnetic_moment: of the cell, μ_B, or None.
        energy_kind: ``force-consistent`` or ``plain``.
        geometries: numbers, positions and cell of the atoms afterwards, as we hold them and as the calculator does.
        inspection: what the code's own output says.
        attempts: one entry a rung of the ladder that was climbed, the first included; plain values.
        settings: those of the last attempt, plain values.
    """

    status: Literal["ok", "unconverged", "crashed"]
    reason: str = ""
    error_text: str = ""
    energy_ev: float = float("nan")
    forces: Any = None
    stress: Any = None
    magnetic_moments: Any = None
    total_magnetic_moment: float | None = None
    energy_kind: str = ""
    geometries: tuple[tuple[Any, Any, Any], ...] = ()
    inspection: Inspection = Inspection()
    attempts: tuple[Mapping[str, Any], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def measure(
    make: Callable[[], Any],
    structure: Structure,
    inspect: Callable[[Any], Inspection] = lambda _calculator: Inspection(),
) -> Measurement:
    """Compute ``structure`` with a fresh calculator from ``make``, then ask ``inspect`` what its code said of it.

    A failure of any kind is a status, never raised.
    """
    calculator = None
    try:
        calculator = make()
        measurement = _measure(calculator, structure)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a calculator must not end the worker
        unconverged = any(_says_unconverged(link) for link in _chain(error))
        first = (str(error).strip().splitlines() or [""])[0]
        measurement = Measurement(
            status="unconverged" if unconverged else "crashed",
            reason=f"{type(error).__name__}: {first}" if first else type(error).__name__,
            error_text="".join(traceback.format_exception(error)),
        )
    return measurement if calculator is None else _inspected(measurement, partial(inspect, calculator))


def _inspected(measurement: Measurement, inspect: Callable[[], Inspection]) -> Measurement:
    """With what the output says; an inspection that fails spoils a good label, but does not hide a bad one's reason."""
    try:
        inspection = inspect()
        inspection = replace(inspection, **plain_values(vars(inspection)))
    except Exception as error:
        if measurement.status != "ok":
            return measurement
        reason = f"the output cannot be read: {type(error).__name__}: {error}"
        return replace(measurement, status="crashed", reason=reason, error_text=traceback.format_exc())
    found = replace(measurement, inspection=inspection)
    if inspection.converged is False and measurement.status != "unconverged":
        reason = inspection.reason or "the output says that it has not converged"
        return replace(found, status="unconverged", reason=reason)
    return replace(found, reason=inspection.reason) if found.status == "crashed" and inspection.reason else found


def _chain(error: BaseException | None) -> list[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _says_unconverged(error: BaseException) -> bool:
    return bool(_UNCONVERGED_NAME.search(type(error).__name__) or _UNCONVERGED_TEXT.search(str(error)))


def _measure(calculator: Any, structure: Structure) -> Measurement:
    atoms = structure.to_atoms()
    atoms.calc = calculator
    # Forces first: some calculators (tblite) offer the force-consistent energy only once there are results.
    forces: Any = np.array(atoms.get_forces(apply_constraint=False), dtype=float)
    results = getattr(calculator, "results", {})
    geometries = tuple(
        _geometry(held) for held in (atoms, getattr(calculator, "atoms", None)) if isinstance(held, Atoms)
    )
    if geometry_changed(structure, atoms):  # asking on would compute the changed geometry
        return Measurement(status="ok", forces=forces, geometries=geometries)
    energy, kind = _energy(atoms)
    if getattr(calculator, "converged", None) is False:  # ASE's Vasp says so here and never raises
        return Measurement(status="unconverged", reason="the calculator says it has not converged")
    return Measurement(
        status="ok",
        energy_ev=energy,
        forces=forces,
        energy_kind=kind,
        stress=_stress(atoms) if structure.pbc.all() else None,
        magnetic_moments=plain_array(results.get("magmoms"), (len(structure),)),
        total_magnetic_moment=None if (total := plain_array(results.get("magmom"), ())) is None else float(total),
        geometries=geometries,
    )


def _geometry(atoms: Atoms) -> tuple[Any, Any, Any]:
    return atoms.numbers.copy(), atoms.positions.copy(), atoms.cell.array.copy()


def geometry_changed(structure: Structure, atoms: Atoms) -> bool:
    """Whether ``atoms`` are not exactly those of ``structure`` any more."""
    asked = (structure.numbers, structure.positions, structure.cell)
    return not all(np.array_equal(now, then) for now, then in zip(_geometry(atoms), asked, strict=True))


def _energy(atoms: Atoms) -> tuple[float, str]:
    """The energy whose gradient the forces are, and which one it is."""
    try:
        return float(atoms.get_potential_energy(force_consistent=True, apply_constraint=False)), "force-consistent"
    except (NotImplementedError, TypeError):
        free = getattr(atoms.calc, "results", {}).get("free_energy")
        if free is not None:
            return float(free), "force-consistent"
        return float(atoms.get_potential_energy(apply_constraint=False)), "plain"


def _stress(atoms: Atoms) -> Any:
    """Nice to have: whatever goes wrong with it, the label stands without."""
    if "stress" not in getattr(atoms.calc, "implemented_properties", ()):
        return None
    try:
        return plain_array(atoms.get_stress(apply_constraint=False), (6,))
    except Exception:
        return None


def plain_values(value: Any) -> Any:
    """``value`` with nothing in it but what a pipe and a database carry: anything odd becomes its text."""
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_values(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def plain_array(values: Any, shape: tuple[int, ...]) -> Any:
    """A finite read-only array of that shape, or None."""
    if values is None:
        return None
    try:
        array = frozen_array(values)
    except (TypeError, ValueError):  # ragged, or not numbers
        return None
    return array if array.shape == shape and np.isfinite(array).all() else None
