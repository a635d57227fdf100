"""Outcomes on disk, and who finds them: after a kill, in another run, on a disk that is full, among thousands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase.calculators.emt import EMT

from alcore.types import LabelRequest
from calculators import outcomes
from calculators.attempts import prepare_local_worker
from calculators.base import ResolvedCalculator
from calculators.executors.outcome import JobOutcome
from calculators.executors.worker import ENDING
from calculators.labeling import LocalLabeler
from calculators.measure import Measurement
from calculators.registry import resolve

MakeRequests = Callable[..., list[LabelRequest]]
HERE = Path(__file__).parent
LABELS = """
import json, sys, time
from pathlib import Path
from ase.build import bulk
from alcore.identity import label_key
from alcore.types import Candidate, LabelRequest, Structure
from calculators.labeling import LocalLabeler
from calculators.registry import resolve
here, folder, function, settings = sys.argv[1:]
resolved = resolve("ase", {"factory": f"counting:{function}", "settings": json.loads(settings), "path": here})
atoms = bulk("Cu", cubic=True)
atoms.numbers[0] = 13
atoms.rattle(0.05, seed=0)
structure = Structure.from_atoms(atoms)
request = LabelRequest(
    key=label_key(structure, resolved.fingerprint),
    candidate=Candidate(path="hop", kind="data", image=0, structure=structure),
    generation=0,
)
LocalLabeler(resolved, Path(folder), 1, timeout_s=300.0).label([request], lambda label: time.sleep(300))
"""
"""Another process that labels ``make_requests(resolved)``; its store hangs."""


def counting(tmp_path: Path, function: str = "counted", **settings: Any) -> ResolvedCalculator:
    settings = {"file": str(tmp_path / "counts")} | settings
    return resolve("ase", {"factory": f"counting:{function}", "settings": settings, "path": str(HERE / "executors")})


def n_begun(tmp_path: Path) -> int:
    counts = tmp_path / "counts"
    return len(counts.read_text().splitlines()) if counts.exists() else 0


def wait_until(happened: Callable[[], Any], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kept(folder: Path) -> list[Path]:
    return list(folder.glob(f"*/{outcomes.OUTCOME}"))


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) - before == set()


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """``other_process(function, **settings)``: labels with ``counting.py``'s ``function`` in ``tmp_path/all/first``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(function: str = "counted", **settings: Any) -> subprocess.Popen[bytes]:
        told = json.dumps({"file": str(tmp_path / "counts")} | settings)
        place = str(tmp_path / "all" / "first")
        command = [sys.executable, "-c", LABELS, str(HERE / "executors"), place, function, told]
        started.append(subprocess.Popen(command, cwd=HERE.parents[1]))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def computed(
    tmp_path: Path, other_process: Callable[..., subprocess.Popen[bytes]], freeze: Callable[[int], None]
) -> Callable[..., None]:
    """``computed(function)``: another process labelled in ``tmp_path/all/first``, and was killed before it heard of
    the answer: it was stopped before the calculation ended."""

    def kill(function: str = "counted") -> None:
        hold = tmp_path / "hold"
        hold.touch()
        process = other_process(function, hold=str(hold))
        wait_until(lambda: n_begun(tmp_path))
        freeze(process.pid)
        hold.unlink()
        wait_until(lambda: kept(tmp_path / "all" / "first"))
        process.kill()
        process.wait()

    return kill


@pytest.mark.parametrize("run", ["first", "second"])
def test_what_a_killed_process_had_computed_is_taken(
    run: str, tmp_path: Path, computed: Callable[..., None], make_requests: MakeRequests
) -> None:
    computed()
    resolved, said = counting(tmp_path, hold=str(tmp_path / "hold")), list[str]()
    requests = make_requests(resolved)
    with LocalLabeler(resolved, tmp_path / "all" / run, beside=tmp_path / "all", log=said.append) as labeler:
        (label,) = labeler.label(requests)
        labeler.tidy(label)
    atoms = requests[0].candidate.structure.to_atoms()
    atoms.calc = EMT()
    assert label.ok
    assert label.energy_ev == atoms.get_potential_energy(force_consistent=True)
    np.testing.assert_array_equal(label.forces, atoms.get_forces())
    assert n_begun(tmp_path) == 1
    whose = "this run" if run == "first" else "run first"
    assert said == [f"label {label.key[:6]} was already computed for {whose}: taken from its folder"]
    assert Path(label.folder).exists() == (run == "second")  # what another run left is not ours to remove


