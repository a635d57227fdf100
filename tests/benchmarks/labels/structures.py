"""End states of the benchmark's hops as built, before anything is relaxed: ASE and lattice constants, nothing else.

Every builder returns states by name; states of one builder share cell, atoms and their order, so that labels of one
hop hold for the others. Places are found by distance, so no builder rests on the order in which ASE lists atoms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100, fcc111, molecule
from ase.constraints import FixAtoms
from ase.geometry import find_mic
from numpy.typing import NDArray

from alcore.endpoints import read_atoms

States = Mapping[str, Atoms]

CU_ANG, AL_ANG, NI_ANG = 3.61, 3.99, 3.49
"""Lattice constants near EMT's own minima (3.59, 3.99 and 3.48 Å); Cu's is that of the published table."""
LIF_ANG = 4.28  # GFN1-xTB: perfect 64-atom cell lowest at 4.28 of 3.8 to 4.4 Å


def fixed_below(slab: Atoms, n_layers: int) -> Atoms:
    """The ``n_layers`` lowest layers do not move."""
    tags = slab.get_tags()
    slab.set_constraint(FixAtoms(mask=tags > tags.max() - n_layers))
    slab.info.clear()
    return slab


def site_near(atoms: Atoms, place: Sequence[float] | NDArray[np.float64]) -> int:
    """Index of the atom nearest to ``place`` (Å)."""
    gaps = find_mic(atoms.positions - np.asarray(place), atoms.cell, atoms.pbc)[1]
    return int(gaps.argmin())


def shortest(atoms: Atoms, step: NDArray[np.float64]) -> NDArray[np.float64]:
    """``step`` (Å) as its minimum image."""
    return np.asarray(find_mic(step[None], atoms.cell, atoms.pbc)[0][0])


def moved(atoms: Atoms, index: int | slice, place: Sequence[float] | NDArray[np.float64]) -> Atoms:
    """A copy with atom ``index`` (or several) at ``place`` (Å)."""
    copy: Atoms = atoms.copy()
    copy.positions[index] = place
    return copy


def renamed(atoms: Atoms, index: int, symbol: str) -> Atoms:
    """A copy whose atom ``index`` is of another element."""
    copy: Atoms = atoms.copy()
    copy.symbols[index] = symbol
    return copy


def vacancy_hops(perfect: Atoms, vacancy: Sequence[float], jumps: Mapping[str, Sequence[str]]) -> dict[str, Atoms]:
    """States reached by a vacancy that starts at ``vacancy`` (Å).

    Args:
        perfect: the lattice.
        vacancy: the empty site of the state ``initial``.
        jumps: for each new state, the state it comes from and, as text ``x y z`` in Å, the site whose atom hops in.
    """
    empty = {"initial": perfect.positions[site_near(perfect, vacancy)]}
    initial = perfect.copy()
    del initial[site_near(perfect, vacancy)]
    states = {"initial": initial}
    for name, (origin, site) in jumps.items():
        before = states[origin]
        hopper = site_near(before, [float(value) for value in site.split()])
        leaves = before.positions[hopper].copy()
        states[name] = moved(before, hopper, leaves + shortest(before, empty[origin] - leaves))
        empty[name] = leaves
    return states


def au_al100() -> States:
    """Au in a hollow of Al(100), and in the next one: ASE's diffusion example (13 atoms, two layers fixed)."""
    slab = fcc100("Al", size=(2, 2, 3))
    add_adsorbate(slab, "Au", 1.7, "hollow")
    slab.center(axis=2, vacuum=4.0)
    slab.set_constraint(FixAtoms(mask=slab.get_tags() > 1))
    slab.info.clear()
    return {"initial": slab, "final": moved(slab, -1, slab.positions[-1] + [slab.cell[0, 0] / 2, 0, 0])}


def vacancy(symbol: str, lattice_ang: float, repeat: int) -> States:
    """A vacancy in ``repeat``^3 cubic fcc cells, and a nearest neighbour hopped in."""
    perfect = bulk(symbol, "fcc", a=lattice_ang, cubic=True).repeat(repeat)
    half = lattice_ang / 2
    return vacancy_hops(perfect, [0, 0, 0], {"final": ("initial", f"{half} {half} 0")})


