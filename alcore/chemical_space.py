"""Structures over a chemical space of metals or of salts: what a generalist prior is pre-trained on.
``alcore.tellurides`` has those of layered tellurides.

None is relaxed, and all are drawn from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations_with_replacement

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bcc100, bcc110, bulk, fcc100, fcc110, fcc111, hcp0001
from ase.data import atomic_numbers, covalent_radii
from ase.geometry import find_mic

from alcore.errors import InputError
from alcore.neb import closest_contact
from alcore.sampling import SampleSpec, disturbed
from alcore.types import FloatArray, Structure

PAIR_CELL_ANG = 15.0


def pairs(
    elements: Sequence[str], per_pair: int, rng: np.random.Generator, reach: tuple[float, float] = (0.6, 1.5)
) -> list[Structure]:
    """Two atoms alone in a large cell, ``per_pair`` times for every two elements, at distances drawn from ``reach`` in
    sums of their covalent radii."""
    found = []
    for first, second in combinations_with_replacement(elements, 2):
        bond = covalent_radii[atomic_numbers[first]] + covalent_radii[atomic_numbers[second]]
        for distance in bond * rng.uniform(*reach, size=per_pair):
            places = [[0.0, 0.0, 0.0], distance * _direction(rng)]
            found.append(
                Structure.from_atoms(Atoms([first, second], positions=places, cell=[PAIR_CELL_ANG] * 3, pbc=True))
            )
    return found


def _direction(rng: np.random.Generator) -> FloatArray:
    vector = rng.normal(size=3)
    return np.asarray(vector / np.linalg.norm(vector))


# --- metals -----------------------------------------------------------------------------------------------------------

Builder = Callable[[Sequence[str], np.random.Generator], Atoms]
SURFACES: dict[str, Callable[..., Atoms]] = {
    "fcc100": fcc100,
    "fcc110": fcc110,
    "fcc111": fcc111,
    "bcc100": bcc100,
    "bcc110": bcc110,
    "hcp0001": hcp0001,
}
FCC_WEIGHT = 4
"""How much oftener an fcc surface is drawn than each of the others."""
SIZES = {"fcc": ((2, 2, 2), (2, 2, 1), (3, 2, 1)), "bcc": ((2, 2, 2), (3, 2, 2)), "hcp": ((2, 2, 2), (3, 3, 2))}
"""Repeats of the cubic cells (4 and 2 atoms), and of hcp's primitive one (2 atoms)."""


def metals(
    elements: Sequence[str], count: int, rng: np.random.Generator, spec: SampleSpec | None = None
) -> list[Structure]:
    """``count`` structures of 11 to 37 atoms over a chemical space of metals, each disturbed.

    fcc, bcc and hcp crystals of one element and random alloys; with a vacancy, a divacancy or a self-interstitial
    (dumbbell); surfaces, most of them fcc (100), (110) and (111), bare, stepped, and with an adatom of any of the
    elements at the hollow, bridge or top site or anywhere else.

    Raises:
        InputError: an element has no crystal of its own to take the volume from.
    """
    for element in elements:
        atomic_volume_ang3(element)
    kinds: Sequence[tuple[Builder, float]] = (
        (_crystal, 0.2),
        (_vacancy, 0.2),
        (_divacancy, 0.05),
        (_interstitial, 0.08),
        (_surface, 0.12),
        (_adatom, 0.27),
        (_step, 0.08),
    )
    return draw(elements, count, rng, spec, kinds)


def atomic_volume_ang3(element: str) -> float:
    """Volume an atom takes in the element's own crystal.

    Raises:
        InputError: it has no simple crystal.
    """
    try:
        crystal = bulk(element)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{element} has no simple crystal", where="elements", mend="sample around structures of your own"
        ) from error
    return float(crystal.get_volume()) / len(crystal)


def draw(
    elements: Sequence[str],
    count: int,
    rng: np.random.Generator,
    spec: SampleSpec | None,
    kinds: Sequence[tuple[Builder, float]],
) -> list[Structure]:
    """``count`` structures of these kinds, each drawn as often as its weight says, disturbed and without overlaps."""
    weights = np.array([weight for _, weight in kinds])
    found: list[Structure] = []
    while len(found) < count:
        build = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))][0]
        structure = disturbed(Structure.from_atoms(build(elements, rng)), rng, spec)
        contact = closest_contact(structure)
        if contact is None or contact[2] >= (spec or SampleSpec()).min_contact:
            found.append(structure)
    return found


def _mixture(elements: Sequence[str], n_atoms: int, rng: np.random.Generator) -> list[str]:
    """One element (half of the time), or two or three at random shares."""
    kinds = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15])) if len(elements) > 1 else 1
    chosen = rng.choice(list(elements), size=min(kinds, len(elements)), replace=False)
    return [str(e) for e in rng.choice(chosen, size=n_atoms, p=rng.dirichlet(np.ones(len(chosen))))]


