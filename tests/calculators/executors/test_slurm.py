"""Labels through a real SLURM, started here."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.calculators.emt import EMT

from alcore.errors import CalculatorError
from alcore.types import Label, LabelRequest
from calculators.executors.queues import QueueSpec, Resources
from calculators.pyiron_labeling import PyironLabeler
from calculators.registry import resolve

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm")]

MakeRequests = Callable[..., list[LabelRequest]]
SPEC = QueueSpec(system="slurm", walltime_s=600, partition="debug", poll_s=0.5, grace_s=3)


def listed() -> list[str]:
    """Numbers of the jobs that wait or run."""
    done = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_labels_are_the_calculator_s_numbers(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    requests = make_requests(resolved, 4)
    take = Resources(cores=2, threads=2, memory_gb=4, prologue=('echo "{{ $SLURM_CPUS_PER_TASK }}"',))
    start = time.perf_counter()
    with PyironLabeler(resolved, tmp_path, 3, queue=SPEC, resources=take) as labeler:
        labels = labeler.label(requests)
    print(f"\na label through SLURM: {(time.perf_counter() - start) / 4:.2f} s, 4 of them, 2 at once")
    for request, label in zip(requests, labels, strict=True):
        atoms = request.candidate.structure.to_atoms()
        atoms.calc = EMT()
        assert label.ok
        assert label.energy_ev == atoms.get_potential_energy(force_consistent=True)
        np.testing.assert_array_equal(label.forces, atoms.get_forces())
        assert "{{ 2 }}" in (Path(label.folder) / "queue.out").read_text()
    assert listed() == []


def test_a_killed_process_s_job_is_found_again_and_runs_once(waiting: Callable[[str], Any]) -> None:
    other = waiting("slurm")
    other.start_and_kill(lambda: other.n_begun() == 1)
    assert len(listed()) == 1
    with other.labeler() as labeler:
        answer: list[Label] = []
        thread = threading.Thread(target=lambda: answer.extend(labeler.label([other.request()])))
        thread.start()
        time.sleep(2.0)
        assert (len(listed()), answer) == (1, [])
        other.hold.unlink()
        thread.join(60)
    assert [label.status for label in answer] == ["ok"]
    assert other.n_begun() == 1


def test_a_job_that_ended_meanwhile_is_collected(
    waiting: Callable[[str], Any], wait_until: Callable[..., None]
) -> None:
    other = waiting("slurm")
    other.start_and_kill(lambda: other.n_begun() == 1)
    other.hold.unlink()
    wait_until(lambda: listed() == [])
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 1


def test_close_leaves_the_job_and_cancel_ends_it(
    waiting: Callable[[str], Any], wait_until: Callable[..., None]
) -> None:
    other = waiting("slurm")
    other.start_and_kill(lambda: other.n_begun() == 1)
    labeler = other.labeler()
    labeler.close()
    assert len(listed()) == 1
    assert other.labeler().cancel() == 1
    wait_until(lambda: listed() == [])
    other.hold.unlink()
    with other.labeler() as labeler:
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 2


def test_scancel_is_a_crash_that_says_so_and_the_next_request_is_computed(
    waiting: Callable[[str], Any], wait_until: Callable[..., None]
) -> None:
    other = waiting("slurm")
    other.hold.touch()
    with other.labeler() as labeler:
        answer: list[Label] = []
        thread = threading.Thread(target=lambda: answer.extend(labeler.label([other.request()])))
        thread.start()
        wait_until(lambda: other.n_begun() == 1)
        subprocess.run(["scancel", *listed()], check=True)
        thread.join(60)
        (label,) = answer
        assert label.status == "crashed"
        assert "left the queue without an outcome" in label.reason
        assert "CANCELLED" in label.reason
        other.hold.unlink()
        assert labeler.label([other.request()])[0].ok
    assert other.n_begun() == 2


def test_a_job_that_reaches_its_walltime_is_a_timeout(tmp_path: Path, make_requests: MakeRequests) -> None:
    """The job itself would end earlier; here it does not even begin, because its prologue hangs."""
    resolved = resolve("emt")
    spec = QueueSpec(system="slurm", walltime_s=1, poll_s=0.5, grace_s=3)
    with PyironLabeler(resolved, tmp_path, queue=spec, resources=Resources(prologue=("sleep 600",))) as labeler:
        (label,) = labeler.label(make_requests(resolved))
    assert label.status == "timeout"
    assert "reached its walltime of 1 s" in label.reason
    assert "DUE TO TIME LIMIT" in (Path(label.folder) / "error.txt").read_text()


def test_a_refusal_is_told_in_sbatch_s_own_words(tmp_path: Path, make_requests: MakeRequests) -> None:
    resolved = resolve("emt")
    spec = QueueSpec(system="slurm", walltime_s=600, partition="nowhere")
    with (
        PyironLabeler(resolved, tmp_path, queue=spec) as labeler,
        pytest.raises(CalculatorError, match="invalid partition specified: nowhere") as caught,
    ):
        labeler.label(make_requests(resolved))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "jobs").glob("*_hdf5")) == []