def asym_al_au() -> States:
    """Au beside an Al adatom on Al(100) 3x2x3, and in the next hollow, away from it (20 atoms, two layers fixed)."""
    slab = fcc100("Al", size=(3, 2, 3))
    slab.center(axis=2, vacuum=4.0)
    slab = hollow_states(fixed_below(slab, 2), "Al", {"only": (0.5, 1.5)}, 1.7)["only"]
    return hollow_states(slab, "Au", {"initial": (0.5, 0.5), "final": (1.5, 0.5)}, 1.7)


def hollow_states(
    slab: Atoms, adatom: str, hollows: Mapping[str, tuple[float, float]], height_ang: float
) -> dict[str, Atoms]:
    """An adatom ``height_ang`` above the first layer of fcc(100), at places given in units of the nearest-neighbour
    distance along x and y from that layer's corner atom."""
    layer = slab.positions[slab.get_tags() == 1]
    spacing = float(np.linalg.norm(slab.positions - slab.positions[0], axis=1)[1:].min())
    origin = layer[np.lexsort((layer[:, 0], layer[:, 1]))[0]]
    states = {}
    for name, (x, y) in hollows.items():
        state = slab.copy()
        place = origin + np.array([x * spacing, y * spacing, height_ang])
        state += Atoms(adatom, positions=[place], tags=[0])
        states[name] = state
    return states


def adatom_100(symbol: str, size: tuple[int, int, int], height_ang: float = 1.7) -> States:
    """A self-adatom on fcc(100) in a hollow, and in the next; two layers fixed."""
    slab = fixed_below(fcc100(symbol, size=size, vacuum=5.0), 2)
    return hollow_states(slab, symbol, {"initial": (0.5, 0.5), "final": (1.5, 0.5)}, height_ang)


def exchange_100(symbol: str, size: tuple[int, int, int]) -> States:
    """A self-adatom on fcc(100) goes into the surface; the atom it pushes out ends in the hollow diagonally across."""
    slab = fixed_below(fcc100(symbol, size=size, vacuum=5.0), 2)
    states = hollow_states(slab, symbol, {"initial": (0.5, 0.5), "final": (1.5, 1.5)}, 1.7)
    initial, final = states["initial"], states["final"]
    pushed = site_near(slab, (initial.positions[-1] + final.positions[-1]) / 2 - [0, 0, 1.7])
    site, beyond = initial.positions[pushed].copy(), final.positions[-1].copy()
    return {"initial": initial, "final": moved(moved(initial, pushed, beyond), -1, site)}


def adatom_111(symbol: str, size: tuple[int, int, int], *, two_hops: bool = False) -> States:
    """A self-adatom on fcc(111) from an fcc hollow to the hcp hollow beside it, or on to the next fcc hollow; two
    layers fixed."""
    slab = fcc111(symbol, size=size, vacuum=5.0)
    initial, other = slab.copy(), slab.copy()
    add_adsorbate(initial, symbol, 2.0, "fcc", offset=(1, 1))
    add_adsorbate(other, symbol, 2.0, "hcp", offset=(1, 1))
    jump = slab.cell[0] / size[0] if two_hops else shortest(slab, other.positions[-1] - initial.positions[-1])
    initial = fixed_below(initial, 2)
    return {"initial": initial, "final": moved(initial, -1, initial.positions[-1] + jump)}


def surface_vacancy_111(symbol: str, size: tuple[int, int, int]) -> States:
    """A vacancy in the first layer of fcc(111), and a neighbour of the same layer hopped in; two layers fixed."""
    slab = fixed_below(fcc111(symbol, size=size, vacuum=5.0), 2)
    top = slab.positions[slab.get_tags() == 1]
    spacing = float(np.linalg.norm(slab.cell[0])) / size[0]
    place = top[0] + [spacing, 0, 0]
    return vacancy_hops(slab, list(top[0]), {"final": ("initial", " ".join(map(str, place)))})


def heptamer(symbol: str, size: tuple[int, int, int], *, shift: bool) -> States:
    """A hexagonal island of seven atoms on fcc(111), all the slab fixed: the island shifts from fcc to hcp hollows, or
    one of its edge atoms moves away from it."""
    slab = fcc111(symbol, size=size, vacuum=5.0)
    slab.set_constraint(FixAtoms(range(len(slab))))
    spacing = float(np.linalg.norm(slab.cell[0])) / size[0]
    around = [spacing * np.array([np.cos(t), np.sin(t), 0]) for t in np.arange(6) * np.pi / 3]
    initial, other = slab.copy(), slab.copy()
    add_adsorbate(initial, symbol, 2.2, "fcc", offset=(2, 2))
    add_adsorbate(other, symbol, 2.2, "hcp", offset=(2, 2))
    centre, jump = initial.positions[-1].copy(), shortest(slab, other.positions[-1] - initial.positions[-1])
    initial += Atoms(f"{symbol}6", positions=[centre + step for step in around])
    initial.info.clear()
    final = initial.copy()
    if shift:
        final.positions[len(slab) :] += jump
    else:
        final.positions[len(slab) + 1] = centre + around[0] + around[1]
    return {"initial": initial, "final": final}


