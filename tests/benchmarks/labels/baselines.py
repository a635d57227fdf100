"""What the loop is compared with: CI-NEB on the reference (ASE, BFGS and FIRE), and the prior's band without learning.

    python tests/benchmarks/labels/baselines.py --check            # does every case have a real saddle?
    python tests/benchmarks/labels/baselines.py --cases au-al100   # calls of CI-NEB, true barriers

CI-NEB: interior images and the two end states are counted, each evaluation once. The true barrier is that of a band
converged to 0.01 eV/Å, but for the hops whose barrier is known from elsewhere (``cases.py`` says how well these bands
are converged). Results are kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from cases import CASES, DEFAULT_CACHE, Case, end_states, pairs_of
from reference import InProcessLabeler, Tally
from rich.console import Console

from alcore.identity import json_sha256, label_key
from alcore.neb import NebSpec, interpolate, relax_band
from alcore.types import Candidate, EndpointPair, LabelRequest, Structure
from calculators.registry import resolve

Optimizer = Literal["BFGS", "FIRE"]
CAP = 2000
HESSIAN_STEP_ANG = 0.02
MODE_EV_PER_ANG2 = 0.02
"""A curvature below minus this counts as a negative mode."""


@dataclass(frozen=True, kw_only=True)
class BandSpec:
    """A plain CI-NEB; ``n_images`` lie between the ends."""

    optimizer: Optimizer
    fmax_ev_per_ang: float = 0.05
    n_images: int = 7
    spring_ev_per_ang2: float = 0.1
    climb_below_ev_per_ang: float = 0.25
    max_step_ang: float = 0.1


class CapError(Exception):
    """The limit of evaluations is reached."""


class NoTruthError(Exception):
    """A hop has no true barrier: no reference band of it converged."""


def images_of(pair: EndpointPair, spec: BandSpec) -> list[Atoms]:
    """The starting band: IDPP, or that of the case."""
    neb = NebSpec(n_images=spec.n_images)
    return [pair.initial.moved(place).to_atoms() for place in interpolate(pair, neb)]


def ci_neb(case: Case, pair: EndpointPair, spec: BandSpec) -> dict[str, Any]:
    """Relaxes a band on the reference: first without, then with a climbing image.

    Returns:
        ``converged``, ``calls``, ``seconds``, ``barrier_ev``, ``energies_ev`` of all images relative to the first,
        ``fmax_ev_per_ang`` left, ``saddle_fmax_ev_per_ang``, ``saddle`` (positions in Å) and ``failed`` (why it ended
        early, or "").
    """
    tally, began = Tally(case.calculator, case.settings), time.perf_counter()
    images = images_of(pair, spec)
    for image in images:
        image.calc = tally.calculator(pair.initial)
    for end in (images[0], images[-1]):  # evaluated once; NEB would ask again at every step
        known = {"forces": end.get_forces(apply_constraint=False), "energy": end.get_potential_energy()}
        end.calc = SinglePointCalculator(end, **known)
    band = NEB(images, k=spec.spring_ev_per_ang2, method="improvedtangent", climb=False)
    failed, left = "", float("inf")

    def watch() -> None:
        if tally.calls >= CAP:
            raise CapError(f"{CAP} evaluations")

    try:
        for climb, fmax in ((False, spec.climb_below_ev_per_ang), (True, spec.fmax_ev_per_ang)):
            band.climb = climb
            optimizer = {"BFGS": BFGS, "FIRE": FIRE}[spec.optimizer](band, logfile=None, maxstep=spec.max_step_ang)
            optimizer.attach(watch)
            optimizer.run(fmax=fmax, steps=CAP)
    except Exception as error:  # the cap, or a reference that gives up
        failed = f"{type(error).__name__}: {error}".splitlines()[0]
    try:
        left = float(np.linalg.norm(band.get_forces(), axis=1).max())
    except Exception as error:
        failed = failed or f"{type(error).__name__}: {error}".splitlines()[0]
    energies, forces = _results(images)
    top = int(energies[1:-1].argmax()) + 1
    return {
        "converged": not failed and left <= spec.fmax_ev_per_ang,
        "failed": failed,
        "calls": tally.calls,
        "seconds": time.perf_counter() - began,
        "barrier_ev": float(energies[top] - energies[0]),
        "energies_ev": (energies - energies[0]).tolist(),
        "fmax_ev_per_ang": left,
        "saddle_fmax_ev_per_ang": pair.initial.free_fmax(forces[top]),
        "saddle": images[top].positions.tolist(),
    }


def _results(images: Sequence[Atoms]) -> tuple[Any, Any]:
    """Energies and forces as they were last computed; an image that failed has no energy."""
    missing = np.full((len(images[0]), 3), np.nan)
    found = [image.calc.results for image in images]
    energies = np.array([result.get("energy", -np.inf) for result in found], dtype=float)
    return energies, [np.array(result.get("forces", missing)) for result in found]


def counted_neb(case: Case, pair: EndpointPair, spec: BandSpec, cache: Path) -> dict[str, Any]:
    """``ci_neb``, from the cache where it is known."""
    file = _neb_file(case, pair, spec, cache)
    if file.is_file():
        return dict(json.loads(file.read_text("utf-8")))
    result = ci_neb(case, pair, spec)
    cache.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}-{file.name}")
    draft.write_text(json.dumps(result), "utf-8")
    draft.replace(file)
    return result


def known_calls(case: Case, optimizer: Optimizer, cache: Path) -> list[float] | None:
    """Calls of each hop's CI-NEB as the cache knows them, infinite where it did not converge; None if one is unknown.
    Computes nothing."""
    if not case.relaxed or not case.file(cache, ".extxyz").is_file():
        return None
    found = []
    for pair in pairs_of(case, cache):
        file = _neb_file(case, pair, band_spec(case, optimizer), cache)
        if not file.is_file():
            return None
        result = json.loads(file.read_text("utf-8"))
        found.append(float(result["calls"]) if result["converged"] else math.inf)
    return found


def _neb_file(case: Case, pair: EndpointPair, spec: BandSpec, cache: Path) -> Path:
    ends = [label_key(state, "") for state in (pair.initial, pair.final)]
    name = json_sha256({"pair": ends, "spec": asdict(spec)})[:10]
    return case.file(cache, f"-{pair.name}-neb-{spec.optimizer}-{name}.json")


def band_spec(case: Case, optimizer: Optimizer, fmax_ev_per_ang: float = 0.05) -> BandSpec:
    """As the loop's band: as many images, the same springs."""
    neb = NebSpec(**case.neb)
    return BandSpec(
        optimizer=optimizer,
        fmax_ev_per_ang=fmax_ev_per_ang,
        n_images=neb.n_images,
        spring_ev_per_ang2=neb.spring_ev_per_ang2,
    )


