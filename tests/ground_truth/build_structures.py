"""Builds the example end states under ``config/structures`` from nothing but lattice constants.

    python tests/ground_truth/build_structures.py au_al100 cu_vacancy cr_sb2te3

Each hop is built, relaxed with the calculator that is its teacher, and written without energies, so that no file
can be mistaken for a label. ``HOPS`` lists them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc100
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.io import write
from ase.optimize import BFGS

STRUCTURES = Path(__file__).resolve().parents[2] / "config" / "structures"

CU_LATTICE_ANG = 3.61
NACL_LATTICE_ANG = 5.46  # GFN1-xTB's own minimum is at 5.462 Å (energy of the perfect 64-atom cell, 5.36 to 5.54 Å)
SB2TE3_A_ANG, SB2TE3_C_ANG = 4.264, 30.458
SB2TE3_Z_SB, SB2TE3_Z_TE = 0.3988, 0.2128
SB2TE3_VACUUM_ANG = 15.0
AL_LATTICE_ANG = 4.05
AL_LDA_LATTICE_ANG = 3.97


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One example: how its unrelaxed ends are built, what relaxes them, and where they are written."""

    ends: Callable[[], tuple[Atoms, Atoms]]
    calculator: Callable[[], Calculator]
    fmax_ev_per_ang: float
    files: tuple[str, str] = ("initial.extxyz", "final.extxyz")
    middle: Callable[[], Atoms] | None = None
    rattle_ang: float = 0.0


def au_al100() -> tuple[Atoms, Atoms]:
    """Au in a hollow of Al(100), and in the next hollow; ASE's diffusion example (13 atoms, two layers fixed)."""
    initial = fcc100("Al", size=(2, 2, 3))
    add_adsorbate(initial, "Au", 1.7, "hollow")
    initial.info.clear()
    initial.center(axis=2, vacuum=4.0)
    initial.set_constraint(FixAtoms(mask=initial.get_tags() > 1))
    final = initial.copy()
    final.positions[-1, 0] += final.cell[0, 0] / 2
    return initial, final


def cu_vacancy(repeat: int = 2) -> tuple[Atoms, Atoms]:
    """A vacancy in ``repeat``^3 cubic cells of fcc Cu (31 or 107 atoms), and a nearest neighbour hopped into it."""
    perfect = bulk("Cu", "fcc", a=CU_LATTICE_ANG, cubic=True).repeat(repeat)
    return vacancy_hop(perfect, vacancy=0, hopper=1)


def vacancy_hop(perfect: Atoms, *, vacancy: int, hopper: int) -> tuple[Atoms, Atoms]:
    """``perfect`` less atom ``vacancy``; at the end ``hopper`` sits in its place (nearest image, unwrapped)."""
    jump = perfect.get_distance(hopper, vacancy, mic=True, vector=True)
    final = perfect.copy()
    final.positions[hopper] += jump
    initial = perfect.copy()
    del initial[vacancy], final[vacancy]
    return initial, final


def nacl_vacancy() -> tuple[Atoms, Atoms]:
    """A Na vacancy (total charge -1) in 2x2x2 cubic cells of NaCl, and a neighbouring Na hopped into it (63 atoms)."""
    perfect = bulk("NaCl", "rocksalt", a=NACL_LATTICE_ANG, cubic=True).repeat(2)
    sodium = [atom.index for atom in perfect if atom.symbol == "Na"]
    initial, final = vacancy_hop(perfect, vacancy=sodium[0], hopper=sodium[1])
    for end in (initial, final):
        end.info["charge"] = -1
    return initial, final


def sb2te3_bilayer() -> Atoms:
    """Two quintuple layers of Sb2Te3 (R-3m, hexagonal setting), 2x2, 40 atoms; the gap's middle is at c/6."""
    a, c = SB2TE3_A_ANG, SB2TE3_C_ANG
    third = np.array([[0, 0, 0], [2 / 3, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 2 / 3]])
    z_sites = [("Te", 0.0)] + [(s, sign * z) for s, z in (("Sb", SB2TE3_Z_SB), ("Te", SB2TE3_Z_TE)) for sign in (1, -1)]
    sites = [(symbol, shift + np.array([0, 0, z])) for symbol, z in z_sites for shift in third]
    symbols = [symbol for symbol, _ in sites]
    scaled = np.array([place for _, place in sites])
    scaled[:, :2] %= 1.0
    scaled[:, 2] = (scaled[:, 2] + 1 / 6) % 1.0 - 1 / 6  # layers centred at 0, c/3 (and 2c/3: cut off)
    crystal = Atoms(symbols, scaled_positions=scaled, cell=[a, a, c, 90, 90, 120], pbc=True)
    bilayer = crystal[scaled[:, 2] < 0.5]
    return Atoms(bilayer.repeat((2, 2, 1)))


