"""Outputs that end too early, though the numbers are there and the exit code says that all is well."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk, molecule

from alcore.types import Structure
from calculators.espresso import inspect
from calculators.measure import Measurement, measure
from calculators.registry import resolve

AL = {"pseudopotentials": {"Al": "Al.pz-vbc.UPF"}, "ecutwfc_ry": 12.0, "kpts": (2, 2, 2), "degauss_ry": 0.05}
H2 = {"basis_set": "SZV-MOLOPT-SR-GTH", "cutoff_ry": 200.0, "algorithm": "ot", "eps_scf": 1e-6}
PSEUDO, DATA = Path("/usr/share/espresso/pseudo/Al.pz-vbc.UPF"), Path("/usr/share/cp2k/GTH_POTENTIALS")
ITERATION = "     iteration #  1     ecut=    12.00 Ry\n"
ACHIEVED, NOT = (
    "     convergence has been achieved in   9 iterations\n",
    "     convergence NOT achieved after 100 iterations\n",
)
DONE = "=----=\n   JOB DONE.\n=----=\n"


@pytest.mark.parametrize(
    ("text", "converged", "said"),
    [
        (ACHIEVED + NOT + DONE, False, "has not converged"),  # the outer cycle of a hybrid functional
        (NOT + ACHIEVED + DONE, True, ""),
        (ACHIEVED + ITERATION, True, "ended in the middle"),
        (ITERATION + DONE, None, "ended in the middle"),
    ],
)
def test_the_verdict_of_the_last_cycle_counts(text: str, converged: bool | None, said: str) -> None:
    Path("espresso.pwo").write_text("     Program PWSCF v.7.2 starts\n" + ITERATION + text)
    found = inspect(None, None)  # type: ignore[arg-type]
    assert found.converged is converged
    assert said in found.reason
    assert bool(said) == bool(found.reason)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def compute(name: str, settings: dict[str, Any], script: str, structure: Structure) -> Measurement:
    """With a program that is this shell script; its version is not asked for."""
    program = Path("program").absolute()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    resolved = resolve(name, {**settings, "version": "any", "command": str(program)})
    make = partial(resolved.entry.make, resolved.settings, structure)
    return measure(make, structure, partial(resolved.entry.inspect, resolved.settings))


@pytest.mark.skipif(not (shutil.which("pw.x") and PSEUDO.is_file()), reason="pw.x and its data are not here")
@pytest.mark.parametrize("missing", ["no such line", "JOB DONE", "convergence has been achieved"])
def test_pw_without_its_last_word_is_never_ok(missing: str) -> None:
    atoms = bulk("Al", "bcc", a=3.2, cubic=True)
    atoms.rattle(0.1, seed=1)
    found = compute("espresso", AL, f'pw.x "$@" | grep -v "{missing}"', Structure.from_atoms(atoms))
    assert "!    total energy" in Path("espresso.pwo").read_text()
    assert found.status == ("ok" if missing == "no such line" else "crashed"), found.reason
    assert ("ended in the middle" in found.reason) == (found.status == "crashed")
    assert found.inspection.electronic_steps is not None


@pytest.mark.skipif(not (shutil.which("cp2k.psmp") and DATA.is_file()), reason="cp2k and its data are not here")
@pytest.mark.parametrize("missing", ["no such line", "PROGRAM ENDED AT"])
def test_cp2k_without_its_last_word_is_never_ok(missing: str) -> None:
    atoms = molecule("H2", cell=np.full(3, 4.5), pbc=True)
    script = f'cp2k.psmp "$@" && sed -i "/{missing}/,\\$d" cp2k.out'
    found = compute("cp2k", H2, script, Structure.from_atoms(atoms))
    assert "ENERGY| Total FORCE_EVAL" in Path("cp2k.out").read_text()
    assert found.status == ("ok" if missing == "no such line" else "crashed"), found.reason
    assert ("ended in the middle" in found.reason) == (found.status == "crashed")
