"""Independent ground truths: plain ASE climbing-image NEB of the example hops, on the reference calculator itself.

    OMP_NUM_THREADS=1 python tests/ground_truth/ci_neb.py au_al100 cu_vacancy cr_sb2te3 nacl_vacancy al_hydrogen

Shares no code with al-loop. Results go to ``ci_neb.json`` beside this file (one entry a hop; others are kept).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.geometry import find_mic
from ase.io import read, write
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.utils.forcecurve import fit_raw
from build_structures import HOPS, STRUCTURES

RESULTS = Path(__file__).with_name("ci_neb.json")


@dataclass(frozen=True, kw_only=True)
class NebSpec:
    """``n_images`` lie between the ends; ``through`` names a file the first guess passes through, half way.

    ``hop`` and ``files`` say which structures, where the entry's own name does not. With ``zoom_images`` the whole band
    does not climb: a second band of that many images between the two neighbours of its highest image does.
    """

    n_images: int = 7
    fmax_ev_per_ang: float = 0.01
    climb_below_ev_per_ang: float = 0.2
    spring_ev_per_ang2: float = 0.1
    optimizer: Literal["FIRE", "BFGS"] = "FIRE"
    max_step_ang: float = 0.1
    max_steps: int = 500
    through: str = ""
    hop: str = ""
    files: tuple[str, str] | None = None
    zoom_images: int = 0
    note: str = ""


# A soft host and a flat saddle (-0.1 to -0.4 eV/Å^2 against 5 to 10 of the stiff modes): images 0.7 Å apart give
# a tangent too coarse to climb along. The climbing band came down to 0.03 to 0.05 eV/Å and then went uphill sideways.
SOFT: dict[str, Any] = {
    "spring_ev_per_ang2": 1.0,
    "climb_below_ev_per_ang": 0.05,
    "max_step_ang": 0.05,
    "fmax_ev_per_ang": 0.03,
    "zoom_images": 7,
    "hop": "cr_sb2te3",
}

SPECS: dict[str, NebSpec] = {
    "au_al100": NebSpec(),
    "cu_vacancy": NebSpec(),
    "cu_vacancy_107": NebSpec(),
    "cr_sb2te3": NebSpec(
        n_images=11,
        through="middle.extxyz",
        note="eighth band tried (config/structures/README.md); one hump refined; extrema and energies_ev are of the "
        "coarse band, not of the saddle. Finite-difference Hessian at the saddle: one negative mode (-0.18 eV/Å^2)",
        **SOFT,
    ),
    "cr_sb2te3_half": NebSpec(
        files=("initial.extxyz", "middle.extxyz"),
        note="NOT a barrier: the converged climbing image has four negative modes (-0.63 to -0.05 eV/Å^2)",
        **SOFT,
    ),
    "nacl_vacancy": NebSpec(
        n_images=5, fmax_ev_per_ang=0.05, optimizer="BFGS", note="still falling by 1 to 2 meV a step at the end"
    ),
    "al_hydrogen": NebSpec(n_images=5, fmax_ev_per_ang=0.05, optimizer="BFGS", note="energies are free energies"),
}


class Tally:
    """Counts the evaluations of every calculator it watches."""

    def __init__(self) -> None:
        self.calls = 0

    def watch(self, calculator: Calculator) -> Calculator:
        evaluate = calculator.calculate

        def calculate(*args: Any, **keywords: Any) -> None:
            self.calls += 1
            evaluate(*args, **keywords)

        setattr(calculator, "calculate", calculate)  # noqa: B010
        return calculator


def first_guess(ends: tuple[Atoms, Atoms], spec: NebSpec, middle: Atoms | None = None) -> list[Atoms]:
    """IDPP guess under minimum images, ends included; by way of ``middle`` if it is given."""
    if middle is None:
        return idpp(*ends, spec.n_images)
    if spec.n_images % 2 == 0:
        raise ValueError("a guess by way of a middle structure needs an odd number of images")
    half = spec.n_images // 2
    return idpp(ends[0], middle, half)[:-1] + idpp(middle, ends[1], half)


def idpp(initial: Atoms, final: Atoms, n_images: int) -> list[Atoms]:
    images = [initial.copy() for _ in range(n_images + 1)] + [final.copy()]
    if n_images:
        NEB(images).interpolate(method="idpp", mic=True)
    return images


def ci_neb(
    ends: tuple[Atoms, Atoms],
    calculator: Callable[[], Calculator],
    spec: NebSpec,
    middle: Atoms | None = None,
    logfile: str | None = None,
) -> tuple[dict[str, Any], list[Atoms]]:
    """Relax a band between ``ends`` (relaxed already) and return its result and its images.

    The result holds ``barrier_ev``, ``reverse_ev``, ``reaction_energy_ev``, ``energies_ev`` of all images relative to
    the initial state, ``extrema`` of the force-fitted spline, ``fmax_ev_per_ang`` left, ``converged``, ``steps`` and
    ``calls`` (evaluations of the reference, the two ends included).
    """
    started, tally = time.perf_counter(), Tally()
    images = first_guess(ends, spec, middle)
    for image in images:
        image.calc = tally.watch(calculator())
    end_fmax = [fmax_of(images[0]), fmax_of(images[-1])]
    band = NEB(images, k=spec.spring_ev_per_ang2, method="improvedtangent", climb=False)
    steps = relax(band, spec.climb_below_ev_per_ang, spec, logfile)
    climber = band
    if spec.zoom_images:
        climber = NEB(zoomed(images, spec.zoom_images), k=spec.spring_ev_per_ang2, method="improvedtangent")
        for image in climber.images[1:-1]:
            image.calc = tally.watch(calculator())
    climber.climb = True
    steps += relax(climber, spec.fmax_ev_per_ang, spec, logfile)
    saddle = max(climber.images[1:-1], key=lambda image: float(image.get_potential_energy()))
    forward = float(saddle.get_potential_energy()) - float(images[0].get_potential_energy())
    energies = np.array([image.get_potential_energy() for image in images], dtype=float)
    energies -= energies[0]
    left = float(np.linalg.norm(climber.get_forces(), axis=1).max())
    result: dict[str, Any] = {
        "converged": left <= spec.fmax_ev_per_ang,
        "barrier_ev": round(forward, 5),
        "reverse_ev": round(forward - float(energies[-1]), 5),
        "reaction_energy_ev": round(float(energies[-1]), 5),
        "energies_ev": energies.round(5).tolist(),
        "extrema": extrema(images),
        "fmax_ev_per_ang": round(left, 4),
        "saddle_fmax_ev_per_ang": round(fmax_of(saddle), 4),
        "end_fmax_ev_per_ang": np.round(end_fmax, 4).tolist(),
        "steps": steps,
        "calls": tally.calls,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return result, [*images, saddle] if spec.zoom_images else images


def fmax_of(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


def relax(band: NEB, fmax_ev_per_ang: float, spec: NebSpec, logfile: str | None) -> int:
    """Relax ``band`` in place with its ends frozen; the number of steps."""
    for k in (0, -1):  # NEB would evaluate the ends again at every step
        end = band.images[k]
        known = {"energy": end.get_potential_energy(), "forces": end.get_forces(apply_constraint=False)}
        end.calc = SinglePointCalculator(end, **known)
    optimizer = {"FIRE": FIRE, "BFGS": BFGS}[spec.optimizer](band, logfile=logfile, maxstep=spec.max_step_ang)
    optimizer.run(fmax=fmax_ev_per_ang, steps=spec.max_steps)
    return int(optimizer.nsteps)


def zoomed(images: list[Atoms], n_images: int) -> list[Atoms]:
    """A denser band between the neighbours of the highest image, by way of it; ``n_images`` (odd) lie between."""
    top = int(np.argmax([image.get_potential_energy() for image in images]))
    below, highest, above = (images[k].copy() for k in (top - 1, top, top + 1))
    half = n_images // 2
    pieces = []
    for start, stop in ((below, highest), (highest, above)):
        piece = [start.copy() for _ in range(half + 1)] + [stop.copy()]
        NEB(piece).interpolate(mic=True)
        pieces.append(piece)
    dense = pieces[0][:-1] + pieces[1]
    dense[0].calc, dense[-1].calc = images[top - 1].calc, images[top + 1].calc
    return dense


def extrema(images: list[Atoms]) -> list[dict[str, Any]]:
    """Interior minima and maxima of ASE's force-fitted spline along the band, in order."""
    # ASE's fit takes its tangents without minimum images: unwrap the path first.
    positions = [images[0].positions]
    for image in images[1:]:
        positions.append(positions[-1] + find_mic(image.positions - positions[-1], image.cell, image.pbc)[0])
    energies = [image.get_potential_energy() for image in images]
    fit = fit_raw(energies, [image.get_forces() for image in images], positions)
    slope = np.sign(np.diff(fit.fit_energies))
    turns = np.flatnonzero(slope[1:] * slope[:-1] < 0) + 1
    return [
        {
            "kind": "maximum" if slope[k - 1] > 0 else "minimum",
            "coordinate_ang": round(float(fit.fit_path[k]), 3),
            "energy_ev": round(float(fit.fit_energies[k]), 4),
        }
        for k in turns
    ]