def cr_sb2te3() -> tuple[Atoms, Atoms]:
    """Cr in an octahedral site of the gap, and in the next one along a_1 (41 atoms, outermost Te layers fixed)."""
    initial = sb2te3_bilayer()
    primitive = initial.cell[:2] / 2
    place = primitive.T @ [1 / 3, 2 / 3] + [0, 0, SB2TE3_C_ANG / 6]
    heights = initial.positions[:, 2]
    outermost = np.flatnonzero((heights < heights.min() + 0.1) | (heights > heights.max() - 0.1))
    initial += Atoms("Cr", positions=[place])
    initial.cell[2] = [0, 0, np.ptp(heights) + SB2TE3_VACUUM_ANG]
    initial.positions[:, 2] += initial.cell[2, 2] / 2 - place[2]
    # The teacher knows no dispersion: without an anchor the layers would drift apart.
    initial.set_constraint(FixAtoms(outermost))
    final = initial.copy()
    final.positions[-1] += primitive[0]
    return initial, final


def cr_tetrahedral() -> Atoms:
    """Cr in the tetrahedral site between the two, one apex Te below it.

    The straight line between the octahedral sites runs through a Te-Te bridge 12.9 eV up, and by inversion symmetry
    no symmetric interpolation leaves it: a first guess has to be told about this site.
    """
    atoms, _ = cr_sb2te3()
    primitive = atoms.cell[:2] / 2
    atoms.positions[-1] += (2 * primitive[0] + primitive[1]) / 3 - [0, 0, 0.8]
    return atoms


def al_vacancy() -> tuple[Atoms, Atoms]:
    """A vacancy in 2x2x2 cubic cells of fcc Al, and a nearest neighbour hopped into it (31 atoms)."""
    return vacancy_hop(bulk("Al", "fcc", a=AL_LDA_LATTICE_ANG, cubic=True).repeat(2), vacancy=0, hopper=1)


def al_hydrogen() -> tuple[Atoms, Atoms]:
    """H in a tetrahedral, and in the next octahedral site of 2x2x2 primitive cells of fcc Al (9 atoms)."""
    ends = []
    for place in (1 / 4, 1 / 2):
        end = bulk("Al", "fcc", a=AL_LATTICE_ANG).repeat(2)
        end += Atoms("H", positions=[np.full(3, place) * AL_LATTICE_ANG])
        ends.append(end)
    return ends[0], ends[1]


def emt() -> Calculator:
    from ase.calculators.emt import EMT

    return EMT()


def chgnet() -> Calculator:
    import torch
    from chgnet.model.dynamics import CHGNetCalculator

    torch.set_num_threads(1)
    return CHGNetCalculator(model=chgnet_model(), use_device="cpu", on_isolated_atoms="error")


@cache
def chgnet_model() -> Any:
    from chgnet.model.model import CHGNet

    return CHGNet.load(use_device="cpu", verbose=False)


def gfn1_xtb(charge: int = 0) -> Calculator:
    from tblite.ase import TBLite

    return TBLite(method="GFN1-xTB", charge=charge, verbosity=0)


def gpaw() -> Calculator:
    """GPAW whose ``energy`` is the free energy, the one of its forces: ASE's NEB would take the extrapolated one."""
    from gpaw.calculator import GPAW

    class FreeEnergyGPAW(GPAW):
        def calculate(self, *args: Any, **keywords: Any) -> None:
            super().calculate(*args, **keywords)
            self.results["energy"] = self.results["free_energy"]

    return FreeEnergyGPAW(
        mode={"name": "pw", "ecut": 300.0},
        xc="PBE",
        kpts={"size": (2, 2, 2)},
        occupations={"name": "fermi-dirac", "width": 0.2},
        symmetry={"point_group": False},
        convergence={"energy": 1e-5, "density": 1e-5},
        txt=None,
    )