def dumbbell(symbol: str, lattice_ang: float, repeat: int, step: Sequence[float], *, solute: str = "") -> States:
    """A <100> dumbbell of fcc, and that on a neighbouring site, turned by 90 degrees.

    With EMT it is a minimum in 3x3x3 cubic cells of Cu, but not in 2x2x2.

    Args:
        symbol: the host.
        lattice_ang: its cubic lattice constant.
        repeat: cubic cells along each direction.
        step: to the neighbouring site, in lattice constants, within the xy plane.
        solute: element of the atom that goes over; empty: the host's.
    """
    perfect = bulk(symbol, "fcc", a=lattice_ang, cubic=True).repeat(repeat)
    here = np.full(3, lattice_ang)
    there = here + lattice_ang * np.asarray(step)
    first, second = site_near(perfect, here), site_near(perfect, there)
    apart, turned = 0.3 * lattice_ang * np.eye(3)[0], 0.3 * lattice_ang * np.sign(step[1]) * np.eye(3)[1]
    initial = moved(perfect, first, here - apart)
    initial += Atoms(solute or symbol, positions=[here + apart])
    final = moved(initial, first, here)
    final.positions[second], final.positions[-1] = there + turned, there - turned
    return {"initial": initial, "final": final}


def divacancy(symbol: str, lattice_ang: float, repeat: int) -> States:
    """Two vacancies side by side; a common neighbour hops into one of them, so that the pair turns."""
    perfect = bulk(symbol, "fcc", a=lattice_ang, cubic=True).repeat(repeat)
    half = lattice_ang / 2
    del perfect[site_near(perfect, [0, half, half])]
    return vacancy_hops(perfect, [0, 0, 0], {"final": ("initial", f"{half} 0 {half}")})


def solute_vacancy(host: str, solute: str, lattice_ang: float, repeat: int) -> States:
    """A vacancy beside a solute at the origin, and what hops into it.

    ``initial`` to ``swapped``: the solute itself. ``around``: a host atom, and the vacancy stays in the solute's first
    shell. ``second``, ``third``: it goes to that shell, and from ``second`` to ``beyond`` on to the third.
    """
    perfect = bulk(host, "fcc", a=lattice_ang, cubic=True).repeat(repeat)
    h = lattice_ang / 2
    perfect = renamed(perfect, site_near(perfect, [0, 0, 0]), solute)
    jumps = {
        "swapped": ("initial", "0 0 0"),
        "around": ("initial", f"{h} 0 {h}"),
        "second": ("initial", f"{2 * h} 0 0"),
        "third": ("initial", f"{2 * h} {h} {h}"),
        "beyond": ("second", f"{2 * h} {h} {h}"),
    }
    return vacancy_hops(perfect, [h, h, 0], jumps)


def alloyed_hops() -> States:
    """Au adatom on Al(100) 4x3x3 with one Au in the surface: hollows that touch that atom, and hollows further away."""
    slab = fcc100("Al", size=(4, 3, 3))
    top = slab.positions[:, 2].max()
    slab = renamed(slab, site_near(slab, [0, 0, top]), "Au")
    slab.center(axis=2, vacuum=4.0)
    slab = fixed_below(slab, 2)
    places = {"touching": (0.5, 0.5), "aside": (1.5, 0.5), "far": (1.5, 1.5), "opposite": (-0.5, 0.5)}
    return hollow_states(slab, "Au", places, 1.7)


