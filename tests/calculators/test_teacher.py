"""Calculators as teachers: in batches or one by one, the answers are those of the calculator itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from alcore.types import Structure
from calculators.registry import resolve
from calculators.teacher import make_teacher


def test_emt_says_what_it_says_alone_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    teacher = make_teacher(resolve("emt"))
    (answer,) = teacher([Structure.from_atoms(atoms)])
    assert answer is not None
    atoms.calc = EMT(asap_cutoff=False)
    assert answer[0] == pytest.approx(atoms.get_potential_energy())
    assert np.allclose(answer[1], atoms.get_forces())
    assert teacher.fingerprint == resolve("emt").fingerprint
    assert Path.cwd() == tmp_path
    assert not list(tmp_path.iterdir())


def test_chgnet_in_batches_says_what_it_says_alone() -> None:
    """Batches of unequal cells; the isolated atom, which it refuses, takes no other answer with it."""
    pytest.importorskip("chgnet")
    resolved = resolve("chgnet")
    atoms = [
        bulk("Cu", cubic=True),
        Atoms("Cu", cell=[20.0] * 3, pbc=True),
        bulk("Al"),
        bulk("NaCl", "rocksalt", a=5.6),
    ]
    for one in atoms:
        one.rattle(0.05, seed=1)
    answers = make_teacher(resolved)([Structure.from_atoms(one) for one in atoms])
    assert [answer is None for answer in answers] == [False, True, False, False]
    for one, answer in zip(atoms, answers, strict=True):
        if answer is not None:
            one.calc = resolved.entry.make(resolved.settings)
            assert answer[0] == pytest.approx(one.get_potential_energy(), abs=1e-4)
            assert np.allclose(answer[1], one.get_forces(), atol=1e-4)


def test_a_teacher_that_has_no_answer_says_why_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "failing_teacher.py").write_text("def make():\n    raise RuntimeError('no licence')\n")
    settings = {"factory": "failing_teacher:make", "settings": {}, "path": str(tmp_path)}
    teacher = make_teacher(resolve("ase", settings))
    assert teacher([Structure.from_atoms(bulk("Cu"))] * 3) == [None] * 3
    assert [record.getMessage() for record in caplog.records] == [
        "ase has no answer for a structure: RuntimeError: no licence"
    ]
