"""End states of a hop: read, checked, unwrapped, relaxed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.data import chemical_symbols
from ase.geometry import find_mic
from scipy.optimize import linear_sum_assignment

from alcore.errors import EndpointError, InputError
from alcore.files import read_file
from alcore.neb import DOUBT_EVERY, Guards, Relaxed, closest_contact, guard_reason
from alcore.optimisers import Fire
from alcore.protocols import Potential
from alcore.rigid import is_loose, superimposed
from alcore.types import EndpointPair, FloatArray, Structure

CELL_TOLERANCE_ANG = 1e-3
SAME_PLACE_ANG = 0.05
SWAP_ANG = 1.0
"""Atoms that move less are not swapped with another."""
OVERLAP_FRACTION = 0.5
"""Two atoms nearer than this fraction of their covalent radii's sum lie on top of each other."""


def read_atoms(path: Path, where: str) -> Atoms:
    """One structure from anything ASE reads.

    Raises:
        InputError: no such file, or ASE cannot read it.
    """
    atoms = read_file(path, where)
    assert isinstance(atoms, Atoms)
    return atoms


def read_band(path: Path, where: str) -> list[Atoms]:
    """A whole band, end states included, from one file of several frames.

    Raises:
        InputError: no such file, unreadable, or fewer than three frames.
    """
    frames = read_file(path, where, ":")
    if not isinstance(frames, list) or len(frames) < 3:
        raise InputError(
            f"{path.name} holds fewer than three images", where=where, mend="give the whole band, end states included"
        )
    return list(frames)


def make_pair(
    name: str,
    initial: Atoms,
    final: Atoms,
    *,
    inner: list[Atoms] | None = None,
    charge: float = 0.0,
    magnetic_moments: Any = None,
    relax: bool = True,
    reference_barrier_ev: float | None = None,
) -> EndpointPair:
    """A checked, unwrapped pair.

    Raises:
        EndpointError: the end states do not belong together; the text names the atom or the vector.
    """
    for label, atoms in (("initial", initial), ("final", final)):
        _check_constraints(atoms, f"{name}: {label}")
    first = Structure.from_atoms(initial, charge=charge, magnetic_moments=magnetic_moments)
    last = Structure.from_atoms(final, charge=charge, magnetic_moments=magnetic_moments)
    _check_same_atoms(name, first, last)
    last = first.moved(_nearest(first, last.positions))
    images = []
    previous = first.positions
    for frame in inner or []:
        image = Structure.from_atoms(frame)
        _check_same_atoms(name, first, image)
        images.append(first.moved(_nearest(first.moved(previous), image.positions)))
        previous = images[-1].positions
    if images:
        last = first.moved(_nearest(first.moved(previous), last.positions))
    pair = EndpointPair(
        name=name,
        initial=first,
        final=last,
        images=tuple(images),
        relax=relax,
        reference_barrier_ev=reference_barrier_ev,
    )
    check_pair(pair)
    return pair


def _nearest(reference: Structure, positions: FloatArray) -> FloatArray:
    """The same geometry, nearest to ``reference``: unwrapped; of a molecule, turned and shifted as a whole."""
    return superimposed(positions, reference.positions) if is_loose(reference) else unwrap(reference, positions)


def unwrap(reference: Structure, positions: FloatArray) -> FloatArray:
    """``positions`` ``(n_atoms, 3)`` moved by lattice vectors, each atom nearest to its place in ``reference``."""
    if not reference.pbc.any():
        return positions
    shift, _ = find_mic(positions - reference.positions, reference.cell, reference.pbc)
    return np.asarray(reference.positions + shift)


def _check_constraints(atoms: Atoms, where: str) -> None:
    for constraint in atoms.constraints:
        if not isinstance(constraint, FixAtoms | FixCartesian):
            raise EndpointError(
                f"constraint {type(constraint).__name__} is not supported",
                where=where,
                mend="use FixAtoms or FixCartesian",
            )