def truth(case: Case, pair: EndpointPair, cache: Path) -> dict[str, Any]:
    """The true barrier: known from elsewhere, or CI-NEB to 0.01 eV/Å by FIRE, by BFGS where that does not converge; the
    other way round where a call takes seconds.

    Returns:
        as ``ci_neb`` (``converged`` may be False); of a barrier from elsewhere only ``barrier_ev`` and ``converged``.
    """
    known = case.known_barriers_ev.get(pair.name)
    if known is not None:
        return {"barrier_ev": known, "converged": True, "failed": "", "source": "tests/ground_truth/ci_neb.json"}
    first: Optimizer
    second: Optimizer
    first, second = ("FIRE", "BFGS") if case.n_atoms < 20 or case.calculator == "emt" else ("BFGS", "FIRE")
    result = counted_neb(case, pair, band_spec(case, first, 0.01), cache)
    return result if result["converged"] else counted_neb(case, pair, band_spec(case, second, 0.01), cache)


def truths(case: Case, cache: Path = DEFAULT_CACHE) -> dict[str, float]:
    """True barriers of the case's hops, eV; those of the relaxed end states for an unrelaxed variant.

    Raises:
        NoTruthError: a reference band has not converged.
    """
    relaxed = CASES[case.original] if case.original else case
    found = {pair.name: truth(relaxed, pair, cache) for pair in pairs_of(relaxed, cache)}
    for hop, band in found.items():
        if not band["converged"]:
            left = band["failed"] or f"{band['fmax_ev_per_ang']:.3f} eV/Å left"
            raise NoTruthError(f"{relaxed.name}, {hop}: no true barrier, the reference band did not converge ({left})")
    return {hop: band["barrier_ev"] for hop, band in found.items()}


def negative_modes(case: Case, structure: Structure) -> list[float]:
    """Curvatures (eV/Å², not mass-weighted) below ``-MODE_EV_PER_ANG2`` of a finite-difference Hessian, ascending."""
    tally = Tally(case.calculator, case.settings)
    atoms = structure.to_atoms()
    atoms.calc = tally.calculator(structure)
    free = np.argwhere(~structure.fixed)
    rows = []
    for atom, axis in free:
        sides = []
        for sign in (1, -1):
            positions = structure.positions.copy()
            positions[atom, axis] += sign * HESSIAN_STEP_ANG
            atoms.positions[:] = positions
            sides.append(atoms.get_forces(apply_constraint=False)[~structure.fixed])
        rows.append((sides[1] - sides[0]) / (2 * HESSIAN_STEP_ANG))
    hessian = np.array(rows)
    curvatures = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    return [float(c) for c in curvatures[curvatures < -MODE_EV_PER_ANG2]]


