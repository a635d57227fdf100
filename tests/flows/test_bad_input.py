"""Whatever a user can get wrong is one line that names the place and the mend, exit 2, before anything is computed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import read, write
from typer.testing import CliRunner, Result

from alcore.mace.models import build_model
from flows.cli import app
from flows.session import open_record_store

NAME = "bad"


def al_loop(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})


def final_state(hop: Any, change: Callable[[Atoms], Atoms | None], name: str) -> dict[str, Any]:
    """The hop with its final state spoilt."""
    atoms = read(hop.folder / "final.extxyz")
    atoms = change(atoms) or atoms
    write(hop.folder / name, atoms)
    return {"paths": [{"initial": "initial.extxyz", "final": name}]}


def other_composition(atoms: Atoms) -> None:
    atoms.symbols[8] = "Au"


def other_cell(atoms: Atoms) -> None:
    atoms.cell[1, 1] += 0.1


def on_top_of_each_other(atoms: Atoms) -> None:
    atoms.positions[8] = atoms.positions[7] + [0.0, 0.0, 0.2]


def identical(hop: Any) -> dict[str, Any]:
    return {"paths": [{"initial": "initial.extxyz", "final": "initial.extxyz"}]}


def other_order(hop: Any) -> dict[str, Any]:
    for name, gold in (("initial", 8), ("final", 7)):
        atoms = read(hop.folder / f"{name}.extxyz")
        atoms.symbols[gold] = "Au"
        write(hop.folder / f"order_{name}.extxyz", atoms)
    return {"paths": [{"initial": "order_initial.extxyz", "final": "order_final.extxyz"}]}


def no_structure(hop: Any) -> dict[str, Any]:
    (hop.folder / "POSCAR").write_text("this is\nno structure\nat all\n")
    return {"paths": [{"initial": "initial.extxyz", "final": "POSCAR"}]}


def foundation_without_copper(hop: Any) -> dict[str, Any]:
    torch.save(build_model([13], seed=0), hop.folder / "aluminium.model")
    return {"model": {"foundation": "aluminium.model"}}


def foundation_that_is_none(hop: Any) -> dict[str, Any]:
    (hop.folder / "broken.model").write_text("not a pickle")
    return {"model": {"foundation": "broken.model"}}


def nobody_listens(hop: Any) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"store": {"mongodb_uri": f"mongodb://me:s3cret@127.0.0.1:{probe.getsockname()[1]}/"}}


def data_without_forces(hop: Any) -> dict[str, Any]:
    atoms = read(hop.folder / "initial.extxyz")
    atoms.info["REF_energy"] = -1.0
    write(hop.folder / "energies.extxyz", atoms)
    return {"data": ["energies.extxyz"]}


def data_of_another_theory(hop: Any) -> dict[str, Any]:
    atoms = read(hop.folder / "initial.extxyz")
    atoms.calc = EMT()
    atoms.info |= {"REF_energy": atoms.get_potential_energy(), "fingerprint": "f" * 64, "calculator": "vasp"}
    atoms.arrays["REF_forces"] = atoms.get_forces()
    atoms.calc = None
    write(hop.folder / "vasp.extxyz", atoms)
    return {"data": ["vasp.extxyz"]}


PAIR = "paths.0 (hop: initial.extxyz and "
BAD: dict[str, tuple[Callable[[Any], dict[str, Any]], list[str]]] = {
    "missing file": (
        lambda hop: {"paths": [{"initial": "initial.extxyz", "final": "gone.xyz"}]},
        ["bad.yaml: paths.0.final: no such file: ", "gone.xyz (give an existing file"],
    ),
    "misspelt key": (
        lambda hop: {"neb": {"n_image": 3}},
        ["bad.yaml: neb.n_image: unknown key (did you mean `n_images`?; line 1)"],
    ),
    "composition": (
        lambda hop: final_state(hop, other_composition, "composition.extxyz"),
        [f"{PAIR}composition.extxyz): the end states differ in composition: Cu9 and Cu8Au (give the same atoms"],
    ),
    "order": (
        other_order,
        [
            "paths.0 (hop: order_initial.extxyz and order_final.extxyz): ",
            "differ in the order of atoms: atom 7 is Cu and then Au (sort both files the same way)",
        ],
    ),
    "cell": (
        lambda hop: final_state(hop, other_cell, "cell.extxyz"),
        [f"{PAIR}cell.extxyz): the end states differ in cell vector b by 0.100 Å (relax both in one cell)"],
    ),
    "atoms on top of each other": (
        lambda hop: final_state(hop, on_top_of_each_other, "overlap.extxyz"),
        [f"{PAIR}overlap.extxyz): atoms 7 (Cu) and 8 (Cu) of the final state are 0.20 Å apart (look at the structure"],
    ),
    "identical": (identical, [f"{PAIR}initial.extxyz): the end states are the same structure", "(give two different"]),
    "no structure": (no_structure, ["paths.0.final: POSCAR cannot be read: ", "(give a file ase.io.read takes)"]),
    "moments": (
        lambda hop: {"paths": [{"initial": "initial.extxyz", "final": "final.extxyz", "magnetic_moments": [1.0]}]},
        ["paths.0.magnetic_moments: 1 magnetic moments for 9 atoms (give one an atom)"],
    ),
    "element the foundation model lacks": (
        foundation_without_copper,
        ["model.foundation: the foundation model does not know Cu (choose another model, or null)"],
    ),
    "no foundation model": (foundation_that_is_none, ["model.foundation: ", "broken.model cannot be read as a MACE"]),
    "unknown calculator": (
        lambda hop: {"calculator": {"name": "tblit"}},
        ["bad.yaml: calculator.name: there is no calculator 'tblit' (did you mean tblite?"],
    ),
    "calculator without its program": (
        lambda hop: {"calculator": {"name": "tblite"}},
        ["calculator tblite: tblite is not installed (pip install tblite)"],
    ),
    "executor that is not there": (
        lambda hop: {"executor": {"kind": "piron"}},
        ["bad.yaml: executor.kind: 'piron' is not known (did you mean `pyiron`?; line 1)"],
    ),
    "queue without its command": (
        lambda hop: {"executor": {"kind": "pyiron", "queue": "lsf", "walltime": "1:00:00"}},
        ["executor.queue: bsub is not on this machine (run al-loop where jobs are submitted, or remove `queue`)"],
    ),
    "queue that cannot be driven": (
        lambda hop: {"executor": {"kind": "pyiron", "queue": "moab", "walltime": "1:00:00"}},
        ["executor.queue: pysqa can submit to moab, but not tell a job's number", "(use the system below it: torque "],
    ),
    "key of a queue without one": (
        lambda hop: {"executor": {"modules": ["vasp"]}},
        ["bad.yaml: executor: `modules` belongs to kind: pyiron (remove it, or set kind: pyiron; line 1)"],
    ),
    "factory that is not there": (
        lambda hop: {"calculator": {"name": "ase", "factory": "not_here:calculator"}},
        ["calculator.factory: cannot import not_here:calculator: ", "(write package.module:function; "],
    ),
    "element the calculator lacks": (
        lambda hop: {
            "paths": [{"band": "iron.extxyz"}],
            "calculator": {"name": "emt"},
        },
        ["path hop: emt does not know Fe (it knows "],
    ),
    "charge": (
        lambda hop: {
            "paths": [{"initial": "initial.extxyz", "final": "final.extxyz", "charge": 1}],
            "calculator": {"name": "emt"},
        },
        ["path hop: emt would ignore the charge of +1 e (set charge: 0"],
    ),
    "no MongoDB there": (
        nobody_listens,
        ["127.0.0.1:", "MongoDB cannot be reached: ", "(is it running, and is store.mongodb_uri right?"],
    ),
    "tolerance of zero": (
        lambda hop: {"stop": {"barrier_tolerance_ev": 0}},
        ["bad.yaml: stop.barrier_tolerance_ev: 0 is refused: must be greater than 0 (eV; "],
    ),
    "negative tolerance": (
        lambda hop: {"stop": {"barrier_tolerance_ev": -0.01}},
        ["bad.yaml: stop.barrier_tolerance_ev: -0.01 is refused: must be greater than 0 (eV; "],
    ),
    "data without forces": (
        data_without_forces,
        ["data.0: frame 0 of energies.extxyz has no energy and forces (give REF_energy and REF_forces)"],
    ),
    "data of another theory": (
        data_of_another_theory,
        ["data.0: frame 0 of vasp.extxyz is of another level of theory (vasp) (give labels of ase with the run's"],
    ),
}
VERBS = {"check": ["check"], "run": ["run", "--no-server"]}


@pytest.fixture
def no_tblite(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed: nothing of that name can be found or imported."""
    monkeypatch.setitem(sys.modules, "tblite", None)