def _check_same_atoms(name: str, first: Structure, last: Structure) -> None:
    """Composition, order, cell, periodicity and constraints must agree."""
    if sorted(first.numbers) != sorted(last.numbers):
        raise EndpointError(
            f"the end states differ in composition: {_formula(first)} and {_formula(last)}",
            where=name,
            mend="give the same atoms in both files",
        )
    off = np.flatnonzero(first.numbers != last.numbers)
    if len(off):
        k = int(off[0])
        raise EndpointError(
            f"the end states differ in the order of atoms: atom {k} is {chemical_symbols[first.numbers[k]]} and then "
            f"{chemical_symbols[last.numbers[k]]}",
            where=name,
            mend="sort both files the same way",
        )
    if (first.pbc != last.pbc).any():
        raise EndpointError(
            f"the end states differ in periodicity: {first.pbc.tolist()} and {last.pbc.tolist()}",
            where=name,
            mend="make pbc the same",
        )
    drift = np.linalg.norm(first.cell - last.cell, axis=1)
    if drift.max() > CELL_TOLERANCE_ANG:
        raise EndpointError(
            f"the end states differ in cell vector {'abc'[int(drift.argmax())]} by {drift.max():.3f} Å",
            where=name,
            mend="relax both in one cell",
        )
    if (first.fixed != last.fixed).any():
        k = int(np.flatnonzero((first.fixed != last.fixed).any(axis=1))[0])
        raise EndpointError(
            f"atom {k} is fixed in one end state and not in the other", where=name, mend="use the same constraints"
        )


def check_pair(pair: EndpointPair) -> None:
    """Raises:
    EndpointError: atoms overlap, the end states are the same, an atom that must not move moves, all atoms are fixed, or
        like atoms look swapped.
    """
    for label, structure in (("initial", pair.initial), ("final", pair.final)):
        contact = closest_contact(structure)
        if contact is not None and contact[2] < OVERLAP_FRACTION:
            i, j, _ = contact
            gap = structure.positions[i] - structure.positions[j]
            distance = float(
                np.linalg.norm(find_mic(gap, structure.cell, structure.pbc)[0] if structure.pbc.any() else gap)
            )
            raise EndpointError(
                f"atoms {i} ({chemical_symbols[structure.numbers[i]]}) and "
                f"{j} ({chemical_symbols[structure.numbers[j]]}) of the {label} state are {distance:.2f} Å apart",
                where=pair.name,
                mend="look at the structure, its cell and its units",
            )
    moved = np.linalg.norm(pair.final.positions - pair.initial.positions, axis=1)
    if moved.max() < SAME_PLACE_ANG:
        raise EndpointError(
            f"the end states are the same structure (no atom moves more than {moved.max():.3f} Å)",
            where=pair.name,
            mend="give two different end states",
        )
    if pair.initial.fixed.all():
        raise EndpointError("every atom is fixed", where=pair.name, mend="free the atoms that take part in the hop")
    stuck = np.where(pair.initial.fixed, np.abs(pair.final.positions - pair.initial.positions), 0.0).max(axis=1)
    if stuck.max() > SAME_PLACE_ANG:
        raise EndpointError(
            f"atom {int(stuck.argmax())} is fixed but moves {stuck.max():.2f} Å",
            where=pair.name,
            mend="free it, or give it one place",
        )
    swapped = swapped_atoms(pair)
    if swapped:
        listed = ", ".join(map(str, swapped[:6])) + (", …" if len(swapped) > 6 else "")
        raise EndpointError(
            f"like atoms look swapped between the end states: {listed}",
            where=pair.name,
            mend="give both files the same order of atoms",
        )