def read_one(path: Path) -> Atoms:
    atoms = read(path)
    assert isinstance(atoms, Atoms)
    return atoms


def displacement_ang(initial: Atoms, final: Atoms) -> float:
    """Largest minimum-image displacement of one atom between the ends."""
    vectors, _ = find_mic(final.positions - initial.positions, initial.cell, initial.pbc)
    return round(float(np.linalg.norm(vectors, axis=1).max()), 3)


def packages(name: str) -> dict[str, str]:
    used = {"cr_sb2te3": ["chgnet", "torch"], "nacl_vacancy": ["tblite"], "al_hydrogen": ["gpaw", "gpaw-data"]}.get(
        name, []
    )
    return {package: version(package) for package in ["ase", "numpy", *used]}


def run(name: str, spec: NebSpec, *, bands: Path | None, logfile: str | None) -> dict[str, Any]:
    """Ground truth of one hop, as it stands in ``ci_neb.json``."""
    source = spec.hop or name
    folder, hop = STRUCTURES / source, HOPS[source]
    initial, final = (read_one(folder / file) for file in spec.files or hop.files)
    middle = read_one(folder / spec.through) if spec.through else None
    result, images = ci_neb((initial, final), hop.calculator, spec, middle, logfile)
    if bands is not None:
        bands.mkdir(parents=True, exist_ok=True)
        write(bands / f"{name}.extxyz", images, columns=["symbols", "positions"], write_results=False)
    return {
        **result,
        "n_atoms": len(initial),
        "largest_displacement_ang": displacement_ang(initial, final),
        "settings": {"method": "improvedtangent", "interpolation": "idpp, mic", **asdict(spec)},
        "versions": packages(source),
        "command": f"OMP_NUM_THREADS=1 python tests/ground_truth/ci_neb.py {name}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(SPECS))
    parser.add_argument("--bands", type=Path, help="also write each relaxed band into this folder")
    parser.add_argument("--log", help="optimiser's log file ('-': standard output)")
    options = parser.parse_args()
    for name in options.names:
        result = run(name, SPECS[name], bands=options.bands, logfile=options.log)
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        known[name] = result
        RESULTS.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        print(
            name,
            f"{result['barrier_ev']:.4f} eV",
            "converged" if result["converged"] else "NOT converged",
            f"{result['calls']} calls, {result['seconds']} s",
        )


if __name__ == "__main__":
    main()
