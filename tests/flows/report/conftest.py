"""Runs made of a real hop: Au on Al(100) with EMT. The "surrogate" of a generation is EMT scaled by a factor that comes
closer to one, on a band that comes closer to the minimum energy path, so its forces are exactly minus its slopes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, fcc100
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.mep import NEB
from ase.optimize import BFGS

from alcore.identity import label_key
from alcore.types import (
    Band,
    BarrierEstimate,
    Calibration,
    Decision,
    Extremum,
    GenerationRecord,
    Label,
    PathRecord,
    Residual,
    RunRecord,
    Sitting,
    Structure,
)

SCALES = (0.80, 1.06, 1.004)
SIGMAS_EV = (0.09, 0.03, 0.004)
STEPS = (2, 8, 80)
TOLERANCE_EV = 0.01
KINDS = ("initial", "final", "saddle", "uncertain", "saddle", "uncertain", "saddle")
"""Of the labels, in the order they are asked."""
SURROGATE = {
    "strategy": "naive",
    "lead": "committee",
    "why": "few labels",
    "members": ["a1" * 32, "b2" * 32],
    "prior": "c3" * 32,
    "noise": float("nan"),
}


@dataclass(frozen=True)
class Case:
    """A run as the report takes it."""

    run: RunRecord
    generations: list[GenerationRecord]
    labels: dict[str, Label]

    def __iter__(self) -> Any:
        return iter((self.run, self.generations, self.labels))


def _slab() -> Atoms:
    atoms = fcc100("Al", size=(2, 2, 3))
    add_adsorbate(atoms, "Au", 1.7, "hollow")
    atoms.center(axis=2, vacuum=4.0)
    atoms.set_constraint(FixAtoms(mask=[atom.tag > 1 for atom in atoms]))
    return atoms


def _bands() -> list[tuple[list[Atoms], float]]:
    """Snapshots of a climbing-image relaxation with what NEB force was left; end states relaxed."""
    initial = _slab()
    final = initial.copy()
    final[-1].x += final.cell[0, 0] / 2
    for atoms in (initial, final):
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.005, steps=100)
    images = [initial, *(initial.copy() for _ in range(5)), final]
    for image in images[1:-1]:
        image.calc = EMT()
    neb = NEB(images, climb=True, method="improvedtangent", k=0.1)
    neb.interpolate(mic=True)
    optimizer, snapshots = BFGS(neb, logfile=None), []
    for steps in STEPS:
        optimizer.run(fmax=0.01, steps=steps)
        fmax = float(np.linalg.norm(neb.get_forces(), axis=1).max())
        snapshots.append(([_evaluated(image) for image in images], fmax))
    return snapshots


def _evaluated(image: Atoms) -> Atoms:
    copy = image.copy()
    copy.calc = EMT()
    copy.get_potential_energy()
    return copy


def _label(atoms: Atoms, **changes: Any) -> Label:
    structure = Structure.from_atoms(atoms)
    label = Label(
        key=label_key(structure, "emt-1"),
        structure=structure,
        status="ok",
        fingerprint="emt-1",
        calculator="emt",
        energy_ev=float(atoms.get_potential_energy()),
        forces=atoms.get_forces(apply_constraint=False),
        seconds=0.4,
        details={"version": "3.29.0"},
    )
    return replace(label, **changes)


def _band(images: list[Atoms], fmax: float, generation: int, path: str) -> Band:
    scale, template = SCALES[generation - 1], Structure.from_atoms(images[0])
    positions = np.array([image.positions for image in images])
    energies = np.array([image.get_potential_energy() for image in images])
    steps = np.linalg.norm(np.diff(positions, axis=0), axis=(1, 2))
    relative = (energies - energies[0]) * scale
    shape = np.sin(np.linspace(0, np.pi, len(images))) ** 2
    return Band(
        path=path,
        template=template,
        positions=positions,
        energies_ev=relative,
        forces=scale * np.array([image.get_forces(apply_constraint=False) for image in images]),
        sigma_committee_ev=0.1 * shape * SIGMAS_EV[generation - 1],
        sigma_posterior_ev=0.5 * shape * SIGMAS_EV[generation - 1],
        sigma_ev=shape * SIGMAS_EV[generation - 1],
        coordinate_ang=np.concatenate([[0.0], np.cumsum(steps)]),
        status="converged" if fmax < 0.03 else "max_steps",
        reason="" if fmax < 0.03 else f"{STEPS[generation - 1]} steps spent",
        climbing_image=int(relative.argmax()),
        fmax_ev_per_ang=fmax,
        n_steps=STEPS[generation - 1],
    )


def _barrier(band: Band) -> BarrierEstimate:
    saddle = int(band.energies_ev.argmax())
    forward = float(band.energies_ev[saddle])
    return BarrierEstimate(
        forward_ev=forward,
        reverse_ev=forward - float(band.energies_ev[-1]),
        reaction_energy_ev=float(band.energies_ev[-1]),
        spline_forward_ev=forward + 0.0005,
        sigma_ev=float(band.sigma_ev[saddle]),
        sigma_committee_ev=float(band.sigma_committee_ev[saddle]),
        sigma_posterior_ev=float(band.sigma_posterior_ev[saddle]),
        saddle_image=saddle,
        extrema=(
            Extremum(kind="minimum", coordinate_ang=0.0, energy_ev=0.0, image=0),
            Extremum(
                kind="maximum", coordinate_ang=float(band.coordinate_ang[saddle]), energy_ev=forward, image=saddle
            ),
            Extremum(
                kind="minimum",
                coordinate_ang=float(band.coordinate_ang[-1]),
                energy_ev=float(band.energies_ev[-1]),
                image=len(band.energies_ev) - 1,
            ),
        ),
    )


def _residual(label: Label, record: PathRecord, kind: Any, image: int, zero_ev: float, generation: int) -> Residual:
    assert record.band is not None
    assert label.energy_ev is not None
    assert label.forces is not None
    return Residual(
        key=label.key,
        path=record.path,
        kind=kind,
        generation=generation,
        predicted_ev=float(record.band.energies_ev[image]),
        labelled_ev=label.energy_ev - zero_ev,
        sigma_committee_ev=float(record.band.sigma_committee_ev[image]),
        sigma_posterior_ev=float(record.band.sigma_posterior_ev[image]),
        sigma_ev=float(record.band.sigma_ev[image]),
        fmax_ev_per_ang=label.structure.free_fmax(label.forces),
    )


def _settings(name: str, paths: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "paths": [
            {"name": path, "initial": "i.vasp", "final": "f.vasp", "reference_barrier_ev": 0.3745} for path in paths
        ],
        "calculator": {"name": "emt", "settings": {}},
        "model": {"foundation": None, "strategy": "auto", "committee": 3},
        "stop": {"barrier_tolerance_ev": TOLERANCE_EV, "saddle_fmax_ev_per_ang": 0.05},
        "seed": 0,
    }


def _probe(images: list[Atoms], fmax: float, generation: int, path: str, labels: dict[str, Label]) -> PathRecord:
    """One generation of one hop: the saddle is labelled, first an uncertain image too, then one fails."""
    band = _band(images, fmax, generation, path)
    barrier = _barrier(band)
    ends = [_label(images[0]), _label(images[-1])]
    zero = float(ends[0].energy_ev or 0.0)
    saddle = _label(images[barrier.saddle_image])
    asked = [saddle]
    record = PathRecord(path=path, initial=band.template, final=band.structure(-1), band=band, barrier=barrier)
    residuals = [_residual(saddle, record, "saddle", barrier.saddle_image, zero, generation)]
    if generation == 1:
        asked.append(_label(images[1]))
        residuals.append(_residual(asked[1], record, "uncertain", 1, zero, generation))
    if generation == 2:
        failed = _label(images[2], status="crashed", energy_ev=None, forces=None)
        asked.append(replace(failed, reason="SCF <did not> settle", folder="/scratch/labels/abc"))
    labels.update({label.key: label for label in asked})
    verified = float(saddle.energy_ev or 0.0) - zero
    error = barrier.forward_ev - verified
    done = generation == len(SCALES)
    return replace(
        record,
        label_keys=tuple(label.key for label in asked),
        residuals=tuple(residuals),
        initial_label=ends[0].key,
        final_label=ends[1].key,
        initial_fmax_ev_per_ang=0.004,
        final_fmax_ev_per_ang=0.004,
        saddle_key=saddle.key,
        verified_barrier_ev=verified,
        saddle_fmax_ev_per_ang=residuals[0].fmax_ev_per_ang,
        error_to_verified_ev=error,
        error_to_reference_ev=verified - 0.3745,
        barrier_std_ev=0.8 * barrier.sigma_ev,
        decision=Decision(
            stop=done, code="converged" if done else "continue", reason="The label agrees." if done else "Too unsure."
        ),
    )


def _make(bands: list[tuple[list[Atoms], float]], name: str, paths: list[str]) -> Case:
    labels: dict[str, Label] = {}
    ends = [_label(bands[0][0][0], reused=True), _label(bands[0][0][-1])]
    labels.update({label.key: label for label in ends})
    first = [
        PathRecord(
            path=path,
            initial=ends[0].structure,
            final=ends[1].structure,
            label_keys=(ends[0].key, ends[1].key) if path == paths[0] else (),
            initial_label=ends[0].key,
            final_label=ends[1].key,
        )
        for path in paths
    ]
    generations = [
        GenerationRecord(
            run=name,
            index=0,
            paths=tuple(first),
            label_keys=(ends[0].key, ends[1].key),
            kinds=dict(zip(labels, KINDS, strict=False)),
            n_reference_calls=1,
            n_labels_reused=1,
        )
    ]
    for index, (images, fmax) in enumerate(bands, start=1):
        records = tuple(_probe(images, fmax, index, path, labels) for path in paths)
        sound = tuple(key for key, label in labels.items() if label.ok)
        generations.append(
            GenerationRecord(
                run=name,
                index=index,
                paths=records,
                label_keys=sound,
                n_reference_calls=sum(not label.reused for label in labels.values()),
                n_labels_reused=1,
                kinds=dict(zip(labels, KINDS, strict=False)),
                calls_by_kind={"final": 1, "saddle": index, "uncertain": 1 + (index > 1), "failed": int(index > 1)},
                calibration=Calibration(factor=1.7, n_residuals=index + 1, source="the loop's own residuals"),
                surrogate=SURROGATE,
                seconds={"probe": 2.5, "label": 0.8, "train": 4.0},
                decision=records[0].decision,
            )
        )
    run = RunRecord(
        name=name,
        settings=_settings(name, paths),
        settings_sha256="d4" * 32,
        status="converged",
        sittings=(Sitting(started="2026-11-01T08:00:00+00:00", versions={"al-loop": "0.1.0", "ase": "3.29.0"}),),
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:01:00+00:00",
    )
    return Case(run, generations, labels)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Makes a converged run with one or several hops (all over the same way)."""
    bands = _bands()

    def make(name: str = "au-al100", paths: tuple[str, ...] = ("hop",)) -> Case:
        return _make(bands, name, list(paths))

    return make


@pytest.fixture(scope="session")
def case(make_case: Callable[..., Case]) -> Case:
    """A converged run: two end states, three bands, one failed label, one reused."""
    return make_case()