def swapped_atoms(pair: EndpointPair) -> list[int]:
    """Atoms that another order of like atoms would bring home: if that more than halves the length of the path, or if
    they only change places with each other. Two that do so while nothing else moves are a mechanism: exchange."""
    first, last = pair.initial, pair.final
    partner = np.arange(len(first))
    for z in np.unique(first.numbers):
        mine = np.flatnonzero(first.numbers == z)
        gaps = (last.positions[mine][None] - first.positions[mine][:, None]).reshape(-1, 3)
        if first.pbc.any():
            gaps = find_mic(gaps, first.cell, first.pbc)[0]
        cost = (gaps**2).sum(axis=1).reshape(len(mine), len(mine))
        partner[mine] = mine[linear_sum_assignment(cost)[1]]
    moved = last.positions[partner] - first.positions
    if first.pbc.any():
        moved = find_mic(moved, first.cell, first.pbc)[0]
    after, before = np.linalg.norm(moved, axis=1), np.linalg.norm(last.positions - first.positions, axis=1)
    other = np.flatnonzero(partner != np.arange(len(first)))
    if len(other) > 2 and np.linalg.norm(after) < 0.5 * np.linalg.norm(before):
        return other.tolist()
    # Atoms that follow one another end in a place of their own; atoms that only change places all come home.
    home = (before > SWAP_ANG) & (after < 0.5 * before)
    swapped: set[int] = set()
    for k in other:
        ring = [int(k)]
        while (following := int(partner[ring[-1]])) != ring[0]:
            ring.append(following)
        if home[ring].all():
            swapped.update(ring)
    elsewhere = np.delete(before, sorted(swapped))
    exchange = len(swapped) == 2 and (not len(elsewhere) or elsewhere.max() < SWAP_ANG)
    return [] if exchange else sorted(swapped)


def _formula(structure: Structure) -> str:
    return str(structure.to_atoms().symbols.formula)


def relax_end_state(
    potential: Potential,
    structure: Structure,
    fmax_ev_per_ang: float,
    *,
    max_steps: int = 300,
    guards: Guards | None = None,
    doubt: Callable[[FloatArray, float], str] | None = None,
) -> Relaxed:
    """FIRE on one structure; stops at a guard with the last sound geometry, like ``neb.relax_band``.

    Args:
        doubt: says why a geometry ``(1, n_atoms, 3)`` that lies so many eV below the first can no longer be trusted, or
            ""; asked every few steps. The relaxation ends there.

    Returns:
        positions etc. of one image, ``(1, n_atoms, 3)``.
    """
    limits = replace(guards or Guards(), max_displacement_ang=1.0)
    positions = structure.positions[None].copy()
    start = positions.copy()
    energies, forces = potential.evaluate(structure, positions)
    first_energy = energies
    fire = Fire(max_step=0.05)
    sound = (positions.copy(), energies, forces)
    status, reason, fmax, step = "max_steps", "", float("inf"), 0
    for step in range(max_steps + 1):
        force = np.where(structure.fixed[None], 0.0, forces)
        fmax = float(np.linalg.norm(force, axis=2).max())
        if fmax < fmax_ev_per_ang:
            status = "converged"
            break
        if step == max_steps:
            reason = f"force {fmax:.3f} eV/Å after {step} steps"
            break
        positions = positions + fire.step(force)
        energies, forces = potential.evaluate(structure, positions)
        reason = guard_reason(
            structure, positions, np.concatenate([first_energy, energies, first_energy]), start, limits
        )
        if reason:
            status = "guarded"
            positions, energies, forces = sound
            break
        sound = (positions.copy(), energies, forces)
        if doubt is not None and step % DOUBT_EVERY == 0:
            reason = doubt(positions, float(first_energy[0] - energies[0]))
            if reason:
                status = "guarded"
                break
    return Relaxed(
        positions=positions,
        energies_ev=energies,
        forces=forces,
        status=status,  # type: ignore[arg-type]
        reason=reason,
        climbing_image=None,
        fmax_ev_per_ang=fmax,
        n_steps=step,
    )