def check(case: Case, cache: Path, *, modes: bool) -> list[dict[str, Any]]:
    """Whether each hop has a converged saddle above both ends, with one negative mode where that is asked."""
    rows = []
    for pair in pairs_of(case, cache):
        found = truth(case, pair, cache)
        row = {"case": case.name, "hop": pair.name, "n_atoms": case.n_atoms, **found}
        if "energies_ev" in found:
            margin = found["barrier_ev"] - max(0.0, found["energies_ev"][-1])
            row |= {"reaction_ev": found["energies_ev"][-1], "valid": found["converged"] and margin > 0.02}
            if modes and case.calculator == "emt":
                places = (pair.initial, pair.initial.moved(np.array(found["saddle"])), pair.final)
                row["negative_modes"] = [negative_modes(case, place) for place in places]
        rows.append(row)
    return rows


def without_learning(case: Case, pair: EndpointPair, prior: Any, truth_ev: float, *, untrained: bool) -> dict[str, Any]:
    """The prior's own band and three reference points: the end states and the prior's saddle.

    Args:
        prior: a MACE model.
        truth_ev: the true barrier.
        untrained: whether it is fresh from ``build_model``.

    Returns:
        ``prior_error_ev`` (the prior's barrier) and ``reference_error_ev`` (reference energy at the prior's saddle),
        both against the truth, None where the band did not come to an end; ``saddle_fmax_ev_per_ang``; ``calls``.
    """
    from alcore.mace.trainer import MaceTrainer, ModelSpec

    trainer = MaceTrainer(prior, ModelSpec(strategy="zero-shot"), untrained=untrained)
    spec = NebSpec(**case.neb)
    start = interpolate(pair, spec)
    surrogate = trainer.start([pair.initial.moved(place) for place in start], [pair.initial, pair.final])
    band = relax_band(surrogate, pair.initial, start, spec)
    top = int(band.energies_ev[1:-1].argmax()) + 1
    labeler = InProcessLabeler(resolve(case.calculator, case.settings))
    places = [pair.initial, pair.final, pair.initial.moved(band.positions[top])]
    labels = labeler.label(
        [
            LabelRequest(
                key=label_key(place, labeler.fingerprint),
                candidate=Candidate(path=pair.name, kind="data", image=0, structure=place),
                generation=0,
            )
            for place in places
        ]
    )
    labeler.close()
    first, _, saddle = labels
    energy = None if first.energy_ev is None or saddle.energy_ev is None else saddle.energy_ev - first.energy_ev
    return {
        "calls": labeler.n_calls,
        "band": band.status,
        "prior_error_ev": float(band.energies_ev[top] - band.energies_ev[0]) - truth_ev,
        "reference_error_ev": None if energy is None else energy - truth_ev,
        "saddle_fmax_ev_per_ang": None if saddle.forces is None else pair.initial.free_fmax(saddle.forces),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="", help="names, comma-separated; empty: all")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder of relaxed states and bands")
    parser.add_argument("--check", action="store_true", help="true barriers and negative modes instead of calls")
    given = parser.parse_args()
    console = Console()
    warnings.simplefilter("ignore")
    names = given.cases.split(",") if given.cases else [name for name, case in CASES.items() if case.relaxed]
    for case in [CASES[name] for name in names]:
        began = time.perf_counter()
        states = end_states(case, given.cache)
        if given.check:
            for row in check(case, given.cache, modes=True):
                shown = {k: v for k, v in row.items() if k not in ("saddle", "energies_ev", "source")}
                console.print(f"{json.dumps(shown)} bands in {time.perf_counter() - began:.0f} s", soft_wrap=True)
                if "energies_ev" in row:
                    console.print("    " + " ".join(f"{e:.3f}" for e in row["energies_ev"]))
            continue
        for pair in pairs_of(case, given.cache):
            for optimizer in ("BFGS", "FIRE"):
                row = counted_neb(case, pair, band_spec(case, optimizer), given.cache)
                console.print(
                    f"{case.name} {pair.name} {len(states)} states {optimizer}: {row['calls']} calls, "
                    f"{row['barrier_ev']:.4f} eV, {'converged' if row['converged'] else row['failed'] or 'no'}, "
                    f"{row['seconds']:.1f} s"
                )


if __name__ == "__main__":
    main()