def test_a_run_that_stands_alone_looks_at_no_other(
    tmp_path: Path, computed: Callable[..., None], make_requests: MakeRequests
) -> None:
    computed()
    resolved = counting(tmp_path, hold=str(tmp_path / "hold"))
    with LocalLabeler(resolved, tmp_path / "all" / "second") as labeler:
        assert labeler.label(make_requests(resolved))[0].ok
    assert n_begun(tmp_path) == 2


def test_a_failure_is_taken_once_and_only_by_its_own_run(
    tmp_path: Path, computed: Callable[..., None], make_requests: MakeRequests
) -> None:
    """How a calculation fails depends on what the run grants it."""
    computed("unconverged")
    resolved = counting(tmp_path, "unconverged", hold=str(tmp_path / "hold"))
    counts = []
    for run in ("second", "first", "first"):
        with LocalLabeler(resolved, tmp_path / "all" / run, beside=tmp_path / "all") as labeler:
            (label,) = labeler.label(make_requests(resolved))
        assert label.status == "unconverged"
        counts.append(n_begun(tmp_path))
    assert counts == [2, 2, 3]


def test_a_rejected_answer_of_another_run_is_not_taken_again(
    tmp_path: Path, computed: Callable[..., None], make_requests: MakeRequests
) -> None:
    computed()
    resolved = counting(tmp_path, hold=str(tmp_path / "hold"))
    requests, counts = make_requests(resolved), []
    for run in ("second", "third"):
        folder = tmp_path / "all" / run
        with LocalLabeler(resolved, folder, max_force_ev_per_ang=1e-6, beside=tmp_path / "all") as labeler:
            assert [labeler.label(requests)[0].status for _ in range(2)] == ["rejected", "rejected"]
        counts.append(n_begun(tmp_path))
    assert counts == [2, 4]


@pytest.mark.parametrize("harm", ["half", "flipped", "empty", "foreign", "another key", "another fingerprint", "odd"])
def test_what_is_no_outcome_of_this_label_is_computed_again(
    harm: str, tmp_path: Path, make_requests: MakeRequests
) -> None:
    resolved = counting(tmp_path)
    (request,) = make_requests(resolved)
    folder = tmp_path / "all" / "first" / outcomes.folder_name(request.key)
    folder.mkdir(parents=True)
    of = {"key": request.key, "fingerprint": resolved.fingerprint} | {harm.removeprefix("another "): "x" * 64}
    good = Measurement(status="ok", energy_ev=1.0, forces=np.zeros((4, 3)))
    outcome = JobOutcome(kind="done", value=good)
    outcomes.write_outcome(folder, outcome, **{name: of[name] for name in ("key", "fingerprint")})
    file = folder / outcomes.OUTCOME
    content = bytearray(file.read_bytes())
    if harm == "half":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "flipped":
        content[content.index(b"energy_ev")] ^= 1
        file.write_bytes(content)
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "foreign":
        np.savez(file, something=np.arange(3))
    elif harm == "odd":
        answer = {"kind": "done", **of, "value": {"unheard": "of"}}
        np.savez(file, json=np.frombuffer(json.dumps(answer).encode(), dtype=np.uint8))
    with LocalLabeler(resolved, tmp_path / "all" / "first", beside=tmp_path / "all") as labeler:
        (label,) = labeler.label([request])
    assert (label.ok, n_begun(tmp_path)) == (True, 1)
    assert label.energy_ev != 1.0