def pw_al() -> Calculator:
    """Quantum ESPRESSO with Debian's norm-conserving LDA pseudopotential; its total energy is the free energy."""
    from ase.calculators.espresso import Espresso, EspressoProfile

    return Espresso(
        profile=EspressoProfile(command="pw.x", pseudo_dir="/usr/share/espresso/pseudo"),
        pseudopotentials={"Al": "Al.pz-vbc.UPF"},
        input_data={
            "control": {"tprnfor": True},
            "system": {"ecutwfc": 16, "occupations": "smearing", "smearing": "mv", "degauss": 0.03, "nosym": True},
            "electrons": {"conv_thr": 1e-8},
        },
        kpts=(2, 2, 2),
    )


HOPS: dict[str, Hop] = {
    "au_al100": Hop(ends=au_al100, calculator=emt, fmax_ev_per_ang=0.005),
    "cu_vacancy": Hop(ends=cu_vacancy, calculator=emt, fmax_ev_per_ang=0.005, files=("POSCAR_initial", "POSCAR_final")),
    "cu_vacancy_107": Hop(
        ends=lambda: cu_vacancy(3), calculator=emt, fmax_ev_per_ang=0.005, files=("POSCAR_initial", "POSCAR_final")
    ),
    "nacl_vacancy": Hop(ends=nacl_vacancy, calculator=lambda: gfn1_xtb(-1), fmax_ev_per_ang=0.02),
    "al_vacancy": Hop(
        ends=al_vacancy, calculator=pw_al, fmax_ev_per_ang=0.02, files=("POSCAR_initial", "POSCAR_final")
    ),
    # Rattled by 0.03 Å, both ends relax back into their sites: they are minima.
    "al_hydrogen": Hop(ends=al_hydrogen, calculator=gpaw, fmax_ev_per_ang=0.01),
    # Undisturbed, the tetrahedral site keeps its threefold axis and is no minimum (chgnet: two modes of -0.13 eV/Å^2).
    "cr_sb2te3": Hop(ends=cr_sb2te3, calculator=chgnet, fmax_ev_per_ang=0.01, middle=cr_tetrahedral, rattle_ang=0.05),
}


def relaxed(atoms: Atoms, calculator: Calculator, fmax_ev_per_ang: float, steps: int = 300) -> Atoms:
    """A relaxed copy of ``atoms`` without a calculator. Raises RuntimeError if it is not relaxed after ``steps``."""
    atoms = atoms.copy()
    atoms.calc = calculator
    optimizer = BFGS(atoms, logfile=None, maxstep=0.1)
    if not optimizer.run(fmax=fmax_ev_per_ang, steps=steps):
        raise RuntimeError(f"not relaxed to {fmax_ev_per_ang} eV/Å after {steps} steps")
    print(f"  {len(atoms)} atoms, {optimizer.nsteps} steps, {atoms.get_potential_energy():.5f} eV")
    atoms.calc = None
    return atoms


def build(name: str, folder: Path) -> None:
    """Build, relax and write both ends (and the middle, if any) of ``HOPS[name]`` under ``folder``."""
    hop = HOPS[name]
    calculator = hop.calculator()
    folder.mkdir(parents=True, exist_ok=True)
    built = dict(zip(hop.files, hop.ends(), strict=True))
    if hop.middle is not None:
        built["middle.extxyz"] = hop.middle()
    for file, atoms in built.items():
        if hop.rattle_ang:
            atoms.rattle(hop.rattle_ang, seed=0)  # fixed atoms stay
        write_structure(folder / file, relaxed(atoms, calculator, hop.fmax_ev_per_ang))


def write_structure(path: Path, atoms: Atoms) -> None:
    options: dict[str, Any] = {"format": "extxyz"}
    if path.name.startswith("POSCAR"):
        options = {"format": "vasp", "direct": True}
    elif atoms.constraints:
        options["columns"] = ["symbols", "positions", "move_mask"]
    else:
        options["columns"] = ["symbols", "positions"]
    write(path, atoms, **options)
    print(f"  wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="+", choices=sorted(HOPS))
    parser.add_argument("-o", "--out", type=Path, default=STRUCTURES, help="folder (default: config/structures)")
    options = parser.parse_args()
    for name in options.names:
        print(name)
        build(name, options.out / name)


if __name__ == "__main__":
    main()
