from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from alcore.types import LabelRequest, Structure
from calculators import job
from calculators.base import Inspection, ResolvedCalculator
from calculators.executors.outcome import JobOutcome
from calculators.executors.processes import MARK, family
from calculators.measure import Measurement
from calculators.outcomes import OUTCOME, RefusedError, write_outcome
from calculators.registry import resolve

Misbehaving = Callable[..., ResolvedCalculator]
MakeRequests = Callable[..., list[LabelRequest]]


def write(folder: Path, resolved: ResolvedCalculator, structure: Structure, **limits: Any) -> str:
    """A job in ``folder``; its token."""
    options = {"key": "k", "retries": 2, "timeout_s": 60.0} | limits
    text = job.describe_job(resolved, structure, **options)
    job.write_input({"job": text}, str(folder))
    return str(json.loads(text)["token"])


def run(folder: Path) -> int:
    """As a queue would: a shell, another folder, an empty environment."""
    return subprocess.run(["/bin/sh", "-c", job.command(folder)], cwd="/", env={}, timeout=120, check=False).returncode


def wait_until(happened: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


@pytest.fixture
def structure() -> Structure:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    return Structure.from_atoms(atoms, magnetic_moments=[1.0, 0.1, 1 / 3, -2e-300])


@pytest.fixture(autouse=True)
def nothing_left_running(tmp_path: Path) -> Iterator[None]:
    yield
    described = job.read_job(tmp_path)
    assert described is None or family(described["token"]) == set()


def test_a_job_s_numbers_are_the_calculator_s(tmp_path: Path, structure: Structure) -> None:
    write(tmp_path, resolve("emt"), structure)
    assert (job.has_begun(tmp_path), job.read_outcome(tmp_path)) == (False, None)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.kind == "done"
    atoms = structure.to_atoms()
    atoms.calc = EMT()
    assert outcome.value.status == "ok"
    assert outcome.value.energy_ev == atoms.get_potential_energy(force_consistent=True)
    np.testing.assert_array_equal(outcome.value.forces, atoms.get_forces())
    assert outcome.value.attempts[0]["name"] == "as set"
    kept = job.collect_output(str(tmp_path))
    assert (kept["status"], kept["energy_ev"]) == ("ok", outcome.value.energy_ev)


def test_the_structure_arrives_exactly(tmp_path: Path, structure: Structure) -> None:
    odd = replace(structure, positions=structure.positions + np.pi * 1e-13, charge=1 / 3)
    write(tmp_path, resolve("emt"), odd)
    described = job.read_job(tmp_path)
    assert described is not None
    arrived = Structure(**described["structure"])
    for field in fields(Structure):
        np.testing.assert_array_equal(getattr(arrived, field.name), getattr(odd, field.name))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
numbers = arrays(np.float64, array_shapes(max_dims=2, max_side=4))


@given(
    forces=st.none() | numbers, stress=st.none() | numbers, energy=st.floats(), notes=st.dictionaries(st.text(), plain)
)
def test_an_outcome_survives_the_disk(
    tmp_path_factory: pytest.TempPathFactory, forces: Any, stress: Any, energy: float, notes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("outcome")
    (folder / job.JOB).write_text('{"token": "t"}')
    measurement = Measurement(
        status="ok",
        energy_ev=energy,
        forces=forces,
        stress=stress,
        geometries=((np.arange(3), np.eye(3), np.zeros((3, 3))),),
        inspection=Inspection(electronic_steps=7, converged=False, notes=notes),
        attempts=({"name": "as set", "seconds": 0.1},),
        settings=notes,
    )
    outcome = JobOutcome(kind="done", value=measurement, seconds=1 / 3)
    write_outcome(folder, outcome, token="t")
    back = job.read_outcome(folder)
    assert back is not None
    assert (back.kind, back.seconds) == ("done", 1 / 3)
    for field in fields(Measurement):
        now, then = getattr(back.value, field.name), getattr(measurement, field.name)
        if field.name == "geometries":
            for one, other in zip(now[0], then[0], strict=True):
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
        elif isinstance(then, np.ndarray):
            np.testing.assert_array_equal(now, then)
        elif field.name == "energy_ev":
            np.testing.assert_equal(now, then)
        else:
            assert now == then


@pytest.mark.parametrize("broken", ["another token", "half", "empty", "no job"])
def test_what_is_not_this_job_s_outcome_is_none(broken: str, tmp_path: Path, structure: Structure) -> None:
    token = write(tmp_path, resolve("emt"), structure)
    done = JobOutcome(kind="done", value=Measurement(status="ok", energy_ev=1.0))
    write_outcome(tmp_path, done, token="another" if broken == "another token" else token)
    file = tmp_path / OUTCOME
    if broken == "half":
        file.write_bytes(file.read_bytes()[:-40])
    elif broken == "empty":
        file.write_bytes(b"")
    elif broken == "no job":
        (tmp_path / job.JOB).unlink()
    assert job.read_outcome(tmp_path) is None


def test_a_folder_begins_once(tmp_path: Path, structure: Structure) -> None:
    write(tmp_path, resolve("emt"), structure)
    assert run(tmp_path) == 0
    before = (tmp_path / OUTCOME).stat().st_mtime_ns
    assert run(tmp_path) == job.BEGUN_BEFORE
    assert (tmp_path / OUTCOME).stat().st_mtime_ns == before
    assert run(tmp_path / "nowhere") != 0


@pytest.mark.parametrize("child", ["plain", "session", "bare"])
def test_a_late_job_ends_with_its_whole_tree(
    child: str, tmp_path: Path, misbehaving: Misbehaving, structure: Structure
) -> None:
    resolved = misbehaving("hangs", pid_file=str(tmp_path / "pids"), child=child)
    write(tmp_path, resolved, structure, timeout_s=1.0)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.kind == "timeout"
    assert outcome.seconds >= 1.0
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: not psutil.pid_exists(int(pid)), 10)  # type: ignore[misc]


def test_a_hang_in_c_is_ended_too(tmp_path: Path, misbehaving: Misbehaving, structure: Structure) -> None:
    write(tmp_path, misbehaving("hangs_in_c"), structure, timeout_s=0.5)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.kind == "timeout"


def test_a_death_is_told_with_its_last_words(tmp_path: Path, misbehaving: Misbehaving, structure: Structure) -> None:
    write(tmp_path, misbehaving("dies", pid_file=str(tmp_path / "pids")), structure)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert (outcome.kind, outcome.text) == ("died", "exit code 3")
    assert "the licence server bit me" in outcome.last_words


def test_too_much_memory_is_ended(tmp_path: Path, misbehaving: Misbehaving, structure: Structure) -> None:
    write(tmp_path, misbehaving("slow", seconds=100), structure, memory_gb=0.01)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.kind == "memory"
    assert "more than executor.memory_gb 0.01" in outcome.text


def test_a_failure_is_a_status_and_threads_are_set(
    tmp_path: Path, misbehaving: Misbehaving, structure: Structure
) -> None:
    write(tmp_path, misbehaving("environment"), structure, threads=3)
    assert run(tmp_path) == 0
    outcome = job.read_outcome(tmp_path)
    assert outcome is not None
    assert outcome.value.status == "crashed"
    assert f"['3', '3'] in {tmp_path}" in outcome.value.reason


def test_a_calculator_that_changed_is_refused(tmp_path: Path, structure: Structure) -> None:
    source = tmp_path / "changing_inside_a_job.py"
    source.write_text("from ase.calculators.emt import EMT\ndef make(): return EMT()\n")
    resolved = resolve("ase", {"factory": "changing_inside_a_job:make"}, base=tmp_path)
    source.write_text(source.read_text() + "# other numbers now\n")
    write(tmp_path, resolved, structure)
    assert run(tmp_path) == 0
    with pytest.raises(RefusedError, match="has changed since the run began: version"):
        job.read_outcome(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_ended_from_outside_leaves_nothing_that_looks_like_an_outcome(
    number: signal.Signals, tmp_path: Path, misbehaving: Misbehaving, structure: Structure
) -> None:
    token = write(tmp_path, misbehaving("hangs", pid_file=str(tmp_path / "pids")), structure)
    arguments = [sys.executable, "-m", "calculators.job", str(tmp_path)]
    environment = os.environ | {MARK: token}
    process = subprocess.Popen(arguments, cwd=Path(job.__file__).parents[1], env=environment)
    wait_until(lambda: (tmp_path / "pids").exists() and bool((tmp_path / "pids").read_text()))
    process.send_signal(number)
    assert process.wait(30) != 0
    wait_until(lambda: family(token) == set())
    assert job.has_begun(tmp_path)
    assert job.read_outcome(tmp_path) is None


def test_a_reader_never_sees_half_an_outcome(tmp_path: Path) -> None:
    (tmp_path / job.JOB).write_text('{"token": "t"}')
    big = JobOutcome(kind="done", value=Measurement(status="ok", forces=np.ones((20_000, 3))))
    write_outcome(tmp_path, big, token="t")
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            write_outcome(tmp_path, big, token="t")

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        for _ in range(50):
            outcome = job.read_outcome(tmp_path)
            assert outcome is not None
            assert outcome.value.forces.sum() == 60_000
    finally:
        stop.set()
        writer.join()