def step_100(symbol: str, size: tuple[int, int, int]) -> States:
    """Half a layer on fcc(100); an adatom at its foot leaves the step for the next hollow; two layers fixed."""
    slab = fcc100(symbol, size=size, vacuum=5.0)
    spacing = float(np.linalg.norm(slab.cell[0])) / size[0]
    upper = slab.get_tags() == 1
    row = slab.positions[upper][:, 0].min() - 0.1 + spacing * (size[0] // 2 - 0.5)
    slab = slab[~upper | (slab.positions[:, 0] < row)]
    slab = fixed_below(slab, 2)
    tags = slab.get_tags()
    edge = slab.positions[tags == 1]
    rise = float(edge[:, 2].mean() - slab.positions[tags == 2][:, 2].mean())
    foot = edge[edge[:, 0].argmax()] + [spacing, 0, 0]
    initial = slab.copy()
    initial += Atoms(symbol, positions=[foot], tags=[0])
    final = moved(initial, -1, foot + np.array([spacing, 0, 0.02 * rise]))
    return {"initial": initial, "final": final}


def lif_vacancy() -> States:
    """A Li vacancy (total charge -1) in 2x2x2 cubic cells of LiF, and a neighbouring Li hopped in (63 atoms).

    Smaller cells are not stable: at the Γ point alone 3x3x2 primitive cells (35 atoms) rebuild themselves.
    """
    perfect = bulk("LiF", "rocksalt", a=LIF_ANG, cubic=True).repeat(2)
    half = LIF_ANG / 2
    return vacancy_hops(perfect, [0, 0, 0], {"final": ("initial", f"{half} {half} 0")})


def formic_acid_dimer() -> States:
    """Two molecules of formic acid, head to tail: both protons go over at once."""
    half = {"C": [(1.95, 0.15, 0)], "O": [(1.35, 1.22, 0), (1.28, -0.98, 0)], "H": [(3.05, 0.20, 0), (0.28, -1.02, 0)]}
    one = np.array([place for kind in "COH" for place in half[kind]])
    initial = Atoms("CO2H2" * 2, positions=np.concatenate([one, -one]))
    final = initial.copy()
    mirror = [0, 2, 1, 3, 9, 5, 7, 6, 8, 4]  # each atom takes the place of its mirror image
    final.positions = initial.positions[mirror] * [1, -1, 1]
    return {"initial": initial, "final": final}


def ammonia() -> States:
    """Ammonia, and the same with its hydrogens on the other side of the nitrogen."""
    initial = molecule("NH3")
    final = initial.copy()
    final.positions[:, 2] *= -1
    return {"initial": initial, "final": final}


def ethanol() -> States:
    """Ethanol, anti and gauche: the hydroxyl group turns."""
    initial = molecule("CH3CH2OH")
    oxygen = int(np.flatnonzero(initial.numbers == 8)[0])
    carbons = sorted(np.flatnonzero(initial.numbers == 6), key=lambda k: float(initial.get_distance(k, oxygen)))
    proton = min(np.flatnonzero(initial.numbers == 1), key=lambda k: float(initial.get_distance(k, oxygen)))
    final = initial.copy()
    final.set_dihedral(carbons[1], carbons[0], oxygen, proton, 62, indices=[proton])
    return {"initial": initial, "final": final}


def malonaldehyde() -> States:
    """The enol of malonaldehyde: its proton goes from one oxygen to the other."""
    places = {
        "C": [(0, 1.10, 0), (1.21, 0.43, 0), (-1.18, 0.36, 0)],
        "O": [(1.30, -0.82, 0), (-1.24, -0.97, 0)],
        "H": [(0, 2.19, 0), (2.14, 1.02, 0), (-2.14, 0.90, 0), (-0.35, -1.30, 0)],
    }
    initial = Atoms("C3O2H4", positions=[place for kind in "COH" for place in places[kind]])
    final = initial.copy()
    mirror = [0, 2, 1, 4, 3, 5, 7, 6, 8]  # each atom takes the place of its mirror image
    final.positions = initial.positions[mirror] * [-1, 1, 1]
    return {"initial": initial, "final": final}


def butane() -> States:
    """Butane, gauche and anti: the end group turns about the middle bond."""
    final = molecule("trans-butane")
    chain = np.flatnonzero(final.numbers == 6)
    ends = [k for k in chain if sum(final.get_distance(k, other) < 1.7 for other in chain) == 2]
    first, last = ends[0], ends[1]
    inner = [next(k for k in chain if k not in ends and final.get_distance(k, end) < 1.7) for end in ends]
    turned = [k for k in range(len(final)) if k == last or (k not in chain and final.get_distance(k, last) < 1.3)]
    turned += [k for k in range(len(final)) if k not in chain and final.get_distance(k, inner[1]) < 1.3]
    initial = final.copy()
    initial.set_dihedral(first, inner[0], inner[1], last, 65, indices=turned)
    return {"initial": initial, "final": final}


def from_files(initial: Path, final: Path) -> States:
    """States written by others."""
    return {"initial": read_atoms(initial, "benchmark"), "final": read_atoms(final, "benchmark")}