@pytest.fixture
def iron(hop: Any) -> None:
    frames = []
    for k in range(3):
        atoms = read(hop.folder / "initial.extxyz")
        atoms.symbols[:] = "Fe"
        atoms.positions[8, 0] += 0.5 * k
        frames.append(atoms)
    write(hop.folder / "iron.extxyz", frames)


def nothing_was_begun(home: Path) -> bool:
    with closing(open_record_store(None)) as store:
        return store.load_run(NAME) is None and not (home / "calculations" / NAME).exists()


@pytest.mark.usefixtures("no_tblite", "iron")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", BAD)
def test_it_is_one_clear_line(case: str, verb: str, hop: Any, home: Path) -> None:
    change, expected = BAD[case]
    result = al_loop(*VERBS[verb], hop.run_file(NAME, **change(hop)))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert not [part for part in expected if part not in result.stderr], result.stderr
    assert "s3cret" not in result.output
    assert result.stdout == ""
    assert hop.calls(NAME) == 0
    assert nothing_was_begun(home)


def test_it_is_told_before_a_prefect_server_is_started(hop: Any, home: Path) -> None:
    result = al_loop("run", hop.run_file(NAME, **foundation_without_copper(hop)))
    assert result.exit_code == 2
    assert result.stderr.startswith("model.foundation: the foundation model does not know Cu")
    assert result.stderr.count("\n") == 1
    assert not (home / "services.json").exists()
    assert nothing_was_begun(home)


def test_a_real_shell_shows_no_more_than_the_line(hop: Any, home: Path) -> None:
    """No traceback and no warning, where nothing catches them."""
    file = hop.run_file(NAME, **foundation_without_copper(hop))
    command = [sys.executable, "-m", "flows.cli", "check", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=dict(os.environ))
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert line.startswith("model.foundation: the foundation model does not know Cu")
