"""The benchmark's hops: which reference, which atoms, which half; their end states relaxed with that reference.

The development half was looked at while constants and defaults were chosen; the test half was not: its hops were only
checked to have a saddle above both ends (``python tests/benchmarks/labels/baselines.py --check``). What has been
computed once is kept in the cache folder under a name that changes with the structures and the reference.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[3]))  # mace-torch, too, has a top-level package called tests

import numpy as np
import structures as build
from ase import Atoms
from ase.io import read, write
from ase.optimize import BFGS
from platformdirs import user_cache_dir
from reference import Tally

from alcore.endpoints import make_pair, read_band
from alcore.identity import json_sha256, label_key
from alcore.types import EndpointPair, Structure
from calculators.registry import resolve

ROOT = Path(__file__).resolve().parents[3]
DEFAULT_CACHE = Path(user_cache_dir("al-loop")) / "benchmarks" / "labels"
RELAX_FMAX_EV_PER_ANG = 0.01
RELAX_STEPS = 400
CONFIG = ROOT / "config" / "structures"

Half = Literal["development", "test"]


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One path of a case: names of its end states, and whether a symmetry of the crystal turns it round."""

    name: str = "hop"
    initial: str = "initial"
    final: str = "final"
    symmetric: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A hop, or a set of hops that share atoms and end states.

    Attributes:
        name: unique.
        half: ``development``: looked at while constants were chosen; ``test``: never.
        description: one line.
        build: the states before they are relaxed.
        hops: the paths.
        calculator, settings: the reference, as in a run file.
        charge: e.
        band: file of a whole starting band, end states included, or None.
        neb: fields of ``NebSpec`` the case needs, as its run file has them.
        relaxed: False: the end states are given as built.
        known_barriers_ev: barriers known from elsewhere (``tests/ground_truth/ci_neb.json``), by the hop's name; their
            bands are less converged than those of ``baselines.truth``.
        original: the case this is a variant of, or "".
    """

    name: str
    half: Half
    description: str
    build: Callable[[], build.States]
    hops: tuple[Hop, ...] = (Hop(),)
    calculator: str = "emt"
    settings: Mapping[str, Any] = field(default_factory=dict)
    charge: float = 0.0
    band: Path | None = None
    neb: Mapping[str, Any] = field(default_factory=dict)
    relaxed: bool = True
    known_barriers_ev: Mapping[str, float] = field(default_factory=dict)
    original: str = ""

    @property
    def is_set(self) -> bool:
        return len(self.hops) > 1

    @cached_property
    def built(self) -> dict[str, Atoms]:
        """The states its hops need before relaxation, by name."""
        used = {name for hop in self.hops for name in (hop.initial, hop.final)}
        return {name: atoms for name, atoms in self.build().items() if name in used}

    @property
    def n_atoms(self) -> int:
        return len(next(iter(self.built.values())))

    @cached_property
    def sha256(self) -> str:
        """Hash of the built states and the reference."""
        reference = resolve(self.calculator, self.settings).fingerprint
        states = {name: Structure.from_atoms(atoms, charge=self.charge) for name, atoms in self.built.items()}
        return json_sha256({name: label_key(state, reference) for name, state in states.items()})

    def file(self, cache: Path, ending: str) -> Path:
        """Where something of this case is kept."""
        return cache / f"{self.original or self.name}-{self.sha256[:10]}{ending}"


def end_states(case: Case, cache: Path = DEFAULT_CACHE) -> dict[str, Atoms]:
    """States of a case, relaxed with its reference (these evaluations count for nobody); from the cache if there.

    Raises:
        RuntimeError: a state does not relax.
    """
    if not case.relaxed:
        return case.built
    file = case.file(cache, ".extxyz")
    if file.is_file():
        return dict(zip(case.built, read(file, ":"), strict=True))
    relaxed, tally, began = {}, Tally(case.calculator, case.settings), time.perf_counter()
    for name, atoms in case.built.items():
        state = atoms.copy()
        state.calc = tally.calculator(Structure.from_atoms(state, charge=case.charge))
        if not BFGS(state, logfile=None, maxstep=0.1).run(fmax=RELAX_FMAX_EV_PER_ANG, steps=RELAX_STEPS):
            raise RuntimeError(f"{case.name}: state {name} is not relaxed after {RELAX_STEPS} steps")
        state.calc = None
        relaxed[name] = state
    cache.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}-{file.name}")
    write(draft, list(relaxed.values()), format="extxyz", write_results=False)
    draft.replace(file)
    print(f"{case.name}: states relaxed in {time.perf_counter() - began:.1f} s, {tally.calls} calls", file=sys.stderr)
    return relaxed


def pairs_of(case: Case, cache: Path = DEFAULT_CACHE, truths: Mapping[str, float] | None = None) -> list[EndpointPair]:
    """The case's hops as the loop takes them; ``truths`` are barriers to report the error against, by hop."""
    states = end_states(case, cache)
    inner = read_band(case.band, case.name)[1:-1] if case.band is not None else None
    return [
        make_pair(
            hop.name,
            states[hop.initial],
            states[hop.final],
            inner=inner,
            charge=case.charge,
            reference_barrier_ev=(truths or {}).get(hop.name),
        )
        for hop in case.hops
    ]