def test_a_crash_is_not_kept(tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a machine goes down its programs die in any order; such a death must not become a label."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    request = make_requests(resolve("emt"))[0]
    monkeypatch.chdir(tmp_path / "good")
    prepare_local_worker((resolve("emt"), 0))(request)
    assert outcomes.read_outcome(Path.cwd(), key=request.key, fingerprint=resolve("emt").fingerprint) is not None
    monkeypatch.chdir(tmp_path / "bad")
    missing = counting(tmp_path, "counted", file=str(tmp_path / "nowhere" / "counts"))
    assert prepare_local_worker((missing, 0))(request).status == "crashed"
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_full_disk_costs_the_file_and_not_the_label(tmp_path: Path, make_requests: MakeRequests) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    said: list[str] = []
    resolved = counting(tmp_path, "fills")
    try:
        with LocalLabeler(resolved, folder, log=said.append) as labeler:
            (label,) = labeler.label(make_requests(resolved))
        assert label.ok, label.reason
        assert said == [f"label {label.key[:6]} is computed, but cannot be kept in {label.folder} (is the disk full?)"]
        assert kept(folder) == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_among_thousands_of_folders_only_those_of_the_label_are_opened(
    tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for run in ("first", "second", "third"):
        for _ in range(1000):
            (tmp_path / run / rng.bytes(8).hex()).mkdir(parents=True)
            (tmp_path / run / "jobs" / f"label_{rng.bytes(12).hex()}_hdf5").mkdir(parents=True)
    resolved = counting(tmp_path)
    (request,) = make_requests(resolved)
    folders = [tmp_path / "third" / f"{request.key[:16]}{more}" for more in ("", "-2")]
    for folder in folders:
        folder.mkdir()
    opened: list[Path] = []
    read = outcomes.read_outcome

    def count(folder: Path, **wanted: str) -> JobOutcome | None:
        opened.append(folder)
        return read(folder, **wanted)

    monkeypatch.setattr(outcomes, "read_outcome", count)
    begun = time.perf_counter()
    found = list(outcomes.places(request.key, tmp_path / "first", tmp_path))
    print(f"\nlooking among 6000 folders of 3 runs: {1e3 * (time.perf_counter() - begun):.1f} ms")
    assert sorted(place.folder for place in found) == folders
    with LocalLabeler(resolved, tmp_path / "first", beside=tmp_path) as labeler:
        assert labeler.label([request])[0].ok
    assert sorted(opened) == folders


def test_what_ends_while_all_is_being_ended_is_no_outcome(
    tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs may have been killed under it."""
    work = prepare_local_worker((resolve("emt"), 0))
    monkeypatch.chdir(tmp_path)
    ENDING.set()
    try:
        work(make_requests(resolve("emt"))[0])
    finally:
        ENDING.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_outlived_a_killed_worker_is_ended_before_its_label_is_computed_again(
    tmp_path: Path,
    other_process: Callable[..., subprocess.Popen[bytes]],
    make_requests: MakeRequests,
    freeze: Callable[[int], None],
) -> None:
    pids = tmp_path / "pids"
    process = other_process("depends", pid_file=str(pids))
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    worker, program = map(int, pids.read_text().split())
    freeze(process.pid)
    os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
    assert not gone(program)
    resolved = counting(tmp_path, "depends", pid_file=str(pids))
    with LocalLabeler(resolved, tmp_path / "all" / "second", timeout_s=1.0, beside=tmp_path / "all") as labeler:
        assert labeler.label(make_requests(resolved))[0].status == "timeout"
    wait_until(lambda: gone(program))


def test_a_living_worker_is_left_alone(
    tmp_path: Path, other_process: Callable[..., subprocess.Popen[bytes]], make_requests: MakeRequests
) -> None:
    """Two who hold no claim compute the same label; none ends the other's."""
    pids = tmp_path / "pids"
    process = other_process("depends", pid_file=str(pids))
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    first = [int(pid) for pid in pids.read_text().split()]
    resolved = counting(tmp_path, "depends", pid_file=str(pids))
    with LocalLabeler(resolved, tmp_path / "all" / "second", timeout_s=1.0, beside=tmp_path / "all") as labeler:
        assert labeler.label(make_requests(resolved))[0].status == "timeout"
    assert [gone(pid) for pid in first] == [False, False]
    process.kill()
    wait_until(lambda: all(gone(pid) for pid in first))


def test_an_answer_that_was_on_disk_when_its_worker_died_counts(
    tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = counting(tmp_path)
    with LocalLabeler(resolved, tmp_path / "run") as labeler:
        run = labeler._pool.run

        def die_at_the_end(*arguments: Any) -> JobOutcome:
            assert run(*arguments).kind == "done"
            return JobOutcome(kind="died", text="killed by signal 9")

        monkeypatch.setattr(labeler._pool, "run", die_at_the_end)
        assert labeler.label(make_requests(resolved))[0].ok


def test_what_was_computed_while_the_labeler_was_closed_is_there_for_the_next(
    tmp_path: Path, make_requests: MakeRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = counting(tmp_path)
    labeler = LocalLabeler(resolved, tmp_path / "run")
    run = labeler._pool.run

    def interrupt(*arguments: Any) -> JobOutcome:
        run(*arguments)
        labeler.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(labeler._pool, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        labeler.label(make_requests(resolved))
    with LocalLabeler(resolved, tmp_path / "run") as labeler:
        assert labeler.label(make_requests(resolved))[0].ok
    assert n_begun(tmp_path) == 1
