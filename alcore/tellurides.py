"""Structures of layered tellurides of antimony and bismuth, pure and doped: what a generalist prior is pre-trained on.

None is relaxed, and all are drawn from the generator that is passed in. A dopant replaces an atom of the host inside a
quintuple layer or forms its own telluride; none is ever put into a van der Waals gap, and none on a migration path, so
that the hops there are new to whoever learned from these structures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers

from alcore.chemical_space import Builder, draw, in_vacuum
from alcore.errors import InputError
from alcore.sampling import SampleSpec
from alcore.types import Structure


@dataclass(frozen=True, kw_only=True)
class Host:
    """A metal M of the layered M2Te3 (R-3m, hexagonal setting), and its own crystal (A7, R-3m).

    Attributes:
        a_ang, c_ang: of M2Te3.
        z_metal, z_te: heights of M and of the outer Te in units of ``c_ang``; the inner Te is at 0.
        own_a_ang, own_c_ang, own_z: likewise of the metal.
    """

    a_ang: float
    c_ang: float
    z_metal: float
    z_te: float
    own_a_ang: float
    own_c_ang: float
    own_z: float


@dataclass(frozen=True, kw_only=True)
class Dopant:
    """Lattice constants of a transition metal's own tellurides.

    Attributes:
        nickeline_ang: a and c of MTe in the NiAs structure.
        iodide_ang: a, c and height of Te above M of MTe2 in the CdI2 structure.
        blende_ang: a of MTe in the zinc blende structure, at the bond length of the others.
    """

    nickeline_ang: tuple[float, float]
    iodide_ang: tuple[float, float, float]
    blende_ang: float


HOSTS = {
    "Sb": Host(a_ang=4.264, c_ang=30.458, z_metal=0.3988, z_te=0.2128, own_a_ang=4.307, own_c_ang=11.273, own_z=0.2335),
    "Bi": Host(a_ang=4.386, c_ang=30.497, z_metal=0.4005, z_te=0.2097, own_a_ang=4.546, own_c_ang=11.863, own_z=0.2339),
}
DOPANTS = {"Cr": Dopant(nickeline_ang=(3.98, 6.23), iodide_ang=(3.79, 6.10, 1.59), blende_ang=6.25)}
TE_A_ANG, TE_C_ANG, TE_X = 4.457, 5.929, 0.2633
"""Of trigonal tellurium (P3_1 21)."""
RHOMBOHEDRAL = np.array([[0, 0, 0], [2 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 2 / 3]])


def tellurides(
    elements: Sequence[str], count: int, rng: np.random.Generator, spec: SampleSpec | None = None
) -> list[Structure]:
    """``count`` structures of 4 to 45 atoms over the layered tellurides of these elements, each disturbed.

    M2Te3 as a crystal and as slabs of one and two quintuple layers, now and then slid against each other; with one atom
    missing; with M replaced by another host or a dopant; tellurium and the metals themselves; the dopant's own
    tellurides (NiAs, CdI2 and zinc blende structures).

    Raises:
        InputError: an element is not known here, or Te or every host is missing.
    """
    strange = [e for e in elements if e not in HOSTS and e not in DOPANTS and e != "Te"]
    if strange or "Te" not in elements or not any(e in HOSTS for e in elements):
        message = f"{strange[0]} is not known here" if strange else f"Te and one of {', '.join(HOSTS)} are needed"
        known = ", ".join(("Te", *HOSTS, *DOPANTS))
        raise InputError(message, where="elements", mend=f"known: {known}; or sample around structures of your own")
    kinds: list[tuple[Builder, float]] = [(_crystal, 0.12), (_slab, 0.26), (_vacancy, 0.1), (_pure, 0.14)]
    if sum(e in HOSTS or e in DOPANTS for e in elements) > 1:
        kinds.append((_substituted, 0.2))
    if any(e in DOPANTS for e in elements):
        kinds.append((_of_dopant, 0.18))
    return draw(elements, count, rng, spec, kinds)


def quintuple_layers(metal: str, count: int) -> Atoms:
    """``count`` quintuple layers of M2Te3 on the primitive cell, 5 atoms each; three are the crystal."""
    host = HOSTS[metal]
    heights = [("Te", 0.0)] + [(s, sign * z) for s, z in ((metal, host.z_metal), ("Te", host.z_te)) for sign in (1, -1)]
    places = np.array([shift + np.array([0.0, 0.0, z]) for _, z in heights for shift in RHOMBOHEDRAL])
    places[:, :2] %= 1.0
    places[:, 2] = (places[:, 2] + 1 / 6) % 1.0 - 1 / 6  # layers centred at 0, c/3 and 2c/3
    symbols = [symbol for symbol, _ in heights for _ in RHOMBOHEDRAL]
    cell = [host.a_ang, host.a_ang, host.c_ang, 90, 90, 120]
    crystal = Atoms(symbols, scaled_positions=places, cell=cell, pbc=True)
    layers: Atoms = crystal[places[:, 2] < count / 3 - 1 / 6]
    return layers


def _repeated(atoms: Atoms, size: tuple[int, int, int]) -> Atoms:
    larger: Atoms = atoms * size
    return larger


def _host(elements: Sequence[str], rng: np.random.Generator) -> str:
    return str(rng.choice([e for e in elements if e in HOSTS]))


def _crystal(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = quintuple_layers(_host(elements, rng), 3)
    return _repeated(atoms, (2, 1, 1) if rng.random() < 0.4 else (1, 1, 1))


def _slab(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """One or two quintuple layers in vacuum; half of the pairs are slid and moved apart or together a little."""
    metal, n_layers = _host(elements, rng), int(rng.choice([1, 2]))
    atoms = quintuple_layers(metal, n_layers)
    if n_layers == 2 and rng.random() < 0.5:
        upper = atoms.positions[:, 2] > HOSTS[metal].c_ang / 6
        atoms.positions[upper] += [*rng.uniform(-1.0, 1.0, size=2), rng.uniform(-0.2, 0.6)]
    sizes = [(2, 1, 1), (2, 2, 1), (3, 2, 1)] if n_layers == 1 else [(1, 1, 1), (2, 1, 1), (2, 2, 1)]
    return in_vacuum(_repeated(atoms, sizes[int(rng.integers(len(sizes)))]))


def _vacancy(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = (_slab if rng.random() < 0.7 else _crystal)(elements, rng)
    del atoms[int(rng.integers(len(atoms)))]
    return atoms


def _substituted(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """One to four atoms of the host's metal replaced, in their layer."""
    atoms = (_slab if rng.random() < 0.7 else _crystal)(elements, rng)
    metals = np.flatnonzero(atoms.numbers != atomic_numbers["Te"])
    own = atoms.symbols[int(metals[0])]
    others = [e for e in elements if e not in ("Te", own)]
    if not others:
        return atoms
    for site in rng.choice(metals, size=int(rng.integers(1, min(4, len(metals)) + 1)), replace=False):
        atoms.symbols[int(site)] = str(rng.choice(others))
    return atoms


