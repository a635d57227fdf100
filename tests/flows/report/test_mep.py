"""Files other programs read: they parse, and hold the band that was relaxed."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.constraints import FixAtoms
from ase.io import read

from flows.report.mep import JANUS_HEADER, mep_csv, mep_rows, write_path_files, write_vasp


@pytest.fixture(scope="module")
def folder(case: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mep")
    write_path_files(*case, "hop", path)
    return path


def test_mep_csv_holds_band_and_reference_energies(case: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(mep_csv(mep_rows(*case)))))
    record = case.generations[-1].paths[0]
    assert [int(row["image"]) for row in rows] == list(range(7))
    assert [float(row["energy_ev"]) for row in rows] == pytest.approx(record.band.energies_ev, abs=1e-6)
    assert [float(row["coordinate_ang"]) for row in rows] == pytest.approx(record.band.coordinate_ang, abs=1e-6)
    known = {int(row["image"]): float(row["reference_energy_ev"]) for row in rows if row["reference_energy_ev"]}
    assert set(known) == {0, 3, 6}
    assert known[0] == 0.0
    assert known[3] == pytest.approx(record.verified_barrier_ev, abs=1e-6)


def test_unknown_numbers_are_empty_cells(case: Any) -> None:
    last = case.generations[-1]
    band = replace(last.paths[0].band, sigma_ev=np.full(7, np.nan))
    changed = replace(last, paths=(replace(last.paths[0], band=band),))
    rows = mep_rows(case.run, [*case.generations[:-1], changed], case.labels)
    assert {row["sigma_ev"] for row in rows} == {""}


def test_band_extxyz_reads_back(case: Any, folder: Path) -> None:
    record = case.generations[-1].paths[0]
    images = read(folder / "band.extxyz", index=":")
    assert len(images) == 7
    for image, atoms in enumerate(images):
        assert atoms.positions == pytest.approx(record.band.positions[image], abs=1e-6)
        assert atoms.get_potential_energy() == pytest.approx(record.band.energies_ev[image], abs=1e-6)
        assert atoms.get_forces(apply_constraint=False) == pytest.approx(record.band.forces[image], abs=1e-6)
        assert atoms.info["image"] == image
    assert images[3].info["REF_energy"] == pytest.approx(case.labels[record.saddle_key].energy_ev)
    assert "REF_energy" not in images[2].info
    assert images[0].arrays["fixed"].sum() == 8


def test_poscars_keep_order_cell_and_fixed_atoms(case: Any, folder: Path) -> None:
    band = case.generations[-1].paths[0].band
    for image in range(7):
        file = folder / f"{image:02d}" / "POSCAR"
        atoms = read(file)
        assert (atoms.numbers == band.template.numbers).all()
        assert atoms.cell.array == pytest.approx(band.template.cell)
        assert atoms.positions == pytest.approx(band.positions[image], abs=1e-8)
        assert "Selective dynamics" in file.read_text("utf-8")
        (constraint,) = atoms.constraints
        assert isinstance(constraint, FixAtoms)
        assert sorted(constraint.index) == sorted(np.flatnonzero(band.template.fixed.all(axis=1)))
    assert read(folder / "saddle.vasp").positions == pytest.approx(band.positions[3], abs=1e-8)


def test_janus_form(case: Any, folder: Path) -> None:
    record = case.generations[-1].paths[0]
    header, values = (folder / "au-al100-neb-results.dat").read_text("utf-8").splitlines()
    assert header == JANUS_HEADER
    assert header == "#Barrier [eV] | delta E [eV] | Max force [eV/Å] "
    expected = [record.barrier.spline_forward_ev, record.barrier.reaction_energy_ev, record.band.fmax_ev_per_ang]
    assert [float(value) for value in values.split()] == pytest.approx(expected)
    images = read(folder / "au-al100-neb-band.extxyz", index=":")
    energies = [atoms.info["mace_energy"] for atoms in images]
    assert energies == pytest.approx(record.band.energies_ev, abs=1e-6)
    assert images[2].arrays["mace_forces"] == pytest.approx(record.band.forces[2], abs=1e-6)


def test_a_molecule_gets_one_box_for_all_images(case: Any, tmp_path: Path) -> None:
    band = case.generations[-1].paths[0].band
    free = replace(band, template=replace(band.template, cell=np.zeros((3, 3)), pbc=np.zeros(3, dtype=bool)))
    write_vasp(free, tmp_path, 3)
    images = [read(tmp_path / f"{image:02d}" / "POSCAR") for image in range(7)]
    for atoms in images:
        assert atoms.cell.array == pytest.approx(images[0].cell.array)
        inside = atoms.get_scaled_positions(wrap=False)
        assert inside.min() > 0
        assert inside.max() < 1
    shifts = [atoms.positions - place for atoms, place in zip(images, band.positions, strict=True)]
    assert np.ptp(np.array(shifts), axis=(0, 1)) == pytest.approx(0.0, abs=1e-6)


def test_a_hop_without_a_band_leaves_no_files(case: Any, tmp_path: Path) -> None:
    assert write_path_files(case.run, case.generations[:1], case.labels, "hop", tmp_path / "new") == []
    assert mep_rows(case.run, case.generations[:1], case.labels) == []
