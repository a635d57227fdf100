"""The data set: good labels of one level of theory, each once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from alcore.dataset import grow, read_labels
from alcore.errors import InputError
from alcore.types import Dataset, Label, Structure


@pytest.fixture
def labels(label_of: Callable[..., Label]) -> list[Label]:
    copper = Structure.from_atoms(bulk("Cu", cubic=True))
    return [label_of(copper.moved(copper.positions * scale)) for scale in (1.0, 0.99, 0.98)]


@pytest.mark.parametrize("status", ["unconverged", "crashed", "timeout", "rejected"])
def test_only_good_labels_enter_each_once_and_in_order(status: Any, labels: list[Label]) -> None:
    bad = replace(labels[1], status=status)
    dataset = grow(Dataset(), [labels[2], bad, labels[0], labels[2]])
    assert [x.key for x in dataset.labels] == [labels[2].key, labels[0].key]
    assert len(grow(dataset, labels)) == 3


def test_two_levels_of_theory_do_not_meet(labels: list[Label]) -> None:
    other = replace(labels[1], fingerprint="another", calculator="vasp")
    with pytest.raises(InputError, match=r"two levels of theory meet: emt .* and vasp"):
        grow(grow(Dataset(), labels[:1]), [other])
    with pytest.raises(InputError, match="two levels"):
        grow(Dataset(), [labels[0], other])


def test_growing_leaves_the_old_set_alone(labels: list[Label]) -> None:
    small = grow(Dataset(), labels[:1])
    grow(small, labels[1:])
    assert len(small) == 1


def _read(path: Path) -> list[Label]:
    return read_labels(path, fingerprint="fp", calculator="emt", where="data.0")


def test_what_a_user_brings_is_read_with_its_forces(tmp_path: Path) -> None:
    frames = []
    for scale in (1.0, 1.01):
        atoms = bulk("Cu", cubic=True)
        atoms.set_cell(atoms.cell * scale, scale_atoms=True)
        atoms.rattle(0.05, seed=1)
        atoms.calc = EMT()
        atoms.get_potential_energy()
        atoms.get_forces()
        frames.append(atoms)
    write(tmp_path / "mine.traj", frames)
    own = [Atoms(a) for a in frames]
    for atoms, source in zip(own, frames, strict=True):
        atoms.info["REF_energy"] = source.get_potential_energy()
        atoms.arrays["REF_forces"] = source.get_forces()
    write(tmp_path / "mine.extxyz", own, format="extxyz")
    for name in ("mine.traj", "mine.extxyz"):
        found = _read(tmp_path / name)
        assert [x.status for x in found] == ["ok", "ok"]
        for label, atoms in zip(found, frames, strict=True):
            assert label.energy_ev == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
            np.testing.assert_allclose(label.forces, atoms.get_forces(), atol=1e-6)
            assert label.fingerprint == "fp"
    assert len({x.key for x in found}) == 2


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.0: no such file"):
        _read(tmp_path / "missing.extxyz")
    bare = bulk("Cu", cubic=True)
    write(tmp_path / "bare.extxyz", bare)
    with pytest.raises(InputError, match=r"frame 0 of bare\.extxyz has no energy and forces"):
        _read(tmp_path / "bare.extxyz")
    broken = bare.copy()
    broken.calc = SinglePointCalculator(broken, energy=float("nan"), forces=np.zeros((4, 3)))
    write(tmp_path / "broken.traj", broken)
    with pytest.raises(InputError, match="not finite"):
        _read(tmp_path / "broken.traj")
    foreign = bare.copy()
    foreign.info.update(REF_energy=1.0, fingerprint="theirs", calculator="vasp")
    foreign.arrays["REF_forces"] = np.zeros((4, 3))
    write(tmp_path / "foreign.extxyz", foreign, format="extxyz")
    with pytest.raises(InputError, match=r"another level of theory \(vasp\)"):
        _read(tmp_path / "foreign.extxyz")
    (tmp_path / "text.extxyz").write_text("nothing\n")
    with pytest.raises(InputError, match="cannot be read"):
        _read(tmp_path / "text.extxyz")
