"""The minimum energy path as files other programs take: CSV, extended XYZ, VASP folders, janus-core's NEB output."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from alcore.types import Band, FloatArray, GenerationRecord, Label, PathRecord, RunRecord
from flows.report.frames import initial_energy_ev, labels_of_band, last_probed, path_forces, path_names

CSV_COLUMNS = (
    "path",
    "image",
    "coordinate_ang",
    "energy_ev",
    "sigma_ev",
    "tangential_force_ev_per_ang",
    "perpendicular_fmax_ev_per_ang",
    "reference_energy_ev",
)
JANUS_HEADER = "#Barrier [eV] | delta E [eV] | Max force [eV/Å] "
MOLECULE_MARGIN_ANG = 6.0
"""VASP needs a box: empty space left on each side of what has no lattice vector of its own."""


def mep_rows(
    run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label], path: str | None = None
) -> list[dict[str, str]]:
    """Rows of ``mep.csv`` for the newest band of each hop (or of one); what is not known is empty.

    Energies are relative to the initial state, the reference's to the label of the initial state.
    """
    rows = []
    for name in [path] if path is not None else path_names(generations):
        probed = last_probed(generations, name)
        if probed is None or probed.band is None:
            continue
        band, forces = probed.band, path_forces(probed.band)
        zero, found = initial_energy_ev(generations, labels, name), labels_of_band(probed.band, labels)
        for image in range(len(band.positions)):
            label = found.get(image)
            known = label is not None and label.energy_ev is not None and zero is not None
            values: dict[str, float | None] = {
                "coordinate_ang": band.coordinate_ang[image],
                "energy_ev": band.energies_ev[image],
                "sigma_ev": band.sigma_ev[image],
                "tangential_force_ev_per_ang": forces.tangential_ev_per_ang[image],
                "perpendicular_fmax_ev_per_ang": forces.perpendicular_fmax_ev_per_ang[image],
                "reference_energy_ev": label.energy_ev - zero if known else None,  # type: ignore[union-attr,operator]
            }
            rows.append({"path": name, "image": str(image)} | {key: _number(value) for key, value in values.items()})
    return rows


def _number(value: float | None) -> str:
    return "" if value is None or not np.isfinite(value) else f"{float(value):.6f}"


def mep_csv(rows: Sequence[Mapping[str, str]]) -> str:
    """``mep.csv``."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def band_atoms(generations: Sequence[GenerationRecord], labels: Mapping[str, Label], path: str) -> list[Atoms]:
    """The newest band of a hop as ASE atoms: surrogate energies (relative to the initial state) and forces as results,
    the reference's total energy and forces as ``REF_energy`` and ``REF_forces`` where labelled; [] without a band."""
    probed = last_probed(generations, path)
    if probed is None or probed.band is None:
        return []
    band, found = probed.band, labels_of_band(probed.band, labels)
    images = []
    for image in range(len(band.positions)):
        atoms = band.structure(image).to_atoms()
        atoms.info |= {
            "path": path,
            "image": image,
            "coordinate_ang": float(band.coordinate_ang[image]),
            "sigma_ev": float(band.sigma_ev[image]),
            "energy_zero": "initial_state",
        }
        atoms.set_array("fixed", band.template.fixed.all(axis=1))
        label = found.get(image)
        if label is not None and label.forces is not None:
            atoms.info["REF_energy"] = float(label.energy_ev or 0.0)
            atoms.arrays["REF_forces"] = np.array(label.forces)
        # apply_constraint would zero the forces of fixed atoms on reading energies back
        atoms.calc = SinglePointCalculator(
            atoms, energy=float(band.energies_ev[image]), forces=np.array(band.forces[image])
        )
        images.append(atoms)
    return images


def _janus_atoms(images: Sequence[Atoms]) -> list[Atoms]:
    """The same band with the keys janus-core gives a MACE model's results."""
    band = []
    for image in images:
        atoms = Atoms(numbers=image.numbers, positions=image.positions, cell=image.cell, pbc=image.pbc)
        atoms.info |= {"mace_energy": image.calc.results["energy"], "units": {"energy": "eV", "forces": "ev/Ang"}}
        atoms.arrays["mace_forces"] = image.calc.results["forces"]
        atoms.calc = SinglePointCalculator(atoms, **image.calc.results)
        band.append(atoms)
    return band


def janus_results(probed: PathRecord) -> str:
    """``<name>-neb-results.dat``: barrier of the spline, reaction energy, largest NEB force."""
    barrier, band = probed.barrier, probed.band
    values = [
        barrier.spline_forward_ev if barrier else np.nan,
        barrier.reaction_energy_ev if barrier else np.nan,
        band.fmax_ev_per_ang if band else np.nan,
    ]
    return f"{JANUS_HEADER}\n{' '.join(str(float(value)) for value in values)}\n"


def _boxed(band: Band) -> tuple[FloatArray, FloatArray]:
    """Cell and positions of all images with a lattice vector in every direction, as VASP wants it; the same box and
    the same shift for all images."""
    cell = np.array(band.template.cell)
    missing = np.linalg.norm(cell, axis=1) < 1e-8
    if not missing.any():
        return cell, np.array(band.positions)
    from ase.cell import Cell

    cell = np.array(Cell(cell).complete())
    shift = np.zeros(3)
    for axis in np.flatnonzero(missing):
        unit = cell[axis] / np.linalg.norm(cell[axis])
        along = band.positions @ unit
        cell[axis] = unit * (np.ptp(along) + 2 * MOLECULE_MARGIN_ANG)
        shift += unit * (MOLECULE_MARGIN_ANG - along.min())
    return cell, band.positions + shift


def write_vasp(band: Band, folder: Path, saddle_image: int | None) -> list[Path]:
    """``00/POSCAR`` ... ``NN/POSCAR`` with selective dynamics for fixed atoms, and ``saddle.vasp``; returns the files.

    Atoms keep their order in every image, as a NEB demands; nothing is wrapped back into the cell.
    """
    from ase.io import write

    cell, positions = _boxed(band)
    width = max(2, len(str(len(positions) - 1)))
    files = []
    for image, place in enumerate(positions):
        atoms = band.structure(image).to_atoms()
        atoms.set_cell(cell, scale_atoms=False)
        atoms.set_positions(place, apply_constraint=False)
        atoms.pbc = True
        targets = [folder / f"{image:0{width}d}" / "POSCAR"] + (
            [folder / "saddle.vasp"] if image == saddle_image else []
        )
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(target, atoms, format="vasp", direct=True, vasp5=True, sort=False)
            files.append(target)
    return files


def write_path_files(
    run: RunRecord, generations: Sequence[GenerationRecord], labels: Mapping[str, Label], path: str, folder: Path
) -> list[Path]:
    """All structure files of one hop into ``folder``; none while it has no band."""
    from ase.io import write

    images = band_atoms(generations, labels, path)
    probed = last_probed(generations, path)
    if not images or probed is None or probed.band is None:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{run.name}-neb" if len(path_names(generations)) == 1 else f"{path}-neb"
    band_file, janus_band, janus_table = (
        folder / "band.extxyz",
        folder / f"{stem}-band.extxyz",
        folder / f"{stem}-results.dat",
    )
    write(band_file, images, format="extxyz")
    write(janus_band, _janus_atoms(images), format="extxyz")
    janus_table.write_text(janus_results(probed), encoding="utf-8")
    saddle = probed.barrier.saddle_image if probed.barrier else None
    return [band_file, janus_band, janus_table, *write_vasp(probed.band, folder, saddle)]