def shares_labels(case: Case) -> bool:
    """Whether the states of a case differ in nothing but positions."""
    first, *others = case.built.values()
    return all(
        np.array_equal(first.numbers, other.numbers) and np.allclose(first.cell.array, other.cell.array)
        for other in others
    )


def _unrelaxed(case: Case) -> Case:
    return replace(
        case,
        name=f"{case.name}-unrelaxed",
        original=case.name,
        relaxed=False,
        description=f"{case.description}; end states as built",
    )


SYMMETRIC = (Hop(symmetric=True),)

_CASES = [
    Case(
        name="au-al100",
        half="development",
        build=build.au_al100,
        hops=SYMMETRIC,
        description="Au on Al(100) 2x2x3, hollow to hollow, two layers fixed",
    ),
    Case(
        name="cu-vacancy-31",
        half="development",
        build=partial(build.vacancy, "Cu", build.CU_ANG, 2),
        hops=SYMMETRIC,
        description="Cu vacancy, 2x2x2 cubic cells, all free",
    ),
    Case(
        name="asym-al-au",
        half="development",
        build=build.asym_al_au,
        description="Au leaves an Al adatom on Al(100) 3x2x3, two layers fixed (the path lies in a mirror plane)",
    ),
    Case(
        name="cr-sb2te3",
        half="development",
        calculator="chgnet",
        build=partial(build.from_files, CONFIG / "cr_sb2te3/initial.extxyz", CONFIG / "cr_sb2te3/final.extxyz"),
        hops=SYMMETRIC,
        band=CONFIG / "cr_sb2te3/band.extxyz",
        neb={"n_images": 11, "spring_ev_per_ang2": 1.0},
        known_barriers_ev={"hop": 0.446},  # of a band converged to 0.03 eV/Å only (the force on its saddle is 0.012)
        description="Cr in the gap of a Sb2Te3 bilayer, octahedral to octahedral, two humps (config/cr_sb2te3.yaml)",
    ),
    Case(
        name="nacl-vacancy",
        half="development",
        calculator="tblite",
        charge=-1.0,
        build=partial(build.from_files, CONFIG / "nacl_vacancy/initial.extxyz", CONFIG / "nacl_vacancy/final.extxyz"),
        hops=SYMMETRIC,
        known_barriers_ev={"hop": 0.416},  # of a band converged to 0.0455 eV/Å only
        description="Na vacancy (charge -1) in NaCl, GFN1-xTB (config/nacl_vacancy.yaml)",
    ),
    Case(
        name="set-au-al100",
        half="development",
        build=build.alloyed_hops,
        hops=(
            Hop(name="away", initial="touching", final="aside"),
            Hop(name="on", initial="aside", final="far"),
            Hop(name="past", initial="touching", final="opposite", symmetric=True),
        ),
        description="Au on Al(100) 4x3x3 with one Au in the surface: three hops between four hollows",
    ),
    Case(
        name="cu-vacancy-107",
        half="development",
        build=partial(build.vacancy, "Cu", build.CU_ANG, 3),
        hops=SYMMETRIC,
        description="Cu vacancy, 3x3x3 cubic cells, all free",
    ),
    Case(
        name="ammonia",
        half="development",
        calculator="tblite",
        build=build.ammonia,
        hops=SYMMETRIC,
        description="ammonia turns inside out, GFN1-xTB",
    ),
    Case(
        name="ethanol",
        half="development",
        calculator="tblite",
        build=build.ethanol,
        description="ethanol, anti to gauche, GFN1-xTB",
    ),
    Case(
        name="formic-acid-dimer",
        half="development",
        calculator="tblite",
        build=build.formic_acid_dimer,
        hops=SYMMETRIC,
        description="two protons go over between two formic acids, GFN1-xTB",
    ),
    Case(
        name="pt7-pt111",
        half="test",
        build=partial(build.heptamer, "Pt", (6, 6, 5), shift=True),
        description="Pt heptamer on Pt(111) 6x6x5 shifts from fcc to hcp hollows; only its 7 atoms free",
    ),
    Case(
        name="pt7-edge",
        half="test",
        build=partial(build.heptamer, "Pt", (6, 6, 5), shift=False),
        description="an edge atom of that heptamer leaves its place; only the 7 atoms free",
    ),
    Case(
        name="ni-adatom-100",
        half="test",
        build=partial(build.adatom_100, "Ni", (3, 3, 4)),
        hops=SYMMETRIC,
        description="Ni on Ni(100) 3x3x4, hollow to hollow, two layers fixed",
    ),
    Case(
        name="pd-adatom-exchange-100",
        half="test",
        build=partial(build.exchange_100, "Pd", (3, 3, 4)),
        hops=SYMMETRIC,
        description="Pd on Pd(100) 3x3x4 goes into the surface, another atom comes out; two layers fixed",
    ),
    Case(
        name="ag-adatom-111",
        half="test",
        build=partial(build.adatom_111, "Ag", (3, 3, 4)),
        description="Ag on Ag(111) 3x3x4, fcc to hcp hollow, two layers fixed",
    ),
    Case(
        name="cu-adatom-111-two-hump",
        half="test",
        build=partial(build.adatom_111, "Cu", (3, 3, 4), two_hops=True),
        hops=SYMMETRIC,
        description="Cu on Cu(111) 3x3x4, fcc to fcc hollow over the hcp hollow: two humps; two layers fixed",
    ),
    Case(
        name="cu-dumbbell",
        half="test",
        build=partial(build.dumbbell, "Cu", build.CU_ANG, 3, [0.5, 0.5, 0]),
        hops=SYMMETRIC,
        description="<100> self-interstitial in Cu goes to the next site and turns, 3x3x3 cubic cells, all free",
    ),
    Case(
        name="ni-cu-dumbbell",
        half="test",
        build=partial(build.dumbbell, "Cu", build.CU_ANG, 2, [0.5, 0.5, 0], solute="Ni"),
        hops=SYMMETRIC,
        description="mixed Cu-Ni dumbbell in Cu, 2x2x2 cubic cells: the Ni goes over to the next site, all free",
    ),
    Case(
        name="al-cu-exchange",
        half="test",
        build=partial(build.solute_vacancy, "Al", "Cu", build.AL_ANG, 2),
        hops=(Hop(final="swapped", symmetric=True),),
        description="a Cu solute hops into a vacancy in Al, 2x2x2 cubic cells, all free",
    ),
    Case(
        name="al-vacancy-from-cu",
        half="test",
        build=partial(build.solute_vacancy, "Al", "Cu", build.AL_ANG, 2),
        hops=(Hop(final="second"),),
        description="Al vacancy, first to second neighbour of a Cu solute, 2x2x2 cubic cells, all free",
    ),
    Case(
        name="pt-step",
        half="test",
        build=partial(build.step_100, "Pt", (6, 3, 4)),
        description="Pt leaves the foot of a step on Pt(100), two layers fixed",
    ),
    Case(
        name="ni-divacancy",
        half="test",
        build=partial(build.divacancy, "Ni", build.NI_ANG, 3),
        hops=SYMMETRIC,
        description="Ni divacancy turns, 3x3x3 cubic cells, all free",
    ),
    Case(
        name="ag-surface-vacancy",
        half="test",
        build=partial(build.surface_vacancy_111, "Ag", (3, 3, 4)),
        hops=SYMMETRIC,
        description="vacancy in the first layer of Ag(111) 3x3x4, two layers fixed",
    ),
    Case(
        name="lif-vacancy",
        half="test",
        calculator="tblite",
        charge=-1.0,
        build=build.lif_vacancy,
        hops=SYMMETRIC,
        description="Li vacancy (charge -1) in LiF, 2x2x2 cubic cells, GFN1-xTB, all free",
    ),
    Case(
        name="malonaldehyde",
        half="test",
        calculator="tblite",
        build=build.malonaldehyde,
        hops=SYMMETRIC,
        description="proton transfer in malonaldehyde, GFN1-xTB",
    ),
    Case(
        name="butane",
        half="test",
        calculator="tblite",
        build=build.butane,
        description="butane, gauche to anti, GFN1-xTB",
    ),
    Case(
        name="set-cu-ni-vacancy",
        half="test",
        build=partial(build.solute_vacancy, "Cu", "Ni", build.CU_ANG, 2),
        hops=(
            Hop(name="exchange", final="swapped", symmetric=True),
            Hop(name="around", final="around", symmetric=True),
            Hop(name="second", final="second"),
            Hop(name="third", final="third"),
            Hop(name="beyond", initial="second", final="beyond"),
        ),
        description="a vacancy and a Ni solute in Cu, 2x2x2 cubic cells, all free: five hops between six states",
    ),
]

UNRELAXED = ("au-al100", "asym-al-au", "ni-adatom-100", "al-vacancy-from-cu", "pt-step", "ag-surface-vacancy")
"""Cases that are also run from end states as built."""

CASES: dict[str, Case] = {case.name: case for case in _CASES}
CASES |= {f"{name}-unrelaxed": _unrelaxed(CASES[name]) for name in UNRELAXED}
