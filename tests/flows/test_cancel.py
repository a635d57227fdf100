"""``al-loop cancel`` on jobs in SLURM's stand-in, which a stopped run left there."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ase.build import bulk
from typer.testing import CliRunner, Result

from alcore.errors import AlLoopError
from alcore.types import Candidate, LabelRequest, RunRecord, Structure
from flows import wiring
from flows.cli import app
from flows.settings import RunSettings
from storage.memory import MemoryStore

HERE = Path(__file__).parents[1] / "calculators" / "executors"
QUEUE = {"kind": "pyiron", "queue": "slurm", "walltime": "0:10:00"}


def cancel(name: str) -> Result:
    return CliRunner().invoke(app, ["cancel", name], env={"COLUMNS": "160"})


def record(store: MemoryStore, name: str, executor: dict[str, Any], counting: dict[str, str]) -> RunSettings:
    """A run of that name that was begun."""
    calculator = {"name": "ase", "factory": "counting:counted", "settings": counting, "path": str(HERE)}
    paths = [{"name": "path", "band": "band.xyz"}]
    values = {"name": name, "paths": paths, "calculator": calculator, "executor": executor}
    settings = RunSettings.model_validate(values)
    plain = settings.model_dump(mode="json")
    store.save_run(RunRecord(name=name, settings=plain, settings_sha256="s", started="2026-01-02T03:04"))
    return settings


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MemoryStore:
    store = MemoryStore()
    monkeypatch.setitem(sys.modules, "flows.session", SimpleNamespace(open_record_store=lambda _: store))
    monkeypatch.setenv("AL_LOOP_HOME", str(tmp_path / "home"))
    return store


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the stand-in keeps its state."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    for name in ("sbatch", "squeue", "scancel"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE / "fake_slurm.py"} {name} {folder} "$@"\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Path]:
    """While it is there, calculations wait."""
    file = tmp_path / "hold"
    file.touch()
    yield file
    file.unlink()


def test_a_stopped_run_s_jobs_are_ended(store: MemoryStore, slurm: Path, hold: Path, tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    settings = record(store, "hop", QUEUE, {"file": str(counts), "hold": str(hold)})
    labeler = wiring.make_labeler(settings, wiring.resolve_calculator(settings, []), store, tmp_path / "home")
    candidate = Candidate(path="hop", kind="data", image=0, structure=Structure.from_atoms(bulk("Cu", cubic=True)))

    def work() -> None:
        with suppress(AlLoopError):
            labeler.label([LabelRequest(key="ab" * 32, candidate=candidate, generation=0)])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not counts.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        active = cancel("hop")
    finally:
        labeler.close()
        thread.join(30)
    assert active.exit_code == 2
    assert "another process labels there (wait for it, or stop it (Ctrl-C) first)" in active.stderr
    assert not (slurm / "scancel.calls").exists()
    assert cancel("hop").stdout == "ended 1 job of 'hop'\n"
    assert (slurm / "scancel.calls").read_text().split() == ["100"]
    assert cancel("hop").stdout == "ended 0 jobs of 'hop'\n"


def test_where_nothing_is_queued_it_says_so(store: MemoryStore, slurm: Path, tmp_path: Path) -> None:
    record(store, "local", {}, {})
    record(store, "elsewhere", QUEUE, {})
    assert cancel("local").stdout.startswith("nothing to cancel: the labels of 'local' are computed by the run itself")
    assert cancel("elsewhere").stdout.startswith("nothing to cancel: 'elsewhere' has started no job")
    assert not (tmp_path / "home" / "calculations").exists()