def _fill(atoms: Atoms, elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """The lattice occupied by a mixture, at the mean of its elements' own volumes (Zen's law)."""
    symbols = _mixture(elements, len(atoms), rng)
    volume = float(np.mean([atomic_volume_ang3(symbol) for symbol in symbols]))
    own = float(atoms.info.pop("atomic_volume_ang3"))
    atoms.symbols[:] = symbols
    atoms.set_cell(atoms.cell * (volume / own) ** (1 / 3), scale_atoms=True)
    return atoms


def _lattice(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    kind = str(rng.choice(["fcc", "bcc", "hcp"], p=[0.6, 0.2, 0.2]))
    cell = bulk("X", kind, a=4.0, **({} if kind == "hcp" else {"cubic": True}))
    sizes = SIZES[kind]
    atoms = cell * sizes[int(rng.integers(len(sizes)))]
    atoms.info["atomic_volume_ang3"] = atoms.get_volume() / len(atoms)
    return _fill(atoms, elements, rng)


def _crystal(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    return _lattice(elements, rng)


def _vacancy(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = _lattice(elements, rng)
    del atoms[int(rng.integers(len(atoms)))]
    return atoms


def _divacancy(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = _lattice(elements, rng)
    first = int(rng.integers(len(atoms)))
    distances = atoms.get_distances(first, range(len(atoms)), mic=True)
    distances[first] = np.inf
    del atoms[[first, int(distances.argmin())]]
    return atoms


def _interstitial(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """A dumbbell along the roomiest of some random directions; its second atom may be of another element."""
    atoms = _lattice(elements, rng)
    site = int(rng.integers(len(atoms)))
    centre = atoms.positions[site].copy()
    others = np.delete(atoms.positions, site, axis=0)
    directions = rng.normal(size=(20, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    half = 0.46 * float(atoms.get_volume() / len(atoms)) ** (1 / 3)
    room = [
        min(find_mic(others - centre - sign * half * d, atoms.cell)[1].min() for sign in (1, -1)) for d in directions
    ]
    shift = half * directions[int(np.argmax(room))]
    atoms.positions[site] = centre + shift
    atoms.append(str(rng.choice(list(elements))))
    atoms.positions[-1] = centre - shift
    return atoms


def _slab(size: tuple[int, int, int], rng: np.random.Generator) -> Atoms:
    """An unoccupied slab of a random surface."""
    names = list(SURFACES)
    weights = np.array([FCC_WEIGHT if name.startswith("fcc") else 1.0 for name in names])
    name = str(rng.choice(names, p=weights / weights.sum()))
    atoms: Atoms = SURFACES[name]("Cu", size=size, a=4.0, vacuum=5.0)
    per_cell = {"fcc": 4.0**3 / 4, "bcc": 4.0**3 / 2, "hcp": 4.0**3 / np.sqrt(2)}
    atoms.info["atomic_volume_ang3"] = per_cell[name[:3]]
    return atoms


def in_vacuum(atoms: Atoms) -> Atoms:
    """A slab (in place) in a cell that leaves 9 Å between it and its images along z, periodic along all axes."""
    atoms.center(axis=2, vacuum=4.5)
    atoms.pbc = True
    return atoms


def _surface(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """Bare, or with a vacancy in its top layer."""
    atoms = _fill(_slab((2, 2, int(rng.integers(3, 6))), rng), elements, rng)
    if rng.random() < 0.4:
        del atoms[int(rng.choice(np.flatnonzero(atoms.get_tags() == 1)))]
    return in_vacuum(atoms)


def _adatom(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """On a site of the surface, or anywhere on it, about as high as spheres of covalent radii touch."""
    slab = _slab((2, 2, 3) if rng.random() < 0.7 else (3, 3, 3), rng)
    sites = [*slab.info["adsorbate_info"]["sites"], "anywhere"]
    site = str(rng.choice(sites))
    place = tuple(rng.random(2) @ slab.cell.array[:2, :2]) if site == "anywhere" else site
    n_slab, symbol = len(slab), str(rng.choice(list(elements)))
    add_adsorbate(slab, symbol, 1.0, place)
    atoms = _fill(slab, elements, rng)
    atoms.symbols[-1] = symbol
    gaps, _ = find_mic(atoms.positions[:n_slab] - atoms.positions[-1], atoms.cell, (True, True, False))
    bonds = covalent_radii[atoms.numbers[:n_slab]] + covalent_radii[atomic_numbers[symbol]]
    aside = np.linalg.norm(gaps[:, :2], axis=1)
    touching = atoms.positions[:n_slab, 2] + np.sqrt(np.clip(bonds**2 - aside**2, 0.0, None))
    atoms.positions[-1, 2] = touching[aside < bonds].max() + rng.uniform(-0.3, 0.6)
    return in_vacuum(atoms)


def _step(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """A slab of which half of the top layer is missing, row by row, now and then with a kink."""
    atoms = _fill(_slab((2, 4, 3), rng), elements, rng)
    top = np.flatnonzero(atoms.get_tags() == 1)
    rows = atoms.get_scaled_positions()[top, 1]
    missing = top[rows < 0.5 - 1e-6]
    if rng.random() < 0.3:
        missing = missing[1:]
    del atoms[missing]
    return in_vacuum(atoms)


# --- salts ------------------------------------------------------------------------------------------------------------

CHARGES = {"Li": 1, "Na": 1, "K": 1, "Rb": 1, "Cs": 1, "Mg": 2, "Ca": 2, "Sr": 2, "Ba": 2, "Zn": 2}
CHARGES |= {"F": -1, "Cl": -1, "Br": -1, "I": -1, "O": -2, "S": -2}
"""Formal charges in e of the ions that are known here."""
IONIC_RADII_ANG = {"Li": 0.76, "Na": 1.02, "K": 1.38, "Rb": 1.52, "Cs": 1.67, "Mg": 0.72, "Ca": 1.00, "Sr": 1.18}
IONIC_RADII_ANG |= {"Ba": 1.35, "Zn": 0.74, "F": 1.33, "Cl": 1.81, "Br": 1.96, "I": 2.20, "O": 1.40, "S": 1.84}
"""Of six-fold coordination: Shannon, Acta Cryst. A 32, 751 (1976)."""


def salts(
    elements: Sequence[str], count: int, rng: np.random.Generator, spec: SampleSpec | None = None
) -> list[Structure]:
    """``count`` structures of 6 to 65 atoms over the salts of these elements, each disturbed.

    Rock salts of ions of equal charge, pure and mixed, fluorites and antifluorites of the others; with a vacancy, a
    pair of vacancies or an interstitial ion; (100) slabs of the rock salts. All are neutral cells.

    Raises:
        InputError: an element is no known ion, or there is no cation or no anion.
    """
    strange = [element for element in elements if element not in CHARGES]
    signs = {CHARGES[element] > 0 for element in elements if element in CHARGES}
    if strange or len(signs) < 2:
        message = f"{strange[0]} is no known ion" if strange else "cations and anions are both needed"
        raise InputError(message, where="elements", mend="sample around structures of your own")
    kinds: Sequence[tuple[Builder, float]] = (
        (_salt, 0.35),
        (_salt_vacancy, 0.3),
        (_ion_pair_gone, 0.1),
        (_salt_interstitial, 0.1),
        (_salt_slab, 0.15),
    )
    return draw(elements, count, rng, spec, kinds)


def _salt(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    cations, anions = _ions(elements, rng)
    cation, anion = cations[0], anions[0]
    apart = IONIC_RADII_ANG[cation] + IONIC_RADII_ANG[anion]
    if CHARGES[cation] == -CHARGES[anion]:
        atoms = bulk("LiF", "rocksalt", a=2 * apart, cubic=True)
        few, many = "Li", "F"
    else:  # fluorite, or antifluorite where the cation is the more frequent ion
        atoms = bulk("CaFF", "fluorite", a=4 / np.sqrt(3) * apart, cubic=True)
        few, many = "Ca", "F"
        if CHARGES[cation] < -CHARGES[anion]:
            few, many = many, few
    atoms = atoms * [(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)][int(rng.choice(4, p=[0.35, 0.35, 0.2, 0.1]))]
    symbols = np.array(atoms.get_chemical_symbols())
    at_few, at_many = symbols == few, symbols == many
    symbols[at_few] = rng.choice(cations, size=at_few.sum())
    symbols[at_many] = rng.choice(anions, size=at_many.sum())
    atoms.symbols[:] = [str(symbol) for symbol in symbols]
    return atoms if len(atoms) <= MOST_IONS else _salt(elements, rng)


MOST_IONS = 64


def _ions(elements: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """One cation and one anion, or two of one of them that have equal charges."""
    cations = [e for e in elements if CHARGES[e] > 0]
    anions = [e for e in elements if CHARGES[e] < 0]
    chosen = []
    for ions in (cations, anions):
        first = str(rng.choice(ions))
        alike = [e for e in ions if e != first and CHARGES[e] == CHARGES[first]]
        chosen.append([first, str(rng.choice(alike))] if alike and rng.random() < 0.2 else [first])
    return chosen[0], chosen[1]


def _salt_vacancy(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = _salt(elements, rng)
    del atoms[int(rng.integers(len(atoms)))]
    return atoms


def _ion_pair_gone(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """Without a cation and an anion, chosen independently."""
    atoms = _salt(elements, rng)
    charges = np.array([CHARGES[symbol] for symbol in atoms.get_chemical_symbols()])
    del atoms[[int(rng.choice(np.flatnonzero(charges > 0))), int(rng.choice(np.flatnonzero(charges < 0)))]]
    return atoms


def _salt_interstitial(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    """An ion of the salt in the middle between its ions (the widest of some random places)."""
    atoms = _salt(elements, rng)
    places = rng.random((60, 3)) @ atoms.cell.array
    room = [find_mic(atoms.positions - place, atoms.cell)[1].min() for place in places]
    atoms.append(str(rng.choice(atoms.get_chemical_symbols())))
    atoms.positions[-1] = places[int(np.argmax(room))]
    return atoms


def _salt_slab(elements: Sequence[str], rng: np.random.Generator) -> Atoms:
    atoms = _salt(elements, rng)
    if rng.random() < 0.3:
        del atoms[int(rng.integers(len(atoms)))]
    return in_vacuum(atoms)