def _pure(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """Tellurium, a host's metal or a dopant's."""
    element = str(rng.choice(list(elements)))
    if element == "Te":
        places = [[TE_X, 0, 1 / 3], [0, TE_X, 2 / 3], [-TE_X, -TE_X, 0]]
        cell = [TE_A_ANG, TE_A_ANG, TE_C_ANG, 90, 90, 120]
        return _repeated(Atoms("Te3", scaled_positions=places, cell=cell, pbc=True), (2, 2, 2))
    if element in HOSTS:
        host = HOSTS[element]
        places = [shift + np.array([0.0, 0.0, sign * host.own_z]) for shift in RHOMBOHEDRAL for sign in (1, -1)]
        cell = [host.own_a_ang, host.own_a_ang, host.own_c_ang, 90, 90, 120]
        return _repeated(Atoms(f"{element}6", scaled_positions=places, cell=cell, pbc=True), (2, 2, 1))
    return _repeated(bulk(element, cubic=True), (2, 2, 2))


def _of_dopant(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """A telluride of the dopant."""
    symbol = str(rng.choice([e for e in elements if e in DOPANTS]))
    dopant = DOPANTS[symbol]
    kind = str(rng.choice(["nickeline", "iodide", "single layer", "blende"]))
    if kind == "blende":
        return _repeated(bulk(f"{symbol}Te", "zincblende", a=dopant.blende_ang, cubic=True), (2, 1, 1))
    if kind == "nickeline":
        a, c = dopant.nickeline_ang
        places = [[0, 0, 0], [0, 0, 1 / 2], [1 / 3, 2 / 3, 1 / 4], [2 / 3, 1 / 3, 3 / 4]]
        cell = [a, a, c, 90, 90, 120]
        symbols = [symbol, symbol, "Te", "Te"]
        return _repeated(Atoms(symbols, scaled_positions=places, cell=cell, pbc=True), (2, 2, 1))
    a, c, height = dopant.iodide_ang
    places = [[0, 0, 0], [1 / 3, 2 / 3, height / c], [2 / 3, 1 / 3, -height / c]]
    atoms = Atoms([symbol, "Te", "Te"], scaled_positions=places, cell=[a, a, c, 90, 90, 120], pbc=True)
    return in_vacuum(_repeated(atoms, (3, 2, 1))) if kind == "single layer" else _repeated(atoms, (2, 2, 1))
