"""What tblite says of its SCF, and its ladder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk, molecule

from alcore.types import Structure
from calculators import tblite
from calculators.attempts import prepare_worker
from calculators.measure import Measurement
from calculators.registry import resolve

pytestmark = pytest.mark.skipif(bool(tblite.unavailable(None)), reason=tblite.unavailable(None) or "")


def methanol() -> Structure:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=1)
    return Structure.from_atoms(atoms)


def label(settings: dict[str, Any], structure: Structure, retries: int = 0) -> Measurement:
    return prepare_worker((resolve("tblite", settings), retries))(structure)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("method", "structure"),
    [
        ("GFN1-xTB", methanol()),
        ("GFN2-xTB", methanol()),
        ("GFN1-xTB", Structure.from_atoms(bulk("LiF", "rocksalt", a=4.03, cubic=True))),
    ],
)
def test_steps_are_counted(method: str, structure: Structure) -> None:
    """One step fewer than it took is not enough: the count is right."""
    good = label({"method": method}, structure)
    steps = good.inspection.electronic_steps
    assert good.inspection.converged
    assert steps is not None
    assert steps > 3
    enough = label({"method": method, "max_iterations": steps}, structure)
    assert (enough.status, enough.energy_ev) == ("ok", pytest.approx(good.energy_ev, abs=1e-8))
    short = label({"method": method, "max_iterations": steps - 1}, structure)
    assert short.status == "unconverged"
    assert (short.inspection.electronic_steps, short.inspection.converged) == (steps - 1, False)


def test_the_ladder_mends_a_starved_scf_without_moving_the_energy() -> None:
    best = label({}, methanol())
    answer = label({"max_iterations": 5}, methanol(), retries=2)
    assert len(answer.attempts) > 1
    assert {attempt["status"] for attempt in answer.attempts[:-1]} == {"unconverged"}
    assert answer.status == "ok"
    assert answer.energy_ev == pytest.approx(best.energy_ev, abs=1e-6)


def test_no_rung_moves_a_fact() -> None:
    settings = tblite.TbliteSettings()
    assert all(tblite.ENTRY.facts(rung.change(settings)) == tblite.ENTRY.facts(settings) for rung in tblite.RETRIES)
    assert "mixer_damping" not in tblite.ENTRY.facts(settings)
