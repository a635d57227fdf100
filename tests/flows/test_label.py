"""``al-loop label``: a file in, a labelled file out, through the store, the executors and the checks of the loop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from typer.testing import CliRunner, Result

from alcore.dataset import read_labels
from alcore.identity import label_key
from alcore.types import Structure
from calculators.registry import resolve
from flows.cli import app
from flows.session import open_record_store

ROOT = Path(__file__).resolve().parents[2]
MOODY = '''
import os, time
from pathlib import Path
from ase.calculators.emt import EMT

class Moody(EMT):
    """EMT that fails, lies, or waits as long as a file says, by where the first atom is; it counts its calls."""
    def __init__(self, folder):
        super().__init__()
        self.folder = Path(folder)
    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        with (self.folder / "calls").open("a") as calls:
            calls.write(".")
        mood = round(float(atoms.positions[0, 0]), 3)
        if mood == 1.0:
            raise RuntimeError("no licence")
        while mood == 2.0 and (self.folder / "wait").exists():
            time.sleep(0.02)
        super().calculate(atoms, properties, system_changes)
        if mood == 3.0:
            self.results["energy"] = self.results["free_energy"] = self.results["energy"] + 1000.0

def calculator(folder):
    return Moody(folder)
'''


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moody")
    (folder / "moody_emt.py").write_text(MOODY)
    return folder


@pytest.fixture
def here(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def frames(n: int, seed: int = 0) -> list[Atoms]:
    found = []
    for k in range(n):
        found.append(bulk("Cu", cubic=True))
        found[-1].rattle(0.05, seed=seed + k)
    return found


def moved(mood: float) -> Atoms:
    """Copper, put where the calculator is in that mood."""
    atoms = bulk("Cu", cubic=True)
    atoms.positions += mood
    return atoms


def label(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["label", *map(str, arguments)], env={"COLUMNS": "160"})


def moody(here: Path, modules: Path, *arguments: Any) -> list[str]:
    factory = ["--set", "factory=moody_emt:calculator", "--set", f"path={modules}"]
    return ["frames.extxyz", "--calculator", "ase", *factory, "--set", f"settings.folder={here}", *arguments]


def calls(here: Path) -> int:
    return len((here / "calls").read_text()) if (here / "calls").exists() else 0


def test_a_file_is_labelled_and_read_again(here: Path) -> None:
    given = frames(5, seed=100)
    given[2].info["config_type"] = "bulk"
    ase.io.write(here / "frames.extxyz", given)
    result = label("frames.extxyz", "--calculator", "emt", "--workers", 2, "-o", "labels.extxyz")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "5/5 frame " in result.stdout
    assert "(5 ok)" in result.stdout
    written = ase.io.read(here / "labels.extxyz", index=":")
    fingerprint = resolve("emt").fingerprint
    for atoms, asked in zip(written, given, strict=True):
        asked.calc = EMT()
        assert atoms.info["REF_energy"] == pytest.approx(asked.get_potential_energy(), abs=1e-5)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], asked.get_forces(), atol=1e-4)
        np.testing.assert_allclose(np.diag(atoms.info["REF_stress"]), asked.get_stress()[:3], atol=1e-5)
        assert (atoms.info["fingerprint"], atoms.info["calculator"], atoms.info["status"]) == (fingerprint, "emt", "ok")
    assert [atoms.info["config_type"] for atoms in written] == ["label", "label", "bulk", "label", "label"]
    back = read_labels(here / "labels.extxyz", fingerprint=fingerprint, calculator="emt", where="data.0")
    with closing(open_record_store(None)) as store:
        stored = store.load_labels([one.key for one in back])
        assert store.held_leases("") == {}
    assert [one.status for one in stored.values()] == ["ok"] * 5
    assert not list((Path(os.environ["AL_LOOP_HOME"]) / "calculations" / f"label-emt-{fingerprint[:12]}").iterdir())


def test_what_the_store_has_is_not_computed_again(here: Path, modules: Path) -> None:
    given = frames(3, seed=200)
    ase.io.write(here / "frames.extxyz", given[:2])
    assert label(*moody(here, modules)).exit_code == 0
    assert calls(here) == 2
    ase.io.write(here / "frames.extxyz", [*given, given[2], given[0]])  # two known, one new, and two of them twice
    result = label(*moody(here, modules))
    assert (result.exit_code, calls(here)) == (0, 3)
    assert "1/1 frames 2, 3: ok (1 ok)" in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["ok", "5"] in rows
    assert ["computed", "now", "1"] in rows
    assert ["known", "already", "2"] in rows
    written = ase.io.read(here / "frames-labelled.extxyz", index=":")
    assert [atoms.info["key"] for atoms in written] == [written[k].info["key"] for k in (0, 1, 2, 2, 0)]


def test_failures_are_told_with_reason_and_folder_and_never_written(here: Path, modules: Path) -> None:
    ase.io.write(here / "frames.extxyz", [*frames(2, seed=300), moved(1.0)])
    result = label(*moody(here, modules, "--workers", 2))
    assert result.exit_code == 1
    (told,) = [line for line in result.stdout.splitlines() if line.startswith("frame 2: ")]
    assert told.startswith("frame 2: crashed: RuntimeError: no licence, files in ")
    assert "no licence" in (Path(told.split("files in ")[1]) / "error.txt").read_text()
    assert len(ase.io.read(here / "frames-labelled.extxyz", index=":")) == 2
    before = calls(here)
    assert label(*moody(here, modules)).exit_code == 1
    assert calls(here) == before + 1  # what failed is tried again, nothing else


def test_a_label_that_all_others_speak_against_is_not_written(here: Path, modules: Path) -> None:
    ase.io.write(here / "frames.extxyz", [*frames(3, seed=400), moved(3.0)])
    result = label(*moody(here, modules))
    assert result.exit_code == 1
    assert "frame 3: rejected: " in result.stdout
    assert len(ase.io.read(here / "frames-labelled.extxyz", index=":")) == 3


def test_every_structure_is_checked_before_anything_is_computed(here: Path) -> None:
    wrong = frames(5, seed=500)
    wrong[1].symbols[0] = "Fe"
    wrong[2].info["charge"] = 1
    wrong[3].info["charge"] = "plus"
    ase.io.write(here / "frames.extxyz", wrong)
    result = label("frames.extxyz", "--calculator", "emt")
    assert (result.exit_code, result.stdout) == (2, "")
    expected = [
        "frames.extxyz: frame 1: emt does not know Fe (it knows ",
        "frames.extxyz: frame 2: emt would ignore the charge of +1 e (set charge: 0",
        "frames.extxyz: frame 3: the charge 'plus' is no number (give it in e)",
    ]
    for line, start in zip(result.stderr.splitlines(), expected, strict=True):
        assert line.startswith(start)
    keys = [label_key(Structure.from_atoms(wrong[k]), resolve("emt").fingerprint) for k in (0, 4)]
    with closing(open_record_store(None)) as store:
        assert store.load_labels(keys) == {}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["gone.xyz", "--calculator", "emt"], "gone.xyz: no such file (give a file of structures that ASE reads)"),
        (["notes.txt", "--calculator", "emt"], "notes.txt: notes.txt cannot be read: "),
        (["frames.extxyz"], "al-loop label: no calculator is named (--calculator NAME, or --like RUN.yaml)"),
        (["frames.extxyz", "--calculator", "etm"], "there is no calculator 'etm' (did you mean emt?"),
        (["frames.extxyz", "--calculator", "tblite", "--set", "metod=x"], "metod"),
        (["frames.extxyz", "--calculator", "emt", "--set", "x"], "--set: 'x' has not the form key=value"),
        (["frames.extxyz", "--calculator", "emt", "-o", "no/where.extxyz"], "no: no such folder (make it, or give "),
        (["frames.extxyz", "--calculator", "emt", "--workers", "0"], "executor.workers: 0 is refused: must be "),
        (["frames.extxyz", "--calculator", "emt", "--executor", "piron"], "executor.kind: 'piron' is not known (did "),
        (["frames.extxyz", "--calculator", "emt", "--set-executor", "thread=2"], "executor.thread: unknown key (did "),
        (["frames.extxyz", "--calculator", "emt", "--set-executor", "queue=lsf"], "`queue` belongs to kind: pyiron"),
        (["frames.extxyz", "--like", "gone.yaml"], "gone.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str, here: Path) -> None:
    ase.io.write(here / "frames.extxyz", frames(1))
    (here / "notes.txt").write_text("no structure")
    result = label(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_run_file_gives_calculator_and_executor(here: Path, hop: Any) -> None:
    file = hop.run_file("liked", executor={"workers": 1, "timeout_s": 60, "max_running": 1})
    ase.io.write(here / "frames.extxyz", frames(2, seed=600))
    result = label("frames.extxyz", "--like", file)
    assert (result.exit_code, hop.calls("liked")) == (0, 2)
    (first, _) = ase.io.read(here / "frames-labelled.extxyz", index=":")
    assert first.info["calculator"] == "ase"
    again = label("frames.extxyz", "--like", file, "--calculator", "emt", "-o", "emt.extxyz")
    assert (again.exit_code, hop.calls("liked")) == (0, 2)
    assert ase.io.read(here / "emt.extxyz", index=0).info["calculator"] == "emt"


def test_tblite_with_a_charge(here: Path) -> None:
    """The ionisation of water costs 15 to 25 eV in GFN2-xTB, too."""
    neutral, cation = molecule("H2O"), molecule("H2O")
    cation.info["charge"] = 1
    ase.io.write(here / "frames.extxyz", [neutral, cation])
    result = label("frames.extxyz", "--calculator", "tblite", "--set", "method=GFN2-xTB")
    assert result.exit_code == 0, result.output
    energies = [atoms.info["REF_energy"] for atoms in ase.io.read(here / "frames-labelled.extxyz", index=":")]
    assert 12 < energies[1] - energies[0] < 25


def test_pyiron_labels_the_same(here: Path) -> None:
    pytest.importorskip("pyiron_base", reason="pyiron_base is not installed")
    ase.io.write(here / "frames.extxyz", frames(1, seed=700))
    result = label("frames.extxyz", "--calculator", "emt", "--executor", "pyiron", "--workers", 1)
    assert result.exit_code == 0, result.output
    atoms, asked = ase.io.read(here / "frames-labelled.extxyz", index=0), frames(1, seed=700)[0]
    asked.calc = EMT()
    assert atoms.info["REF_energy"] == pytest.approx(asked.get_potential_energy(), abs=1e-5)


def test_ctrl_c_keeps_what_is_labelled(here: Path, modules: Path) -> None:
    (here / "wait").touch()
    ase.io.write(here / "frames.extxyz", [*frames(2, seed=800), moved(2.0), *frames(2, seed=802)])
    command = [sys.executable, "-m", "flows.cli", "label", *moody(here, modules, "--workers", "1")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while calls(here) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "stopped; what is labelled is kept: the same command goes on from there\n"
    (here / "wait").unlink()
    result = label(*moody(here, modules))
    assert (result.exit_code, calls(here)) == (0, 6)  # two before, the one that was stopped, and three after
    with closing(open_record_store(None)) as store:
        assert store.held_leases("") == {}
